"""Which translations a client may hold: all that walks gave it, without those that it had to drop. Pure.

A client MAY drop more, and MAY hold a translation of each size for an address, and several for a page; so this is the
largest TLB that the specification permits. What is dropped is remembered with the reason, so that its use can be named.
"""

from __future__ import annotations

import enum

import msgspec

from shadowmmu.protocol.events import AccessFlag

__all__ = ["Dropped", "Grant", "Misuse", "TlbModel"]

_RIGHTS = 0xFF00 & ~int(AccessFlag.LARGE)
"""LARGE is not compared: it says how the walk found the translation, and 1 GiB leaves may be held in pieces."""


class Dropped(enum.Enum):
    """Why a translation may not be used any more."""

    FLUSH = "flush"
    NO_VPID = "no VPID"
    INVLPG = "INVLPG"
    FAULT = "a page fault"
    INCARNATION = "a new incarnation"
    PROCESSOR = "another processor"


class Grant(msgspec.Struct, frozen=True):
    """A translation that a walk gave. `page`: the gva in units of the leaf's size; `pfn` that of its first frame."""

    level: int
    page: int
    pfn: int
    flags: int

    def frame(self, gva: int) -> int:
        """The 4 KiB frame that `gva` is in."""
        return self.pfn + ((gva >> 12) & ((1 << 9 * (self.level - 1)) - 1))


class Misuse(msgspec.Struct, frozen=True):
    """An access that no translation allows. `dropped`: there was one, until this; None: there never was."""

    text: str
    dropped: Dropped | None = None
    rights: bool = False


class TlbModel:
    """The largest TLB that a client may have, over all its incarnations."""

    def __init__(self) -> None:
        self._banks: dict[int, set[Grant]] = {}
        self._dead: dict[Grant, Dropped] = {}
        self.processor = 0

    @property
    def _bank(self) -> set[Grant]:
        return self._banks.setdefault(self.processor, set())

    def grant(self, gva: int, pfn: int, level: int, flags: int) -> None:
        """A walk has found a translation."""
        grant = Grant(level, gva >> (12 + 9 * (level - 1)), pfn, flags & _RIGHTS)
        self._dead.pop(grant, None)
        self._bank.add(grant)

    def select(self, processor: int) -> bool:
        """The vCPU runs on that processor now. Whether it holds nothing there that it held before."""
        moved = processor != self.processor and bool(self._bank)
        self.processor = processor
        return moved

    def clear(self, why: Dropped) -> bool:
        """Everything on the current processor goes. Whether there was anything."""
        return self._drop(self._bank, set(self._bank), why)

    def clear_all(self, why: Dropped) -> bool:
        """Everything on all processors goes. Whether there was anything."""
        return sum(self._drop(bank, set(bank), why) for bank in self._banks.values()) > 0

    def drop(self, gva: int, why: Dropped) -> bool:
        """What covers the address goes. Whether there was anything."""
        return self._drop(self._bank, self._covering(self._bank, gva), why)

    def _drop(self, bank: set[Grant], gone: set[Grant], why: Dropped) -> bool:
        bank -= gone
        self._dead.update(dict.fromkeys(gone, why))
        return bool(gone)

    @staticmethod
    def _covering(grants: set[Grant], gva: int) -> set[Grant]:
        return {g for g in grants if gva >> (12 + 9 * (g.level - 1)) == g.page}

    def misuse(self, flags: int, gva: int, pfn: int) -> Misuse | None:
        """Why an access with these flags (of the access and of its translation) is not allowed, or None if it is."""
        rights = flags & _RIGHTS
        for grant in self._covering(self._bank, gva):
            if grant.frame(gva) == pfn and grant.flags == rights:
                return self._rights_misuse(flags, gva)
        what = f"access {flags:#x} to {gva:#x} by host frame {pfn:#x}"
        for grant in self._covering(set(self._dead), gva):
            if grant.frame(gva) == pfn and grant.flags == rights:
                why = self._dead[grant]
                return Misuse(f"{what}: that translation had to go ({why.value})", why)
        for processor, bank in self._banks.items():
            if any(g.frame(gva) == pfn for g in self._covering(bank, gva)) and processor != self.processor:
                return Misuse(f"{what}: that translation is processor {processor}'s", Dropped.PROCESSOR)
        return Misuse(f"{what}: no walk gave such a translation")

    @staticmethod
    def _rights_misuse(flags: int, gva: int) -> Misuse | None:
        f = AccessFlag
        need = 0
        if flags & f.WRITE:
            need |= f.MAY_WRITE | f.DIRTY
        if flags & f.USER:
            need |= f.MAY_USER
        if flags & f.FETCH:
            need |= f.MAY_FETCH
        missing = need & ~flags
        if flags & f.FETCH and flags & f.SMEP and not flags & f.USER:
            return Misuse(f"fetch {flags:#x} from {gva:#x}: SMEP forbids it", rights=True)
        if missing:
            return Misuse(f"access {flags:#x} to {gva:#x}: the translation lacks {missing:#x}", rights=True)
        return None
