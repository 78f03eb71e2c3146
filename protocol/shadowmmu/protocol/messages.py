"""Every message of the protocol, as a typed struct.

Three conversations share one framing (`codec`): a vCPU with the MMU service, a host agent with the MMU service, and
every process of a run with the coordinator. Messages are tagged MessagePack maps, except those of the hot path
(accesses in a log), which are arrays. `docs/PROTOCOL.md` explains each field; the legal order is in `session`.

Units: `gva`, `gpa`, `cr2`, `cr3` are byte addresses; `gfn`, `pfn` are frame numbers (address / 4096); sizes are bytes;
`entry` is the number of a guest entry, counted from 1 per incarnation.
"""

from __future__ import annotations

import enum
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

# MessagePack has no integer above 64 bits, and msgspec no bounds above 63: the format itself is U64's upper bound.
U64: TypeAlias = Annotated[int, Meta(ge=0, extra_json_schema={"maximum": 0xFFFF_FFFF_FFFF_FFFF})]
U32: TypeAlias = Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)]
Frame: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 40) - 1)]
AccessSize: TypeAlias = Annotated[int, Meta(ge=1, le=8)]
Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=64)]
ProfileName: TypeAlias = Annotated[str, Meta(min_length=1, max_length=4096)]  # every fix may be switched
Text: TypeAlias = Annotated[str, Meta(max_length=1024)]
VcpuId: TypeAlias = Annotated[int, Meta(ge=0, le=255)]
Processor: TypeAlias = Annotated[int, Meta(ge=0, le=255)]
Seconds: TypeAlias = Annotated[float, Meta(gt=0)]
PendingVector: TypeAlias = Annotated[int, Meta(ge=32, le=255)]
Token: TypeAlias = Annotated[bytes, Meta(max_length=64)]
STATE_LIMIT = 192 * 1024
"""Most bytes of a program's state."""
ProgramState: TypeAlias = Annotated[bytes, Meta(max_length=STATE_LIMIT)]

LOG_LIMIT = 64
"""Most accesses in one Log message."""
LOG_SECONDS = 0.005
"""A log is shipped after this long at the latest."""
LOG_CREDITS = 4
"""Most Log messages of a vCPU that the service has not applied yet."""
TRAIL_LIMIT = 4096
"""Most steps of a trail: a vCPU that sends no state for longer cannot be resumed by another worker."""


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="t"):
    """A message body; the member `t` names its type."""


def tag_of(message: _Message | type[_Message]) -> str:
    """The name on the wire of a message's type; the type itself will do."""
    tag = message.__struct_config__.tag
    assert isinstance(tag, str)
    return tag


# --- instructions and registers ---------------------------------------------------------------------------------


class LockedOp(enum.Enum):
    """A locked read-modify-write."""

    CMPXCHG = "cmpxchg"
    XCHG = "xchg"
    XADD = "xadd"


