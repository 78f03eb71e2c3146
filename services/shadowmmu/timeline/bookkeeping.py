"""What both forms of a timeline have to remember of the events: who holds mmu_lock, host threads, shadow pages.

The event stream names a host operation by its number and a shadow page by its serial number. Here is what the events
before said of them. Bounded by what is under way and by the shadow pages in use. Relies on `shadowmmu.kvm.role`.
"""

from __future__ import annotations

import heapq

import msgspec

from shadowmmu.kvm.role import ROLE_INVALID
from shadowmmu.protocol.events import (
    Entered,
    ShadowPageCreated,
    ShadowPageSynced,
    ShadowPageUnsynced,
    ShadowPageZapped,
)

__all__ = ["HostThreads", "Page", "Pages"]


class HostThreads:
    """Threads of the host agent: as many as it has operations under way at once, numbered from 0."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._count = 0

    def take(self) -> int:
        """The lowest number that nobody has."""
        if self._free:
            return heapq.heappop(self._free)
        self._count += 1
        return self._count - 1

    def give_back(self, number: int) -> None:
        """The thread's operation has ended."""
        heapq.heappush(self._free, number)


class Page(msgspec.Struct):
    """A shadow page as a tracepoint shows it: `role` is the kernel's role word."""

    gfn: int
    role: int
    unsync: bool = False


class Pages:
    """The shadow pages in use: made, and not zapped since; also roots that were zapped while a vCPU had them."""

    def __init__(self) -> None:
        self._pages: dict[int, Page] = {}
        self._roots: dict[int, int] = {}
        self.unsync = 0

    def __len__(self) -> int:
        return len(self._pages)

    def root_count(self, sp: int) -> int:
        """How many vCPUs were last entered on this root (the kernel's root_count, as far as events tell)."""
        return sum(1 for root in self._roots.values() if root == sp)

    def page(self, sp: int) -> Page:
        """The page, as it is before the event that names it. One that was never made is taken for an empty role."""
        return self._pages.get(sp) or Page(0, 0)

    def entered(self, event: Entered) -> None:
        """A vCPU runs on this root."""
        self._roots[event.vcpu] = event.root

    def created(self, event: ShadowPageCreated) -> None:
        """kvm_mmu_get_page made it."""
        self._pages[event.sp] = Page(event.gfn, event.role)

    def unsynced(self, event: ShadowPageUnsynced) -> None:
        """It goes out of sync."""
        self._set_unsync(event.sp, on=True)

    def synced(self, event: ShadowPageSynced) -> None:
        """It is in sync again."""
        self._set_unsync(event.sp, on=False)

    def zapped(self, event: ShadowPageZapped) -> None:
        """It is gone, or, while still some vCPU's root, invalid."""
        self._set_unsync(event.sp, on=False)
        if event.in_use:
            self.page(event.sp).role |= ROLE_INVALID
        else:
            self._pages.pop(event.sp, None)

    def _set_unsync(self, sp: int, *, on: bool) -> None:
        page = self._pages.get(sp)
        if page is not None and page.unsync != on:
            page.unsync = on
            self.unsync += 1 if on else -1
