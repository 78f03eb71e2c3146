"""The final state of an execution, and conditions on it.

An outcome is what the programs' registers hold at the end, and the words of memory that the condition names. A
condition is written with `vN:rM` (a register: what was loaded, or the fault taken), `NAME[i]` (word i of a frame),
numbers, `fault` (any page fault), comparisons and `and`, `or`, `not`:

    v0:r1 == 5 and (v1:r0 == fault or G[3] != 0)
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from shadowmmu.explorer.program import FaultTaken

__all__ = [
    "Condition",
    "ConditionError",
    "Outcome",
    "format_outcome",
    "holds",
    "memory_words",
    "parse_condition",
    "registers",
]

Condition: TypeAlias = ast.expr
Outcome: TypeAlias = tuple[tuple[str, int], ...]
"""(name, value) pairs: `v0:r1`, `G[3]`, in a fixed order."""

_REGISTER: Final = re.compile(r"v(\d+):(r\d+)")
_FAULT: Final = "fault"


class ConditionError(ValueError):
    """A condition that cannot be understood."""


_COMPARE: Final[dict[type[ast.cmpop], Callable[[int, int], bool]]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
}


def format_outcome(outcome: Outcome) -> str:
    """`v0:r0=5; v1:r0=#PF(0x7)`."""
    return "; ".join(
        f"{name}={value!r}" if isinstance(value, FaultTaken) else f"{name}={_number(value)}"
        for name, value in outcome
    )


def _number(value: int) -> str:
    return str(value) if value < 4096 else hex(value)


def parse_condition(text: str) -> Condition:
    """Reads a condition. Raises ConditionError."""
    try:
        tree = ast.parse(_REGISTER.sub(r"v\1_\2", text.strip()), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # ast.parse's refusals
        raise ConditionError(f"{text!r} is no condition: {error}") from error
    _check(tree, text)
    return tree


def _check(node: ast.expr, text: str) -> None:
    match node:
        case ast.BoolOp(values=values):
            for value in values:
                _check(value, text)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            _check(operand, text)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            for operator in ops:
                if type(operator) not in _COMPARE:
                    raise ConditionError(f"{text!r}: only == != < <= > >= compare")
            names = [_term_name(term, text) for term in (left, *comparators)]
            if _FAULT in names and not all(isinstance(operator, ast.Eq | ast.NotEq) for operator in ops):
                raise ConditionError(f"{text!r}: only == and != compare with a fault")
        case _:
            raise ConditionError(f"{text!r}: {ast.unparse(node)!r} is neither a comparison nor and, or, not")


def _term_name(node: ast.expr, text: str) -> str | int:
    match node:
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            return value
        case ast.Name(id=name) if name == _FAULT or re.fullmatch(r"v\d+_r\d+", name):
            return name.replace("_", ":")
        case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=int(index))):
            return f"{name}[{index}]"
        case _:
            raise ConditionError(
                f"{text!r}: {ast.unparse(node)!r} is no register vN:rM, word NAME[i], number or fault"
            )


def memory_words(condition: Condition) -> set[tuple[str, int]]:
    """The (frame name, index) pairs that a condition looks at."""
    return {
        (node.value.id, node.slice.value)
        for node in ast.walk(condition)
        if isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, int)
    }


def registers(condition: Condition) -> set[str]:
    """The registers that a condition looks at, as `v0:r1`."""
    return {
        node.id.replace("_", ":")
        for node in ast.walk(condition)
        if isinstance(node, ast.Name) and re.fullmatch(r"v\d+_r\d+", node.id, re.ASCII)
    }


def holds(condition: Condition, values: Mapping[str, int]) -> bool:
    """Whether it is true of these values; a register that was never written is 0."""
    match condition:
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(holds(part, values) for part in parts)
        case ast.BoolOp(values=parts):
            return any(holds(part, values) for part in parts)
        case ast.UnaryOp(operand=operand):
            return not holds(operand, values)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            terms = [left, *comparators]
            return all(_compare(operator, terms[i], terms[i + 1], values) for i, operator in enumerate(ops))
        case _:
            raise ConditionError(f"not a condition: {ast.unparse(condition)}")


def _compare(operator: ast.cmpop, left: ast.expr, right: ast.expr, values: Mapping[str, int]) -> bool:
    names = _term_name(left, ""), _term_name(right, "")
    if _FAULT in names:
        other = names[1] if names[0] == _FAULT else names[0]
        is_fault = isinstance(values.get(str(other), 0), FaultTaken)
        return is_fault is isinstance(operator, ast.Eq)
    a, b = (name if isinstance(name, int) else values.get(name, 0) for name in names)
    if isinstance(a, FaultTaken) or isinstance(b, FaultTaken):
        return isinstance(operator, ast.NotEq)  # a fault is no number
    return _COMPARE[type(operator)](a, b)
