"""The contents of guest memory, by guest physical address.

Contents belong to user space's memory behind a slot (`user_memory`): they stay when the host moves a frame, and when a
slot moves. Nothing here knows whether the host frame is present. Stores are the host's, which knows by its own page
tables that it has made them; guests' stores go to user space's memory directly.
"""

from __future__ import annotations

from collections.abc import Sequence

from shadowmmu.kvm.errors import NoSuchFrameError
from shadowmmu.kvm.memslots import KvmMemorySlot

__all__ = ["GuestMemory"]


class GuestMemory:
    """Reads and writes guest memory by guest physical address (bytes).

    `slots` are those in force; whoever changes them says so here. An access may be unaligned but must stay within one
    page. Methods that are not told the slot raise NoSuchFrameError if none holds the address. With `start_recording`,
    the first old value of every aligned 8-byte word that a write touches is kept.
    """

    __slots__ = ("changed", "slots")

    def __init__(self, slots: Sequence[KvmMemorySlot]) -> None:
        self.slots = slots
        self.changed: dict[int, int] | None = None

    def slot(self, gpa: int) -> KvmMemorySlot:
        """The slot that holds the address."""
        gfn = gpa >> 12
        for slot in self.slots:
            if slot.base_gfn <= gfn < slot.end_gfn:
                return slot
        raise NoSuchFrameError(gfn)

    def read(self, gpa: int, size: int) -> int:
        """`size` bytes (1, 2, 4 or 8) as an unsigned integer."""
        slot = self.slot(gpa)
        return slot.memory.read(gpa - (slot.base_gfn << 12), size)

    def write(self, gpa: int, size: int, value: int) -> None:
        """Store the low `size` bytes of `value`."""
        self.write_in(self.slot(gpa), gpa, size, value)

    def read_in(self, slot: KvmMemorySlot, gpa: int, size: int) -> int:
        """The same in a slot that was looked up before, and may have changed since."""
        return slot.memory.read(gpa - (slot.base_gfn << 12), size)

    def write_in(self, slot: KvmMemorySlot, gpa: int, size: int, value: int) -> None:
        """Likewise."""
        offset = gpa - (slot.base_gfn << 12)
        changed = self.changed
        if changed is not None:
            for word in range(offset >> 3, (offset + size + 7) >> 3):
                changed.setdefault((slot.base_gfn << 12) + (word << 3), slot.words[word])
        slot.memory.write(offset, size, value)
        slot.memory.written.add(offset >> 12)

    def start_recording(self) -> None:
        """Forget what was recorded, and record from now on."""
        self.changed = {}

    def take_changes(self) -> list[tuple[int, int]]:
        """(address, new value) of each word that differs from its value at the last call, by address."""
        if self.changed is None:
            return []
        changes = [
            (gpa, new) for gpa, old in sorted(self.changed.items()) if (new := self.read(gpa, 8)) != old
        ]
        self.changed = {}
        return changes
