"""What is checked of a client, as data."""

from __future__ import annotations

import enum

from shadowmmu.protocol_check.checks import Check

__all__ = ["ClientCheck"]


class ClientCheck(enum.Enum):
    """The checks of `check-client`, in the order of their reports."""

    FRAMING = Check("client.framing", "Its messages are two frames of the right form", "Framing")
    ATTACH = Check(
        "client.attach", "It opens with Attach, and sends nothing else before the answer", "Opening"
    )
    NUMBERS = Check(
        "client.numbers",
        "It numbers its messages without gaps, in its incarnation",
        "Incarnations and numbers",
    )
    ORDER = Check("client.order", "It sends nothing that is not legal in its state", "Legal order")
    ENTRIES = Check("client.entries", "What it sends in a guest entry names that entry", "Guest entries")
    WALKS = Check("client.walks", "It numbers its walks, one at a time", "Walks")
    CREDITS = Check("client.credits", "It has no more logs on their way than it has credits", "Logs")
    ACCESSES = Check(
        "client.accesses", "Its accesses have the flags, sizes and values they must have", "Values"
    )
    TRANSLATIONS = Check("client.translations", "Each access uses a translation that a walk gave it", "Walks")
    RIGHTS = Check("client.rights", "No access is made that its translation does not permit", "The TLB")
    FLUSH = Check("client.tlb.flush", "It empties the TLB when Entered says so", "Guest entries")
    NO_VPID = Check("client.tlb.no-vpid", "Without VPID nothing survives an exit or an entry", "The TLB")
    INVLPG = Check("client.tlb.invlpg", "INVLPG drops what the TLB has for the address", "Exits")
    FAULT = Check("client.tlb.fault", "A page fault drops what the TLB has for the address", "The TLB")
    PROCESSOR = Check(
        "client.tlb.processor", "It uses the TLB of the processor that Entered names", "Guest entries"
    )
    FAULT_EXIT = Check("client.fault-exit", "A page fault that exits exits, with what the walk said", "Exits")
    BYPASS = Check(
        "client.bypass", "A fault that does not exit is taken by the guest", "Faults without an exit"
    )
    KICK = Check("client.kick", "It answers a kick by the exit of that entry, in time", "Kicks")
    KICK_WALK = Check("client.kick.walk", "It answers a kick while a walk is under way", "Kicks")
    KICK_STALE = Check("client.kick.stale", "It ignores a kick of an entry that has ended", "Kicks")
    UNASKED = Check(
        "client.unasked-exit", "It exits for an external interrupt only if it was kicked", "Exits"
    )
    LATE_WALK = Check("client.late-walk", "It ignores the late answer to a walk that it abandoned", "Kicks")
    COMPLETED = Check(
        "client.completed", "An instruction that was completed is not executed again", "Guest entries"
    )
    INJECT = Check("client.inject", "It bears a page fault that is injected", "Guest entries")
    INTERRUPT = Check("client.interrupt", "It bears interrupts that are delivered", "Guest entries")
    GENERAL_PROTECTION = Check(
        "client.general-protection", "It bears the refusal of a register write", "Guest entries"
    )
    HEARTBEAT = Check("client.heartbeat", "It sends heartbeats while it waits", "Signs of life")
    LEAVE = Check("client.leave", "It leaves by Detach, and waits for Ended", "Ending")
    ENDED = Check("client.ended", "It sends nothing more in a session that was ended", "Ending")
    GIVEN_UP = Check(
        "client.given-up",
        "When it is given up it ends, or attaches anew with an empty TLB",
        "Incarnations and numbers",
    )
    REPEATED = Check("client.repeated", "It ignores what the service says twice", "Exactly once")
    RESUME = Check(
        "client.resume",
        "If it says that it can resume: it goes on over a new connection, and nothing is lost or done twice",
        "Resuming on a new connection",
    )
    MINOR = Check("client.minor", "It works with a service of a newer minor version", "Versions")
    ENCODING = Check("client.encoding", "It takes other encodings of the same values", "Framing")
    UNKNOWN_CODE = Check("client.unknown-code", "It bears error codes that it does not know", "Versions")

    @property
    def check(self) -> Check:
        return self.value
