"""The vCPU's side of entries, kicks and answers: what it says when, and what it does with what it is told."""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowmmu.cpu import VcpuCore, instruction_share
from shadowmmu.cpu.program import (
    Halt,
    Invlpg,
    LockedAccess,
    Op,
    SendIpi,
    Touch,
    Touches,
    UsedLoad,
    WriteRegister,
)
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.errors import RemoteProtocolError
from shadowmmu.protocol.events import AccessFlag
from shadowmmu.protocol.session import Session
from shadowmmu.protocol.states import MMU, Side

READ, WRITE, USER_WRITE = 0, 1, 5
RIGHTS = int(AccessFlag.MAY_WRITE | AccessFlag.MAY_USER | AccessFlag.MAY_FETCH | AccessFlag.DIRTY)


class Script:
    """A program that executes a list and then idles. `told` is what it was told."""

    def __init__(self, *ops: Op) -> None:
        self.ops = deque(ops)
        self.told: list[object] = []

    def fetch(self) -> Op:
        while (
            self.ops and isinstance(self.ops[0], Touches) and self.ops[0].position == len(self.ops[0].items)
        ):
            self.ops.popleft()
        if not self.ops:
            self.ops.append(Halt())
        return self.ops[0]

    def retire(self, value: int) -> None:
        self.told.append(("retired", type(self.ops.popleft()).__name__, value))

    def interrupt(self, vector: int) -> None:
        self.told.append(("interrupt", vector))

    def page_fault(self, error_code: int, cr2: int) -> None:
        self.told.append(("page_fault", error_code, cr2))

    def general_protection(self) -> None:
        self.told.append("general_protection")

    def idle(self) -> None:
        self.told.append("idle")
        self.ops.clear()

    def state(self) -> bytes:
        return b""

    def restore(self, data: bytes) -> None:
        pass

    def counters(self) -> dict[str, int]:
        return {}


def touches(*items: Touch) -> Touches:
    return Touches(list(items))


def page(n: int, flags: int = READ) -> Touch:
    return flags, n << 12 | 8, 8, 2 if flags & WRITE else 0


class Bench:
    """A core that has entered the guest for the first time."""

    def __init__(self, *ops: Op, **changes: Any) -> None:
        self.program = Script(*ops)
        self.core = VcpuCore(m.RunConfig(**{"ops": 1 << 20, **changes}), 0, 1, self.program)
        self.core.start()
        assert self.core.take_output() == [m.Enter()]
        self.entry = 0
        self.enter()

    def enter(self, **what: Any) -> None:
        self.entry += 1
        self.core.receive(m.Entered(self.entry, **what))

    def run(self, limit: int = 1000) -> list[m.VcpuMessage]:
        self.core.run(limit)
        return self.core.take_output()

    def walk(self) -> m.Walk:
        """The walk that the core asks for."""
        message = self.run()[-1]
        assert isinstance(message, m.Walk)
        return message

    def walked(self, walk: m.Walk, flags: int = RIGHTS, level: int = 1) -> None:
        pfn = walk.gva >> 12 if level == 1 else walk.gva >> 21 << 9
        self.core.receive(m.Walked(walk.entry, walk.walk, pfn, level, flags))

    def map(self, *pages: int) -> None:
        """Brings pages into the TLB without an instruction."""
        for number in pages:
            self.core.tlb.insert(number << 12, number, 1, RIGHTS)


def log_of(messages: list[m.VcpuMessage]) -> list[tuple[int, int]]:
    """(gva, pfn) of the logged accesses."""
    return [(a[1], a[2]) for message in messages if isinstance(message, m.Log) for a in message.accesses]


# --- accesses -------------------------------------------------------------------------------------------------------


def test_hits_go_to_the_log_and_cost_no_message() -> None:
    bench = Bench(touches(page(1), page(2, WRITE)))
    bench.map(1, 2)
    assert bench.core.run(2) == 2
    assert bench.core.take_output() == []
    assert bench.core.log_pending == 2
    bench.core.ship_log()
    (log,) = bench.core.take_output()
    assert log == m.Log(1, [(RIGHTS, 0x1008, 1, 8, 0), (RIGHTS | WRITE, 0x2008, 2, 8, 2)])


