"""Page faults without an exit: what the parameter bypass_guest_pf saves, and what it costs.

Only the tree before "KVM: MMU: remove bypass_guest_pf" (profile `pre-patch`) has it. A run of that profile has this
table whether the parameter is on or off, so that two such runs can be compared line by line. Read from the
counters: `vcpu.bypassed` of the workers, `exits.REASON` and `kvm.notrap.NAME` of the MMU service. All pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, get_args

import msgspec

from shadowmmu.kvm import KernelTree, Profile
from shadowmmu.protocol.messages import EptMisconfigExit, ExitReason, RunConfig, tag_of

__all__ = ["PageFaultReport", "page_faults_of"]

_EXITS: Final = "exits."
_OUTCOMES: Final = "outcome.vcpu.page_fault."
_NOTRAP: Final = "kvm.notrap."
_REASONS: Final = tuple(tag_of(kind) for kind in get_args(ExitReason) if kind is not EptMisconfigExit)
"""Why a guest of this kernel exits: it makes no misconfigured EPT entries."""


class PageFaultReport(msgspec.Struct, frozen=True):
    """How the page faults of a run were delivered. All are counts.

    `bypassed`: the guest took them without an exit. `exits`: guest exits by reason, also of those that did not occur.
    `handled`: how the page faults that exited were handled, by outcome; `inject` are the guest's own. `notrap`: shadow
    entries that were made to fault without an exit, by where that was done, and `converted`: made to exit again.
    """

    bypass_guest_pf: bool
    instructions: int
    bypassed: int
    exits: dict[str, int]
    handled: dict[str, int]
    notrap: dict[str, int]

    @property
    def guest_faults(self) -> int:
        """Page faults that the guest took, with and without an exit."""
        return self.bypassed + self.handled.get("inject", 0)


def page_faults_of(config: RunConfig, counters: Mapping[str, int]) -> PageFaultReport | None:
    """The table for a run with these counters; None if its kernel has no bypass_guest_pf."""
    if Profile.parse(config.profile).kernel is not KernelTree.PRE_PATCH:
        return None
    return PageFaultReport(
        bypass_guest_pf=config.bypass_guest_pf,
        instructions=counters.get("vcpu.instructions", 0),
        bypassed=counters.get("vcpu.bypassed", 0),
        exits=dict.fromkeys(_REASONS, 0) | _named(_EXITS, counters),
        handled=_named(_OUTCOMES, counters),
        notrap=_named(_NOTRAP, counters),
    )


def _named(prefix: str, counters: Mapping[str, int]) -> dict[str, int]:
    return {
        name.removeprefix(prefix): value
        for name, value in sorted(counters.items())
        if name.startswith(prefix)
    }
