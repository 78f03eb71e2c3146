"""Every input that campaigns have kept, and every one that once showed a defect, goes through its harness; then some new ones.

Replaying needs no atheris. `make fuzz` is the campaign.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fuzz.mutator import HEAD, mutate
from tests.fuzz.seeds import seeds
from tests.fuzz.targets import TARGETS, committed, runner

ROOT = Path(__file__).parents[2]
SECONDS = 60
AT_ONCE = 2
MOST_BYTES = 2048


@pytest.mark.parametrize("target", TARGETS)
def test_no_input_of_the_corpus_shows_a_defect(target: str) -> None:
    run = runner(target)
    for data in (b"", *seeds(target), *committed(target)):
        run(data)


def test_mutations_of_messages_are_other_messages_within_bounds() -> None:
    original = seeds("decode")[0]
    mutated = {mutate(original, MOST_BYTES, number) for number in range(50)}
    assert len(mutated - {None, original}) > 10
    assert all(
        data is None or (len(data) <= MOST_BYTES and data[:HEAD] == original[:HEAD]) for data in mutated
    )
    assert mutate(b"\0\0\xc1", MOST_BYTES, 1) is None


@pytest.mark.fuzz
@pytest.mark.processes
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris is not there: it has wheels for some versions of Python on Linux x86-64 only",
)
def test_a_minute_of_fuzzing_finds_nothing(tmp_path: Path) -> None:
    def session(target: str) -> subprocess.CompletedProcess[str]:
        corpus = tmp_path / target
        corpus.mkdir()
        for number, data in enumerate([*seeds(target), *committed(target)]):
            (corpus / str(number)).write_bytes(data)
        command = [
            sys.executable, "-m", "tests.fuzz.driver", target, f"-max_total_time={SECONDS // len(TARGETS)}",
            f"-max_len={MOST_BYTES}", "-timeout=20", f"-artifact_prefix={tmp_path}/{target}-", str(corpus),
        ]  # fmt: skip
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for target, done in zip(TARGETS, pool.map(session, TARGETS), strict=True):
            failing = [path.read_bytes().hex() for path in tmp_path.glob(f"{target}-*")]
            assert done.returncode == 0, f"{target}: {failing}\n{done.stderr[-3000:]}"
