"""A seeded sample of all mutants that a few operators make of the model.

The operators change what a line does: comparisons, arithmetic and bit operators, `and` and `or`, `not`, conditions,
integer and boolean constants, returned values, `break` and `continue`; and they drop calls, yields, assignments to
attributes and entries, and deletions. Annotations, docstrings and other strings, `__slots__`, `__all__`, `__repr__`,
decorators and messages of exceptions stay as they are, as do modules that are data or documentation.

Written with the standard library alone. cosmic-ray 8.7 was tried: it has no operator that drops a statement or
changes a returned value, runs one command for all mutants, and has no place for mutants chosen by hand.
"""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path
from typing import Final

from tools.mutation.mutant import MODEL, Mutant, places

__all__ = ["sample"]

DATA: Final = frozenset(("__init__", "errors", "points", "effects", "stats", "profiles"))
"""Modules that are data, declarations or documentation: nothing to change in them says something about the model."""

COMPARE: Final = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
BINARY: Final = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.FloorDiv: ("//", "*"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.BitXor: ("^", "|"),
}
BOOLEAN: Final = {ast.And: ("and", "or"), ast.Or: ("or", "and")}
UNARY: Final = {ast.Not: "not ", ast.Invert: "~", ast.USub: "-"}

Edit = tuple[str, int, int, int, str]
"""Kind, line, first column, column after the last (bytes, as ast counts), new text."""


class _Edits(ast.NodeVisitor):
    """Collects what can be changed, within single lines."""

    def __init__(self, lines: list[bytes]) -> None:
        self._lines = lines
        self.found: list[Edit] = []

    def _node(self, node: ast.expr | ast.stmt) -> str | None:
        """The text of a node, if it is on one line."""
        if node.end_lineno != node.lineno:
            return None
        return self._lines[node.lineno - 1][node.col_offset : node.end_col_offset].decode()

    def _replace(self, kind: str, node: ast.expr | ast.stmt, text: str) -> None:
        if node.end_lineno == node.lineno and node.end_col_offset is not None:
            self.found.append((kind, node.lineno, node.col_offset, node.end_col_offset, text))

    def _between(self, kind: str, left: ast.expr, right: ast.expr, old: str, new: str) -> None:
        """Change the operator between two operands."""
        if left.end_lineno != right.lineno or left.end_col_offset is None:
            return
        start, end = left.end_col_offset, right.col_offset
        text = self._lines[right.lineno - 1][start:end].decode()
        if text.count(old) == 1:
            self.found.append((kind, right.lineno, start, end, text.replace(old, new)))

    # What stays as it is

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name != "__repr__":
            for statement in node.body:
                self.visit(statement)
            for default in [*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]:
                self.visit(default)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def visit_Raise(self, node: ast.Raise) -> None:
        self._replace("raise dropped", node, "pass")

    def visit_Import(self, node: ast.Import) -> None:
        pass

    # What is changed

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, operator, right in zip(
            [node.left, *node.comparators], node.ops, node.comparators, strict=False
        ):
            self._between("comparison", left, right, *COMPARE[type(operator)])
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if type(node.op) in BINARY:
            self._between("operator", node.left, node.right, *BINARY[type(node.op)])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._between("and, or", left, right, *BOOLEAN[type(node.op)])
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        text = self._node(node)
        if text is not None and type(node.op) in UNARY:
            self._replace("negation dropped", node, text.removeprefix(UNARY[type(node.op)]))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._replace("constant", node, str(not node.value))
        elif isinstance(node.value, int):
            for changed in (node.value + 1, node.value - 1):
                self._replace(
                    "constant", node, hex(changed) if node.value > 9 and changed >= 0 else str(changed)
                )

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in BINARY:
            old, new = BINARY[type(node.op)]
            self._between("operator", node.target, node.value, f"{old}=", f"{new}=")
        self._replace("statement dropped", node, "pass")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if any(
            isinstance(target, ast.Name) and target.id in ("__all__", "__slots__") for target in node.targets
        ):
            return
        if all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets):
            self._replace("statement dropped", node, "pass")
        self.generic_visit(node)

    def visit_Delete(self, node: ast.Delete) -> None:
        self._replace("statement dropped", node, "pass")

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call | ast.Yield | ast.YieldFrom):
            self._replace("statement dropped", node, "pass")
        self.generic_visit(node)

    def visit_Break(self, node: ast.Break) -> None:
        self._replace("jump", node, "continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        self._replace("jump", node, "break")

    def _condition(self, test: ast.expr) -> None:
        text = self._node(test)
        # A comparison or `not` is negated by its own operator.
        if text is not None and not isinstance(test, ast.Compare | ast.UnaryOp):
            self._replace("condition negated", test, f"not ({text})")

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        self._condition(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self._condition(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._condition(node.test)
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not isinstance(node.value, ast.Constant | ast.Tuple):
            self._replace("returned value", node.value, "0")
        self.generic_visit(node)


def mutants_of(path: Path) -> list[Mutant]:
    """Everything that the operators make of one module; a few of those may not compile."""
    text = path.read_text()
    tree = ast.parse(text)
    raw = [line.encode() for line in text.splitlines()]
    where = places(tree)
    edits = _Edits(raw)
    edits.visit(tree)
    found: dict[str, Mutant] = {}
    for kind, number, start, end, new in edits.found:
        line = raw[number - 1]
        original, becomes = line.decode(), (line[:start] + new.encode() + line[end:]).decode()
        function, statement = where[number]
        same = sum(raw[i - 1] == line and where.get(i, ("", 0))[0] == function for i in range(1, number))
        key = f"{path.stem}\0{function}\0{original.strip()}\0{becomes.strip()}\0{same}"
        identifier = f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        mutant = Mutant(identifier, path.stem, function, number, statement, original, becomes, kind)
        if becomes != original:
            found.setdefault(identifier, mutant)
    return list(found.values())


def _compiles(mutant: Mutant, text: str) -> bool:
    try:
        compile(mutant.apply(text), mutant.module, "exec")
    except SyntaxError:
        return False
    return True


def sample(root: Path, size: int, seed: int) -> list[Mutant]:
    """`size` mutants of the model below `root`: first one of each module, then of all; at most one of each line.

    The order in which they are considered is random, but the same for the same seed, and changes little when the model
    does. Constants are so many that only one change in four is considered.
    """

    def rank(mutant: Mutant) -> bytes:
        return hashlib.sha256(f"{seed}\0{mutant.id}".encode()).digest()

    paths = {path.stem: path for path in sorted((root / MODEL).glob("*.py")) if path.stem not in DATA}
    texts = {module: path.read_text() for module, path in paths.items()}
    every = [mutant for path in paths.values() for mutant in mutants_of(path)]
    ranked = sorted((m for m in every if m.kind != "constant" or rank(m)[-1] < 64), key=rank)
    firsts: dict[str, Mutant] = {}
    for mutant in ranked:
        if mutant.module not in firsts and _compiles(mutant, texts[mutant.module]):
            firsts[mutant.module] = mutant
    chosen = {(mutant.module, mutant.number): mutant for mutant in firsts.values()}
    for mutant in ranked:
        if len(chosen) >= size:
            break
        place = (mutant.module, mutant.number)
        if place not in chosen and _compiles(mutant, texts[mutant.module]):
            chosen[place] = mutant
    return sorted(chosen.values(), key=lambda m: (m.module, m.number))
