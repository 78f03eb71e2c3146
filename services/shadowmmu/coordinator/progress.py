"""How far a run is, for people who watch it."""

from __future__ import annotations

import msgspec

from shadowmmu.coordinator.run_state import RunState
from shadowmmu.coordinator.run_types import Phase
from shadowmmu.protocol.messages import Role

__all__ = ["Snapshot", "snapshot_of"]


class Snapshot(msgspec.Struct, frozen=True):
    """A run at a moment. `seconds`: since the start of the run; `ops`: instructions to be executed."""

    phase: str
    detail: str
    instructions: int
    ops: int
    accesses: int
    page_faults: int
    flushes: int
    events: int
    seconds: float

    @property
    def line(self) -> str:
        """One line of text."""
        if not self.instructions:
            return f"{self.phase}: {self.detail}"
        rate = self.instructions / self.seconds if self.seconds > 0 else 0.0
        return (
            f"{self.phase}: {self.instructions:,} of {self.ops:,} instructions ({rate:,.0f}/s), "
            f"{self.page_faults:,} page faults, {self.flushes:,} remote flushes, {self.events:,} events checked"
        )


def snapshot_of(state: RunState, now: float) -> Snapshot:
    """The run now; `now` by the state's clock."""
    counters: dict[str, int] = {}
    for member in state.members:
        if member.role is Role.MMU:
            counters |= member.counters
    return Snapshot(
        phase=state.phase.value,
        detail=_detail(state),
        instructions=state.instructions,
        ops=state.settings.config.ops,
        accesses=counters.get("accesses.applied", 0),
        page_faults=counters.get("exits.page_fault", 0),
        flushes=counters.get("kvm.remote_tlb_flush", 0),
        events=state.events,
        seconds=0.0 if state.started_at is None else max(now - state.started_at, 0.0),
    )


def _detail(state: RunState) -> str:
    match state.phase:
        case Phase.WAITING:
            wanted = "" if state.settings.vcpus is None else f" of {state.settings.vcpus}"
            mmu = "the MMU service has joined" if state.mmu_joined else "no MMU service yet"
            return f"{state.count(Role.VCPU, ready=True)}{wanted} vCPUs are ready, {mmu}"
        case Phase.STARTING:
            return f"the MMU service prepares {state.vcpus} vCPUs"
        case Phase.DRAINING if state.stage is not None:
            return f"waiting for the {state.stage.value}"
        case _:
            return f"{state.vcpus} vCPUs"
