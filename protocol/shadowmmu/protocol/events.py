"""The event stream: the ordered record of what happened in a run.

The machine writes it, and the checker, the statistics and the reports read nothing else. Each event is a small
tagged struct that MessagePack encodes as an array; the stream is the plain concatenation of the encoded events, so
its digest does not depend on how it was cut into batches. Names follow KVM's tracepoints where KVM has one.

Numbers are frame numbers (`gfn` guest frame, `pfn` host frame: address / 4096), addresses (`gva`, `gpa`: bytes) and
virtual CPU numbers from 0. `vcpu` is -1 where the host itself acts. `sp` is the serial number of a shadow page,
unique in a run. `op` is the serial number of a host operation, unique in a run.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

import msgspec

__all__ = [
    "AccessFlag",
    "Accesses",
    "AuditFailed",
    "Bypassed",
    "DeviceStored",
    "DirtyLogRead",
    "DirtyLogStarted",
    "EmulatedLoad",
    "EmulatedStore",
    "Entered",
    "Event",
    "Exited",
    "FlushAnswered",
    "FlushRequested",
    "FrameBacked",
    "FrameRevoked",
    "GpteUpdate",
    "IncarnationEnded",
    "IncarnationStarted",
    "Injected",
    "InputConsumed",
    "Invalidated",
    "InvalidationCause",
    "LockReleased",
    "LockTaken",
    "LockWaited",
    "LockedRead",
    "MmioAccess",
    "NoProgress",
    "OperationEnded",
    "OperationStarted",
    "PagingRegisters",
    "RunEnded",
    "ShadowPageCreated",
    "ShadowPageSynced",
    "ShadowPageUnsynced",
    "ShadowPageZapped",
    "SlotSettled",
    "SlotsPublished",
    "TlbsDirtyCleared",
    "TlbsDirtyRaised",
    "Walked",
    "decode_events",
    "encode_event",
]


class AccessFlag(enum.IntFlag):
    """What an access was and which translation it used (bits 8 and up describe the translation)."""

    WRITE = 1
    FETCH = 2
    USER = 4
    USED = 8  # the program uses the value that it loaded
    LOCKED = 16  # a locked read-modify-write
    MAY_WRITE = 1 << 8
    MAY_USER = 1 << 9
    MAY_FETCH = 1 << 10
    DIRTY = 1 << 11
    LARGE = 1 << 12
    SMEP = 1 << 13  # a user translation made under CR4.SMEP: the supervisor may not fetch through it


class InvalidationCause(enum.IntEnum):
    """Why a vCPU's TLB lost entries (TLB_RULES R4)."""

    ENTRY_FLUSH = 0  # a flush served at guest entry, or a root loaded
    PAGE_FAULT = 1
    INVLPG = 2
    NO_VPID = 3  # entry or exit without a tag
    RESET = 4  # a new incarnation starts with an empty TLB


class _Base(msgspec.Struct, array_like=True, frozen=True, gc=False):
    pass


class InputConsumed(_Base, tag=0, frozen=True):
    """The model consumed journal record `record`; the events up to the next such event follow from it."""

    record: int


class Accesses(_Base, tag=1, frozen=True, gc=True):
    """Logged or answered accesses of one vCPU, applied to memory one after another.

    `items`: (flags, gva, gfn, pfn, size in bytes, value) per access; flags are AccessFlag bits; value is what was
    stored, or loaded (little-endian unsigned); gfn is the guest frame that the host frame held when it was applied,
    -1 if none.
    """

    vcpu: int
    entry: int
    items: list[tuple[int, int, int, int, int, int]]


class Walked(_Base, tag=2, frozen=True):
    """A hardware walk ended. `pfn` is -1 on a fault; `flags` as in Accesses (bits 8 and up), `level` of the leaf."""

    vcpu: int
    entry: int
    gva: int
    error_code: int
    pfn: int
    level: int
    flags: int


class Exited(_Base, tag=3, frozen=True):
    """Guest entry `entry` of `vcpu` ended: everything that the vCPU did in it has been applied.

    `reason` as in the protocol.
    """

    vcpu: int
    entry: int
    reason: str
    gva: int
    error_code: int


class Entered(_Base, tag=4, frozen=True):
    """The vCPU is in guest mode, in entry number `entry`, on the root shadow page `root` (serial number, -1 none)."""

    vcpu: int
    entry: int
    flush: bool
    root: int


class Invalidated(_Base, tag=5, frozen=True):
    """Translations left the vCPU's TLB: those of page `gva`, or all of them if `gva` is -1."""

    vcpu: int
    gva: int
    cause: InvalidationCause


