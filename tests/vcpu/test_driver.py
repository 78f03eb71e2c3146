"""The worker's driver with a fake core and a fake clock, against the service's end of the session in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hdrh.histogram import HdrHistogram

from shadowmmu.protocol import messages as m
from shadowmmu.protocol.codec import FROM_MMU, TO_MMU
from shadowmmu.protocol.continuity import QUIET_INTERVALS
from shadowmmu.protocol.errors import ErrorCode, RemoteProtocolError, error_reply
from shadowmmu.protocol.messages import LOG_SECONDS, Envelope
from shadowmmu.protocol.session import Session
from shadowmmu.protocol.states import MMU, Side, State
from shadowmmu.vcpu.driver import SLICE_INSTRUCTIONS, TURN_INSTRUCTIONS, TURN_SECONDS, Reopen, VcpuDriver

HEARTBEAT = 1.0
PATIENCE = 60.0
TOKEN = b"token of vCPU 3"
INSTRUCTION = 1e-6  # seconds that one takes on the fake clock


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeCore:
    """Every instruction (every n-th) is a TLB hit that is logged with the time; it walks when told to."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.done = False
        self.started = False
        self.entry = 0
        self.inside = False
        self.kicks = 0
        self.walking = False
        self.walk_next = False
        self.hits = True
        self.hit_every = 1
        self.credits = m.LOG_CREDITS
        self.walks = 0
        self.instructions = 0
        self.instruction_seconds = INSTRUCTION
        self.log: list[m.LoggedAccess] = []
        self.output: list[m.VcpuMessage] = []
        self.attached: m.Attached | None = None

    @property
    def waiting(self) -> bool:
        full = len(self.log) == m.LOG_LIMIT and not self.credits
        return not self.inside or self.walking or full or not self.hits

    @property
    def log_pending(self) -> int:
        return len(self.log)

    def start(self) -> None:
        self.started = True
        self.output.append(m.Enter())

    def receive(self, body: m.MmuMessage) -> None:
        match body:
            case m.Entered():
                self.entry, self.inside = body.entry, True
            case m.Walked():
                self.walking = False
            case m.Applied():
                self.credits += body.logs
            case m.Kick():
                self.kicks += 1
                self.interrupted()
            case m.Attached():
                self.attached = body
            case _:
                raise AssertionError(body)

    def interrupted(self) -> None:
        if self.inside:
            self.ship_log()
            self.output.append(m.Exit(self.entry, m.ExternalInterruptExit()))
            self.inside = self.walking = False

    def run(self, limit: int) -> int:
        if self.waiting:
            return 0
        if self.walk_next:
            self.walk_next, self.walking = False, True
            self.ship_log()
            self.walks += 1
            self.output.append(m.Walk(self.entry, self.walks, 0x5000, 0))
            return 0
        executed = 0
        while executed < limit:
            if len(self.log) == m.LOG_LIMIT:
                self.ship_log()
                if self.log:
                    break
            executed += 1
            self.instructions += 1
            if self.instructions % self.hit_every == 0:
                self.log.append((0, 0x1000, 7, 8, int(self.clock.now * 1e6)))
            self.clock.now += self.instruction_seconds
        return executed

    def ship_log(self) -> None:
        if self.log and self.credits:
            self.credits -= 1
            self.output.append(m.Log(self.entry, self.log))
            self.log = []

    def take_output(self) -> list[m.VcpuMessage]:
        output, self.output = self.output, []
        return output

    def drain(self) -> None:
        self.interrupted()
        self.output.append(m.Detach())

    def counters(self) -> dict[str, int]:
        return {"vcpu.instructions": self.instructions}