def test_a_log_ships_when_it_is_full_and_at_most_four_are_outstanding() -> None:
    bench = Bench(touches(*[page(1)] * 1000))
    bench.map(1)
    messages = bench.run()
    assert [len(log.accesses) for log in messages if isinstance(log, m.Log)] == [64] * 4
    assert bench.core.log_pending == 64
    assert bench.core.run(10) == 0
    bench.core.receive(m.Applied(1))
    bench.core.run(10)
    assert len(log_of(bench.core.take_output())) == 64
    assert bench.core.log_pending == 10


def test_a_miss_ships_the_log_and_walks_and_the_access_uses_what_was_walked() -> None:
    bench = Bench(touches(page(1), page(2), page(3)))
    bench.map(1)
    log, walk = bench.run()
    assert isinstance(log, m.Log)
    assert walk == m.Walk(1, 1, 0x2008, READ)
    assert isinstance(walk, m.Walk)
    bench.walked(walk)
    assert bench.core.log_pending == 1
    bench.core.receive(m.Applied(1))
    assert bench.walk() == m.Walk(1, 2, 0x3008, READ)


@pytest.mark.parametrize(
    "flags, rights",
    [
        (WRITE, AccessFlag.MAY_USER | AccessFlag.DIRTY),
        (WRITE, AccessFlag.MAY_WRITE),  # D is to be set first
        (4, AccessFlag.MAY_WRITE | AccessFlag.DIRTY),
        (2, AccessFlag.MAY_WRITE | AccessFlag.DIRTY),
        (2, RIGHTS | AccessFlag.SMEP),
    ],
)
def test_a_hit_without_the_rights_walks_again(flags: int, rights: int) -> None:
    bench = Bench(touches(page(1, flags)))
    bench.core.tlb.insert(0x1000, 1, 1, int(rights))
    assert bench.walk().flags == flags
    assert bench.core.log_pending == 0


def test_a_large_translation_serves_its_pages() -> None:
    bench = Bench(touches(page(0x205)))
    bench.walked(bench.walk(), level=2)
    bench.core.ship_log()
    assert log_of(bench.core.take_output()) == [(0x20_5008, 0x205)]


def test_loads_and_locked_operations_wait_for_their_value_behind_the_log() -> None:
    locked = LockedAccess(0x1010, m.LockedOp.CMPXCHG, 6, expected=4)
    bench = Bench(touches(page(1)), UsedLoad(0x1000), locked)
    bench.map(1)
    log, load = bench.run()
    assert isinstance(log, m.Log)
    assert load == m.Load(1, (RIGHTS | AccessFlag.USED, 0x1000, 1, 8, 0))
    bench.core.receive(m.Loaded(1, 77))
    (message,) = bench.run()
    flags = RIGHTS | AccessFlag.USED | AccessFlag.LOCKED | AccessFlag.WRITE
    assert message == m.Locked(1, (int(flags), 0x1010, 1, 8, 6), m.LockedOp.CMPXCHG, 4)
    bench.core.receive(m.Loaded(1, 4))
    assert bench.program.told == [("retired", "UsedLoad", 77), ("retired", "LockedAccess", 4)]


# --- exits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "op, reason",
    [
        (Invlpg(0x1000), m.InvlpgExit(0x1000)),
        (WriteRegister(m.ControlRegister.CR3, 0x5000), m.RegisterWriteExit(m.ControlRegister.CR3, 0x5000)),
        (SendIpi([1, 2], 40), m.SendIpiExit([1, 2], 40)),
        (Halt(), m.HaltExit()),
    ],
)
def test_some_instructions_always_exit_behind_the_log_and_are_executed_by_it(
    op: Op, reason: m.ExitReason
) -> None:
    bench = Bench(touches(page(1)), op, touches(page(2)))
    bench.map(1, 2)
    log, exit_ = bench.run()
    assert isinstance(log, m.Log)
    assert exit_ == m.Exit(1, reason)
    assert bench.core.waiting
    bench.enter()
    bench.core.run(1)
    assert bench.core.log_pending == 1
    assert (bench.core.tlb.lookup(0x1000) is None) == isinstance(op, Invlpg)


