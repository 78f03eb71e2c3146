"""What a machine refuses: messages that are legal in their order, but name what is not there.

A refused message changes nothing; whoever submits inputs asks first.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from shadowmmu.kvm import Kvm, Vcpu
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.errors import ErrorCode
from shadowmmu.protocol.messages import Tdp

__all__ = ["host_operation_refusal", "vcpu_refusal"]

Refusal: TypeAlias = tuple[ErrorCode, str]

ACCESS_SIZES: Final = (1, 2, 4, 8)
ADDRESSES: Final = 1 << 64
ADDRESSES_32: Final = 1 << 32
"""Outside of long mode an address has 32 bits."""


def vcpu_refusal(vcpu: Vcpu, body: object) -> Refusal | None:
    """Why a message of the vCPU makes no sense for this machine, or None. Changes nothing."""
    end = ADDRESSES if vcpu.is_long_mode else ADDRESSES_32
    match body:
        case m.Log():
            accesses = body.accesses
        case m.Load() | m.Locked():
            accesses = [body.access]
        case m.Walk(_, _, gva, _) | m.Exit(_, m.InvlpgExit(gva)):
            return _address_refusal(gva, end)
        case m.Exit(_, m.PageFaultExit(gva, _, instruction)):
            return _shape_refusal(gva, instruction.size) or _address_refusal(gva, end)
        case m.Exit(_, m.EptMisconfigExit(gpa, instruction)):
            if vcpu.kvm.config.tdp is not Tdp.EPT:
                return ErrorCode.MALFORMED, "there are no EPT tables in this machine"
            return _shape_refusal(gpa, instruction.size) or _address_refusal(gpa, end)
        case _:
            return None
    gfn_of = vcpu.kvm.host.gfn_of
    for _, gva, pfn, size, _ in accesses:
        if gfn_of(pfn) is None:
            return ErrorCode.UNKNOWN_FRAME, f"host frame {pfn} never backed guest memory"
        if size not in ACCESS_SIZES or (gva & 0xFFF) + size > 0x1000:
            return _shape_refusal(gva, size)
        if gva >= end:
            return _address_refusal(gva, end)
    return None


def _address_refusal(gva: int, end: int) -> Refusal | None:
    if gva >= end:
        return (
            ErrorCode.MALFORMED,
            f"address {gva:#x} has more than 32 bits, and the vCPU is not in long mode",
        )
    return None


def _shape_refusal(gva: int, size: int) -> Refusal | None:
    if size not in ACCESS_SIZES:
        return ErrorCode.MALFORMED, f"an access has 1, 2, 4 or 8 bytes, not {size}"
    if (gva & 0xFFF) + size > 0x1000:
        return ErrorCode.MALFORMED, f"an access of {size} bytes at {gva:#x} crosses a page"
    return None


def _small_page_refusal(kvm: Kvm, gfn: int) -> str | None:
    """The host takes pages of hugetlbfs away by whole blocks only."""
    slot = kvm.gfn_to_memslot(gfn)
    if slot is None:
        return f"gfn {gfn} is in no memory slot"
    if slot.backing.level > 1:
        return f"gfn {gfn} is in a huge page ({slot.backing.value}): use unmap_range on whole ones"
    return None


def _range_refusal(kvm: Kvm, gfn: int, npages: int) -> str | None:
    slot = kvm.gfn_to_memslot(gfn)
    if slot is None or gfn + npages > slot.end_gfn:
        return f"gfns {gfn} to {gfn + npages - 1} are not all in one memory slot"
    if (gfn | npages) & ~slot.host_mask:
        return f"gfns {gfn} to {gfn + npages - 1} are not whole host pages ({slot.backing.value})"
    return None


def host_operation_refusal(kvm: Kvm, operation: m.HostOperation) -> str | None:
    """Why the operation's arguments are not usable, or None if they are."""
    match operation:
        case m.Unmap(gfn) | m.Reclaim(gfn) | m.Move(gfn, _):
            return _small_page_refusal(kvm, gfn)
        case m.ReclaimIdle(gfns):
            return next(filter(None, (_small_page_refusal(kvm, gfn) for gfn in gfns)), None)
        case m.Age(gfn) | m.TestAge(gfn):
            return None if kvm.gfn_to_memslot(gfn) is not None else f"gfn {gfn} is in no memory slot"
        case m.UnmapRange(gfn, npages):
            return _range_refusal(kvm, gfn, npages)
        case m.SetDirtyLog(slot, _) | m.GetDirtyLog(slot):
            return None if kvm.memslot(slot) is not None else f"there is no memory slot {slot}"
        case m.WritePhys(words):
            for gpa, _ in words:
                if gpa & 7 or kvm.gfn_to_memslot(gpa >> 12) is None:
                    return f"gpa {gpa:#x} is not an aligned word in a memory slot"
            return None
        case m.SetRegisters() | m.Migrate():
            return None if operation.vcpu < len(kvm.vcpus) else f"there is no vCPU {operation.vcpu}"
        case m.SetMemoryRegion(_, gfn, npages):
            limit = 1 << kvm.config.guest_maxphyaddr - 12
            return None if gfn + npages <= limit else f"gfns {gfn} to {gfn + npages - 1} are beyond {limit}"
        case m.Shrink() | m.SetMmuPages() | m.ZapAll():
            return None
