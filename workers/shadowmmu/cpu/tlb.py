"""A processor's translation lookaside buffer (TLB): recent translations, kept until something removes them.

Set-associative, least recently used out first, with separate arrays for 4 KiB and for 2 MiB translations, as in
processors of 2011. Entries carry the tag (physical processor, VPID) under which they were made and are found only
under it. Which events remove entries is TLB_RULES R4, and the caller's business (`vcpu_core`); here are only the
mechanisms. Two things that real TLBs do and this one does too: both sizes may hold a translation for the same address,
and translations that are not present are never held. Relies on the access flags of the event stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from shadowmmu.protocol.events import AccessFlag

__all__ = ["Tag", "Tlb", "TlbEntry", "checked_rights", "needed_rights"]

_LARGE: Final = int(AccessFlag.LARGE)

MAX_ACCESS_FLAGS: Final = 32
"""Access types are AccessFlag bits 0 to 4."""


def _needs(flags: int) -> int:
    need = 0
    if flags & AccessFlag.WRITE:
        need |= AccessFlag.MAY_WRITE | AccessFlag.DIRTY
    if flags & AccessFlag.USER:
        need |= AccessFlag.MAY_USER
    if flags & AccessFlag.FETCH:
        need |= AccessFlag.MAY_FETCH
    return int(need)


needed_rights: Final[tuple[int, ...]] = tuple(map(_needs, range(MAX_ACCESS_FLAGS)))
"""For each access type (AccessFlag bits 0 to 4) the bits that a cached translation must have for it.

A write needs DIRTY too: the processor sets D in memory before it writes, so an entry that does not have it is walked
again (TLB_RULES R8). CR0.WP is 1 whenever a guest runs under shadow paging, so supervisor writes need MAY_WRITE.
"""


checked_rights: Final[tuple[int, ...]] = tuple(
    need | (AccessFlag.SMEP if flags & AccessFlag.FETCH and not flags & AccessFlag.USER else 0)
    for flags, need in enumerate(needed_rights)
)
"""For each access type the bits of a cached translation that must be as in `needed_rights`.

A supervisor fetch must not find SMEP. An entry has it if CR4.SMEP was set when it was made; whoever sets or clears
that bit flushes.
"""


class Tag(NamedTuple):
    """Whose translations: a physical processor's, for one virtual-processor identifier (0: VPID off)."""

    processor: int
    vpid: int


class TlbEntry:
    """One translation. `page` is the gva divided by its size; `pfn` that of the first 4 KiB frame.

    `flags` are AccessFlag bits 8 and up. `used` is the clock of the last use.
    """

    __slots__ = ("flags", "page", "pfn", "used")

    def __init__(self, page: int, pfn: int, flags: int, used: int) -> None:
        self.page = page
        self.pfn = pfn
        self.flags = flags
        self.used = used

    def frame(self, gva: int) -> int:
        """The 4 KiB frame that `gva` is in."""
        return self.pfn + ((gva >> 12) & 511) if self.flags & _LARGE else self.pfn

    def __repr__(self) -> str:
        return f"TlbEntry(page={self.page:#x}, pfn={self.pfn:#x}, flags={self.flags:#x})"


class _Array:
    """Translations of one page size: an index by page for lookups, the sets for replacement."""

    __slots__ = ("index", "sets", "ways")

    def __init__(self, sets: int, ways: int) -> None:
        self.index: dict[int, TlbEntry] = {}
        self.sets: list[list[TlbEntry]] = [[] for _ in range(sets)]
        self.ways = ways

    def put(self, entry: TlbEntry) -> None:
        row = self.sets[entry.page % len(self.sets)]
        old = self.index.get(entry.page)
        if old is not None:
            row.remove(old)
        elif len(row) == self.ways:
            victim = min(row, key=_last_use)
            row.remove(victim)
            del self.index[victim.page]
        row.append(entry)
        self.index[entry.page] = entry

    def drop(self, page: int) -> bool:
        entry = self.index.pop(page, None)
        if entry is None:
            return False
        self.sets[page % len(self.sets)].remove(entry)
        return True

    def clear(self) -> bool:
        if not self.index:
            return False
        self.index.clear()
        for row in self.sets:
            row.clear()
        return True


