"""One session of coverage-guided fuzzing, as a process: `python -m tests.fuzz.driver TARGET [libFuzzer's options] FOLDER`.

Needs atheris (Linux on x86-64, and only some versions of Python). Ends with libFuzzer's status: 0, or 77 and a file if an input fails.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["shadowmmu", "msgspec", "tests.fuzz"]):
    from tests.fuzz.mutator import mutate
    from tests.fuzz.targets import TARGETS, runner


def _custom_mutator(data: bytes, most: int, seed: int) -> bytes:
    """Half of the mutations know MessagePack; the rest are libFuzzer's."""
    made = mutate(data, most, seed) if seed & 1 else None
    return atheris.Mutate(data, most) if made is None else made


OUTCOMES = 1 << 11
"""So many outcomes of inputs are told apart."""
PER_MARKER = 64


def _outcome_markers() -> list[Callable[[int], int]]:
    """Functions with a branch for each outcome: to run into it is coverage, and coverage is what guides the fuzzer.

    Many small ones, since instrumenting a function takes time that goes with the square of its length.
    """
    names: dict[str, Callable[[int], int]] = {}
    markers = []
    for number in range(OUTCOMES // PER_MARKER):
        branches = "".join(f" if n == {value}:\n  return {value}\n" for value in range(PER_MARKER))
        exec(f"def mark{number}(n):\n{branches} return -1\n", names)
        markers.append(atheris.instrument_func(names[f"mark{number}"]))
    return markers


def main() -> None:
    """Fuzzes until libFuzzer's options say that it is enough; does not return."""
    target = sys.argv[1]
    if target not in TARGETS:
        sys.exit(f"no such target: {target}; there are {', '.join(TARGETS)}")
    with atheris.instrument_imports(include=["shadowmmu", "msgspec", "tests.fuzz"]):
        take = runner(target)
    markers = _outcome_markers() if target == "decode" else []

    def run(data: bytes) -> None:
        for outcome in take(data) or ():
            marker, value = divmod(zlib.crc32(outcome.encode()) % OUTCOMES, PER_MARKER)
            markers[marker](value)

    arguments = [str(Path(__file__).name), *sys.argv[2:]]
    if target == "decode":
        atheris.Setup(arguments, run, custom_mutator=_custom_mutator)
    else:
        atheris.Setup(arguments, run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
