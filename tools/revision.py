"""Which state of the sources a report is about."""

from __future__ import annotations

import datetime as dt
import hashlib
import subprocess
from collections.abc import Iterable
from pathlib import Path

__all__ = ["digest", "revision"]


def revision(path: Path) -> str:
    """Today's date and the commit, and whether `path` (a folder of the working tree) differs from the commit."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    changed = " with changes" if git("status", "--porcelain", "--", ".") else ""
    today = dt.datetime.now(tz=dt.UTC).date()
    return f"{today.isoformat()}, commit {git('rev-parse', '--short=10', 'HEAD')}{changed}"


def digest(paths: Iterable[Path]) -> str:
    """A hash of files, and of all files below folders: names and contents; what Python caches is left out."""
    total = hashlib.sha256()
    files: list[Path] = []
    for path in paths:
        files += [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in sorted(files):
        if "__pycache__" not in file.parts:
            total.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            total.update(file.read_bytes())
    return total.hexdigest()[:16]