class Pair:
    """The driver and the service's end of its session."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.core = FakeCore(self.clock)
        self.made: list[tuple[int, int]] = []
        self.driver = VcpuDriver("worker-1", self._make_core, self.clock, patience=PATIENCE)
        self.service = Session(MMU, Side.SERVICE)
        self.heard: list[m.Message] = []

    def _make_core(self, vcpu: int, vcpus: int) -> FakeCore:
        self.made.append((vcpu, vcpus))
        return self.core

    def sent(self) -> list[m.Message]:
        """What the driver sent since the last call; every message must be legal for the service."""
        bodies: list[m.Message] = []
        for frames in self.driver.take_frames():
            envelope = TO_MMU.decode(frames)
            self.service.receive(envelope)
            bodies.append(envelope.body)
        return bodies

    def reply(self, body: m.Message) -> None:
        self.driver.received(FROM_MMU.encode(self.service.send(body)))

    def attach(self, token: bytes = b"") -> None:
        self.driver.opened()
        assert self.sent() == [m.Attach(m.Role.VCPU, "worker-1", resumable=True)]
        self.reply(m.Attached(3, 9, vpid=True, heartbeat=HEARTBEAT, token=token))

    def enter(self, token: bytes = b"") -> None:
        self.attach(token)
        self.driver.start(4)
        self.driver.turn()
        assert self.sent() == [m.Enter()]
        self.reply(m.Entered(1))


@pytest.fixture
def pair() -> Pair:
    return Pair()


def kinds(bodies: list[m.Message]) -> list[type]:
    return [type(body) for body in bodies]


def turns_until(pair: Pair, condition: Callable[[], bool], limit: int = 1000) -> None:
    for _ in range(limit):
        if condition():
            return
        pair.driver.turn()
    raise AssertionError("the condition never came true")


def decoded(text: str) -> HdrHistogram:
    return HdrHistogram.decode(text)


def test_attach_and_start_make_the_core_of_the_vcpu_given(pair: Pair) -> None:
    pair.attach()
    assert pair.driver.attached and pair.driver.vcpu == 3 and not pair.made
    assert not pair.driver.turn()
    pair.driver.start(4)
    assert pair.made == [(3, 4)] and pair.core.started
    assert pair.core.attached == m.Attached(3, 9, vpid=True, heartbeat=HEARTBEAT)


def test_a_turn_is_bounded_by_instructions(pair: Pair) -> None:
    pair.enter()
    pair.core.instruction_seconds = 0.0
    assert pair.driver.turn()
    assert pair.core.instructions == TURN_INSTRUCTIONS


def test_a_turn_is_bounded_by_time(pair: Pair) -> None:
    pair.enter()
    pair.core.instruction_seconds = TURN_SECONDS / 50
    assert pair.driver.turn()
    assert SLICE_INSTRUCTIONS <= pair.core.instructions <= 50 + SLICE_INSTRUCTIONS


def test_a_core_that_waits_needs_no_turns(pair: Pair) -> None:
    pair.enter()
    pair.core.walk_next = True
    pair.driver.turn()
    assert kinds(pair.sent()) == [m.Walk]
    assert not pair.driver.turn()
    pair.reply(m.Walked(1, 1, 7, 1, 0))
    assert pair.driver.turn()


def test_a_log_is_shipped_within_its_time_by_a_busy_core(pair: Pair) -> None:
    pair.enter()
    pair.core.instruction_seconds = 10e-6
    pair.core.hit_every = 16  # 5 ms are 31 accesses: the log never fills
    logs = 0
    for _ in range(300):
        pair.driver.turn()
        for body in pair.sent():
            assert isinstance(body, m.Log)
            logs += 1
            first_logged_at = body.accesses[0][4] * 1e-6
            assert pair.clock.now - first_logged_at <= LOG_SECONDS
            pair.reply(m.Applied(1))
    assert logs > 50


def test_a_log_is_shipped_within_its_time_by_an_idle_core(pair: Pair) -> None:
    pair.enter()
    first = pair.clock.now
    pair.core.run(3)
    pair.core.hits = False
    assert not pair.driver.turn()
    deadline = pair.driver.log_deadline
    assert deadline is not None and first < deadline <= first + LOG_SECONDS
    assert pair.sent() == []
    pair.clock.now = deadline
    assert not pair.driver.turn()
    (log,) = pair.sent()
    assert isinstance(log, m.Log) and len(log.accesses) == 3
    assert pair.driver.log_deadline is None


def test_a_full_log_without_credits_waits_without_spinning(pair: Pair) -> None:
    pair.enter()
    pair.core.instruction_seconds = 0.0
    turns_until(pair, lambda: pair.core.credits == 0 and pair.core.log_pending == m.LOG_LIMIT)
    assert kinds(pair.sent()) == [m.Log] * m.LOG_CREDITS
    before = pair.driver.log_deadline
    assert before is not None
    pair.clock.now = before
    assert not pair.driver.turn()
    assert pair.driver.log_deadline is not None and pair.driver.log_deadline > before
    pair.reply(m.Applied(2))
    before = pair.core.instructions
    pair.driver.turn()
    assert kinds(pair.sent()) == [m.Log] * 2
    assert pair.core.instructions == before + 2 * m.LOG_LIMIT


def test_a_kick_is_answered_after_its_log(pair: Pair) -> None:
    pair.enter()
    pair.core.run(5)
    pair.reply(m.Kick(1))
    pair.driver.turn()
    log, answer = pair.sent()
    assert isinstance(log, m.Log) and len(log.accesses) == 5
    assert answer == m.Exit(1, m.ExternalInterruptExit())


def test_a_kick_of_an_entry_that_has_ended_is_dropped(pair: Pair) -> None:
    pair.enter()
    pair.reply(m.Kick(1))
    crossing = FROM_MMU.encode(pair.service.send(m.Kick(1)))
    pair.driver.turn()
    assert kinds(pair.sent()) == [m.Exit]
    pair.driver.received(crossing)
    pair.reply(m.Entered(2))
    assert pair.core.kicks == 1 and pair.driver.end is None


def test_latencies_are_measured_from_sending_to_the_answer(pair: Pair) -> None:
    pair.enter()
    pair.core.walk_next = True
    pair.driver.turn()
    pair.sent()
    pair.clock.now += 0.002
    pair.reply(m.Walked(1, 1, 7, 1, 0))
    pair.reply(m.Kick(1))
    pair.driver.turn()
    pair.sent()
    pair.clock.now += 0.030
    pair.reply(m.Entered(2))
    histograms = pair.driver.histograms()
    walk, exits = decoded(histograms["walk_latency_us"]), decoded(histograms["exit_latency_us"])
    assert walk.get_total_count() == exits.get_total_count() == 1
    assert walk.get_max_value() == pytest.approx(2000, rel=0.01)
    assert exits.get_max_value() == pytest.approx(30_000, rel=0.01)


def test_the_answer_to_an_abandoned_walk_is_dropped_and_not_measured(pair: Pair) -> None:
    pair.enter()
    pair.core.walk_next = True
    pair.driver.turn()
    pair.sent()
    late = FROM_MMU.encode(pair.service.send(m.Kick(1)))
    pair.driver.received(late)
    answer = FROM_MMU.encode(pair.service.send(m.Walked(1, 1, 7, 1, 0)))
    pair.driver.turn()
    assert kinds(pair.sent()) == [m.Exit]
    pair.driver.received(answer)
    assert pair.driver.end is None
    assert "walk_latency_us" not in pair.driver.histograms()


def test_heartbeats_are_sent_by_an_idle_worker(pair: Pair) -> None:
    pair.attach()
    assert pair.driver.tick_seconds <= HEARTBEAT / 2
    beats = 0
    for _ in range(40):
        pair.clock.now += pair.driver.tick_seconds
        pair.driver.tick()
        pair.reply(m.Heartbeat())
        beats += kinds(pair.sent()).count(m.Heartbeat)
    assert beats == pytest.approx(40 * pair.driver.tick_seconds / HEARTBEAT, abs=1)


def test_heartbeats_are_not_needed_while_something_else_is_sent(pair: Pair) -> None:
    pair.enter()
    for _ in range(40):
        pair.clock.now += pair.driver.tick_seconds
        pair.driver.turn()
        pair.driver.tick()
        sent = kinds(pair.sent())
        assert m.Heartbeat not in sent
        for _ in range(sent.count(m.Log)):
            pair.reply(m.Applied(1))


def test_a_silent_service_is_given_up(pair: Pair) -> None:
    pair.attach()
    silent_since = pair.clock.now
    while pair.driver.end is None:
        assert pair.clock.now - silent_since < 2 * PATIENCE
        pair.clock.now += pair.driver.tick_seconds
        pair.driver.tick()
    assert not pair.driver.end.in_order
    assert "nothing was heard" in pair.driver.end.text
    assert pair.clock.now - silent_since >= QUIET_INTERVALS * HEARTBEAT


def test_a_silent_service_is_tried_over_other_connections_and_given_up_at_last(pair: Pair) -> None:
    pair.attach(TOKEN)
    silent_since = pair.clock.now
    tried = 0
    while pair.driver.end is None:
        assert pair.clock.now - silent_since < 2 * PATIENCE
        pair.clock.now += pair.driver.tick_seconds
        pair.driver.tick()
        if pair.driver.reopen is not None:
            pair.driver.reopen = None
            pair.driver.opened()
            (frames,) = pair.driver.take_frames()
            assert TO_MMU.decode(frames) == Envelope(9, 0, m.Resume(TOKEN, 0))
            tried += 1
    assert tried > 3
    assert pair.clock.now - silent_since >= PATIENCE


def test_what_was_on_its_way_is_said_again_on_the_next_connection(pair: Pair) -> None:
    pair.enter(TOKEN)
    pair.core.run(5)
    pair.driver.drain()
    pair.driver.turn()
    pair.driver.take_frames()  # lost
    pair.driver.opened()
    (resume,) = pair.sent()
    assert isinstance(resume, m.Resume)
    for envelope in pair.service.resume(resume):
        pair.driver.received(FROM_MMU.encode(envelope))
    assert kinds(pair.sent()) == [m.Log, m.Exit, m.Detach]
    assert pair.driver.counters()["vcpu.resumed"] == 1


def test_a_lost_incarnation_is_followed_by_another_with_a_new_core(pair: Pair) -> None:
    pair.enter(TOKEN)
    pair.core.run(5)
    pair.reply(m.Ended("given-up", "silent for 5 s"))
    assert (pair.driver.end, pair.driver.reopen) == (None, Reopen.NOW)
    assert pair.driver.counters()["vcpu.instructions"] == 5
    pair.core = FakeCore(pair.clock)
    pair.service = Session(MMU, Side.SERVICE)
    pair.driver.opened()
    assert pair.sent() == [m.Attach(m.Role.VCPU, "worker-1", 3, resumable=True, token=TOKEN)]
    pair.reply(m.Attached(3, 10, vpid=True, heartbeat=HEARTBEAT, token=TOKEN))
    pair.driver.turn()
    assert pair.sent() == [m.Enter()]
    assert pair.made == [(3, 4), (3, 4)]


def test_a_replacement_waits_for_its_place(pair: Pair) -> None:
    driver = VcpuDriver("worker-2", pair._make_core, pair.clock, patience=PATIENCE, place=(3, TOKEN))
    pair.driver = driver
    driver.opened()
    assert pair.sent() == [m.Attach(m.Role.VCPU, "worker-2", 3, resumable=True, token=TOKEN)]
    pair.reply(m.ErrorReply("vcpu-taken", "vCPU 3 is attached"))
    assert (driver.end, driver.reopen) == (None, Reopen.LATER)


def test_a_pause_of_our_own_is_not_the_services_silence(pair: Pair) -> None:
    pair.attach()
    pair.clock.now += 3600.0
    pair.driver.tick()
    assert pair.driver.end is None


def test_drain_leaves_guest_mode_and_detaches(pair: Pair) -> None:
    pair.enter()
    pair.core.run(5)
    pair.driver.drain()
    pair.driver.turn()
    assert kinds(pair.sent()) == [m.Log, m.Exit, m.Detach]
    pair.reply(m.Ended("detached"))
    assert pair.driver.end is not None and pair.driver.end.in_order
    assert not pair.driver.turn()
    assert pair.driver.counters()["vcpu.instructions"] == 5


def test_drain_before_the_start_detaches_at_once(pair: Pair) -> None:
    pair.attach()
    pair.driver.drain()
    assert pair.sent() == [m.Detach()]
    pair.driver.start(4)
    assert not pair.made
    pair.reply(m.Ended("detached"))
    assert pair.driver.end is not None and pair.driver.end.in_order


def test_drain_while_attaching_detaches_as_soon_as_possible(pair: Pair) -> None:
    pair.driver.opened()
    pair.sent()
    pair.driver.drain()
    pair.reply(m.Attached(0, 1, vpid=True, heartbeat=HEARTBEAT))
    assert pair.sent() == [m.Detach()]


def test_an_ended_incarnation_is_the_end(pair: Pair) -> None:
    pair.enter()
    pair.reply(m.Ended("given-up", "silent for 5 s"))
    end = pair.driver.end
    assert end is not None and not end.in_order
    assert "given-up" in end.text and "silent for 5 s" in end.text
    before = pair.core.instructions
    assert not pair.driver.turn()
    assert pair.core.instructions == before and pair.sent() == []


def test_an_error_reply_is_counted_and_is_the_end(pair: Pair) -> None:
    pair.enter()
    refusal = error_reply(RemoteProtocolError(ErrorCode.STALE_INCARNATION, "over", incarnation=9, seq=2))
    pair.driver.received(FROM_MMU.encode(refusal))
    end = pair.driver.end
    assert end is not None and not end.in_order
    assert "stale-incarnation" in end.text and "message 2" in end.text
    assert pair.driver.counters()["vcpu.error_replies"] == 1


def test_a_refused_attach_is_the_end(pair: Pair) -> None:
    pair.driver.opened()
    pair.sent()
    pair.reply(m.ErrorReply("run-full", "no place left"))
    end = pair.driver.end
    assert end is not None and not end.in_order and "run-full" in end.text


@pytest.mark.parametrize(
    "frames",
    [
        [b"nonsense"],
        [b"SMMU/1.0", b"\xc1"],
        FROM_MMU.encode(Envelope(9, 2, m.Walked(1, 1, 7, 1, 0))),  # no walk is under way
        FROM_MMU.encode(Envelope(9, 7, m.Heartbeat())),  # a gap
    ],
    ids=["part-count", "malformed", "out-of-order", "gap"],
)
def test_what_the_service_may_not_send_is_the_end(pair: Pair, frames: list[bytes]) -> None:
    pair.attach()
    pair.driver.received(frames)
    end = pair.driver.end
    assert end is not None and not end.in_order and "may not" in end.text


def test_messages_of_an_earlier_incarnation_are_dropped(pair: Pair) -> None:
    pair.attach()
    pair.driver.received(FROM_MMU.encode(Envelope(8, 4, m.Entered(3))))
    assert pair.driver.end is None


def test_what_we_may_not_send_is_not_sent(pair: Pair) -> None:
    pair.enter()
    pair.core.output.append(m.Enter())
    pair.driver.turn()
    end = pair.driver.end
    assert end is not None and not end.in_order and "Enter" in end.text


@pytest.mark.parametrize("walking", [False, True])
def test_abandon_answers_and_detaches_without_the_log(pair: Pair, walking: bool) -> None:
    pair.enter()
    if walking:
        pair.core.walk_next = True
        pair.driver.turn()
        pair.sent()
    else:
        pair.core.run(3)
    pair.driver.abandon("enough")
    assert kinds(pair.sent()) == [m.Exit, m.Detach]
    assert pair.driver.end is not None and pair.driver.end.text == "enough"
    assert pair.service.state is State.LEAVING


def test_done_is_the_cores(pair: Pair) -> None:
    assert not pair.driver.done
    pair.enter()
    assert not pair.driver.done
    pair.core.done = True
    assert pair.driver.done
