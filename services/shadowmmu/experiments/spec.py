"""An experiment's file: TOML that says what is asked, what is run, and which parameters take which values.

    title = "Fork under one lock"
    question = "How much slower is fork at 32 processes than at one?"
    kind = "virtual"
    replicates = 5

    [fixed]
    load.load = "fork"

    [grid]
    vcpus = [1, 2, 4, 8, 16, 32]

Everything is checked before anything runs, and an error names the file and the key. docs/EXPERIMENTS.md explains the
keys.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from shadowmmu.experiments.analyses import analysis_names
from shadowmmu.experiments.kinds.kind import Kind
from shadowmmu.experiments.parameters import Parameter, ParameterError
from shadowmmu.experiments.point import KINDS
from shadowmmu.experiments.values import Value

__all__ = [
    "MAX_RUNS",
    "PRESENTATION",
    "Plot",
    "SpecError",
    "SweepSpec",
    "find_spec",
    "load_spec",
    "parse_spec",
]

SHIPPED: Final = Path(__file__).with_name("shipped")
MAX_RUNS: Final = 100_000
"""Most runs of a sweep: more is a slip in a grid, and a table that memory does not hold."""
PRESENTATION: Final = frozenset({"title", "question", "analysis", "plots", "timeout"})
"""Keys that change no result of a run."""

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=10_000)]


class SpecError(ValueError):
    """A file that is no experiment. `key`: what in it is wrong, "" for all of it."""

    def __init__(self, source: str, key: str, text: str) -> None:
        super().__init__(f"{source}: {key}: {text}" if key else f"{source}: {text}")
        self.source = source
        self.key = key
        self.text = text


class Plot(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A plot: metric `y` over `x` (a parameter or a metric), a colour and a panel per value of two parameters."""

    title: Text
    x: Text
    y: Text
    color: Text | None = None
    facet: Text | None = None
    log_x: bool = False
    log_y: bool = False
    x_title: str = ""
    y_title: str = ""


class SweepSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An experiment. Names of parameters are flat (`load.pages`), values checked.

    The design is every point of `points` (one without parameters if there are none) with every combination of `grid`,
    each with the parameters `fixed`. `timeout`: seconds until a run is given up. `common_random_numbers`: replicate r
    has the same seed at all points. `metrics`: patterns (`kvm.*`) of those that are kept; all if there are none.
    """

    title: Text
    question: str = ""
    kind: Kind
    replicates: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1
    seed: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] = 0
    common_random_numbers: bool = False
    timeout: Annotated[float, msgspec.Meta(gt=0.0, le=1e7)] = 3600.0
    analysis: str | None = None
    metrics: list[Text] = []
    fixed: dict[str, Value] = {}
    grid: dict[str, list[Value]] = {}
    points: list[dict[str, Value]] = []
    plots: list[Plot] = []

    def names(self) -> list[str]:
        """The parameters, in the order of the file."""
        of_points = dict.fromkeys(name for point in self.points for name in point)
        return [*self.fixed, *of_points, *self.grid]

    def varied(self) -> list[str]:
        """Those that differ between points."""
        of_points = dict.fromkeys(name for point in self.points for name in point)
        return [*of_points, *self.grid]

    def keeps(self, metric: str) -> bool:
        """Whether a metric is kept."""
        return not self.metrics or any(fnmatchcase(metric, pattern) for pattern in self.metrics)

    def runs(self) -> int:
        """How many runs it has, replicates counted."""
        return max(1, len(self.points)) * math.prod(map(len, self.grid.values())) * self.replicates


def find_spec(name: str, seed: int | None = None) -> SweepSpec:
    """The experiment in a file, or the shipped one of that name; with `seed` instead of its own. Raises SpecError."""
    path = Path(name)
    shipped = SHIPPED / f"{name}.toml"
    # A folder of that name is no file of one's own: results often go into a folder called like the experiment.
    if not path.is_file() and path.name == name and shipped.exists():
        path = shipped
    if not path.exists():
        known = ", ".join(sorted(each.stem for each in SHIPPED.glob("*.toml"))) or "none"
        raise SpecError(
            name, "", f"there is no such file, and no experiment of that name (there are: {known})"
        )
    spec = load_spec(path)
    return spec if seed is None else msgspec.structs.replace(spec, seed=seed)


def load_spec(path: Path) -> SweepSpec:
    """The experiment in a file. Raises SpecError."""
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise SpecError(str(path), "", error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise SpecError(str(path), "", f"this is no text: {error}") from error
    return parse_spec(text, str(path))


def parse_spec(text: str, source: str) -> SweepSpec:
    """The experiment in a TOML text; `source` names it in errors. Raises SpecError."""
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # Not all are TOMLDecodeErrors: numbers may be too long, and lists too deep.
        raise SpecError(source, "", f"this is no TOML: {error}") from error
    return _Reader(source).read(raw)


class _Reader:
    """From the tables of the file to the spec."""

    def __init__(self, source: str) -> None:
        self._source = source

    def _error(self, key: str, text: str) -> SpecError:
        return SpecError(self._source, key, text)

    def read(self, raw: dict[str, Any]) -> SweepSpec:
        """Raises SpecError."""
        tables: dict[str, Any] = {
            "fixed": self._scalars("fixed", raw.get("fixed", {})),
            "grid": self._grid(raw.get("grid", {})),
            "points": self._points(raw.get("points", [])),
        }
        for key, table in tables.items():
            if key in raw and not table:
                raise self._error(key, "this is empty")
        try:
            spec = msgspec.convert(raw | tables, SweepSpec)
        except msgspec.ValidationError as error:
            text, _, path = str(error).partition(" - at `$")
            raise self._error(path.strip("`.").replace("[...]", ""), text.replace("`", "")) from error
        spec = self._checked_values(spec)
        self._check_size(spec)
        self._check_presentation(spec)
        return spec

    # --- shape -------------------------------------------------------------------------------------------------------

    def _flat(self, key: str, table: object) -> dict[str, Any]:
        """Tables within tables as names with dots."""
        if not isinstance(table, dict):
            raise self._error(key, f"this is a table of parameters, not {_kind_of(table)}")
        flat: dict[str, Any] = {}
        for name, value in _leaves(table, ""):
            if value == {}:
                raise self._error(f"{key}.{name}", "this is empty")
            if name in flat:
                raise self._error(f"{key}.{name}", "this is there twice, with dots and in quotes")
            flat[name] = value
        return flat

    def _scalars(self, key: str, table: object) -> dict[str, Any]:
        flat = self._flat(key, table)
        for name, value in flat.items():
            self._check_scalar(f"{key}.{name}", value)
        return flat

    def _grid(self, table: object) -> dict[str, Any]:
        flat = self._flat("grid", table)
        for name, values in flat.items():
            if not isinstance(values, list):
                raise self._error(
                    f"grid.{name}", f"this is a list of values, not {_kind_of(values)}; see fixed"
                )
            for value in values:
                self._check_scalar(f"grid.{name}", value)
        return flat

    def _check_scalar(self, key: str, value: object) -> None:
        if not isinstance(value, bool | int | float | str):
            raise self._error(key, f"a value is a truth value, a number or a text, not {_kind_of(value)}")
        if isinstance(value, str) and "\0" in value:
            raise self._error(key, "this text has a null character")
        if isinstance(value, float) and not math.isfinite(value):
            raise self._error(key, f"{value} is no finite number")

    def _points(self, points: object) -> list[dict[str, Any]]:
        if not isinstance(points, list):
            raise self._error("points", f"these are tables, each begun by [[points]], not {_kind_of(points)}")
        flat = [self._scalars(f"points[{n}]", point) for n, point in enumerate(points)]
        for n, point in enumerate(flat):
            if not point:
                raise self._error(f"points[{n}]", "this is empty")
        return flat

    # --- parameters --------------------------------------------------------------------------------------------------

    def _checked_values(self, spec: SweepSpec) -> SweepSpec:
        self._check_clashes(spec)
        fixed = {name: self._value(spec, f"fixed.{name}", name, value) for name, value in spec.fixed.items()}
        grid = {}
        for name, values in spec.grid.items():
            key = f"grid.{name}"
            if not values:
                raise self._error(key, "this list is empty, so there would be no point")
            grid[name] = [self._value(spec, key, name, value) for value in values]
            if len(set(grid[name])) < len(values):
                raise self._error(key, "a value is there twice")
        points = [
            {name: self._value(spec, f"points[{n}].{name}", name, value) for name, value in point.items()}
            for n, point in enumerate(spec.points)
        ]
        return msgspec.structs.replace(spec, fixed=fixed, grid=grid, points=self._filled(spec, points))

    def _filled(self, spec: SweepSpec, points: list[dict[str, Value]]) -> list[dict[str, Value]]:
        """Points that all have the same parameters: those that one lacks have their defaults."""
        names = dict.fromkeys(name for point in points for name in point)
        seen: dict[tuple[Value, ...], int] = {}
        for n, point in enumerate(points):
            values = tuple(point[name] if name in point else self._default(spec, n, name) for name in names)
            first = seen.setdefault(values, n)
            if first != n:
                raise self._error(f"points[{n}]", f"this is points[{first}] again")
        return [dict(zip(names, values, strict=True)) for values in seen]

    def _default(self, spec: SweepSpec, number: int, name: str) -> Value:
        default = self._parameter(spec, f"points[{number}].{name}", name).default
        if default is None:
            raise self._error(f"points[{number}].{name}", "this is missing; it has no default")
        return default

    def _check_clashes(self, spec: SweepSpec) -> None:
        seen: dict[str, str] = {}
        of_points = dict.fromkeys(name for point in spec.points for name in point)
        for key, names in (("fixed", spec.fixed), ("grid", spec.grid), ("points", of_points)):
            for name in names:
                full = self._parameter(spec, f"{key}.{name}", name).name
                if full in seen:
                    raise self._error(
                        f"{key}.{name}", f"clashes with {seen[full]}: a parameter has one place"
                    )
                seen[full] = f"{key}.{name}"

    def _parameter(self, spec: SweepSpec, key: str, name: str) -> Parameter:
        try:
            return KINDS[spec.kind].parameters.find(name)
        except ParameterError as error:
            raise self._error(key, error.text) from error

    def _value(self, spec: SweepSpec, key: str, name: str, value: Value) -> Value:
        parameter = self._parameter(spec, key, name)
        try:
            return parameter.check(value)
        except ParameterError as error:
            raise self._error(key, error.text) from error

    # --- the rest ----------------------------------------------------------------------------------------------------

    def _check_size(self, spec: SweepSpec) -> None:
        if spec.runs() > MAX_RUNS:
            raise self._error("grid", f"these would be {spec.runs()} runs; the most is {MAX_RUNS}")

    def _check_presentation(self, spec: SweepSpec) -> None:
        names = analysis_names()
        if spec.analysis is not None and spec.analysis not in names:
            raise self._error(
                "analysis", f"there is none called {spec.analysis!r}; there are {', '.join(names) or 'none'}"
            )
        parameters = spec.names()
        for n, plot in enumerate(spec.plots):
            for field in ("color", "facet"):
                name = getattr(plot, field)
                if name is not None and name not in parameters:
                    raise self._error(
                        f"plots[{n}].{field}",
                        f"{name!r} is no parameter of this sweep; there are {', '.join(parameters) or 'none'}",
                    )
            for field in ("x", "y"):
                name = getattr(plot, field)
                if name not in parameters and not spec.keeps(name):
                    raise self._error(f"plots[{n}].{field}", f"no pattern of metrics keeps {name!r}")
            if plot.y in parameters:
                raise self._error(f"plots[{n}].y", f"{plot.y!r} is a parameter; y is a metric")


def _leaves(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _kind_of(value: object) -> str:
    names = {
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "a table",
    }
    return names.get(type(value), f"a {type(value).__name__}")
