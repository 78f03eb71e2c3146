"""A virtual machine as the MMU sees it (struct kvm, kvm_arch): its memory, its shadow pages, its vCPUs.

Plain state and look-ups only; what changes it are the operations of the other modules.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

import msgspec

from shadowmmu.cpu.x86 import PT64_BASE_ADDR_MASK
from shadowmmu.kvm.constants import KVM_MIN_ALLOC_MMU_PAGES
from shadowmmu.kvm.contexts import build_context, initial_context
from shadowmmu.kvm.errors import ConfigError
from shadowmmu.kvm.guest_memory import GuestMemory
from shadowmmu.kvm.host_memory import HostMemory
from shadowmmu.kvm.memslots import NO_SLOT, KvmMemorySlot, MemorySlot, check_memslots
from shadowmmu.kvm.page import SHADOW_PAGE_BASE, ShadowPage
from shadowmmu.kvm.points import MEMORY_POINTS, Point
from shadowmmu.kvm.profiles import KernelTree, Profile
from shadowmmu.kvm.spte import SHADOW_TRAP_NONPRESENT_PTE, SpteFormat, ept_format, shadow_format
from shadowmmu.kvm.stats import KvmStat, NotrapStat
from shadowmmu.kvm.tracepoints import Tracepoints
from shadowmmu.kvm.user_memory import UserMemory
from shadowmmu.kvm.vcpu import Vcpu
from shadowmmu.kvm.work import Work
from shadowmmu.protocol.events import Event, SlotsPublished
from shadowmmu.protocol.messages import MemoryModel, Tdp

__all__ = ["Kvm", "KvmConfig"]


class KvmConfig(msgspec.Struct, frozen=True):
    """What a virtual machine is made of.

    `n_max_mmu_pages` limits the shadow pages in use. `host_phys_bits` (40 to 51) is where the bits begin that mark
    MMIO shadow entries; `guest_maxphyaddr` (32 to 51) where the guest's reserved address bits begin. `tdp`: the format
    of two-dimensional paging, None for shadow paging. `bypass_guest_pf`: the module parameter of that name, in a tree
    that has it. `memory_model`: of the host's processors. `tlbs_dirty_bits` (2 to 32): the width of the int through
    which notifiers look at tlbs_dirty (bug A11). `oos_shadow`: the module parameter of that name; without it guest
    tables never go out of sync.
    """

    memslots: tuple[MemorySlot, ...]
    n_max_mmu_pages: int = 1024
    host_phys_bits: int = 40
    guest_maxphyaddr: int = 36
    profile: Profile = Profile.parse("linux-3.1")
    tdp: Tdp | None = None
    bypass_guest_pf: bool = False
    memory_model: MemoryModel = MemoryModel.SC
    tlbs_dirty_bits: int = 32
    oos_shadow: bool = True

    def check(self) -> None:
        """Raises ConfigError if a machine cannot be made from this."""
        check_memslots(self.memslots)
        if self.n_max_mmu_pages < KVM_MIN_ALLOC_MMU_PAGES:
            raise ConfigError(
                f"n_max_mmu_pages is {self.n_max_mmu_pages}, at least {KVM_MIN_ALLOC_MMU_PAGES}"
            )
        if not 40 <= self.host_phys_bits <= 51:
            raise ConfigError(f"host_phys_bits is {self.host_phys_bits}, must be 40 to 51")
        if not 32 <= self.guest_maxphyaddr <= 51:
            raise ConfigError(f"guest_maxphyaddr is {self.guest_maxphyaddr}, must be 32 to 51")
        if not 2 <= self.tlbs_dirty_bits <= 32:
            raise ConfigError(f"tlbs_dirty_bits is {self.tlbs_dirty_bits}, must be 2 to 32")
        if self.bypass_guest_pf and self.profile.kernel is not KernelTree.PRE_PATCH:
            raise ConfigError(f"profile {self.profile.name} has no bypass_guest_pf: only pre-patch has it")
        if self.bypass_guest_pf and self.tdp is not None:
            raise ConfigError("there is no bypass_guest_pf with two-dimensional paging")


class Kvm:
    """One virtual machine.

    `trace`, if given, is called with each event of the model as it happens; `tracepoints`, if set, is told of what has
    no event. `memory_points` are the memory points
    that operations yield; none at first.

    `memslots` are the slots in force, by first frame; they change as a whole (`publish_memslots`). `slots_locked`:
    somebody holds slots_lock.

    `mmio_sptes`: frames without memory get shadow entries of their own. `shadow_trap_nonpresent_pte`: the value of
    entries that a shadow page's `spt` does not hold.

    `need_resched`: an operation that offers to drop mmu_lock for a moment (cond_resched_lock) is taken at its word, so
    that others may come in between. In a kernel without preemption that is so at the end of a time slice alone.

    `late_unsync`: pages that are to become unsync after an entry maps their table writable (only with bug C2).

    `page_header` finds a shadow page by the address of its table; `mmu_page_hash` the pages of a guest frame, oldest
    first; `active_mmu_pages` holds all pages in use by address, oldest first (recycling takes the first).
    """

    __slots__ = (
        "_last_slot",
        "_last_visible_slot",
        "_memory_points",
        "_next_serial",
        "_visible_memslots",
        "active_mmu_pages",
        "bypass_guest_pf",
        "config",
        "emulated_stores",
        "host",
        "indirect_shadow_pages",
        "invlpg_counter",
        "late_unsync",
        "memory",
        "memslots",
        "memslots_generation",
        "mmio_sptes",
        "mmu_notifier_count",
        "mmu_notifier_seq",
        "mmu_page_hash",
        "n_max_mmu_pages",
        "n_requested_mmu_pages",
        "n_used_mmu_pages",
        "need_resched",
        "notrap",
        "page_header",
        "point_gpte_read",
        "point_read_guest_memory",
        "point_spte_update",
        "profile",
        "shadow_trap_nonpresent_pte",
        "slots_locked",
        "spte_format",
        "stat",
        "tlbs_dirty",
        "trace",
        "tracepoints",
        "vcpus",
        "work",
    )

    def __init__(self, config: KvmConfig, trace: Callable[[Event], None] | None = None) -> None:
        config.check()
        self.config = config
        self.profile = config.profile
        self.trace = trace
        self.tracepoints: Tracepoints | None = None
        self.spte_format: SpteFormat = (
            ept_format() if config.tdp is Tdp.EPT else shadow_format(config.host_phys_bits)
        )
        self.mmio_sptes = config.profile.kernel is not KernelTree.PRE_PATCH
        self.bypass_guest_pf = config.bypass_guest_pf
        self.shadow_trap_nonpresent_pte = SHADOW_TRAP_NONPRESENT_PTE if config.bypass_guest_pf else 0
        slots = [KvmMemorySlot(s, UserMemory(s.base_gfn, s.npages, s.base_gfn)) for s in config.memslots]
        self.memory = GuestMemory(())
        self.host = HostMemory(self, [slot.memory for slot in slots])
        self._last_slot = self._last_visible_slot = NO_SLOT
        self.memslots_generation = 0
        self.slots_locked = False
        self.publish_memslots(slots)
        self.stat = KvmStat()
        self.notrap = NotrapStat()
        self.work = Work()
        self.vcpus: list[Vcpu] = []
        self.page_header: dict[int, ShadowPage] = {}
        self.mmu_page_hash: dict[int, list[ShadowPage]] = {}
        self.active_mmu_pages: OrderedDict[int, ShadowPage] = OrderedDict()
        self.n_used_mmu_pages = 0
        self.n_max_mmu_pages = config.n_max_mmu_pages
        self.n_requested_mmu_pages = config.n_max_mmu_pages
        self.indirect_shadow_pages = 0
        self.invlpg_counter = 0
        self.late_unsync: list[ShadowPage] = []
        self.tlbs_dirty = 0
        self.emulated_stores: set[int] = set()  # vCPUs with one that the shadow does not know of yet
        self.mmu_notifier_seq = 0
        self.mmu_notifier_count = 0
        self.need_resched = True
        self._next_serial = 0
        self.memory_points = frozenset()

    @property
    def memory_points(self) -> frozenset[Point]:
        """The memory points that operations yield."""
        return self._memory_points

    @memory_points.setter
    def memory_points(self, points: Iterable[Point]) -> None:
        chosen = frozenset(points)
        if not chosen <= MEMORY_POINTS:
            raise ConfigError(f"not memory points: {sorted(p.name for p in chosen - MEMORY_POINTS)}")
        self._memory_points = chosen
        self.point_read_guest_memory = Point.READ_GUEST_MEMORY in chosen
        self.point_gpte_read = Point.GPTE_READ in chosen
        self.point_spte_update = Point.SPTE_UPDATE in chosen

    def create_vcpu(self) -> Vcpu:
        """Add a vCPU, in the state after reset: paging off, no root. Numbers count from 0."""
        vcpu = Vcpu(self, len(self.vcpus), initial_context())
        self.vcpus.append(vcpu)
        build_context(vcpu)
        return vcpu

    def gfn_to_memslot(self, gfn: int) -> KvmMemorySlot | None:
        """The slot that holds a guest frame, None if none does."""
        slot = self._last_slot
        if slot.base_gfn <= gfn < slot.end_gfn:
            return slot
        for slot in self.memslots:
            if slot.base_gfn <= gfn < slot.end_gfn:
                self._last_slot = slot
                return slot
        return None

    def visible_memslot(self, gfn: int) -> KvmMemorySlot | None:
        """The slot through which KVM reaches a guest frame's memory (gfn_to_hva): not one that is going."""
        slot = self._last_visible_slot
        if slot.base_gfn <= gfn < slot.end_gfn:
            return slot
        for slot in self._visible_memslots:
            if slot.base_gfn <= gfn < slot.end_gfn:
                self._last_visible_slot = slot
                return slot
        return None

    def publish_memslots(self, slots: Iterable[KvmMemorySlot]) -> None:
        """These slots, as they are now, are what everybody finds from now on (rcu_assign_pointer)."""
        self.memslots = tuple(sorted(slots, key=lambda slot: slot.base_gfn))
        self._visible_memslots = tuple(slot for slot in self.memslots if not slot.invalid)
        self._last_slot = self._last_visible_slot = NO_SLOT
        self.memory.slots = self.memslots
        self.memslots_generation += 1
        if self.trace is not None:
            self.trace(SlotsPublished([(s.id, s.base_gfn, s.npages, s.invalid) for s in self.memslots]))

    def memslot(self, slot_id: int) -> KvmMemorySlot | None:
        """The slot with that number."""
        return next((slot for slot in self.memslots if slot.id == slot_id), None)

    def child(self, spte: int) -> ShadowPage:
        """The shadow page that a table entry leads to."""
        return self.page_header[spte & PT64_BASE_ADDR_MASK]

    def bypass_counters(self) -> dict[str, int]:
        """What became of "notrap" entries, by name; empty in a kernel that has no bypass_guest_pf."""
        return {} if self.mmio_sptes else self.notrap.counters()

    def new_shadow_page(self, gfn: int, role: int) -> ShadowPage:
        """Allocate a shadow page; its address is never used again."""
        sp = ShadowPage(self._next_serial, gfn, role)
        if sp.hpa >= SHADOW_PAGE_BASE << 1:
            raise OverflowError("the addresses of shadow pages are used up: this run made 2**27 of them")
        self._next_serial += 1
        return sp
