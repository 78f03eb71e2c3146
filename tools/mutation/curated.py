"""The mutants chosen by hand (curated.toml): what a person could get wrong in the kernel's MMU, one line each.

An entry names the line (without its indentation), the module or the function or both, as far as needed to tell it from
others, what the line becomes, and why that matters.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

import msgspec

from tools.mutation.mutant import MODEL, Mutant, places

__all__ = ["StaleMutantsError", "curated"]

FILE: Final = Path(__file__).parent / "curated.toml"


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of curated.toml; `within` is the function's name (Class.method), `becomes` lacks the indentation too."""

    id: str
    line: str
    becomes: str
    why: str
    module: str = ""
    within: str = ""


class Entries(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """curated.toml."""

    mutant: list[Entry]


class StaleMutantsError(Exception):
    """Entries of curated.toml whose line is not there, or there more than once."""


def curated(root: Path) -> list[Mutant]:
    """The mutants of curated.toml, found in the model below `root`. Raises StaleMutantsError."""
    entries = msgspec.toml.decode(FILE.read_bytes(), type=Entries).mutant
    wrong = [
        f"{entry.id}: named twice"
        for i, entry in enumerate(entries)
        if entry.id in {e.id for e in entries[:i]}
    ]
    found = []
    for entry in entries:
        found_at = _places(root, entry)
        if len(found_at) == 1:
            found += found_at
        else:
            where = " ".join(name for name in (entry.module, entry.within) if name)
            wrong.append(f"{entry.id}: {len(found_at)} lines in {where or 'the model'} are: {entry.line}")
    if wrong:
        raise StaleMutantsError("\n".join(wrong))
    return found


def _places(root: Path, entry: Entry) -> list[Mutant]:
    return [
        mutant
        for path in sorted((root / MODEL).glob(f"{entry.module or '*'}.py"))
        for mutant in _places_in(path, entry)
    ]


def _places_in(path: Path, entry: Entry) -> list[Mutant]:
    text = path.read_text()
    if entry.line not in text:
        return []
    where = places(ast.parse(text))
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() != entry.line or number not in where:
            continue
        function, statement = where[number]
        if entry.within in ("", function):
            becomes = line[: len(line) - len(line.lstrip())] + entry.becomes
            mutant = Mutant(
                entry.id, path.stem, function, number, statement, line, becomes, "chosen", entry.why
            )
            compile(mutant.apply(text), str(path), "exec")
            found.append(mutant)
    return found
