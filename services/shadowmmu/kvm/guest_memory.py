"""The contents of guest memory.

Contents belong to guest frames: they stay when the host moves a frame. Little-endian throughout; the host must be
little-endian too, since words are accessed natively. Nothing here knows whether the host frame is present, or marks
anything dirty.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from shadowmmu.kvm.errors import NoSuchFrameError
from shadowmmu.kvm.memslots import KvmMemorySlot

__all__ = ["GuestMemory"]

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("shadowmmu keeps guest memory as native words and needs a little-endian host")


class GuestMemory:
    """Reads and writes guest memory by guest physical address (bytes).

    An access may be unaligned but must stay within one page. Every method raises NoSuchFrameError if no slot holds
    the address. With `start_recording`, the first old value of every aligned 8-byte word that a write touches is kept.
    """

    __slots__ = ("_slots", "changed")

    def __init__(self, slots: Sequence[KvmMemorySlot]) -> None:
        self._slots = slots
        self.changed: dict[int, int] | None = None

    def slot(self, gpa: int) -> KvmMemorySlot:
        """The slot that holds the address."""
        gfn = gpa >> 12
        for slot in self._slots:
            if slot.base_gfn <= gfn < slot.end_gfn:
                return slot
        raise NoSuchFrameError(gfn)

    def read(self, gpa: int, size: int) -> int:
        """`size` bytes (1, 2, 4 or 8) as an unsigned integer."""
        slot = self.slot(gpa)
        offset = gpa - (slot.base_gfn << 12)
        if size == 8 and not offset & 7:
            return slot.words[offset >> 3]
        return int.from_bytes(slot.data[offset : offset + size], "little")

    def write(self, gpa: int, size: int, value: int) -> None:
        """Store the low `size` bytes of `value`."""
        slot = self.slot(gpa)
        offset = gpa - (slot.base_gfn << 12)
        changed = self.changed
        if changed is not None:
            for word in range(offset >> 3, (offset + size + 7) >> 3):
                changed.setdefault((slot.base_gfn << 12) + (word << 3), slot.words[word])
        if size == 8 and not offset & 7:
            slot.words[offset >> 3] = value & 0xFFFFFFFFFFFFFFFF
        else:
            slot.data[offset : offset + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")

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
