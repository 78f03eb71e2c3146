"""User space's memory behind a slot: what the guest's memory is to the rest of the host.

It is named by host virtual page numbers, which nobody uses twice; a slot says at which guest frame the range begins.
So contents and host pages stay when a slot moves, and go when user space unmaps the range, not when the slot goes.
Words are native: little-endian.
"""

from __future__ import annotations

import sys
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Any, Final

__all__ = ["FrameCopy", "UserMemory"]

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("shadowmmu keeps guest memory as native words and needs a little-endian host")


_ZERO_PAGE: Final = bytes(4096)


def _zeros(npages: int) -> memoryview:
    # Anonymous memory costs nothing until it is touched; a bytearray of 1 GiB would be filled with zeros first.
    return memoryview(mmap(-1, npages << 12, flags=MAP_PRIVATE | MAP_ANONYMOUS) if npages else b"")


class UserMemory:
    """The host virtual pages `base` to `end` - 1.

    `base_gfn` is the guest frame at which a slot has them, or had them last. `words` and `dwords` are the contents
    as aligned 8-byte and 4-byte words. `written` are the pages (counted from the first) that were stored to through the
    host's own page tables since they were last written to swap; guests' stores are not noted here. After `unmap`, loads
    by stale translations give 0 and stores go nowhere.
    """

    __slots__ = ("base", "base_gfn", "data", "dwords", "end", "mapped", "words", "written")

    def __init__(self, base: int, npages: int, base_gfn: int) -> None:
        self.base = base
        self.end = base + npages
        self.base_gfn = base_gfn
        self.mapped = True
        self.written: set[int] = set()
        self.data = _zeros(npages)
        self.words: memoryview[int] = self.data.cast("Q")
        self.dwords: memoryview[int] = self.data.cast("I")

    def __getstate__(self) -> dict[str, object]:
        """For a copy: of the contents, the pages that are not all zeros."""
        data = self.data
        pages = ((page, bytes(data[page << 12 : page + 1 << 12])) for page in range(len(data) >> 12))
        return {
            "base": self.base,
            "end": self.end,
            "base_gfn": self.base_gfn,
            "mapped": self.mapped,
            "written": self.written,
            "contents": {page: contents for page, contents in pages if contents != _ZERO_PAGE},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        contents = state.pop("contents")
        for name, value in state.items():
            setattr(self, name, value)
        self.data = _zeros(self.end - self.base if self.mapped else 0)
        for page, data in contents.items():
            self.data[page << 12 : page + 1 << 12] = data
        self.words = self.data.cast("Q")
        self.dwords = self.data.cast("I")

    def gfn(self, page: int) -> int:
        """The guest frame that a host virtual page is, or was last."""
        return page - self.base + self.base_gfn

    def read(self, offset: int, size: int) -> int:
        """`size` bytes (1, 2, 4 or 8) at `offset` (bytes from the beginning) as an unsigned integer."""
        if not self.mapped:
            return 0
        if size == 8 and not offset & 7:
            return self.words[offset >> 3]
        return int.from_bytes(self.data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Store the low `size` bytes of `value`."""
        if not self.mapped:
            return
        if size == 8 and not offset & 7:
            self.words[offset >> 3] = value & 0xFFFFFFFFFFFFFFFF
        else:
            self.data[offset : offset + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")

    def unmap(self) -> None:
        """Give the contents back to the host."""
        self.mapped = False
        self.words = self.dwords = self.data = memoryview(b"")


class FrameCopy(UserMemory):
    """One page as its old frame has it while the host has copied it to a new one, and KVM does not know (bug A13).

    Translations from before lead here. They see nothing that is stored to the page now. Their own stores are not lost:
    where the host really copies pages it has made them read-only, so that there are none.
    """

    __slots__ = ("_memory", "_offset")

    def __init__(self, memory: UserMemory, page: int) -> None:
        super().__init__(page, 1, memory.gfn(page))
        self._memory = memory
        self._offset = page - memory.base << 12
        self.data[:] = memory.data[self._offset : self._offset + 4096]

    def __getstate__(self) -> dict[str, object]:
        return super().__getstate__() | {"_memory": self._memory, "_offset": self._offset}

    def write(self, offset: int, size: int, value: int) -> None:
        """Store to the old frame and to the page."""
        super().write(offset, size, value)
        self._memory.write(self._offset + offset, size, value)