def test_a_walk_fault_removes_the_translations_and_exits_with_the_instruction() -> None:
    bench = Bench(touches((USER_WRITE, 0x1008, 4, 6)))
    bench.core.tlb.insert(0x1000, 1, 1, int(AccessFlag.MAY_USER))
    walk = bench.walk()
    bench.core.receive(m.WalkFault(1, walk.walk, 7))
    assert bench.core.take_output() == [
        m.Exit(1, m.PageFaultExit(0x1008, 7, m.Instruction(USER_WRITE, 4, 6)))
    ]
    assert bench.core.tlb.lookup(0x1000) is None


def fault(bench: Bench) -> None:
    walk = bench.walk()
    bench.core.receive(m.WalkFault(walk.entry, walk.walk, 0))
    assert isinstance(bench.core.take_output()[-1], m.Exit)


def test_a_faulting_access_is_executed_again_unless_it_is_completed() -> None:
    bench = Bench(touches(page(1), page(2)))
    fault(bench)
    bench.enter()
    assert bench.walk().gva == 0x1008
    bench.core.receive(m.WalkFault(2, 2, 0))
    bench.core.take_output()
    bench.enter(completed=m.Completed(5, mmio=True))
    assert bench.walk().gva == 0x2008
    assert bench.core.counters()["vcpu.instructions"] == 1
    assert bench.core.counters()["vcpu.mmio"] == 1


def test_a_completed_load_gives_its_value() -> None:
    bench = Bench(UsedLoad(0x1000))
    fault(bench)
    bench.enter(completed=m.Completed(99))
    assert bench.program.told == [("retired", "UsedLoad", 99)]


def test_an_injected_fault_is_taken_before_interrupts_and_removes_translations() -> None:
    bench = Bench(touches(page(1)))
    fault(bench)
    bench.map(1, 2)
    bench.enter(inject=m.InjectedFault(4, 0x1008), interrupts=[50, 60])
    assert bench.program.told == [("page_fault", 4, 0x1008), ("interrupt", 50), ("interrupt", 60)]
    assert bench.core.tlb.lookup(0x1000) is None
    assert bench.core.tlb.lookup(0x2000) is not None


def test_a_refused_register_write_is_told() -> None:
    bench = Bench(WriteRegister(m.ControlRegister.CR3, 1))
    bench.run()
    bench.enter(general_protection=True)
    assert bench.program.told == [("retired", "WriteRegister", 0), "general_protection"]


def test_the_flush_of_an_entry_empties_the_tlb_and_the_mutant_skips_it() -> None:
    for mutant, left in ((None, 0), (m.Mutant.ENTRY_FLUSH_SKIPPED, 1)):
        bench = Bench(Halt(), mutant=mutant)
        bench.map(1)
        bench.run()
        bench.enter(flush=True)
        assert len(bench.core.tlb) == left


def test_without_a_vpid_every_exit_and_entry_empties_the_tlb() -> None:
    bench = Bench(Halt(), vpid=False)
    bench.map(1)
    bench.run()
    assert len(bench.core.tlb) == 0
    bench.map(1)
    bench.enter()
    assert len(bench.core.tlb) == 0


# --- kicks -----------------------------------------------------------------------------------------------------------

KICKED = m.ExternalInterruptExit()


def test_a_kick_is_answered_behind_the_log() -> None:
    bench = Bench(touches(*[page(1)] * 10))
    bench.map(1)
    bench.core.run(3)
    bench.core.receive(m.Kick(1))
    log, exit_ = bench.core.take_output()
    assert isinstance(log, m.Log)
    assert exit_ == m.Exit(1, KICKED)
    bench.enter()
    assert bench.core.run(100) == 8  # the other 7, and HLT


def test_the_mutant_answers_first_and_ships_old_translations_in_the_next_entry() -> None:
    bench = Bench(touches(*[page(1)] * 10), mutant=m.Mutant.ANSWER_BEFORE_LOG)
    bench.map(1)
    bench.core.run(3)
    bench.core.receive(m.Kick(1))
    assert bench.core.take_output() == [m.Exit(1, KICKED)]
    bench.enter(flush=True)
    (log,) = bench.core.take_output()
    assert isinstance(log, m.Log)
    assert log.entry == 2
    assert len(log.accesses) == 3