class Instruction(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The memory access that the vCPU was executing, for the emulator.

    `flags`: AccessFlag bits 0 to 4; `value` to be stored, or the operand of `op`; `expected` for cmpxchg.
    """

    flags: Annotated[int, Meta(ge=0, le=31)]
    size: AccessSize = 8
    value: U64 = 0
    op: LockedOp | None = None
    expected: U64 = 0


class ControlRegister(enum.Enum):
    """A register whose write exits."""

    CR0 = "cr0"
    CR3 = "cr3"
    CR4 = "cr4"
    EFER = "efer"


# --- why a guest entry ended -------------------------------------------------------------------------------------


class PageFaultExit(_Message, tag="page_fault", frozen=True):
    """The hardware walk faulted. `error_code`: PFERR bits. `instruction` is executed again, or emulated.

    With two-dimensional paging this is the violation of the host's tables, and `gva` the guest physical address.
    """

    gva: U64
    error_code: Annotated[int, Meta(ge=0, le=31)]
    instruction: Instruction


class EptMisconfigExit(_Message, tag="ept_misconfig", frozen=True):
    """The walk of the EPT tables met a misconfigured entry. `instruction` is executed again, or emulated."""

    gpa: U64
    instruction: Instruction


class InvlpgExit(_Message, tag="invlpg", frozen=True):
    """The guest executed INVLPG."""

    gva: U64


class RegisterWriteExit(_Message, tag="register_write", frozen=True):
    """The guest wrote a control register or EFER."""

    register: ControlRegister
    value: U64


class SendIpiExit(_Message, tag="send_ipi", frozen=True):
    """The guest wrote its local APIC: an interrupt `vector` to each vCPU in `targets`."""

    targets: Annotated[list[VcpuId], Meta(max_length=256)]
    vector: Annotated[int, Meta(ge=32, le=255)]


class HaltExit(_Message, tag="halt", frozen=True):
    """The guest executed HLT: it is entered again when an interrupt is pending."""


class ExternalInterruptExit(_Message, tag="external_interrupt", frozen=True):
    """The vCPU was kicked."""


ExitReason: TypeAlias = (
    PageFaultExit
    | EptMisconfigExit
    | InvlpgExit
    | RegisterWriteExit
    | SendIpiExit
    | HaltExit
    | ExternalInterruptExit
)

# --- a vCPU to the MMU service -----------------------------------------------------------------------------------


class Role(enum.Enum):
    """What a peer is."""

    MMU = "mmu"
    VCPU = "vcpu"
    HOST = "host"
    PROBE = "probe"  # asks for health only


class Attach(_Message, tag="attach", frozen=True, omit_defaults=True):
    """First message to the MMU service. `vcpu`: a number to attach as (again), or None: the service gives one.

    `resumable`: the peer knows Resume, and wants a token. `token`: the vCPU's of an earlier incarnation; the program
    goes on where that one got to, and that one is replaced if it still is attached. `heartbeat`: the interval that is
    wished for.
    """

    role: Role
    name: Name
    vcpu: VcpuId | None = None
    resumable: bool = False
    token: Token = b""
    heartbeat: Seconds | None = None


class Resume(_Message, tag="resume", frozen=True):
    """First message of a new connection that goes on with the envelope's incarnation; its number is 0.

    `token` of that incarnation; `received`: how many messages that count were taken in since its Attached.
    """

    token: Token
    received: U64


class Enter(_Message, tag="enter", frozen=True):
    """The first guest entry of an incarnation is asked for."""


LoggedAccess: TypeAlias = tuple[Annotated[int, Meta(ge=0, le=0xFFFF)], U64, Frame, AccessSize, U64]
"""(AccessFlag bits, gva, pfn of the 4 KiB frame, size, value stored; 0 for a load)."""


class Log(_Message, tag="log", frozen=True):
    """Accesses that hit the TLB, in program order; none of their values is used."""

    entry: U64
    accesses: Annotated[list[LoggedAccess], Meta(min_length=1, max_length=LOG_LIMIT)]


class Walk(_Message, tag="walk", frozen=True):
    """The TLB has no usable translation: walk the shadow tables. `walk` numbers the vCPU's walks."""

    entry: U64
    walk: U64
    gva: U64
    flags: Annotated[int, Meta(ge=0, le=31)]


class Load(_Message, tag="load", frozen=True, omit_defaults=True):
    """A load whose value the program uses. `state` as in Exit."""

    entry: U64
    access: LoggedAccess
    state: ProgramState | None = None


class Locked(_Message, tag="locked", frozen=True, omit_defaults=True):
    """A locked operation; the access's value is its operand. `state` as in Exit."""

    entry: U64
    access: LoggedAccess
    op: LockedOp
    expected: U64 = 0
    state: ProgramState | None = None


class Exit(_Message, tag="exit", frozen=True, omit_defaults=True):
    """Guest entry `entry` ended. Everything the vCPU did in it was sent before. Answers a kick of that entry.

    `state`: now and then, what the program has to know to go on from here on another worker; the service does not
    look into it.
    """

    entry: U64
    reason: ExitReason
    state: ProgramState | None = None


class Detach(_Message, tag="detach", frozen=True):
    """The peer leaves; legal outside guest mode only."""


# --- the MMU service to a vCPU -----------------------------------------------------------------------------------


class Attached(_Message, tag="attached", frozen=True, omit_defaults=True):
    """The peer is `vcpu` (None for a host agent), as incarnation `incarnation`.

    A page fault exits only if its error code, masked with `pfec_mask`, is `pfec_match`; the guest takes all others
    without an exit. `token`: for Resume, and for an Attach in this one's place; only for peers that asked for it.
    """

    vcpu: VcpuId | None
    incarnation: U64
    vpid: bool
    heartbeat: Seconds  # between heartbeats
    pfec_mask: U32 = 0
    pfec_match: U32 = 0
    token: Token = b""


class Resumed(_Message, tag="resumed", frozen=True):
    """The incarnation goes on: numbers of both directions begin again with 1 (this message's).

    `received`: how many messages that count the service has taken in. Each end repeats what the other lacks.
    """

    received: U64


class InjectedFault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A page fault that the guest's handler takes first. `cr2` is the faulting gva."""

    error_code: Annotated[int, Meta(ge=0, le=31)]
    cr2: U64


class Completed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The emulator executed the instruction of the last exit. `value`: loaded, or the old value of a locked one."""

    value: U64 = 0
    mmio: bool = False


class Asked(enum.Enum):
    """What a step of a trail answers: a message, or the reason of an exit."""

    ENTER = "enter"
    WALK = "walk"
    LOAD = "load"
    LOCKED = "locked"
    PAGE_FAULT = "page_fault"
    EPT_MISCONFIG = "ept_misconfig"
    INVLPG = "invlpg"
    REGISTER_WRITE = "register_write"
    SEND_IPI = "send_ipi"
    HALT = "halt"
    EXTERNAL_INTERRUPT = "external_interrupt"


class TrailStep(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Something that a vCPU was told: the answer to what it `asked`, after `accesses` applied since the step before.

    Walks that found a translation are no steps. An Entered in a trail has no `resume`.
    """

    accesses: U64
    asked: Asked
    answer: Entered | Loaded | WalkFault


class Resumption(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How far the program of a vCPU got, before this incarnation.

    `state`: the last one that took effect (None: the program's beginning), as of sending. `trail`: what the vCPU was
    told since, in order, the answer to the message with that state first; `accesses` applied after the last step.
    """

    state: ProgramState | None = None
    trail: Annotated[list[TrailStep], Meta(max_length=TRAIL_LIMIT)] = []
    accesses: U64 = 0


class Entered(_Message, tag="entered", frozen=True, omit_defaults=True):
    """Guest mode, entry number `entry`.

    `flush`: empty the TLB first. `inject`: take this page fault first. `completed`: the instruction of the last exit
    is done (absent: execute it again). `general_protection`: the register write was refused. `interrupts`: vectors
    to take before the next instruction. `processor`: the physical processor, whose TLB it is that counts. `resume`: in
    the first entry of an incarnation that goes on with a program, before all else.
    """

    entry: U64
    flush: bool = False
    inject: InjectedFault | None = None
    completed: Completed | None = None
    general_protection: bool = False
    interrupts: Annotated[list[PendingVector], Meta(max_length=256)] = []
    processor: Processor = 0
    resume: Resumption | None = None


class Walked(_Message, tag="walked", frozen=True):
    """The walk found a translation.

    `pfn`: of the leaf's first 4 KiB frame; `level`: 1 or 2 (3); `flags`: AccessFlag bits 8 and up.
    """

    entry: U64
    walk: U64
    pfn: Frame
    level: Annotated[int, Meta(ge=1, le=3)]
    flags: Annotated[int, Meta(ge=0, le=0xFFFF)]


class WalkFault(_Message, tag="walk_fault", frozen=True, omit_defaults=True):
    """The walk faulted with PFERR bits `error_code`: the vCPU exits with a page fault.

    If the page-fault mask and match of Attached let the fault through, the guest takes it and nothing exits.
    `misconfig`: it met a misconfigured EPT entry, and the vCPU exits for that instead.
    """

    entry: U64
    walk: U64
    error_code: Annotated[int, Meta(ge=0, le=31)]
    misconfig: bool = False


class Loaded(_Message, tag="loaded", frozen=True):
    """The answer to Load, or the old value for Locked."""

    entry: U64
    value: U64


class Applied(_Message, tag="applied", frozen=True):
    """`logs` more Log messages have been applied: the vCPU may send as many more."""

    logs: U32


class Kick(_Message, tag="kick", frozen=True):
    """Leave guest entry `entry`. Ignored if the vCPU is not in it any more."""

    entry: U64


# --- the host agent and the MMU service --------------------------------------------------------------------------


class Unmap(_Message, tag="unmap", frozen=True):
    """The host unmaps the page; it comes back in the same host frame. Notifier invalidate_page.

    Result 1, or 0 if it was not there.
    """

    gfn: Frame


class UnmapRange(_Message, tag="unmap_range", frozen=True):
    """The same for `npages` pages. Notifiers invalidate_range_start and invalidate_range_end."""

    gfn: Frame
    npages: Annotated[int, Meta(ge=1, le=1 << 20)]


class Reclaim(_Message, tag="reclaim", frozen=True):
    """The host swaps the page out; it comes back in another host frame. Notifier invalidate_page.

    Result 1, or 0 if it was not there.
    """

    gfn: Frame


class ReclaimIdle(_Message, tag="reclaim_idle", frozen=True):
    """Like Reclaim for each of these pages that was not used lately (notifier test_young). Result: how many went."""

    gfns: Annotated[list[Frame], Meta(min_length=1, max_length=64)]


class Move(_Message, tag="move", frozen=True):
    """The host backs the page by a new host frame at once. Notifier change_pte."""

    gfn: Frame
    writable: bool


class Age(_Message, tag="age", frozen=True):
    """Notifier clear_flush_young. Result 0 or 1."""

    gfn: Frame


class TestAge(_Message, tag="test_age", frozen=True):
    """Notifier test_young. Result 0 or 1."""

    gfn: Frame


class SetDirtyLog(_Message, tag="set_dirty_log", frozen=True):
    """Turn dirty logging of a memory slot on or off."""

    slot: U32
    enable: bool


class GetDirtyLog(_Message, tag="get_dirty_log", frozen=True):
    """Read and reset the dirty log of a slot. Result: number of dirty pages; `gfns` has them."""

    slot: U32


class SetMemoryRegion(_Message, tag="set_memory_region", frozen=True):
    """Create a memory slot, or move it if it exists; with no pages: delete it and unmap its memory.

    Result 1, or 0 if that made no sense for the slots of that moment: overlap, another size, nothing to delete.
    """

    slot: Annotated[int, Meta(ge=0, le=31)]
    gfn: Frame
    npages: Annotated[int, Meta(ge=0, le=1 << 20)]
    huge: bool = False


class Shrink(_Message, tag="shrink", frozen=True):
    """The memory shrinker with nr_to_scan = n. Result: shadow pages in use afterwards."""

    n: U32


class SetMmuPages(_Message, tag="set_mmu_pages", frozen=True):
    """Change the limit on shadow pages (at least 64)."""

    n: Annotated[int, Meta(ge=64, le=1 << 20)]


class ZapAll(_Message, tag="zap_all", frozen=True):
    """Drop every shadow page."""


class Migrate(_Message, tag="migrate", frozen=True):
    """The host moves a vCPU to a physical processor: it leaves guest mode, and enters it again there."""

    vcpu: VcpuId
    processor: Processor


class WritePhys(_Message, tag="write_phys", frozen=True):
    """Store aligned 8-byte little-endian words, [gpa, value] each, as a device would: the MMU is not told."""

    words: Annotated[list[tuple[U64, U64]], Meta(min_length=1, max_length=4096)]


class SetRegisters(_Message, tag="set_registers", frozen=True):
    """Set a vCPU's registers before its first entry."""

    vcpu: VcpuId
    cr0: U64
    cr3: U64
    cr4: U64
    efer: U64


HostOperation: TypeAlias = (
    Unmap
    | UnmapRange
    | Reclaim
    | ReclaimIdle
    | Move
    | Age
    | TestAge
    | SetDirtyLog
    | GetDirtyLog
    | SetMemoryRegion
    | Shrink
    | SetMmuPages
    | ZapAll
    | Migrate
    | WritePhys
    | SetRegisters
)


class HostRequest(_Message, tag="host_request", frozen=True):
    """A host operation; `request` numbers the agent's requests. Several may be under way at once.

    `paced`: start it when the guest has come far enough for the run's `host_rate`; an unpaced request starts at once,
    and so do all paced ones before it.
    """

    request: U64
    operation: HostOperation
    paced: bool = False


class HostReply(_Message, tag="host_reply", frozen=True):
    """The operation returned."""

    request: U64
    result: int
    gfns: list[Frame] = []


# --- either way --------------------------------------------------------------------------------------------------


class Heartbeat(_Message, tag="heartbeat", frozen=True):
    """The sender lives."""


class ErrorReply(_Message, tag="error", frozen=True, omit_defaults=True):
    """A message was refused and changed nothing. `code`: of the error registry; `seq`: of the message, 0 if unknown.

    `request`: of the host request that was not possible.
    """

    code: Name
    text: Text
    seq: U64 = 0
    request: U64 = 0


class Ended(_Message, tag="ended", frozen=True):
    """The incarnation, or the membership in a run, is over. `code`: of the error registry, or "finished"."""

    code: Name
    text: Text = ""


# --- the coordinator and the processes of a run ------------------------------------------------------------------


class Workload(enum.Enum):
    """A guest program."""

    ANON = "anon"
    FORK = "fork"
    MPROTECT = "mprotect"
    MMAP_CHURN = "mmap-churn"
    CONTEXT_SWITCH = "context-switch"
    HUGE = "huge"
    SLOPPY = "sloppy"
    MIXED = "mixed"
    MODES = "modes"


class GuestMode(enum.Enum):
    """The paging mode that guests run in; all but `modes` are 64-bit programs."""

    PAGING64 = "paging64"
    PAE = "pae"
    PAGING32 = "paging32"
    NONPAGING = "nonpaging"
    MIXED = "mixed"  # each vCPU in another one, and all of them change now and then


class Tdp(enum.Enum):
    """Two-dimensional paging: the format of the host's tables."""

    EPT = "ept"
    NPT = "npt"


class MemoryModel(enum.Enum):
    """The order in which the host's processors make stores visible: sequential consistency, or x86's store buffers."""

    SC = "sc"
    TSO = "tso"


class Audit(enum.Enum):
    """When the mmu_audit checks run: never, after some operations (seeded), after every operation."""

    NEVER = "never"
    SAMPLED = "sampled"
    ALWAYS = "always"


class Mutant(enum.Enum):
    """A defect put in on purpose, to see the detectors fire."""

    FLUSH_NOT_AWAITED = "flush-not-awaited"  # a remote flush returns without its answers
    ANSWER_BEFORE_LOG = "answer-before-log"  # a kicked worker answers before it ships its log
    ENTRY_FLUSH_SKIPPED = "entry-flush-skipped"  # a worker keeps its TLB at an entry that asks for a flush
    NOTIFIER_IGNORES_TLBS_DIRTY = "notifier-ignores-tlbs-dirty"  # BUGS.md B2


class RunConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a run is: everything but the arrival order of messages.

    `ops`: guest instructions of all vCPUs together. `memory_pages`: guest memory in 4 KiB frames. `mmu_pages`: limit
    on shadow pages. `park_rate`: share of the named points at which an operation is parked; `park_steps`: for at most
    this many scheduler steps. `host_rate`: host agent operations per 1,000 guest instructions. `tlb_sets`, `tlb_ways`:
    of a vCPU's TLB for 4 KiB entries (large entries: a quarter of the sets).
    `mode` other than paging64 goes with workload `modes` only. `tdp`: None is shadow paging; with a value guests run
    with paging off. `bypass_guest_pf`: the parameter of that name of profile `pre-patch`, not with `tdp`.
    `memory_model` is about the host's own stores; guests' are sequentially consistent.
    """

    workload: Workload = Workload.MIXED
    mode: GuestMode = GuestMode.PAGING64
    tdp: Tdp | None = None
    bypass_guest_pf: bool = False
    memory_model: MemoryModel = MemoryModel.SC
    seed: U64 = 0
    ops: Annotated[int, Meta(ge=1, le=1 << 48)] = 100_000
    profile: ProfileName = "fixed"
    vpid: bool = True
    audit: Audit = Audit.SAMPLED
    mutant: Mutant | None = None
    memory_pages: Annotated[int, Meta(ge=1024, le=1 << 20)] = 4096
    mmu_pages: Annotated[int, Meta(ge=64, le=1 << 20)] = 128
    park_rate: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.1
    park_steps: Annotated[int, Meta(ge=1, le=1 << 20)] = 200
    host_rate: Annotated[float, Meta(ge=0.0, le=1000.0)] = 5.0
    tlb_sets: Annotated[int, Meta(ge=1, le=4096)] = 128
    tlb_ways: Annotated[int, Meta(ge=1, le=64)] = 4
    check: bool = True


class Join(_Message, tag="join", frozen=True, omit_defaults=True):
    """First message to the coordinator. `endpoint`: where the MMU service is to be reached (MMU only).

    `member`, `token`: of a member that joins again, as the same one, after its connection or the coordinator was lost.
    """

    role: Role
    name: Name
    endpoint: Text = ""
    member: U32 = 0
    token: Token = b""


class Joined(_Message, tag="joined", frozen=True, omit_defaults=True):
    """Welcome: the run's configuration and where the MMU service is (sent to workers once that is known).

    `run`: which run it is, of all runs ever. `token`: for joining again. `vcpu`, `vcpu_token`: the place of a vCPU
    whose worker was lost; attach as this one, with this token. `next_event`: the number of the event that the MMU
    service is to send next.
    """

    member: U32
    config: RunConfig
    mmu_endpoint: Text
    heartbeat: Seconds  # between heartbeats
    run: Token = b""
    token: Token = b""
    vcpu: VcpuId | None = None
    vcpu_token: Token = b""
    next_event: U64 = 0


class Ready(_Message, tag="ready", frozen=True, omit_defaults=True):
    """The member can start. `vcpu`: the number that the MMU service gave it; `token`: the one of its Attached."""

    vcpu: VcpuId | None = None
    token: Token = b""


class Start(_Message, tag="start", frozen=True):
    """The run begins: `vcpus` of them take part."""

    vcpus: Annotated[int, Meta(ge=1, le=256)]


class Progress(_Message, tag="progress", frozen=True, omit_defaults=True):
    """Counters so far. `done`: the member's share of the instructions is executed.

    `tokens`: from the MMU service, (vCPU, token) of each vCPU that another worker may go on with.
    """

    counters: dict[str, U64]
    done: bool = False
    tokens: Annotated[list[tuple[VcpuId, Token]], Meta(max_length=256)] = []


class EventBatch(_Message, tag="event_batch", frozen=True):
    """A piece of the event stream: `count` encoded events in `data`, the first of which has number `first`."""

    first: U64
    count: U32
    data: bytes


class EventCredit(_Message, tag="event_credit", frozen=True):
    """The coordinator has taken in `batches` more event batches."""

    batches: U32


class VcpuLost(_Message, tag="vcpu_lost", frozen=True):
    """The MMU service gave a vCPU up."""

    vcpu: VcpuId
    text: Text


class Drain(_Message, tag="drain", frozen=True):
    """No more instructions (requests, for a host agent; inputs, for the MMU service).

    The member finishes what is under way, then reports.
    """


class Report(_Message, tag="report", frozen=True):
    """A member's final word.

    `histograms`: HdrHistogram V2 encodings (base64), microseconds; `info`: free-form names to text.
    """

    counters: dict[str, U64]
    histograms: dict[str, str] = {}
    info: dict[str, str] = {}


class Verdict(enum.Enum):
    """How a run ended."""

    PASS = "pass"  # noqa: S105
    VIOLATED = "violated"
    UNKNOWN = "unknown"


class Finished(_Message, tag="finished", frozen=True):
    """The run is over: members end."""

    verdict: Verdict
    text: Text = ""


VcpuMessage: TypeAlias = (
    Attach | Resume | Enter | Log | Walk | Load | Locked | Exit | Detach | Heartbeat | HostRequest
)
"""What a vCPU or a host agent sends to the MMU service."""

MmuMessage: TypeAlias = (
    Attached
    | Resumed
    | Entered
    | Walked
    | WalkFault
    | Loaded
    | Applied
    | Kick
    | HostReply
    | Heartbeat
    | ErrorReply
    | Ended
)
"""What the MMU service sends to them."""

MemberMessage: TypeAlias = Join | Ready | Progress | EventBatch | VcpuLost | Report | Heartbeat
"""What a process of a run sends to the coordinator."""

CoordinatorMessage: TypeAlias = (
    Joined | Start | EventCredit | Drain | Finished | Heartbeat | ErrorReply | Ended
)
"""What the coordinator sends to them."""

Message: TypeAlias = VcpuMessage | MmuMessage | MemberMessage | CoordinatorMessage


class Envelope(msgspec.Struct, array_like=True, frozen=True):
    """The second frame of every message: [incarnation, sequence number, body].

    Incarnation 0 and sequence number 0 stand for "none yet" (Attach, Join, and errors about unreadable messages).
    Both directions count from 1 in each incarnation.
    """

    incarnation: U64
    seq: U64
    body: Message
