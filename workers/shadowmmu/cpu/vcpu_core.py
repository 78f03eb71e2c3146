"""One virtual processor as a state machine: a guest program, a TLB, and its side of entries, kicks and answers.

No I/O and no clock: messages of the MMU service go in by `receive`, instructions are executed by `run`, messages for
the service come out of `take_output`, in order. The worker process, the in-process driver and the search all run this.

    OUTSIDE --Enter--> HANDLING --Entered--> IN_GUEST --Exit--> HANDLING ... --Detach--> LEFT

In guest mode the core runs until it must wait: for credit to ship a log, for a walk, or for the value of a load or a
locked operation. Accesses that hit the TLB go into the log, which is shipped before anything else is sent.

When an exit's instruction is executed: INVLPG, register writes, IPIs and HLT are executed by their exit (the next
Entered only adds `general_protection`); the access of a page fault is executed if the next Entered says `completed`,
and otherwise executed again, unless a fault was injected. A page fault whose error code does not fit the mask and
match of Attached does not exit: the program takes it at once.

With every `STATE_INTERVAL`th request that is answered goes the program's state, so that another worker can go on if
this one is lost: the first Entered of an incarnation brings such a state and the trail since, which the core follows
before all else (`resume`). Relies on `tlb`, `execution` and the interface in `program`.
"""

from __future__ import annotations

import enum
from collections import Counter
from typing import Final

from shadowmmu.cpu.execution import (
    FAULTS,
    Execution,
    access_type,
    exit_of,
    instruction_of,
)
from shadowmmu.cpu.program import Invlpg, LockedAccess, Op, Program, Touches, UsedLoad
from shadowmmu.cpu.resume import resume, save_state
from shadowmmu.cpu.tlb import Tlb, TlbEntry, checked_rights, needed_rights
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.errors import ErrorCode, RemoteProtocolError
from shadowmmu.protocol.messages import (
    LOG_CREDITS,
    LOG_LIMIT,
    STATE_LIMIT,
    Asked,
    LoggedAccess,
    Mutant,
    RunConfig,
    VcpuMessage,
)

__all__ = ["STATE_INTERVAL", "VcpuCore", "instruction_share"]

STATE_INTERVAL: Final = 64
"""Requests that are answered (loads, locked operations, exits) from one that brings the program's state to the next."""


class _State(enum.Enum):
    OUTSIDE = "outside"  # never entered
    HANDLING = "handling"  # Enter or Exit is sent, Entered not received
    IN_GUEST = "in guest"
    LEFT = "left"  # detached, or the incarnation was ended


class _Wait(enum.Enum):
    NOTHING = "nothing"
    CREDIT = "credit"  # the log cannot be shipped yet
    WALK = "walk"
    VALUE = "value"


def instruction_share(ops: int, vcpu: int, vcpus: int) -> int:
    """How many of a run's `ops` instructions are `vcpu`'s."""
    return ops // vcpus + (vcpu < ops % vcpus)