def test_kicks_of_other_entries_are_ignored() -> None:
    bench = Bench(Halt(), touches(page(1)))
    bench.core.receive(m.Kick(0))
    bench.run()
    bench.core.receive(m.Kick(1))
    bench.enter()
    bench.core.receive(m.Kick(1))
    assert not bench.core.waiting
    assert bench.core.take_output() == []
    assert bench.core.counters()["vcpu.kicks_ignored"] == 3


def test_a_kick_abandons_a_walk_and_the_access_starts_again() -> None:
    bench = Bench(touches(page(1)))
    walk = bench.walk()
    bench.core.receive(m.Kick(1))
    assert bench.core.take_output() == [m.Exit(1, KICKED)]
    bench.enter()
    again = bench.walk()
    assert again == m.Walk(2, 2, 0x1008, READ)
    bench.walked(walk)  # the late answer
    assert bench.core.waiting
    assert len(bench.core.tlb) == 0
    bench.walked(again)
    assert bench.core.log_pending == 1


def test_a_kick_waits_for_an_outstanding_value() -> None:
    bench = Bench(UsedLoad(0x1000), touches(page(1)))
    bench.map(1)
    bench.run()
    bench.core.receive(m.Kick(1))
    assert bench.core.take_output() == []
    bench.core.receive(m.Loaded(1, 3))
    assert bench.core.take_output() == [m.Exit(1, KICKED)]
    assert bench.program.told == [("retired", "UsedLoad", 3)]


def test_a_kick_waits_for_credit() -> None:
    bench = Bench(touches(*[page(1)] * 1000))
    bench.map(1)
    bench.run()
    bench.core.receive(m.Kick(1))
    assert bench.core.take_output() == []
    bench.core.receive(m.Applied(1))
    log, exit_ = bench.core.take_output()
    assert isinstance(log, m.Log)
    assert exit_ == m.Exit(1, KICKED)


# --- the end ----------------------------------------------------------------------------------------------------------


def test_it_executes_its_share_and_then_idles() -> None:
    bench = Bench(touches(*[page(1)] * 500), ops=100)
    bench.map(1)
    assert bench.core.run(1000) == 101  # and HLT
    assert bench.core.done
    assert bench.program.told[0] == "idle"


@given(st.integers(1, 10**6), st.integers(1, 64))
def test_shares_add_up(ops: int, vcpus: int) -> None:
    shares = [instruction_share(ops, vcpu, vcpus) for vcpu in range(vcpus)]
    assert sum(shares) == ops
    assert max(shares) - min(shares) <= 1


def test_draining_leaves_guest_mode_behind_the_log_and_detaches() -> None:
    bench = Bench(touches(*[page(1)] * 10))
    bench.map(1)
    bench.core.run(3)
    bench.core.drain()
    log, exit_, detach = bench.core.take_output()
    assert isinstance(log, m.Log)
    assert exit_ == m.Exit(1, KICKED)
    assert detach == m.Detach()
    assert bench.core.left
    assert bench.core.run(10) == 0
    bench.enter()  # crosses the Detach
    assert bench.core.take_output() == []


def test_draining_outside_guest_mode_detaches_at_once() -> None:
    bench = Bench(Halt())
    bench.run()
    bench.core.drain()
    assert bench.core.take_output() == [m.Detach()]


def test_draining_waits_for_an_outstanding_value() -> None:
    bench = Bench(UsedLoad(0x1000))
    bench.map(1)
    bench.run()
    bench.core.drain()
    assert bench.core.take_output() == []
    bench.core.receive(m.Loaded(1, 0))
    assert bench.core.take_output() == [m.Exit(1, KICKED), m.Detach()]


@pytest.mark.parametrize("body", [m.Loaded(1, 0), m.Entered(2), m.Applied(1)])
def test_messages_that_make_no_sense_are_the_services_fault(body: m.MmuMessage) -> None:
    bench = Bench(touches(page(1)))
    with pytest.raises(RemoteProtocolError):
        bench.core.receive(body)


def test_a_walk_without_the_rights_asked_for_is_the_services_fault() -> None:
    bench = Bench(touches(page(1, WRITE)))
    walk = bench.walk()
    with pytest.raises(RemoteProtocolError):
        bench.walked(walk, flags=int(AccessFlag.MAY_WRITE))


