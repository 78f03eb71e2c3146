"""What each field of a message means, and in which unit: the data dictionary.

`NOTES` is keyed by field name, or by `Message.field` where a message's field means something of its own.
docs/PROTOCOL.md prints it; a test sees to it that no field lacks a note and no note lacks a field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = ["NOTES", "note"]

NOTES: Final[Mapping[str, str]] = {
    # Guest entries and walks.
    "entry": "Number of the guest entry, counted from 1 in each incarnation.",
    "Entered.entry": "Number of the guest entry that begins: one more than the last.",
    "Kick.entry": "The guest entry to be left. Ignored if it has ended.",
    "walk": "Number of the walk, counted from 1 in each incarnation.",
    "gva": "Guest virtual address, in bytes. Guest physical with paging off and with two-dimensional paging.",
    "Walk.flags": "What the access is: AccessFlag bits 0 to 4. Only WRITE, FETCH and USER matter to the walk.",
    "Walked.flags": "What the translation permits and is: AccessFlag bits 8 and up.",
    "Instruction.flags": (
        "What the access is: AccessFlag bits 0 to 4. A load whose value the program uses has USED; a locked operation "
        "has WRITE, USED and LOCKED."
    ),
    "pfn": "Host frame number (host physical address / 4096) of the first 4 KiB frame of the leaf.",
    "level": "Level of the leaf entry: 1 maps 4 KiB, 2 maps 2 MiB, 3 maps 1 GiB.",
    "error_code": (
        "Page-fault error code, PFERR bits: 1 present, 2 write, 4 user, 8 reserved bit, 16 fetch. Of an EPT violation: "
        "1 read, 2 write, 0 fetch."
    ),
    "InjectedFault.error_code": (
        "Page-fault error code, PFERR bits: 1 present, 2 write, 4 user, 8 reserved bit, 16 fetch."
    ),
    "misconfig": "The walk met a misconfigured EPT entry; `error_code` is 0 then.",
    "gpa": "Guest physical address, in bytes.",
    "accesses": "The accesses, in program order.",
    "access": "The access. Its value is 0 for a Load, the operand for Locked.",
    "op": "The locked operation.",
    "Instruction.op": "The locked operation; absent for plain loads and stores.",
    "expected": "The value that cmpxchg compares with: unsigned, of the access's size, the bits above it 0. Else 0.",
    "Instruction.value": "What is stored, or the operand of `op`: unsigned; the low `size` bytes count. 0 for a load.",
    "Completed.value": "What was loaded, or the old value of a locked operation: unsigned, of the access's size; or 0.",
    "Loaded.value": "What was loaded, or the old value of a locked operation: unsigned, of the access's size.",
    "RegisterWriteExit.value": "What the guest writes.",
    "size": "Bytes: 1, 2, 4 or 8. The access may not cross a 4 KiB page.",
    "reason": "Why guest mode was left: a map with a tag of its own.",
    "instruction": "The instruction that was executing, for the emulator.",
    "register": "The register.",
    "targets": "Numbers of the vCPUs. The sender's own, and those that do not exist or are not attached, are left out.",
    "vector": "Interrupt vector.",
    "flush": "Empty the TLB of `processor` before anything else.",
    "inject": "Take this page fault before the next instruction.",
    "cr2": "The faulting guest virtual address, in bytes.",
    "completed": "The instruction of the last exit was executed by the emulator; absent: execute it again.",
    "general_protection": "The register write of the last exit was refused: the guest takes #GP.",
    "interrupts": "Vectors of the interrupts to be taken before the next instruction, in order.",
    "mmio": "The access went to a device.",
    "processor": "The physical processor: its TLB is used. Translations stay there when the vCPU moves.",
    "Applied.logs": "How many more Log messages have been applied.",
    # Programs that go on.
    "state": (
        "What the program has to know to go on behind this message on another worker: bytes of the client's own, "
        "which the service does not look into. Null: it is not said this time."
    ),
    "resume": (
        "How far the program got before: only in the first entry of an incarnation that was attached with a token. "
        "Null: the program begins anew."
    ),
    "Resumption.state": "The last `state` that took effect, as it was sent. Null: the program's beginning.",
    "trail": "What the vCPU was told since, in order.",
    "TrailStep.accesses": "How many accesses of logs were applied since the step before (or since the state).",
    "asked": "What `answer` answers: a message, or the reason of an exit.",
    "answer": "What the vCPU was told. An Entered in here has no `resume`.",
    "Resumption.accesses": "How many accesses of logs were applied after the last step of the trail.",
    # Sessions.
    "role": "What the sender is.",
    "name": "Who the sender is, for people to read.",
    "vcpu": "Number of the vCPU.",
    "Attach.vcpu": "The vCPU to attach as; null: the service chooses the lowest that is free. Null for other roles.",
    "Attached.vcpu": "The vCPU that the sender is now; null for host agents and probes.",
    "Ready.vcpu": "The vCPU that the MMU service made of the member; null for others.",
    "Joined.vcpu": "The vCPU whose place the member takes; null: it asks the MMU service for any.",
    "resumable": "The sender knows Resume; it gets a token.",
    "token": "Random bytes that show who may go on with this incarnation, or membership. Empty: none.",
    "Attach.token": (
        "The token of an earlier incarnation of `vcpu`, whose program goes on; that one is replaced if it is still "
        "attached. Empty: a new program."
    ),
    "Resume.token": "The token of Attached of this incarnation.",
    "Join.token": "The token of the last Joined, of who joins again. Empty: a new member.",
    "Ready.token": "The token of the Attached that gave `vcpu`; empty if there is none.",
    "vcpu_token": "The token with which the place of `vcpu` is taken. Empty: none.",
    "received": "How many messages that count the sender has taken in since the incarnation began.",
    "incarnation": "Number of this incarnation, which every envelope carries from now on; from 1, never used again.",
    "vpid": "Whether TLB entries are tagged by VPID; if not, every entry and exit empties the TLB.",
    "heartbeat": "Seconds between heartbeats, in both directions.",
    "Attach.heartbeat": "Seconds between heartbeats that the sender wishes for. Null: as the service likes.",
    "pfec_mask": "Which bits of a page fault's error code decide whether it exits (VMX: PFEC_MASK).",
    "pfec_match": "What these bits are in a page fault that exits (VMX: PFEC_MATCH).",
    "code": "A code of the error registry.",
    "text": "Details, for people to read.",
    "Finished.text": "The verdict's reason, for people to read.",
    "VcpuLost.text": "Why, for people to read.",
    "seq": "Sequence number of the message refused; 0 if it could not be read that far.",
    # Host operations.
    "request": "Number of the request, counted from 1 in each incarnation.",
    "ErrorReply.request": "Number of the host request that was not possible; 0: it is about no request, or not said.",
    "operation": "The operation: a map with a tag of its own.",
    "paced": (
        "Start it when the guest has come far enough for the run's `host_rate`; a request that is not paced starts "
        "at once, and with it all paced ones before it."
    ),
    "result": "What the operation returned, not negative; 0 where it returns nothing.",
    "ReclaimIdle.gfns": "Guest frame numbers of the pages.",
    "HostReply.gfns": "GetDirtyLog: guest frame numbers of the dirty pages; else empty.",
    "gfn": "Guest frame number (guest physical address / 4096).",
    "npages": "Pages of 4 KiB.",
    "writable": "Whether the new mapping may be written.",
    "slot": "Number of the memory slot.",
    "enable": "On or off.",
    "SetMemoryRegion.gfn": "Guest frame number at which the slot begins.",
    "SetMemoryRegion.npages": "Pages of 4 KiB; 0 deletes the slot. A slot that exists keeps its number of pages.",
    "huge": "The host backs the slot by pages of 2 MiB.",
    "Shrink.n": "Objects to scan, as the kernel's nr_to_scan.",
    "SetMmuPages.n": "Shadow pages.",
    "Migrate.processor": "The physical processor on which the vCPU enters the guest next.",
    "words": "Pairs [gpa, value]: guest physical address in bytes, a multiple of 8, and what is stored there, u64.",
    "cr0": "CR0.",
    "cr3": "CR3: guest physical address of the root table, in bytes.",
    "cr4": "CR4.",
    "efer": "EFER.",
    # Runs.
    "endpoint": "ZeroMQ address (tcp://HOST:PORT) at which workers reach the sender; the MMU service only, else empty.",
    "member": "Number of the member, from 1; serves as the incarnation in this conversation's envelopes.",
    "run": "Which run it is, of all that there ever are: random bytes. Empty: it is not said.",
    "Join.member": "The member that joins again; 0: a new one.",
    "tokens": "From the MMU service: (vCPU, token) of each vCPU whose program another worker may go on with. "
    "Other members send none.",
    "next_event": "Number of the event with which the MMU service's next batch begins, counted from 0.",
    "config": "The run's configuration.",
    "mmu_endpoint": "ZeroMQ address of the MMU service; empty in the welcome of the MMU service itself.",
    "vcpus": "How many vCPUs take part: those numbered from 0 to one less.",
    "counters": "Counters by name, since the start of the run; not negative. docs/REPORT.md has the names.",
    "done": "The member's share of the guest instructions is executed: see A run.",
    "first": "Number of the first event, counted from 0; the next batch begins where this one ends.",
    "count": "Events in `data`.",
    "data": "The events, each a MessagePack array, one after another (`shadowmmu.protocol.events`).",
    "batches": "How many more batches have been taken in.",
    "histograms": "HdrHistogram V2 encodings (base64) by name; microseconds.",
    "info": "Free-form texts by name.",
    "verdict": "How the run ended.",
    # RunConfig.
    "workload": "The guest program.",
    "mode": "The paging mode of the guests.",
    "tdp": "Two-dimensional paging: the format of the host's tables; null: shadow paging.",
    "bypass_guest_pf": "Not-present faults go to the guest without an exit where the shadow entry says so.",
    "memory_model": "In which order the host's own stores become visible.",
    "seed": "Seeds programs and choices.",
    "ops": "Guest instructions of all vCPUs together.",
    "profile": "The kernel that is simulated: `fixed`, `linux-3.1`, ..., with fixes switched by +NAME and -NAME.",
    "audit": "When the mmu_audit checks run.",
    "mutant": "A defect put in on purpose; null: none.",
    "memory_pages": "Guest memory, in frames of 4 KiB.",
    "mmu_pages": "Limit on shadow pages.",
    "park_rate": "Share of the named points at which an operation is parked.",
    "park_steps": "Scheduler steps for which an operation is parked at most.",
    "host_rate": "Host agent operations per 1,000 guest instructions.",
    "tlb_sets": "Sets of a vCPU's TLB for 4 KiB entries; large entries have a quarter.",
    "tlb_ways": "Ways of each set.",
    "check": "Whether the run is checked for coherence while it goes on.",
}


def note(message: str, field: str) -> str:
    """The note on a field of a message (or of a struct inside one). Raises KeyError if there is none."""
    return NOTES.get(f"{message}.{field}") or NOTES[field]
