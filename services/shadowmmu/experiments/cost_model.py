"""Cost models: files that say what things cost on some machine, each figure with its source and its range.

A file has a table `[model]`, a table `[costs.NAME]` for each constant of `shadowmmu.machine.costs.Costs`, and a table
`[guest.NAME]` for each kind of work of `shadowmmu.cpu.loads.WORK`. Shipped models lie beside this module, in
`cost_models`. Everything is checked: a constant that is missing, unknown, outside its own range, or without a source is
an error.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Final

import msgspec

from shadowmmu.cpu.loads import WORK
from shadowmmu.machine.costs import Costs, Cycles

__all__ = [
    "Constant",
    "CostModel",
    "CostModelError",
    "Label",
    "cost_model_names",
    "load_cost_model",
    "scaled",
]

_SHIPPED: Final = Path(__file__).parent / "cost_models"
_GUEST: Final = "guest."
_MOST: Final = 1 << 40
NonEmpty = Annotated[str, msgspec.Meta(min_length=1)]


class CostModelError(ValueError):
    """A cost model that cannot be used; the text says which, and what of it."""


class Label(enum.Enum):
    """How well a figure is founded."""

    READ = "P"
    """Read in the source itself."""
    QUOTED = "S"
    """Read elsewhere, where the source is quoted."""
    UNVERIFIED = "U"
    """An estimate, or from memory: the range is wide."""
    DERIVED = "D"
    """By arithmetic from figures of these kinds: `note` shows it."""


class Constant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One figure: `cycles`, and the range in which it may lie; where it comes from."""

    cycles: Cycles
    low: Cycles
    high: Cycles
    label: Label
    source: NonEmpty
    note: str = ""

    def __post_init__(self) -> None:
        if not self.low <= self.cycles <= self.high:
            raise ValueError(f"{self.cycles} cycles are not in the range {self.low} to {self.high}")
        if self.label is Label.DERIVED and not self.note:
            raise ValueError("a derived figure needs a note that shows how")


class _Heading(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: NonEmpty
    title: NonEmpty
    processor: NonEmpty
    ghz: Annotated[float, msgspec.Meta(gt=0.0, le=100.0)]
    kernel: NonEmpty
    notes: str = ""


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    model: _Heading
    costs: dict[str, Constant]
    guest: dict[str, Constant]


class CostModel(msgspec.Struct, frozen=True, kw_only=True):
    """A cost model. `ghz`: of the processors' clock, for cycles as time. `kernel`: of host and guest, as measured.

    `constants`: by name, those of `guest` as `guest.NAME`. `factors`: by which constants were multiplied (`scaled`).
    """

    name: str
    title: str
    processor: str
    ghz: float
    kernel: str
    notes: str
    constants: dict[str, Constant]
    factors: dict[str, float] = {}

    @property
    def costs(self) -> Costs:
        """What `run_timed` takes."""
        cycles = {
            name: min(_MOST, round(constant.cycles * self.factors.get(name, 1.0)))
            for name, constant in self.constants.items()
        }
        guest = {name: cycles.pop(_GUEST + name) for name in WORK}
        return Costs(**cycles, guest=guest)

    def microseconds(self, cycles: float) -> float:
        """So many cycles, as time."""
        return cycles / (self.ghz * 1e3)


def cost_model_names() -> list[str]:
    """The shipped models."""
    return sorted(path.stem for path in _SHIPPED.glob("*.toml"))


def load_cost_model(name_or_path: str | Path) -> CostModel:
    """A shipped model by name, or a file's (what has a suffix or a directory is a path). Raises CostModelError."""
    path = Path(name_or_path)
    if path.suffix != ".toml" and len(path.parts) == 1:
        names = cost_model_names()
        if path.name not in names:
            raise CostModelError(
                f"no cost model {path.name!r}: there are {', '.join(names)}, or name a .toml file"
            )
        return _shipped(path.name)
    return _load(path)


@cache
def _shipped(name: str) -> CostModel:
    model = _load(_SHIPPED / f"{name}.toml")
    if model.name != name:
        raise CostModelError(f"{name}.toml calls itself {model.name!r}")
    return model


def _load(path: Path) -> CostModel:
    try:
        data = path.read_bytes()
        file = msgspec.toml.decode(data, type=_File)
    except OSError as error:
        raise CostModelError(f"cannot read cost model {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        # What is no cost model, no TOML or no text; numbers may be too long, and lists too deep.
        raise CostModelError(f"cost model {path}: {error}") from error
    _check_names(path, "costs", file.costs, [name for name in Costs.__struct_fields__ if name != "guest"])
    _check_names(path, "guest", file.guest, list(WORK))
    constants = file.costs | {_GUEST + name: constant for name, constant in file.guest.items()}
    return CostModel(**msgspec.structs.asdict(file.model), constants=constants)


def _check_names(path: Path, table: str, given: Mapping[str, Constant], wanted: list[str]) -> None:
    missing = [name for name in wanted if name not in given]
    unknown = sorted(given.keys() - set(wanted))
    if missing:
        raise CostModelError(f"cost model {path}: [{table}] has no {', '.join(missing)}")
    if unknown:
        raise CostModelError(f"cost model {path}: [{table}] knows no {', '.join(unknown)}")


def scaled(model: CostModel, factors: Mapping[str, float]) -> CostModel:
    """The model with some constants multiplied; guest work by `guest.NAME`. Raises CostModelError for unknown names.

    Factors of an already scaled model are multiplied. A constant of 0 stays 0.
    """
    product = dict(model.factors)
    for name, factor in factors.items():
        if name not in model.constants:
            raise CostModelError(f"cost model {model.name} has no constant {name!r}")
        if not 0.0 <= factor < float("inf"):
            raise CostModelError(f"cost model {model.name}: {name} cannot be multiplied by {factor}")
        product[name] = product.get(name, 1.0) * factor
    return msgspec.structs.replace(model, factors=product)