# --- faults that do not exit, and misconfigurations -----------------------------------------------------------------


def bypassing() -> Bench:
    """A processor on which only faults on present entries exit."""
    bench = Bench(touches(page(1, WRITE), page(2)))
    bench.core.receive(m.Attached(0, 1, vpid=True, heartbeat=1.0, pfec_mask=1, pfec_match=1))
    return bench


def test_a_fault_that_the_filter_lets_through_goes_to_the_program_without_an_exit() -> None:
    bench = bypassing()
    walk = bench.walk()
    bench.core.receive(m.WalkFault(bench.entry, walk.walk, 2))
    assert bench.program.told == [("page_fault", 2, walk.gva)]
    assert bench.core.take_output() == []
    counters = bench.core.counters()
    assert counters["vcpu.bypassed"] == 1
    assert "vcpu.exits.page_fault" not in counters
    again = bench.walk()
    assert (again.gva, again.entry) == (walk.gva, bench.entry), "in the same entry, executed again"


def test_a_fault_that_does_not_exit_removes_the_translations_of_its_page() -> None:
    bench = Bench(touches(page(1), page(1, WRITE), page(1)))
    bench.core.receive(m.Attached(0, 1, vpid=True, heartbeat=1.0, pfec_mask=1, pfec_match=1))
    bench.walked(bench.walk(), flags=int(AccessFlag.MAY_USER))
    walk = bench.walk()
    bench.core.receive(m.WalkFault(bench.entry, walk.walk, 2))
    assert len(bench.core.tlb) == 0


def test_a_fault_that_fits_the_filter_exits() -> None:
    bench = bypassing()
    walk = bench.walk()
    bench.core.receive(m.WalkFault(bench.entry, walk.walk, 1 | 2 | 8))
    (exit_,) = bench.core.take_output()
    assert exit_ == m.Exit(bench.entry, m.PageFaultExit(walk.gva, 11, m.Instruction(WRITE, 8, 2)))
    assert bench.program.told == []


def test_an_abandoned_walk_delivers_no_fault() -> None:
    bench = bypassing()
    walk = bench.walk()
    bench.core.receive(m.Kick(bench.entry))
    bench.core.receive(m.WalkFault(bench.entry, walk.walk, 2))
    assert bench.program.told == []


def test_a_misconfiguration_exits_and_may_complete_the_instruction() -> None:
    bench = Bench(UsedLoad(0x1008))
    walk = bench.walk()
    bench.core.receive(m.WalkFault(bench.entry, walk.walk, 0, misconfig=True))
    (exit_,) = bench.core.take_output()
    assert exit_ == m.Exit(bench.entry, m.EptMisconfigExit(0x1008, m.Instruction(int(AccessFlag.USED))))
    bench.enter(completed=m.Completed(77, mmio=True))
    assert bench.program.told == [("retired", "UsedLoad", 77)]


# --- any order ---------------------------------------------------------------------------------------------------------

OPS = st.one_of(
    st.lists(
        st.tuples(st.sampled_from([READ, WRITE, USER_WRITE]), st.integers(0, 12).map(lambda n: n << 12)),
        min_size=1,
        max_size=100,
    ).map(lambda items: Touches([(flags, gva, 8, 2 * (flags & 1)) for flags, gva in items])),
    st.integers(0, 12).map(lambda n: UsedLoad(n << 12)),
    st.integers(0, 12).map(lambda n: LockedAccess(n << 12, m.LockedOp.XADD, 2)),
    st.integers(0, 12).map(lambda n: Invlpg(n << 12)),
    st.just(WriteRegister(m.ControlRegister.CR3, 0x1000)),
    st.just(SendIpi([1], 40)),
    st.just(Halt()),
)


