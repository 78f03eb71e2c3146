"""The host's threads in virtual time: which operation each asks for next, and when."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

from shadowmmu.cpu.guest import huge_base
from shadowmmu.machine.host_program import HostProgram
from shadowmmu.protocol import messages as m

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shadowmmu.machine.timed_config import HostActor, TimedConfig

__all__ = ["HostThread"]


class HostThread:
    """One thread: endless. Times are cycles; it begins at `first`."""

    def __init__(self, number: int, actor: HostActor, config: TimedConfig) -> None:
        self.number = number
        self.kind = actor.kind
        self.first = actor.interval
        self.next_start = 0
        self._interval = actor.interval
        self._operations = _operations(actor, config)

    def next_operation(self, now: int) -> m.HostOperation:
        """What it asks for at `now`; the one after that begins an interval later, or when this one has returned."""
        self.next_start = now + self._interval
        return next(self._operations)


def _operations(actor: HostActor, config: TimedConfig) -> Iterator[m.HostOperation]:
    kind = actor.kind
    pages = config.run.memory_pages
    base = huge_base(pages)
    match kind.value:
        case "dirty-log":
            slots = range(1 if base == pages else 2)
            yield from (m.SetDirtyLog(slot, enable=True) for slot in slots)
            yield from (m.GetDirtyLog(slot) for slot in cycle(slots))
        case "unmap":
            yield from (m.Unmap(gfn) for gfn in cycle(range(base)))
        case "age":
            yield from (m.Age(gfn) for gfn in cycle(range(base)))
        case _:
            program = HostProgram(config.run, config.vcpus)
            while True:
                yield program.next_operation()
