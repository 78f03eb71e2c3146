"""What a machine refuses: messages that are legal in their order, but name what is not there.

A refused message changes nothing; whoever submits inputs asks first.
"""

from __future__ import annotations

from shadowmmu.kvm import HostMemory, Kvm
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.errors import ErrorCode

__all__ = ["host_operation_refusal", "vcpu_refusal"]

ACCESS_SIZES = (1, 2, 4, 8)


def vcpu_refusal(host: HostMemory, body: object) -> tuple[ErrorCode, str] | None:
    """Why a vCPU's message makes no sense for this machine, or None. Changes nothing."""
    match body:
        case m.Log():
            accesses = body.accesses
        case m.Load() | m.Locked():
            accesses = [body.access]
        case m.Exit(_, m.PageFaultExit(gva, _, instruction)):
            return _shape_refusal(gva, instruction.size)
        case _:
            return None
    gfn_of = host.gfn_of
    for _, gva, pfn, size, _ in accesses:
        if gfn_of(pfn) is None:
            return ErrorCode.UNKNOWN_FRAME, f"host frame {pfn} never backed guest memory"
        if size not in ACCESS_SIZES or (gva & 0xFFF) + size > 0x1000:
            return _shape_refusal(gva, size)
    return None


def _shape_refusal(gva: int, size: int) -> tuple[ErrorCode, str] | None:
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
        case m.SetRegisters():
            return None if operation.vcpu < len(kvm.vcpus) else f"there is no vCPU {operation.vcpu}"
        case m.Shrink() | m.SetMmuPages() | m.ZapAll():
            return None
