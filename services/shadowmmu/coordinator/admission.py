"""Who may have a place in a run, at what time: rules without state of their own. Pure."""

from __future__ import annotations

import msgspec

from shadowmmu.coordinator.members import Member
from shadowmmu.coordinator.roster import Roster
from shadowmmu.coordinator.run_types import Phase
from shadowmmu.protocol.errors import ErrorCode
from shadowmmu.protocol.messages import Role

__all__ = ["Admission"]


class Admission(msgspec.Struct, frozen=True):
    """The rules in a phase of a run. `wanted`: vCPUs (None: any number); `vcpus`: those that the run started with."""

    phase: Phase
    roster: Roster
    wanted: int | None
    vcpus: int
    text: str

    def is_free(self, role: Role) -> bool:
        """Whether one more of that role is taken at once."""
        match role:
            case Role.MMU:
                return self.phase is Phase.WAITING and self.roster.mmu is None
            case Role.VCPU:
                return self.phase is Phase.WAITING and len(self.roster.present(role)) < (self.wanted or 256)
            case _:
                return self.phase is Phase.WAITING or (self.takes_more(role) and not self.roster.live(role))

    def takes_more(self, role: Role) -> bool:
        """Whether more of them are no harm: a run that has begun can do with another host agent."""
        return role is Role.HOST and self.phase in (Phase.WAITING, Phase.STARTING, Phase.RUNNING)

    def may_become_free(self, role: Role) -> bool:
        """Whether a place of that role may be a dead process's."""
        if self.phase is Phase.FINISHED or (self.phase is Phase.WAITING and role is Role.VCPU):
            return False
        return any(member.report is None for member in self.roster.live(role))

    def may_return(self, member: Member) -> bool:
        """Whether one who was lost, and did not give up, may have its place again: before the run, if it is free."""
        return self.phase is Phase.WAITING and member.report is None and self.is_free(member.role)

    def refusal(self, role: Role) -> tuple[ErrorCode, str]:
        """Why there is no place."""
        if self.phase is Phase.FINISHED:
            return ErrorCode.RUN_FINISHED, self.text
        if self.phase is Phase.DRAINING:
            return ErrorCode.DRAINING, "the run is being drained"
        if role is Role.MMU:
            return ErrorCode.RUN_FULL, f"the run has its {self.roster.mmu} already"
        if self.phase is Phase.WAITING:
            return ErrorCode.RUN_FULL, f"the run has its {len(self.roster.present(role))} vCPUs"
        return ErrorCode.RUN_FULL, f"the run has started with {self.vcpus} vCPUs"
