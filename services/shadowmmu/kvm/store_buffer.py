"""The store buffer of a vCPU's host thread: stores that it has made and that nobody else sees yet (x86-TSO).

The host's processors let a load overtake an earlier store to another address. With memory model `tso` the plain stores
of KVM on which races depend wait here: the emulator's to guest memory, and that of `vcpu->mode` at guest entry. They
become visible in order, each at a moment of the driver's choice, and all of them at the latest where the kernel has a
full barrier: a locked operation (taking mmu_lock, clearing a request), smp_mb, guest entry, an interprocessor
interrupt. The thread itself reads what it has stored (`forward`). With memory model `sc` there are no such buffers.

Stores under mmu_lock that are read under it only need none: whoever reads them has taken the lock later.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from shadowmmu.kvm.constants import VcpuMode
from shadowmmu.kvm.memslots import KvmMemorySlot
from shadowmmu.protocol.events import EmulatedStore

if TYPE_CHECKING:
    from shadowmmu.kvm.vcpu import Vcpu

__all__ = ["GuestStore", "ModeStore", "StoreBuffer"]


class GuestStore(msgspec.Struct, frozen=True, gc=False):
    """A store of the emulator to guest memory: the low `size` bytes of `value` at `gpa`, in `slot`.

    `dirty_bitmap` is the slot's when the store was made (None without dirty logging): the frame is marked there by the
    next store of the thread, which nobody can tell from this one.
    """

    slot: KvmMemorySlot
    gpa: int
    size: int
    value: int
    dirty_bitmap: set[int] | None

    def perform(self, vcpu: Vcpu) -> None:
        """Change memory, mark the frame dirty, and say so."""
        kvm = vcpu.kvm
        kvm.memory.write_in(self.slot, self.gpa, self.size, self.value)
        if self.dirty_bitmap is not None:
            self.dirty_bitmap.add(self.gpa >> 12)
        if kvm.trace is not None:
            kvm.trace(EmulatedStore(vcpu.vcpu_id, self.gpa, self.size, self.value))


class ModeStore(msgspec.Struct, frozen=True, gc=False):
    """A store to `vcpu->mode`."""

    mode: VcpuMode

    def perform(self, vcpu: Vcpu) -> None:
        """Change the mode that others see."""
        vcpu.mode = self.mode


BufferedStore: TypeAlias = GuestStore | ModeStore


class StoreBuffer:
    """The stores of `vcpu`'s host thread that are not visible yet, in program order. True if there are any."""

    __slots__ = ("_stores", "_vcpu")

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self._stores: deque[BufferedStore] = deque()

    def __len__(self) -> int:
        return len(self._stores)

    @property
    def drainable(self) -> bool:
        """A driver may call `drain_oldest`.

        Not for a store of the mode: the thread makes it with interrupts off, right before it enters the guest, so that
        whoever sees it and kicks finds the vCPU in the guest.
        """
        return bool(self._stores) and isinstance(self._stores[0], GuestStore)

    def put(self, store: BufferedStore) -> None:
        """The thread stores."""
        self._stores.append(store)

    def drain_oldest(self) -> None:
        """The oldest store becomes visible. There must be one."""
        self._stores.popleft().perform(self._vcpu)

    def drain(self) -> None:
        """All stores become visible: a full barrier."""
        while self._stores:
            self.drain_oldest()

    def interrupt(self) -> None:
        """An interprocessor interrupt is a barrier too; with interrupts off it waits until the vCPU is in the guest."""
        while self.drainable:
            self.drain_oldest()

    def forward(self, slot: KvmMemorySlot, gpa: int, size: int, value: int) -> int:
        """What the thread loads, where memory has `value`: `size` bytes at `gpa` in `slot`, with its own stores."""
        for store in self._stores:
            if not isinstance(store, GuestStore) or store.slot is not slot:
                continue
            for i in range(store.size):
                shift = 8 * (store.gpa + i - gpa)
                if 0 <= shift < 8 * size:
                    value = value & ~(0xFF << shift) | (store.value >> 8 * i & 0xFF) << shift
        return value
