"""The bench: a copy of the sources, to which mutants are applied one at a time to be tried. The originals stay."""

from __future__ import annotations

import compileall
import os
import py_compile
import shutil
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from tools.mutation.mutant import MODEL, ROOT, Mutant
from tools.mutation.trial import Task, Verdict

__all__ = ["RECORDINGS", "Baseline", "Bench", "recordings"]

RECORDINGS: Final = Path("tests") / "data" / "conformance"
COPIED: Final = ("protocol", "services", "workers", "tests")
TESTS: Final = ["tests/kvm", "tests/conform/test_reports.py"]
"""tests/conform/test_recordings.py replays the recordings with the audit: that is done directly."""

TESTS_SECONDS: Final = 180.0
"""What tests may take at most, all together. Each has a limit of its own."""

FIRST_SECONDS: Final = 30.0
"""How much of the recordings is replayed before the tests, in seconds of the baseline; the rest comes after them."""

AUDITED_BYTES: Final = 16_000
"""Recordings up to this size, about 120 operations, are replayed a second time, with the audit."""


class Baseline(msgspec.Struct):
    """What replaying the recordings against the unchanged model takes (seconds), and which lines each executes.

    `lines`: per module and line the recordings; what is executed when the module is imported has "" among them.
    """

    seconds: dict[str, float]
    lines: dict[str, dict[int, list[str]]]

    def relevant(self, mutant: Mutant) -> list[str]:
        """The recordings that execute the mutant's statement, the quickest first; all, if it is executed on import."""
        first, last = mutant.statement
        lines = self.lines.get(mutant.module, {})
        names = {name for number in range(first, last + 1) for name in lines.get(number, [])}
        if "" in names:
            names = set(self.seconds)
        return sorted(names, key=lambda name: self.seconds[name])

    def limit(self, name: str) -> float:
        """Seconds after which a replay counts as endless."""
        return 5 + 5 * self.seconds.get(name, 20)


def recordings(root: Path) -> list[str]:
    """All recordings, as paths below `root`, the smallest first."""
    paths = sorted((root / RECORDINGS).rglob("*.jsonl.gz"), key=lambda path: (path.stat().st_size, path.name))
    return [path.relative_to(root).as_posix() for path in paths]


class Bench:
    """A copy of the sources in `folder`, made on entering; used by one trial at a time."""

    def __init__(self, folder: Path) -> None:
        self.root = folder

    def __enter__(self) -> Self:
        for name in COPIED:
            shutil.copytree(
                ROOT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__", ".hypothesis")
            )
        shutil.copy(ROOT / "pyproject.toml", self.root)
        # By hash: a mutant may have the size and, to the second, the time of the one before it.
        mode = py_compile.PycInvalidationMode.CHECKED_HASH
        for name in COPIED:
            compileall.compile_dir(self.root / name, quiet=2, invalidation_mode=mode)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        shutil.rmtree(self.root)

    def measure(self) -> Baseline:
        """Replay everything against the unchanged model. Raises RuntimeError if something does not pass."""
        task = Task(recordings=[(name, 600) for name in recordings(self.root)], measure=True)
        measured = self._run(task, 3600)
        if measured.outcome != "passed":
            raise RuntimeError(f"the unchanged model does not pass: {measured.killer}: {measured.detail}")
        return Baseline(measured.seconds, measured.lines)

    def try_unchanged(self, baseline: Baseline) -> Verdict:
        """Everything that a mutant would have to survive. Raises RuntimeError if the unchanged model does not."""
        verdict = self._try(sorted(baseline.seconds, key=lambda name: baseline.seconds[name]), baseline)
        if verdict.outcome != "passed":
            raise RuntimeError(f"the unchanged model does not pass: {verdict.killer}: {verdict.detail}")
        return verdict

    def try_mutant(self, mutant: Mutant, baseline: Baseline) -> Verdict:
        """Apply the mutant, try it, and take it back."""
        path = self.root / MODEL / f"{mutant.module}.py"
        original = path.read_text()
        path.write_text(mutant.apply(original))
        try:
            return self._try(baseline.relevant(mutant), baseline)
        finally:
            path.write_text(original)

    def _try(self, names: list[str], baseline: Baseline) -> Verdict:
        small = [n for n in recordings(self.root) if (self.root / n).stat().st_size <= AUDITED_BYTES]
        sums = accumulate(baseline.seconds[name] for name in names)
        first = sum(total <= FIRST_SECONDS for total in sums)
        task = Task(
            recordings=[(name, baseline.limit(name)) for name in names[:first]],
            audited=[(name, baseline.limit(name)) for name in small],
            tests=TESTS,
            later=[(name, baseline.limit(name)) for name in names[first:]],
        )
        limits = sum(limit for _, limit in task.recordings + task.audited + task.later)
        return self._run(task, limits + TESTS_SECONDS)

    def _run(self, task: Task, seconds: float) -> Verdict:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                str(self.root / name) for name in ("protocol", "services", "workers")
            ),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
        }
        # -P: this folder is not to be on the path.
        command = [sys.executable, "-P", str(Path(__file__).with_name("trial.py"))]
        try:
            done = subprocess.run(
                command,
                cwd=self.root,
                env=environment,
                input=msgspec.json.encode(task),
                capture_output=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Verdict("timeout", "tests", f"more than {seconds:.0f} s in all")
        try:
            return msgspec.json.decode(done.stdout, type=Verdict)
        except msgspec.DecodeError:
            error = done.stderr.decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"a trial broke down: {error[-1] if error else done.returncode}") from None
