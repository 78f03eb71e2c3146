"""One trial of a copy of the sources: do the recordings agree, is the audit clean, do the tests pass?

Run as a script, in the copy, in a process of its own, with the copy's source roots in PYTHONPATH; its standard input
is a `Task`. The last line of its standard output is a `Verdict`. Recordings are replayed in the order given, up to the
first mismatch.

Imports nothing of `tools`: the copy has no tools.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec

MEMORY_LIMIT: Final = 12 << 30
"""Bytes of address space: a mutant that never stops allocating is to fail, not to take the machine with it."""


class Task(msgspec.Struct):
    """What to do: replay `recordings`, each with its time limit (seconds); replay `audited` with the audit after each
    operation; run pytest with `tests`; replay `later`. `measure`: only the first, under coverage.
    """

    recordings: list[tuple[str, float]]
    audited: list[tuple[str, float]] = []
    tests: list[str] = []
    later: list[tuple[str, float]] = []
    measure: bool = False


class Verdict(msgspec.Struct):
    """What came of it. `outcome` is "passed" or what killed it: "recordings", "audit", "tests", "timeout".

    `killer` names the recording or test, `detail` says more. `seconds` per recording, and `lines` (per module and line,
    which recordings) only if measured.
    """

    outcome: str
    killer: str = ""
    detail: str = ""
    seconds: dict[str, float] = {}
    lines: dict[str, dict[int, list[str]]] = {}


class OutOfTimeError(BaseException):
    """Not an Exception: the model's own handlers must not catch it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTimeError in the block when the time is over."""

    def stop(*_: object) -> NoReturn:
        raise OutOfTimeError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def check_origin() -> None:
    """Raises RuntimeError unless the model, and what replays recordings against it, come from the copy."""
    for name in ("shadowmmu.kvm", "shadowmmu.cpu.x86", "shadowmmu.conform", "shadowmmu.protocol.events"):
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin) if spec is not None and spec.origin is not None else None
        if origin is None or not origin.is_relative_to(Path.cwd()):
            raise RuntimeError(f"{name} would come from {origin}, not from the copy {Path.cwd()}")


def replay(
    recordings: list[tuple[str, float]],
    audited: bool = False,
    switch: Callable[[str], object] = lambda _: None,
) -> Verdict:
    """Replays the recordings; `switch` is called with the name of each before it."""
    try:
        conform = importlib.import_module("shadowmmu.conform")
        kvm = importlib.import_module("shadowmmu.kvm")
    except Exception as error:  # noqa: BLE001 - whatever a mutant does
        return Verdict("recordings", "import", f"{type(error).__name__}: {error}")

    def audit(line: dict[str, Any], machine: Any) -> None:
        wrong = kvm.mmu_audit(machine)
        if wrong:
            raise AuditError(f"operation {line['seq']}: {wrong[0]}")

    verdict = Verdict("passed")
    for name, limit in recordings:
        switch(name)
        began = time.monotonic()
        try:
            with time_limit(limit):
                report = conform.run_trace(name, after_operation=audit if audited else None)
        except OutOfTimeError:
            return Verdict("timeout", name, f"more than {limit:.0f} s")
        except Exception as error:  # noqa: BLE001 - an AuditError, or the audit itself failed
            return Verdict("audit", name, f"{type(error).__name__}: {error}")
        if not report.passed:
            return Verdict("recordings", name, conform.render(report).splitlines()[0][:300])
        verdict.seconds[name] = time.monotonic() - began
    return verdict


class AuditError(Exception):
    """The audit found something wrong."""


class FirstFailure:
    """A pytest plugin that remembers the first test that fails."""

    def __init__(self) -> None:
        self.name = ""

    def pytest_configure(self) -> None:
        """Pytest's hook. The same examples each time, none remembered from other mutants; one failure is enough."""
        import hypothesis  # noqa: PLC0415 - pytest wants to import it first

        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile(
            "mutants", database=None, derandomize=True, phases=phases, deadline=None
        )
        hypothesis.settings.load_profile("mutants")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Pytest's hook."""
        if report.failed and not self.name:
            self.name = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        """Pytest's hook: a test file that cannot be imported."""
        if report.failed and not self.name:
            self.name = report.nodeid


def run_tests(paths: list[str]) -> Verdict:
    """Runs pytest up to the first failure."""
    import pytest  # noqa: PLC0415 - after the recordings, which kill most mutants

    first = FirstFailure()
    with contextlib.redirect_stdout(io.StringIO()):
        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--timeout=60", *paths], plugins=[first])
    if status == pytest.ExitCode.OK:
        return Verdict("passed")
    return Verdict("tests", first.name, f"pytest's exit status {int(status)}")


def measure(task: Task) -> Verdict:
    """Replays the recordings under coverage: which of them execute which line."""
    import coverage  # noqa: PLC0415 - only here

    model = Path("services/shadowmmu/kvm").resolve()
    cov = coverage.Coverage(data_file=None, config_file=False, source=[str(model)])
    cov.start()
    verdict = replay(task.recordings, switch=cov.switch_context)
    cov.stop()
    data = cov.get_data()
    for file in data.measured_files():
        verdict.lines[Path(file).stem] = data.contexts_by_lineno(file)
    return verdict


def main() -> int:
    """Does the task; always 0 if there is a verdict."""
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    check_origin()
    # The tests may write what they like: the verdict alone goes to standard output.
    out = os.dup(1)
    os.dup2(2, 1)
    if task.measure:
        verdict = measure(task)
    else:
        steps: tuple[Callable[[], Verdict], ...] = (
            lambda: replay(task.recordings),
            lambda: replay(task.audited, audited=True),
            lambda: run_tests(task.tests),
            lambda: replay(task.later),
        )
        verdicts = (step() for step in steps)
        verdict = next((v for v in verdicts if v.outcome != "passed"), Verdict("passed"))
    os.write(out, msgspec.json.encode(verdict) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
