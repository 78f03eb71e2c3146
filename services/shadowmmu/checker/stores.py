"""Rule 9: lost store. A load returns what was last stored; nothing comes between the halves of a locked operation.

The hot loop of `accesses` compares loads of whole words with guest memory as the stream tells it; everything else of
the rule is here: other sizes, what the emulator does, locked operations, KVM's own updates of guest entries, and
accesses that the emulator took for a device's although there is memory.
"""

from __future__ import annotations

from collections.abc import Callable

from shadowmmu.checker.guest_memory import GuestMemory
from shadowmmu.checker.guest_paging import ACCESSED, DIRTY
from shadowmmu.checker.history import History
from shadowmmu.checker.processor import Processor
from shadowmmu.checker.table_history import TIME_SHIFT
from shadowmmu.checker.violation import Rule, Violation
from shadowmmu.protocol.events import (
    Accesses,
    EmulatedLoad,
    EmulatedStore,
    GpteUpdate,
    LockedRead,
    MmioAccess,
    SlotSettled,
    SlotsPublished,
)

__all__ = ["LostStores"]


class LostStores:
    """Rule 9, beside the guest memory that all rules share.

    Frames that are memory are looked for by slot: `_settled` has, per slot, since when it is reached where it is.
    """

    def __init__(self, history: History, memory: GuestMemory) -> None:
        self._history = history
        self._memory = memory
        self._locked: dict[int, tuple[int, int, int]] = {}  # by vCPU: (gpa, size, value read)
        self._settled: dict[int, tuple[int, int, int]] = {}  # by slot: (first frame, frames, since)

    # --- locked operations --------------------------------------------------------------------------------------

    def locked_read(self, event: LockedRead) -> Violation | None:
        """The first half of a locked operation."""
        self._locked[event.vcpu] = (event.gpa, event.size, event.value)
        return self._compare(event.vcpu, "a locked operation", event.gpa, event.size, event.value)

    def locked_store(self, vcpu: int, gpa: int) -> Violation | None:
        """Before any store of a vCPU that has read for a locked operation: the second half, if it is there."""
        pending = self._locked.pop(vcpu, None)
        if pending is None or pending[0] != gpa:
            return None
        _, size, value = pending
        now = self._memory.load(gpa, size)
        if now is None or now == value:
            return None
        return self._violation(
            vcpu,
            f"a locked operation of vCPU {vcpu} read {value:#x} ({size} bytes at gpa {gpa:#x}) and stores what follows "
            f"from that, but memory holds {now:#x}: a store came between and is lost",
            "whoever emulates a locked operation has to compare and store in one step",
        )

    def locked_access(self, event: Accesses, number: int) -> Violation | None:
        """The same for the hardware's."""
        _, gva, gfn, *_ = event.items[number]
        return self.locked_store(event.vcpu, gfn << 12 | gva & 0xFFF)

    def pending(self, vcpu: int) -> bool:
        """Whether the vCPU has read for a locked operation and not stored yet."""
        return vcpu in self._locked

    # --- loads --------------------------------------------------------------------------------------------------

    def loaded(self, event: Accesses, number: int, *, report: bool) -> Violation | None:
        """Item `number` may have loaded something else than memory has, or what is not known."""
        _, gva, gfn, _, size, value = event.items[number]
        if gfn < 0:
            return None
        gpa = gfn << 12 | gva & 0xFFF
        self._memory.frame(gfn)  # the next load finds it at once
        now = self._memory.load(gpa, size)
        if now is None:
            self._memory.learn(gpa, size, value)
            return None
        if now == value or not report:
            return None
        return self._history.access_violation(
            Rule.LOST_STORE,
            event,
            number,
            why=f"returned {value:#x}, but memory holds {now:#x} at gpa {gpa:#x}",
            blame="whoever kept an old copy of the page, or brought one back",
            related=[],
        )

    def emulated_load(self, event: EmulatedLoad) -> Violation | None:
        """The emulator loads for the guest."""
        return self._compare(event.vcpu, "an emulated load", event.gpa, event.size, event.value)

    def _compare(self, vcpu: int, what: str, gpa: int, size: int, value: int) -> Violation | None:
        now = self._memory.load(gpa, size)
        if now is None:
            self._memory.learn(gpa, size, value)
            return None
        if now == value:
            return None
        return self._violation(
            vcpu,
            f"{what} of vCPU {vcpu} ({size} bytes at gpa {gpa:#x}) returned {value:#x}, but memory holds {now:#x}",
            "whoever kept an old copy of the page, or brought one back",
        )

    # --- what KVM stores ----------------------------------------------------------------------------------------

    def emulated_store(self, event: EmulatedStore) -> Violation | None:
        """Before the emulator's store takes effect."""
        return self.locked_store(event.vcpu, event.gpa)

    def gpte_update(self, event: GpteUpdate) -> Violation | None:
        """Before KVM's walk sets A or D: nothing else may change."""
        now = self._memory.load(event.gpa, event.size)
        if now is None or not (now ^ event.value) & ~(ACCESSED | DIRTY):
            return None
        return self._violation(
            event.vcpu,
            f"the walk for vCPU {event.vcpu} sets accessed or dirty in the guest entry at gpa {event.gpa:#x} and makes "
            f"it {event.value:#x}, but memory holds {now:#x}: a store came between and is lost",
            "whoever sets the bits has to compare and exchange the whole entry",
        )

    # --- accesses to devices ------------------------------------------------------------------------------------

    def slots_published(self, event: SlotsPublished) -> None:
        """A slot that moves or goes is not settled any more."""
        now = {slot: (base, npages) for slot, base, npages, going in event.slots if not going}
        for slot in [slot for slot, settled in self._settled.items() if now.get(slot) != settled[:2]]:
            del self._settled[slot]
        if self._history.index == 0:  # the slots that a run begins with
            self._settled = {slot: (base, npages, 0) for slot, (base, npages) in now.items()}

    def slot_settled(self, event: SlotSettled, time: int) -> None:
        """The slot can be reached there from now on."""
        before = self._settled.get(event.slot)
        if event.npages and (before is None or before[:2] != (event.base_gfn, event.npages)):
            self._settled[event.slot] = event.base_gfn, event.npages, time

    def mmio_access(self, processor: Processor, event: MmioAccess) -> Violation | None:
        """The emulator takes an access for a device's: at some time since the exit the frame was in no slot."""
        gfn = event.gpa >> 12
        for slot, (base, npages, since) in self._settled.items():
            if base <= gfn < base + npages and since < processor.exited:
                what = "a store" if event.write else "a load"
                return self._violation(
                    event.vcpu,
                    f"{what} of vCPU {event.vcpu} ({event.size} bytes at gpa {event.gpa:#x}) was taken for an access "
                    f"to a device, but the frame is memory: slot {slot} has been there since event "
                    f"{since >> TIME_SHIFT}, before the access began",
                    "whoever remembered that there was no memory",
                )
        return None

    def _violation(self, vcpu: int, text: str, blame: str) -> Violation:
        return Violation(
            rule=Rule.LOST_STORE,
            text=text,
            vcpu=vcpu,
            access=None,
            journal_record=self._history.record,
            event_index=self._history.index,
            blame=blame,
            related=tuple(self._history.flushes_of(vcpu)),
        )

    def snapshot(self, rank: Callable[[int], int]) -> object:
        """What future verdicts depend on, canonically; `rank` replaces times."""
        return (
            tuple(sorted(self._locked.items())),
            tuple(
                (slot, base, npages, rank(since))
                for slot, (base, npages, since) in sorted(self._settled.items())
            ),
        )
