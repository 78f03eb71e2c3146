"""The litmus tests that come with the program: one per bug of the catalogue, and the classic patterns.

They are package data: `library/bugs/SLUG.toml` shows the bug that is there without fix SLUG,
`library/classic/NAME.toml` how a coherence pattern behaves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from shadowmmu.explorer.litmus import LitmusError, load_litmus
from shadowmmu.explorer.scenario import Scenario

__all__ = ["LIBRARY", "bug_test", "classic_tests", "find_test", "library_files"]

LIBRARY: Final = Path(__file__).with_name("library")


def library_files() -> list[Path]:
    """Every litmus test, bugs first."""
    return [*sorted((LIBRARY / "bugs").glob("*.toml")), *sorted((LIBRARY / "classic").glob("*.toml"))]


def classic_tests() -> list[Scenario]:
    """The classic patterns."""
    return [load_litmus(path) for path in sorted((LIBRARY / "classic").glob("*.toml"))]


def bug_test(slug: str) -> Scenario | None:
    """The litmus test of a bug, None if it has none."""
    path = LIBRARY / "bugs" / f"{slug}.toml"
    return load_litmus(path) if path.exists() else None


def find_test(name: str) -> Scenario:
    """A litmus test by file name, or by the name of one that comes with the program. Raises LitmusError."""
    path = Path(name)
    if path.suffix == ".toml" and path.exists():
        return load_litmus(path)
    for known in library_files():
        if known.stem == name:
            return load_litmus(known)
    try:
        return load_litmus(path)
    except (OSError, UnicodeDecodeError) as error:
        raise LitmusError(name, f"no such file, and no litmus test of that name: {error}") from error
