"""The parameters of a kind of run, read off the structs that configure it.

A field of the struct is a parameter under its own name; the fields of a struct within it have that field's name before
theirs (`load.pages`). Where a struct is a transparent part (`run`, the run's configuration), its fields go by their
names alone too (`vpid` for `run.vpid`), unless another parameter has that name. Values are checked against the field's
type and range; an optional field is None by the value "none".
"""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Generic, TypeVar

import msgspec

from shadowmmu.experiments.values import Value

__all__ = ["NONE", "Parameter", "ParameterError", "Parameters"]

NONE: Final = "none"
"""How None is written."""

_SCALARS: Final = (bool, int, float, str)
Config = TypeVar("Config", bound=msgspec.Struct)


class ParameterError(ValueError):
    """A parameter that there is not, or a value that it cannot have. `name`: of the parameter, "" if not of one."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}" if name else text)
        self.name = name
        self.text = text


class Parameter(msgspec.Struct, frozen=True):
    """One parameter: where it is in the struct, its type there, and its default (None: it has none)."""

    path: tuple[str, ...]
    type: Any
    default: Value | None

    @property
    def name(self) -> str:
        """Its full name."""
        return ".".join(self.path)

    def check(self, value: object) -> Value:
        """The value as it is kept: of the type's own kind, an enum by its value, None as "none".

        Raises ParameterError.
        """
        if value == NONE and type(None) in _alternatives(self.type):
            return NONE
        try:
            return _plain(msgspec.convert(value, self.type))
        except msgspec.ValidationError as error:
            raise ParameterError(self.name, str(error).replace("`", "")) from error

    def describe(self) -> str:
        """Its type and range for people."""
        names = [_describe(part, self.type) for part in _alternatives(self.type)]
        return " or ".join(names)


class Parameters(Generic[Config]):
    """The parameters of the struct `config`, apart from those called `without`.

    `transparent`: fields of it whose fields go by their names alone too.
    """

    def __init__(
        self, config: type[Config], *, without: Sequence[str] = (), transparent: Sequence[str] = ()
    ) -> None:
        self._config = config
        found = [p for p in _parameters(config, (), None) if p.name not in without]
        self.all: Final[dict[str, Parameter]] = {parameter.name: parameter for parameter in found}
        """By full name."""
        self._known = dict(self.all)
        for parameter in found:
            if len(parameter.path) == 2 and parameter.path[0] in transparent:
                self._known.setdefault(parameter.path[1], parameter)

    def short_name(self, parameter: Parameter) -> str:
        """The shortest name by which it goes."""
        last = parameter.path[-1]
        return last if self._known.get(last) is parameter else parameter.name

    def find(self, name: str) -> Parameter:
        """The parameter of a name. Raises ParameterError."""
        try:
            return self._known[name]
        except KeyError:
            raise ParameterError(name, f"there is no such parameter; {self._hint(name)}") from None

    def _hint(self, name: str) -> str:
        last = name.rpartition(".")[2]
        close = [known for known in self._known if known.rpartition(".")[2] == last]
        names = close or sorted({self.short_name(parameter) for parameter in self.all.values()})
        return f"there are {', '.join(names)}"

    def build(self, values: Mapping[str, Value], **more: object) -> Config:
        """The struct with these values; `more`: fields of it, or of its parts with `__` for the dot.

        Raises ParameterError.
        """
        tree: dict[str, Any] = {}
        given: set[str] = set()
        for name, value in values.items():
            parameter = self.find(name)
            if parameter.name in given:
                raise ParameterError(parameter.name, "this is given twice, by two of its names")
            given.add(parameter.name)
            checked = parameter.check(value)
            _put(tree, parameter.path, None if checked == NONE and _optional(parameter) else checked)
        for name, field in more.items():
            _put(tree, tuple(name.split("__")), field)
        try:
            return msgspec.convert(tree, self._config)
        except msgspec.ValidationError as error:
            raise ParameterError("", str(error).replace("`", "")) from error


def _optional(parameter: Parameter) -> bool:
    return type(None) in _alternatives(parameter.type)


def _put(tree: dict[str, Any], path: tuple[str, ...], value: object) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def _parameters(
    struct: type[msgspec.Struct], prefix: tuple[str, ...], defaults: msgspec.Struct | None
) -> Iterator[Parameter]:
    for field in msgspec.structs.fields(struct):
        path = (*prefix, field.name)
        if defaults is not None:
            default = getattr(defaults, field.name)
        elif field.default is not msgspec.NODEFAULT:
            default = field.default
        elif field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        else:
            default = msgspec.NODEFAULT
        nested = [part for part in _alternatives(field.type) if _is_struct(part)]
        if nested:
            yield from _parameters(nested[0], path, default if isinstance(default, nested[0]) else None)
        elif all(_is_scalar(part) for part in _alternatives(field.type)):
            yield Parameter(path, field.type, None if default is msgspec.NODEFAULT else _plain(default))


def _alternatives(annotation: Any) -> list[Any]:
    """The types of a union, without what Annotated says of them."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [each for part in typing.get_args(annotation) for each in _alternatives(part)]
    return [annotation]


def _is_struct(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, msgspec.Struct)


def _is_scalar(annotation: Any) -> bool:
    return isinstance(annotation, type) and (
        annotation in _SCALARS or annotation is type(None) or issubclass(annotation, enum.Enum)
    )


def _plain(value: Any) -> Value:
    if value is None:
        return NONE
    plain: Value = value.value if isinstance(value, enum.Enum) else value
    return plain


def _describe(part: Any, whole: Any) -> str:
    if part is type(None):
        return f'"{NONE}"'
    if issubclass(part, enum.Enum):
        return ", ".join(f'"{member.value}"' for member in part)
    names = {bool: "true or false", int: "integer", float: "number", str: "text"}
    return names[part] + _range(whole)


def _range(annotation: Any) -> str:
    meta = next(_metas(annotation), None)
    if meta is None:
        return ""
    low = "" if meta.ge is None else f" from {_number(meta.ge)}"
    high = "" if meta.le is None else f" to {_number(meta.le)}"
    return low + high


def _number(value: Any) -> str:
    if isinstance(value, int) and value > 4096 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _metas(annotation: Any) -> Iterator[msgspec.Meta]:
    if typing.get_origin(annotation) is typing.Annotated:
        yield from (meta for meta in typing.get_args(annotation)[1:] if isinstance(meta, msgspec.Meta))
    for part in typing.get_args(annotation):
        if not isinstance(part, msgspec.Meta):
            yield from _metas(part)