class Injected(_Base, tag=6, frozen=True):
    """A page fault was injected into the guest."""

    vcpu: int
    error_code: int
    cr2: int


class Bypassed(_Base, tag=7, frozen=True):
    """A walk ended in a page fault that goes to the guest without an exit (bypass_guest_pf), with PFERR bits.

    The guest takes it, and the translations of its page leave the TLB, unless the vCPU's exit crosses the answer.
    """

    vcpu: int
    gva: int
    error_code: int


class ShadowPageCreated(_Base, tag=10, frozen=True):
    """kvm_mmu_get_page made a page (trace kvm_mmu_get_page, created). `role` is the role word of the kernel."""

    sp: int
    gfn: int
    level: int
    direct: bool
    role: int


class ShadowPageUnsynced(_Base, tag=11, frozen=True):
    """kvm_unsync_page: guest stores to the table no longer exit (trace kvm_mmu_unsync_page)."""

    sp: int
    gfn: int


class ShadowPageSynced(_Base, tag=12, frozen=True):
    """kvm_unlink_unsync_page: the table is write-protected again (trace kvm_mmu_sync_page)."""

    sp: int
    gfn: int


class ShadowPageZapped(_Base, tag=13, frozen=True):
    """kvm_mmu_prepare_zap_page (trace kvm_mmu_prepare_zap_page). `in_use`: still some vCPU's root."""

    sp: int
    gfn: int
    in_use: bool


class FlushRequested(_Base, tag=20, frozen=True):
    """A remote TLB flush kicked `targets`: (vcpu, entry) pairs to be waited for. `op` asked for it."""

    op: int
    targets: list[tuple[int, int]]


class FlushAnswered(_Base, tag=21, frozen=True):
    """Every vCPU that the flush of operation `op` kicked has left the entry it was in."""

    op: int


class TlbsDirtyRaised(_Base, tag=22, frozen=True):
    """sync_page dropped a shadow entry and put the flush off: kvm->tlbs_dirty is now `value`."""

    value: int


class TlbsDirtyCleared(_Base, tag=23, frozen=True):
    """A remote flush set kvm->tlbs_dirty from `value` to 0."""

    value: int


class FrameRevoked(_Base, tag=30, frozen=True):
    """A notifier call that takes host frame `pfn` away from guest frame `gfn` has returned."""

    gfn: int
    pfn: int


class FrameBacked(_Base, tag=31, frozen=True):
    """The host backs guest frame `gfn` by host frame `pfn` (again)."""

    gfn: int
    pfn: int


class DirtyLogRead(_Base, tag=32, frozen=True, gc=True):
    """kvm_vm_ioctl_get_dirty_log returned these guest frames for `slot`."""

    slot: int
    gfns: list[int]


class GpteUpdate(_Base, tag=33, frozen=True):
    """The host's guest walker set A or D in a guest paging entry: aligned `gpa`, `size` bytes, the new `value`."""

    vcpu: int
    gpa: int
    size: int
    value: int


class EmulatedStore(_Base, tag=34, frozen=True):
    """The emulator performed a guest store to memory (before kvm_mmu_pte_write hears of it)."""

    vcpu: int
    gpa: int
    size: int
    value: int


class DeviceStored(_Base, tag=35, frozen=True, gc=True):
    """The host or a device stored to guest memory, as DMA does: (gpa, value) per aligned 8-byte word, in order.

    The MMU hears nothing of it, and no dirty log has it.
    """

    words: list[tuple[int, int]]


class LockedRead(_Base, tag=36, frozen=True):
    """A locked operation, of the hardware or emulated, read `value` (`size` bytes at `gpa`).

    Its store is the vCPU's next Accesses item, or EmulatedStore, and nobody stores there in between.
    """

    vcpu: int
    gpa: int
    size: int
    value: int


class EmulatedLoad(_Base, tag=37, frozen=True):
    """The emulator loaded `value` from memory for the guest."""

    vcpu: int
    gpa: int
    size: int
    value: int


class MmioAccess(_Base, tag=38, frozen=True):
    """The emulator took the access for one to a device: `gpa` is in no memory, and none was read or written."""

    vcpu: int
    gpa: int
    size: int
    write: bool


class SlotsPublished(_Base, tag=39, frozen=True, gc=True):
    """The memory slots that everybody finds from now on: (number, first guest frame, frames, invalid) of each.

    A slot that was not there before has new memory, all zero. One that is at another place than before has its
    contents there; those of a slot that is gone are lost. `invalid`: the slot is going. The first event of a run.
    """

    slots: list[tuple[int, int, int, bool]]


class LockTaken(_Base, tag=40, frozen=True):
    """Operation `op` holds mmu_lock."""

    op: int


