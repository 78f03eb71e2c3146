"""The part of atheris that tests/fuzz uses."""

# ruff: noqa: N802 - the names are atheris's

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

_F = TypeVar("_F", bound=Callable[..., object])

def instrument_imports(
    include: Sequence[str] = ..., exclude: Sequence[str] = ..., enable_loader_override: bool = ...
) -> AbstractContextManager[None]: ...
def instrument_func(function: _F) -> _F: ...
def Setup(
    arguments: Sequence[str],
    test_one_input: Callable[[bytes], None],
    *,
    custom_mutator: Callable[[bytes, int, int], bytes] = ...,
) -> list[str]: ...
def Mutate(data: bytes, most: int) -> bytes: ...
def Fuzz() -> None: ...