class Service:
    """Answers directly, with identity translations; checks the legal order with the protocol's own tables."""

    def __init__(self, core: VcpuCore) -> None:
        self.core = core
        self.peer = Session(MMU, Side.PEER)
        self.session = Session(MMU, Side.SERVICE)
        self.session.receive(self.peer.send(m.Attach(m.Role.VCPU, "test")))
        self.peer.receive(self.session.send(m.Attached(0, 1, vpid=True, heartbeat=1.0)))
        self.entry = 0
        self.inside = False
        self.up: deque[m.Envelope] = deque()
        self.down: deque[m.Envelope] = deque()
        self.accesses = 0
        self.ended = False
        self.flushed_in = 0  # the entry that began with the last flush
        self.walked_in: dict[int, int] = {}  # gva page to the entry in which it was walked last

    def send(self, body: m.MmuMessage) -> None:
        self.down.append(self.session.send(body))

    def collect(self) -> None:
        self.up.extend(self.peer.send(body) for body in self.core.take_output())

    def deliver(self) -> bool:
        if not self.down:
            return False
        envelope = self.down.popleft()
        if self.peer.receive(envelope):
            self.core.receive(envelope.body)  # type: ignore[arg-type]
        return True

    def kick(self) -> None:
        if self.inside:
            self.send(m.Kick(self.entry))

    def take(self, choice: int) -> bool:
        if not self.up:
            return False
        envelope = self.up.popleft()
        assert self.session.receive(envelope)
        match envelope.body:
            case m.Enter():
                self.enter(choice)
            case m.Exit():
                self.inside = False
                self.enter(choice)
            case m.Log(accesses=accesses):
                for access in accesses:
                    self.check(access)
                self.send(m.Applied(1))
            case m.Load(access=access) | m.Locked(access=access):
                self.check(access)
                self.send(m.Loaded(self.entry, 7))
            case m.Walk() as walk:
                self.walked_in[walk.gva >> 12] = self.entry
                if choice == 3:
                    self.send(m.WalkFault(self.entry, walk.walk, 0))
                else:
                    self.send(m.Walked(self.entry, walk.walk, walk.gva >> 12, 1, RIGHTS))
            case m.Detach():
                self.inside = False
                self.ended = True
        return True

    def check(self, access: m.LoggedAccess) -> None:
        """Every access uses a translation that was walked since the last flush."""
        _, gva, pfn, _, _ = access
        assert pfn == gva >> 12
        assert self.walked_in[pfn] >= self.flushed_in
        self.accesses += 1

    def enter(self, choice: int) -> None:
        self.entry += 1
        self.inside = True
        if choice == 1:
            self.flushed_in = self.entry
        self.send(m.Entered(self.entry, flush=choice == 1, interrupts=[50] if choice == 2 else []))


@settings(max_examples=60, deadline=None)
@given(st.lists(OPS, max_size=12), st.randoms(use_true_random=False))
def test_in_any_order_of_kicks_and_answers_every_message_is_legal_and_every_instruction_executed(
    ops: list[Op], random: Any
) -> None:
    # The same objects may come several times; a run counts its own position.
    program = Script(*(msgspec.structs.replace(op) for op in ops))
    accesses = sum(
        len(op.items) if isinstance(op, Touches) else isinstance(op, UsedLoad | LockedAccess) for op in ops
    )
    expected = accesses + sum(isinstance(op, Invlpg | WriteRegister | SendIpi | Halt) for op in ops)
    core = VcpuCore(m.RunConfig(ops=1 << 40), 0, 1, program)
    service = Service(core)
    core.start()
    for _ in range(20_000):
        service.collect()
        if core.instructions >= expected and not core.log_pending:
            break
        choice = random.randrange(12)
        if choice < 4:
            service.take(random.randrange(8))
        elif choice < 8:
            service.deliver()
        elif choice == 8:
            service.kick()
        elif choice == 9:
            core.ship_log()
        else:
            core.run(1 + random.randrange(70))
    core.drain()
    for _ in range(1000):
        service.collect()
        if not service.take(0) and not service.deliver():
            break
    assert core.instructions >= expected
    assert service.accesses == accesses
    assert service.ended
    assert core.left


def test_translations_stay_on_the_processor_that_made_them() -> None:
    bench = Bench(touches(*[page(7)] * 9))
    bench.walked(bench.walk())
    for processor, known in ((1, False), (0, True), (1, False)):
        bench.core.receive(m.Kick(bench.entry))
        bench.core.take_output()
        bench.enter(processor=processor)
        assert (bench.core.tlb.lookup(7 << 12) is not None) is known
    assert bench.core.counters()["vcpu.migrations"] == 3