class VcpuCore:
    """The processor `vcpu` of `vcpus`, executing `program`."""

    def __init__(self, config: RunConfig, vcpu: int, vcpus: int, program: Program) -> None:
        self.vcpu = vcpu
        self.tlb = Tlb(config.tlb_sets, config.tlb_ways, config.vpid)
        self.entry = 0
        self._execution = Execution(program, instruction_share(config.ops, vcpu, vcpus))
        self._mutant = config.mutant
        self._state = _State.OUTSIDE
        self._wait = _Wait.NOTHING
        self._asked = Asked.ENTER  # what the next Entered answers
        self._kicked = False  # a kick of this entry is to be answered
        self._draining = False
        self._walk = 0
        self._walk_for = (0, 0)  # gva and access type
        self._pfec_mask = self._pfec_match = 0  # all page faults exit
        self._log: list[LoggedAccess] = []
        self._credits = LOG_CREDITS
        self._output: list[VcpuMessage] = []
        self._counts: Counter[str] = Counter()
        self._logged = 0
        self._until_state = STATE_INTERVAL  # requests

    # --- what drivers see ----------------------------------------------------------------------------------------

    @property
    def program(self) -> Program:
        """What it executes."""
        return self._execution.program

    @property
    def instructions(self) -> int:
        """How many are executed, by this processor and those in whose place it is."""
        return self._execution.instructions

    @property
    def done(self) -> bool:
        """Its share of the run's instructions is executed; the program only serves interrupts."""
        return self._execution.done

    @property
    def waiting(self) -> bool:
        """`run` can do nothing before a message arrives."""
        return self._state is not _State.IN_GUEST or self._wait is not _Wait.NOTHING

    @property
    def in_guest(self) -> bool:
        """In guest mode, as far as the processor knows: it has not sent an exit."""
        return self._state is _State.IN_GUEST

    @property
    def halted(self) -> bool:
        """Outside guest mode after HLT: entered again when there is an interrupt."""
        return self._state is _State.HANDLING and self._asked is Asked.HALT

    @property
    def _faulted(self) -> bool:
        """The last exit was a page fault, or an EPT misconfiguration; the search tells states apart by it."""
        return self._asked in FAULTS

    @property
    def left(self) -> bool:
        """Detached, or its incarnation was ended."""
        return self._state is _State.LEFT

    @property
    def log_pending(self) -> int:
        """How many accesses are in the log."""
        return len(self._log)

    def counters(self) -> dict[str, int]:
        """What the processor and its program did so far, by name.

        In the place of a processor that was lost: also what that one and its program did up to the last state that it
        sent. The program's own counters, and `vcpu.instructions`, are exact.
        """
        counts = {f"vcpu.{name}": count for name, count in sorted(self._counts.items())}
        counts["vcpu.instructions"] = self.instructions
        accesses = self._logged + self._counts["loads"] + self._counts["locked"]
        # The access for which a walk was made may not be executed yet.
        counts["vcpu.tlb_hits"] = max(accesses - self._counts["walks_used"], 0)
        counts["vcpu.tlb_misses"] = self._counts["walks"]
        counts.update({f"guest.{name}": count for name, count in self.program.counters().items()})
        return counts

    def take_output(self) -> list[VcpuMessage]:
        """The messages for the service since the last call."""
        output, self._output = self._output, []
        return output

    def start(self) -> None:
        """Asks for the first guest entry."""
        if self._state is _State.OUTSIDE:
            self._output.append(m.Enter())
            self._state = _State.HANDLING

    def ship_log(self) -> None:
        """The log has got old: sends it, if that is possible now."""
        if self._state is _State.IN_GUEST and self._wait is _Wait.NOTHING and self._log and self._credits:
            self._ship()

    def drain(self) -> None:
        """Executes nothing more; leaves guest mode as soon as it can, and detaches."""
        self._draining = True
        if self._state is _State.OUTSIDE or self._state is _State.HANDLING:
            self._detach()
        elif self._state is _State.IN_GUEST:
            self._interrupted()

    def run(self, limit: int) -> int:
        """Executes up to `limit` instructions, or until it must wait. How many were executed."""
        execution = self._execution
        begin = execution.instructions
        end = begin + limit
        while execution.instructions < end and not self.waiting:
            self._execute_next(end)
        return execution.instructions - begin

    # --- messages ------------------------------------------------------------------------------------------------

    def receive(self, body: m.MmuMessage) -> None:
        """Takes a message of the service. Raises RemoteProtocolError if it makes no sense."""
        match body:
            case m.Applied():
                self._applied(body)
            case m.Walked():
                self._walked(body)
            case m.WalkFault():
                self._walk_fault(body)
            case m.Loaded():
                self._loaded(body)
            case m.Entered():
                self._entered(body)
            case m.Kick():
                self._kick(body)
            case m.Ended():
                self._state = _State.LEFT
            case m.Attached():
                self._pfec_mask, self._pfec_match = body.pfec_mask, body.pfec_match
            case m.Resumed() | m.Heartbeat() | m.HostReply() | m.ErrorReply():
                pass

    def _entered(self, message: m.Entered) -> None:
        if self._state is _State.LEFT:
            return
        if self._state is not _State.HANDLING or message.entry <= self.entry:
            raise _unexpected(message, f"in state {self._state.value}, entry {self.entry}")
        if message.resume is not None:
            self._resume(message, message.resume)
        self._state = _State.IN_GUEST
        self._wait = _Wait.NOTHING
        self._kicked = False
        self.entry = message.entry
        self._counts["entries"] += 1
        if message.processor != self.tlb.tag.processor:
            self._counts["migrations"] += 1
            self.tlb.select(self.tlb.tag._replace(processor=message.processor))
        self.tlb.world_switch()
        # Mutant: the flush is skipped. Everything else ignores it.
        if message.flush and self._mutant is not Mutant.ENTRY_FLUSH_SKIPPED:
            self._counts["flushes"] += 1
            self.tlb.flush()
        asked, self._asked = self._asked, Asked.ENTER
        if message.inject is not None:
            self._counts["injected"] += 1
            self.tlb.invalidate(message.inject.cr2)
        elif message.completed is not None and asked in FAULTS:
            self._counts["mmio" if message.completed.mmio else "emulated"] += 1
        if message.interrupts:
            self._counts["interrupts"] += len(message.interrupts)
        self._execution.entered(asked, message)
        if self._log:  # only with the mutant "answer-before-log"
            self._ship()

    def _resume(self, message: m.Entered, resumption: m.Resumption) -> None:
        """Goes on in the place of a processor that was lost."""
        if self.entry or self.instructions:
            raise _unexpected(message, "resumes a program that is being executed")
        saved = resume(self._execution, resumption)
        if saved is not None:
            self._counts.update(saved.counts)
            self._logged = saved.logged
        self._counts["resumed"] += 1
        self._until_state = 1  # should this one be lost too, nobody has to follow the same trail again

    def _kick(self, message: m.Kick) -> None:
        if self._state is not _State.IN_GUEST or message.entry != self.entry:
            self._counts["kicks_ignored"] += 1
            return
        self._counts["kicks_answered"] += not self._kicked
        self._kicked = True
        self._interrupted()

    def _applied(self, message: m.Applied) -> None:
        self._credits += message.logs
        if self._credits > LOG_CREDITS:
            raise _unexpected(message, "more logs than were sent")
        if self._wait is _Wait.CREDIT and self._state is _State.IN_GUEST:
            self._wait = _Wait.NOTHING
            if self._kicked or self._draining:
                self._interrupted()

    def _walked(self, message: m.Walked) -> None:
        if not self._answers_walk(message):
            return
        gva, flags = self._walk_for
        need = needed_rights[flags]
        if message.flags & need != need:
            raise _unexpected(message, f"rights {message.flags:#x} are not enough for access type {flags}")
        self._wait = _Wait.NOTHING
        self._counts["walks_used"] += 1
        self.tlb.insert(gva, message.pfn, message.level, message.flags)
        # The access uses what its walk found, whatever arrives next.
        self._execute_next(self._execution.instructions + 1)

    def _walk_fault(self, message: m.WalkFault) -> None:
        if not self._answers_walk(message):
            return
        self._wait = _Wait.NOTHING
        gva, _ = self._walk_for
        error_code = message.error_code
        self.tlb.invalidate(gva)
        if message.misconfig:
            self._exit(m.EptMisconfigExit(gva, instruction_of(self._execution.fetch())), self._state_if_due())
        elif error_code & self._pfec_mask == self._pfec_match:
            reason = m.PageFaultExit(gva, error_code, instruction_of(self._execution.fetch()))
            self._exit(reason, self._state_if_due())
        else:
            self._counts["bypassed"] += 1
            self._execution.fault_bypassed(error_code, gva)

    def _answers_walk(self, message: m.Walked | m.WalkFault) -> bool:
        if self._wait is _Wait.WALK and message.entry == self.entry and message.walk == self._walk:
            return True
        self._counts["walks_dropped"] += 1
        return False

    def _loaded(self, message: m.Loaded) -> None:
        if self._state is _State.LEFT:
            return
        if self._wait is not _Wait.VALUE or message.entry != self.entry:
            raise _unexpected(message, f"waiting for {self._wait.value} in entry {self.entry}")
        self._wait = _Wait.NOTHING
        self._execution.loaded(message.value)
        if self._kicked or self._draining:
            self._interrupted()

    # --- leaving guest mode --------------------------------------------------------------------------------------

    def _interrupted(self) -> None:
        """In guest mode, with a kick to answer or draining: leaves at the next instruction boundary."""
        if self._wait is _Wait.VALUE or (self._wait is _Wait.CREDIT and not self._answers_early()):
            return
        if self._wait is _Wait.WALK and (self._pfec_mask or self._pfec_match):
            # The walk is abandoned, but the service may have counted on the program to take its fault without an exit.
            self._until_state = 1
        self._wait = _Wait.NOTHING  # an outstanding walk is abandoned
        if self._answers_early() or self._ship():
            self._exit(m.ExternalInterruptExit(), self._state_if_due())
            if self._draining:
                self._detach()

    def _answers_early(self) -> bool:
        """Mutant: the kick is answered now, and what is in the log is shipped in the next entry."""
        return self._mutant is Mutant.ANSWER_BEFORE_LOG and not self._draining

    def _exit(self, reason: m.ExitReason, state: bytes | None) -> None:
        name = m.tag_of(reason)
        self._output.append(m.Exit(self.entry, reason, state))
        self._state = _State.HANDLING
        self._asked = Asked(name)
        self._counts[f"exits.{name}"] += 1
        self.tlb.world_switch()

    def _state_if_due(self) -> bytes | None:
        """The state to go with a request, of before its instruction, if it is time for one."""
        self._until_state -= 1
        if self._until_state > 0 or self._log:  # a log is left only with the mutant "answer-before-log"
            return None
        self._until_state = STATE_INTERVAL
        state = save_state(self._execution, dict(self._counts), self._logged)
        return state if len(state) <= STATE_LIMIT else None

    def _detach(self) -> None:
        self._output.append(m.Detach())
        self._state = _State.LEFT

    # --- executing -----------------------------------------------------------------------------------------------

    def _ship(self) -> bool:
        """Sends the log, if there is one. Without credit the core waits: False."""
        if not self._log:
            return True
        if not self._credits:
            self._wait = _Wait.CREDIT
            self._counts["waits_for_credit"] += 1
            return False
        self._credits -= 1
        self._output.append(m.Log(self.entry, self._log))
        self._counts["logs"] += 1
        self._log = []
        return True

    def _execute_next(self, end: int) -> None:
        """Executes the next instruction, or a run of accesses until `instructions` is `end`; or waits for something."""
        execution = self._execution
        op = execution.fetch()
        if type(op) is Touches:
            self._touch(op, end if execution.done else min(end, execution.share))
        else:
            self._execute(op)

    def _touch(self, run: Touches, end: int) -> None:
        """Executes a run until its end, a TLB miss, a full log, or the instruction count `end`."""
        if len(self._log) == LOG_LIMIT and not self._ship():
            return
        log = self._log
        before = len(log)
        first = run.position
        last = first + min(LOG_LIMIT - before, end - self._execution.instructions)
        tlb = self.tlb
        small, large = tlb.small.get, tlb.large.get
        clock = tlb.clock
        need, check = needed_rights, checked_rights
        append = log.append
        missed: tuple[int, int] | None = None
        for flags, gva, size, value in run.items[first:last]:
            entry = small(gva >> 12)
            if entry is None:
                entry = large(gva >> 21)
                if entry is None:
                    missed = gva, flags
                    break
                pfn = entry.pfn + ((gva >> 12) & 511)
            else:
                pfn = entry.pfn
            rights = entry.flags
            if rights & check[flags] != need[flags]:
                missed = gva, flags
                break
            clock += 1
            entry.used = clock
            append((flags | rights, gva, pfn, size, value))
        tlb.clock = clock
        executed = len(log) - before
        self._execution.advance(run, executed)
        self._logged += executed
        if missed is not None:
            self._begin_walk(*missed)
        elif before + executed == LOG_LIMIT and self._credits:
            self._ship()

    def _execute(self, op: Op) -> None:
        if isinstance(op, UsedLoad | LockedAccess):
            self._access_for_value(op)
            return
        if not self._ship():
            return
        reason = exit_of(op)
        state = self._state_if_due()
        if isinstance(op, Invlpg):
            self.tlb.invalidate(op.gva)
        self._execution.retire(op, 0)
        self._exit(reason, state)

    def _access_for_value(self, op: UsedLoad | LockedAccess) -> None:
        flags = access_type(op)
        entry = self.tlb.lookup(op.gva)
        if entry is None or entry.flags & checked_rights[flags] != needed_rights[flags]:
            self._begin_walk(op.gva, flags)
        elif self._ship():
            self._wait = _Wait.VALUE
            access = _logged(flags, op, entry)
            state = self._state_if_due()
            if isinstance(op, LockedAccess):
                self._counts["locked"] += 1
                self._output.append(m.Locked(self.entry, access, op.op, op.expected, state))
            else:
                self._counts["loads"] += 1
                self._output.append(m.Load(self.entry, access, state))

    def _begin_walk(self, gva: int, flags: int) -> None:
        if self._ship():
            self._counts["walks"] += 1
            self._walk += 1
            self._walk_for = gva, flags
            self._wait = _Wait.WALK
            self._output.append(m.Walk(self.entry, self._walk, gva, flags))


def _logged(flags: int, op: UsedLoad | LockedAccess, entry: TlbEntry) -> LoggedAccess:
    value = op.value if isinstance(op, LockedAccess) else 0
    return flags | entry.flags, op.gva, entry.frame(op.gva), op.size, value


def _unexpected(message: m.MmuMessage, text: str) -> RemoteProtocolError:
    return RemoteProtocolError(ErrorCode.UNEXPECTED_MESSAGE, f"{type(message).__name__} {text}")