def _last_use(entry: TlbEntry) -> int:
    return entry.used


class _Bank:
    """Everything held under one tag."""

    __slots__ = ("large", "small")

    def __init__(self, sets: int, ways: int) -> None:
        self.small = _Array(sets, ways)
        self.large = _Array(max(1, sets // 4), ways)


class Tlb:
    """The TLB that a virtual processor uses.

    `sets` and `ways` are those of the array for 4 KiB; that for 2 MiB has a quarter of the sets. `vpid`: entries are
    tagged and survive exits and entries of guest mode.

    `small` and `large` are the lookup indices under the current tag, by gva >> 12 and gva >> 21; the hot loop of
    `vcpu_core` reads them directly. They stay the same objects until `select`.
    """

    def __init__(self, sets: int, ways: int, vpid: bool = True, processor: int = 0) -> None:
        self._geometry = (sets, ways)
        self._banks: dict[Tag, _Bank] = {}
        self.vpid = vpid
        self.clock = 0
        self.select(Tag(processor, 1 if vpid else 0))

    def select(self, tag: Tag) -> None:
        """Run under `tag` from now on: the virtual processor moved to another physical one, or has another VPID."""
        bank = self._banks.get(tag)
        if bank is None:
            bank = self._banks[tag] = _Bank(*self._geometry)
        self.tag = tag
        self._bank = bank
        self.small = bank.small.index
        self.large = bank.large.index

    def held(self) -> Iterator[tuple[Tag, tuple[Mapping[int, TlbEntry], Mapping[int, TlbEntry]]]]:
        """By tag: what is held of 4 KiB (by gva >> 12) and of 2 MiB (by gva >> 21)."""
        for tag, bank in self._banks.items():
            yield tag, (bank.small.index, bank.large.index)

    def __len__(self) -> int:
        return len(self.small) + len(self.large)

    def lookup(self, gva: int) -> TlbEntry | None:
        """The translation of `gva`, and note its use."""
        entry = self.small.get(gva >> 12)
        if entry is None:
            entry = self.large.get(gva >> 21)
            if entry is None:
                return None
        self.clock += 1
        entry.used = self.clock
        return entry

    def insert(self, gva: int, pfn: int, level: int, flags: int) -> TlbEntry:
        """Hold what a walk found for `gva`: a leaf at `level`, whose first 4 KiB frame is `pfn`.

        An entry of the other size for the same address goes, so that what has just been walked is what the next
        lookup finds. A 1 GiB leaf is held as the 2 MiB piece that `gva` is in.
        """
        self.clock += 1
        if level == 1:
            self._bank.large.drop(gva >> 21)
            entry = TlbEntry(gva >> 12, pfn, flags & ~_LARGE, self.clock)
            self._bank.small.put(entry)
            return entry
        if level == 3:
            pfn += (gva >> 12) & 0x3FE00
        self._bank.small.drop(gva >> 12)
        entry = TlbEntry(gva >> 21, pfn, flags | _LARGE, self.clock)
        self._bank.large.put(entry)
        return entry

    def invalidate(self, gva: int) -> bool:
        """Remove the translations of `gva`, all sizes. Whether there was one."""
        small = self._bank.small.drop(gva >> 12)
        return self._bank.large.drop(gva >> 21) or small

    def flush(self) -> bool:
        """Remove everything held under the current tag. Whether there was anything."""
        small = self._bank.small.clear()
        return self._bank.large.clear() or small

    def world_switch(self) -> bool:
        """The processor enters or leaves guest mode: without a VPID nothing survives that."""
        return not self.vpid and self.flush()
