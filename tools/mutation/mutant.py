"""A mutant: one line of one module of the model, and what is put in its place."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

import msgspec

__all__ = ["MODEL", "ROOT", "Mutant", "places"]

ROOT: Final = Path(__file__).parents[2]
MODEL: Final = Path("services") / "shadowmmu" / "kvm"
"""Where the model is, below ROOT or a copy of it."""


class Mutant(msgspec.Struct, frozen=True):
    """Line `number` (from 1) of `module`, in `function` ("" outside), becomes `becomes`.

    `id` does not depend on the line's number, so that what is known of the mutant outlives changes elsewhere.
    `statement` is the first and last line of the statement that the line belongs to. `kind` says what was changed,
    `why` (of those chosen by hand) what it means.
    """

    id: str
    module: str
    function: str
    number: int
    statement: tuple[int, int]
    line: str
    becomes: str
    kind: str
    why: str = ""

    def apply(self, text: str) -> str:
        """The module's text with the line replaced. Raises ValueError if the line is not there."""
        lines = text.splitlines(keepends=True)
        if lines[self.number - 1].rstrip("\n") != self.line:
            raise ValueError(f"{self.id}: line {self.number} of {self.module} is another")
        lines[self.number - 1] = self.becomes + "\n"
        return "".join(lines)


def places(tree: ast.Module) -> dict[int, tuple[str, tuple[int, int]]]:
    """For each line of a module that has code: the function around it, and the statement or head of one that it is in.

    The function is its qualified name, "" if there is none; the statement its first and last line.
    """
    found: dict[int, tuple[str, tuple[int, int]]] = {}

    def visit(node: ast.AST, prefix: str, function: str) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.stmt):
                visit(child, prefix, function)
                continue
            body = getattr(child, "body", None)
            end = body[0].lineno - 1 if body else child.end_lineno or child.lineno
            last = max(end, child.lineno)
            for number in range(child.lineno, last + 1):
                found[number] = (function, (child.lineno, last))
            if isinstance(child, ast.FunctionDef):
                visit(child, f"{prefix}{child.name}.", prefix + child.name)
            elif isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}{child.name}.", function)
            else:
                visit(child, prefix, function)

    visit(tree, "", "")
    return found
