"""`make experiments`: makes the sweeps of the shipped experiments that are not done, then their pages.

    python -m tools.experiment_pages.campaign [NAME...] [--jobs N] [--runs experiment-runs] [-o docs/experiments]

A sweep that was stopped is gone on with. Exit status: 0, or 1 if a sweep has failed; the others have their pages.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import msgspec

from shadowmmu.experiments.results import HEADER_NAME, SweepFolderError, open_sweep
from shadowmmu.experiments.spec import SHIPPED, find_spec
from tools.experiment_pages.pages import FOLDER, write_pages
from tools.experiment_pages.provenance import PROVENANCE_NAME, provenance_now, read_provenance

__all__ = ["begin", "main", "shipped_names"]


def shipped_names() -> list[str]:
    """The experiments that come with the program."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def _is_done(folder: Path, name: str) -> bool:
    """Whether the folder has all runs of this experiment, as its file is now."""
    if not (folder / HEADER_NAME).exists():
        return False
    try:
        sweep = open_sweep(folder)
        return sweep.spec == find_spec(name) and sweep.complete() and sweep.failures().is_empty()
    except SweepFolderError:
        return False


def begin(folder: Path) -> str:
    """Notes in the folder what makes its results; what is wrong with going on there, "" if nothing."""
    now = provenance_now()
    begun = read_provenance(folder)
    if begun is None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PROVENANCE_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(now)) + b"\n")
    elif begun.sources != now.sources:
        return f"{folder} was begun with other sources ({begun.revision}): remove it, and all its runs are made again"
    return ""


def _sweep(folder: Path, name: str, jobs: int | None) -> bool:
    """Makes a sweep, or the rest of it; whether all is well."""
    if wrong := begin(folder):
        print(wrong, file=sys.stderr)
        return False
    command = [sys.executable, "-m", "shadowmmu.cli", "sweep", name, "--out", str(folder), "--retry-failed"]
    if jobs is not None:
        command += ["--jobs", str(jobs)]
    return subprocess.run(command, check=False).returncode == 0


def main() -> None:
    """Makes what is not done."""
    parser = argparse.ArgumentParser(
        prog="make experiments", description="Sweeps that are not done, and pages."
    )
    parser.add_argument("names", nargs="*", help="only these; without: all that come with the program")
    parser.add_argument(
        "--jobs", type=int, help="processes of a sweep; as many as there are cores if not given"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("experiment-runs"), help="where the sweeps' folders are"
    )
    parser.add_argument("-o", "--out", type=Path, default=FOLDER, help="where the pages go")
    arguments = parser.parse_args()
    names: list[str] = arguments.names or shipped_names()
    failed = [
        name
        for name in names
        if not _is_done(arguments.runs / name, name)
        and not _sweep(arguments.runs / name, name, arguments.jobs)
    ]
    write_pages([arguments.runs / name for name in names if name not in failed], arguments.out)
    if failed:
        sys.exit(f"not finished: {', '.join(failed)}")


if __name__ == "__main__":
    main()
