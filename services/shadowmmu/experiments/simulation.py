"""simulation.json: a run in virtual time and what came of it, as `shadowmmu simulate --out` leaves it.

The configuration and the cost model are all that the run depends on: `events` executes it again for whoever wants to
see what happened in it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from shadowmmu.machine.costs import Costs
from shadowmmu.machine.timed_config import TimedConfig, TimedResult
from shadowmmu.machine.virtual_time import run_timed
from shadowmmu.protocol.events import Event

__all__ = ["SCHEMA", "SIMULATION_NAME", "Simulation", "SimulationError", "execute_again", "read_simulation"]

SCHEMA: Final = "shadowmmu-simulation/1"
SIMULATION_NAME: Final = "simulation.json"
"""The file in the folder of a run in virtual time."""


class SimulationError(ValueError):
    """A file that is no simulation.json of this version; the text is a line for people."""


class Simulation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A run: `version` of what executed it, the cost model's name, clock rate and figures, and the result."""

    schema: str = SCHEMA
    version: str
    config: TimedConfig
    cost_model: str
    ghz: float
    costs: Costs
    result: TimedResult

    def encode(self) -> bytes:
        """As JSON for people and programs."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    def write(self, folder: Path) -> None:
        """Into an existing folder. Raises OSError."""
        (folder / SIMULATION_NAME).write_bytes(self.encode())


def read_simulation(folder: Path) -> Simulation:
    """Raises SimulationError, OSError."""
    path = folder / SIMULATION_NAME
    try:
        simulation = msgspec.json.decode(path.read_bytes(), type=Simulation)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SimulationError(f"{path}: {str(error).replace('`', '')}") from error
    if simulation.schema != SCHEMA:
        raise SimulationError(f"{path} has schema {simulation.schema}, not {SCHEMA}")
    return simulation


def execute_again(simulation: Simulation, on_event: Callable[[int, Event], None]) -> TimedResult:
    """Executes the run again, and tells each event with its time in cycles, as `run_timed` does.

    Raises SimulationError if the result is another: the program has changed since.
    """
    result = run_timed(simulation.config, simulation.costs, on_event)
    if result.digest != simulation.result.digest:
        raise SimulationError(
            f"executed again the run gives digest {result.digest}, not {simulation.result.digest}:"
            f" it was made by another version of the program ({simulation.version})"
        )
    return result