class LockReleased(_Base, tag=41, frozen=True):
    """Operation `op` released mmu_lock."""

    op: int


class OperationStarted(_Base, tag=42, frozen=True):
    """A host operation began. `name` is the kernel function."""

    op: int
    vcpu: int
    name: str


class OperationEnded(_Base, tag=43, frozen=True):
    """A host operation returned."""

    op: int


class IncarnationStarted(_Base, tag=44, frozen=True):
    """A worker attached as `vcpu`, with an empty TLB."""

    vcpu: int
    incarnation: int


class IncarnationEnded(_Base, tag=45, frozen=True):
    """The vCPU's worker was given up or detached; nothing more of this incarnation is applied."""

    vcpu: int
    incarnation: int
    reason: str


class PagingRegisters(_Base, tag=46, frozen=True, gc=True):
    """The vCPU's control registers are now these: the guest wrote one of them, or user space set them.

    Every write that takes effect is an event, also of the value that was there. `register`: the one written (as in
    the protocol: cr0, cr3, cr4, efer), "" if user space set all. `pdptes`: the four page-directory pointers of PAE
    paging as loaded (TLB_RULES R10), which mean nothing in other modes. What leaves the vCPU's TLB as the guest may
    see it follows from the registers before and now (R4): by MOV CR3 everything but global translations; by a change
    of CR4.PGE or PAE, by setting CR4.SMEP and by clearing CR0.PG everything. (INVLPG is Exited with reason "invlpg":
    it removes the translations of one page from then on; and Injected those of its address.)

    `maxphyaddr`: the guest's processor has so many bits of physical address. `tdp`: guest physical addresses are
    translated in a second dimension, and the guest's own paging is the processor's affair.
    """

    vcpu: int
    register: str
    cr0: int
    cr3: int
    cr4: int
    efer: int
    pdptes: list[int]
    maxphyaddr: int
    tdp: bool


class SlotSettled(_Base, tag=47, frozen=True):
    """The call that created, moved or deleted (`npages` 0) a memory slot, or switched its dirty log, has returned.

    `dirty_log`: whether the slot has one now. From now on its memory is reached at `base_gfn`, and every store is
    logged.
    """

    slot: int
    base_gfn: int
    npages: int
    dirty_log: bool


class DirtyLogStarted(_Base, tag=48, frozen=True):
    """kvm_vm_ioctl_get_dirty_log begins for a slot that has a dirty log; DirtyLogRead is its end."""

    slot: int


class LockWaited(_Base, tag=49, frozen=True):
    """Operation `op` waits for mmu_lock, which another one holds; LockTaken is the end of that."""

    op: int


class AuditFailed(_Base, tag=50, frozen=True):
    """An mmu_audit check failed."""

    check: str
    text: str


class NoProgress(_Base, tag=51, frozen=True, gc=True):
    """Nothing can go on any more although the run is not over. `waiting`: each operation under way, and for what."""

    waiting: list[str]


class RunEnded(_Base, tag=60, frozen=True):
    """The last event of a run."""

    records: int


Event = (
    InputConsumed
    | Accesses
    | Walked
    | Exited
    | Entered
    | Invalidated
    | Injected
    | Bypassed
    | ShadowPageCreated
    | ShadowPageUnsynced
    | ShadowPageSynced
    | ShadowPageZapped
    | FlushRequested
    | FlushAnswered
    | TlbsDirtyRaised
    | TlbsDirtyCleared
    | FrameRevoked
    | FrameBacked
    | DirtyLogRead
    | GpteUpdate
    | EmulatedStore
    | DeviceStored
    | LockedRead
    | EmulatedLoad
    | MmioAccess
    | SlotsPublished
    | LockTaken
    | LockReleased
    | OperationStarted
    | OperationEnded
    | IncarnationStarted
    | IncarnationEnded
    | PagingRegisters
    | SlotSettled
    | DirtyLogStarted
    | LockWaited
    | AuditFailed
    | NoProgress
    | RunEnded
)
"""Any event."""

encode_event = msgspec.msgpack.Encoder().encode
"""One event to its bytes."""

_decoder = msgspec.msgpack.Decoder(list[Event])


def _array_header(count: int) -> bytes:
    return b"\xdd" + count.to_bytes(4, "big")


def decode_events(data: bytes, count: int) -> list[Event]:
    """`count` concatenated encoded events back to structs.

    Raises msgspec.DecodeError or msgspec.ValidationError if the bytes are not exactly that many events.
    """
    return _decoder.decode(_array_header(count) + data)


def encode_events(events: Iterable[Event]) -> bytes:
    """The concatenated encoding of some events."""
    return b"".join(map(encode_event, events))
