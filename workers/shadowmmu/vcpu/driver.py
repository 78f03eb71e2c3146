"""What a vCPU worker does, without sockets, event loop or clock of its own.

The driver joins three things: the processor model (`shadowmmu.cpu.VcpuCore`), our end of the conversation with the
MMU service (`Session`), and the timers: heartbeats and the age of the log. Its user hands in the frames that arrive,
calls `turn` while it returns True (the core can go on), `turn` again at `log_deadline`, and `tick` every
`tick_seconds`; after each of these it sends `take_frames`. The core runs in short turns, so that a kick that arrives is
seen soon: it is taken at the next instruction boundary of the next turn.

Connections come and go: `opened` is called for each new one, and goes on with the incarnation where there is one.
`reopen` says that another one is wanted: nothing is heard any more, something is missing, or an incarnation is lost.
Then the worker attaches anew, with a new core, whose program goes on where the service says that the old one got to.
An attachment is over, for good, when `end` is set.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import msgspec

from shadowmmu.protocol import messages as m
from shadowmmu.protocol.codec import FROM_MMU, TO_MMU
from shadowmmu.protocol.continuity import INCARNATION_LOST, NOTHING_TO_RESUME, QUIET_INTERVALS
from shadowmmu.protocol.errors import ErrorCode, ProtocolError, RemoteProtocolError, error_info
from shadowmmu.protocol.heartbeat import HeartbeatTimer
from shadowmmu.protocol.messages import LOG_SECONDS
from shadowmmu.protocol.session import Session
from shadowmmu.protocol.states import MMU, Side, State
from shadowmmu.vcpu.latencies import Latencies

__all__ = ["Core", "End", "VcpuDriver"]

SLICE_INSTRUCTIONS: Final = 32
"""Instructions between two looks at the clock."""
TURN_INSTRUCTIONS: Final = 256
"""Most instructions of one turn."""
TURN_SECONDS: Final = 0.001
"""A turn ends after this long, give or take a slice: until then what the core sends waits, and kicks are not seen."""
PATIENCE_LOOKS: Final = 16
"""A pause of our own counts for one sixteenth of our patience, at most."""
HEARTBEAT_TICKS: Final = 4
"""Looks at the heartbeats per interval."""
_NO_PLACE_YET: Final = frozenset({ErrorCode.VCPU_TAKEN, ErrorCode.RUN_FULL})
"""Our own incarnation before may still be there, if its Attached was lost."""


class Core(Protocol):
    """What the driver needs of `shadowmmu.cpu.VcpuCore`."""

    entry: int
    """Of the last guest entry; 0 before the first."""

    @property
    def done(self) -> bool: ...

    @property
    def waiting(self) -> bool: ...

    @property
    def log_pending(self) -> int: ...

    def start(self) -> None: ...

    def receive(self, body: m.MmuMessage) -> None: ...

    def run(self, limit: int) -> int: ...

    def ship_log(self) -> None: ...

    def take_output(self) -> list[m.VcpuMessage]: ...

    def drain(self) -> None: ...

    def counters(self) -> dict[str, int]: ...


class Reopen(enum.Enum):
    """When another connection is wanted."""

    NOW = "now"
    LATER = "later"  # after a pause


class End(msgspec.Struct, frozen=True):
    """How an attachment ended. `in_order`: by our own Detach, or before there was one to end."""

    in_order: bool
    text: str


class VcpuDriver:
    """The attachment of a vCPU worker to the MMU service, over as many connections and incarnations as it takes.

    `name`: of this worker; `make_core(vcpu, vcpus)`: the processor of that vCPU out of so many; `clock`: seconds, of
    any clock that does not go back; `patience`: seconds of silence after which the service is given up. `place`: the
    vCPU whose worker we replace, and its token.
    """

    def __init__(
        self,
        name: str,
        make_core: Callable[[int, int], Core],
        clock: Callable[[], float],
        *,
        patience: float,
        place: tuple[int, bytes] | None = None,
    ) -> None:
        self.vcpu: int | None = None
        self.token = b""
        """Of the last incarnation."""
        self.end: End | None = None
        self.reopen: Reopen | None = None
        """Another connection is wanted; to be taken back by who makes it."""
        self.log_deadline: float | None = None
        """When the log has to be shipped (on the driver's clock), if there is one."""
        self.exit_latency = Latencies()
        self.walk_latency = Latencies()
        self._name = name
        self._make_core = make_core
        self._clock = clock
        self._patience = HeartbeatTimer(patience / PATIENCE_LOOKS, clock(), missed=PATIENCE_LOOKS)
        self._place = place
        self._vcpus: int | None = None  # of the run, once it has begun
        self._was_done = False
        self._counters: dict[str, int] = {}  # of the core before, until the next one has taken over
        self._session = Session(MMU, Side.PEER)
        self._timer: HeartbeatTimer | None = None
        self._attached: m.Attached | None = None
        self._core: Core | None = None
        self._draining = False
        self._frames: list[list[bytes]] = []
        self._exit_sent: float | None = None
        self._walk_sent: float | None = None
        self._error_replies = 0
        self.resumed = 0
        """How often an incarnation went on over another connection."""
        self.incarnations_lost = 0

    # --- the course of things ------------------------------------------------------------------------------------

    def opened(self) -> None:
        """There is a new connection: goes on with the incarnation, or attaches."""
        if self.end is not None:
            return
        self._frames.clear()  # of the connection before
        session = self._session
        if session.attached and session.token:
            self._send(m.Resume(session.token, session.continuity.received))
        else:
            self._attach()

    def _attach(self) -> None:
        self._session = Session(MMU, Side.PEER)
        self._timer = None
        vcpu, token = (None, b"") if self._place is None else self._place
        self._send(m.Attach(m.Role.VCPU, self._name, vcpu, resumable=True, token=token))

    @property
    def attached(self) -> bool:
        return self.vcpu is not None and self.end is None

    def start(self, vcpus: int) -> None:
        """The run begins, with `vcpus` vCPUs."""
        if self._vcpus is not None or self._draining or self.end is not None:
            return
        self._vcpus = vcpus
        if self._session.state is State.OUTSIDE:
            self._start_core(vcpus)

    def _start_core(self, vcpus: int) -> None:
        assert self.vcpu is not None
        assert self._attached is not None
        self._core = self._make_core(self.vcpu, vcpus)
        self._core.receive(self._attached)
        self._core.start()

    def drain(self) -> None:
        """No more instructions: the core leaves guest mode and detaches."""
        if self._draining or self.end is not None:
            return
        self._was_done = self.done
        self._draining = True
        if self._core is not None:
            self._core.drain()
        elif self._session.state is State.OUTSIDE:
            self._send(m.Detach())

    def _lose_incarnation(self, text: str) -> None:
        """What the service has not applied has not happened; another incarnation goes on from there."""
        if not self.token:
            self.fail(text)
            return
        self._counters = self.counters()
        self._core = None
        self._exit_sent = self._walk_sent = self.log_deadline = None
        assert self.vcpu is not None
        self._place = (self.vcpu, self.token)
        self._session = Session(MMU, Side.PEER)
        self._timer = None
        self.incarnations_lost += 1
        self.reopen = Reopen.NOW

    def abandon(self, text: str) -> None:
        """Leaves at once, if need be with the core in the middle of something: what it has not shipped has not
        happened.
        """
        if self.end is not None:
            return
        if self._core is not None:
            self._ship_output(self._core)
        if self._session.state in (State.IN_GUEST, State.WAITING_WALK):
            self._send(m.Exit(self._session.entry, m.ExternalInterruptExit()))
        if self._session.state in (State.OUTSIDE, State.HANDLING):
            self._send(m.Detach())
        self.fail(text)

    def fail(self, text: str) -> None:
        """The attachment cannot go on."""
        if self.end is None:
            self.end = End(in_order=False, text=text)

    # --- what the user calls in between --------------------------------------------------------------------------

    def received(self, frames: Sequence[bytes]) -> None:
        """A message of the MMU service."""
        if self.end is not None:
            return
        now = self._clock()
        try:
            envelope = FROM_MMU.decode(frames)
            act = self._session.receive(envelope)
            self._patience.heard(now)
            if self._timer is not None:
                self._timer.heard(now)
            if act:
                self._act(envelope.body, now)
        except RemoteProtocolError as error:
            if error.code is ErrorCode.SEQUENCE_GAP and self._session.token:
                self.reopen = Reopen.NOW  # something was lost on the way
            else:
                self.fail(f"the MMU service sent what it may not: {error}")

    def turn(self) -> bool:
        """Lets the core execute for about a millisecond; True if it could go on at once."""
        core = self._core
        if core is None or self.end is not None:
            return False
        began = now = self._clock()
        left = TURN_INSTRUCTIONS
        while left > 0 and now - began < TURN_SECONDS and not core.waiting:
            left -= max(core.run(SLICE_INSTRUCTIONS), 1)
            now = self._clock()
        if self.log_deadline is not None and now >= self.log_deadline:
            core.ship_log()
            self.log_deadline = now + LOG_SECONDS  # without credits it stays with us: asked again
        if self._ship_output(core) or not core.log_pending:
            self.log_deadline = None
        if self.log_deadline is None and core.log_pending:
            # Its oldest access is of this turn; and what a turn ships goes out at that turn's end.
            self.log_deadline = began + (LOG_SECONDS - TURN_SECONDS)
        if self._was_done and core.done:
            core.drain()  # what the incarnation before had finished is finished again
            self._ship_output(core)
        return self.attached and not core.waiting

    @property
    def tick_seconds(self) -> float:
        """How often `tick` should be called."""
        return 0.25 if self._timer is None else self._timer.interval / HEARTBEAT_TICKS

    def tick(self) -> None:
        """Looks at the heartbeats of both directions."""
        if self.end is not None:
            return
        now = self._clock()
        timer = self._timer
        if self._patience.expired(now):
            self.fail(f"nothing was heard of the MMU service for {self._patience.silence:.1f} s")
        elif timer is None:
            pass
        elif timer.expired(now) and self._session.token:
            timer.heard(now)  # the next connection has as long
            self.reopen = Reopen.NOW
        elif timer.expired(now):
            self.fail(f"nothing was heard of the MMU service for {timer.silence:.1f} s")
        elif timer.due(now):
            self._send(m.Heartbeat())

    def take_frames(self) -> list[list[bytes]]:
        """The messages to be sent, encoded."""
        frames, self._frames = self._frames, []
        return frames

    # --- what is to be reported ----------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """The vCPU's share of the instructions is executed."""
        return self._core is not None and self._core.done

    def counters(self) -> dict[str, int]:
        """The core's, and the errors that the service told us of."""
        core = self._core
        counters = self._counters if core is None or not core.entry else core.counters()
        return counters | {
            "vcpu.error_replies": self._error_replies,
            "vcpu.resumed": self.resumed,
            "vcpu.incarnations_lost": self.incarnations_lost,
        }

    def histograms(self) -> dict[str, str]:
        """Latencies in microseconds, as in a Report."""
        latencies = {"exit_latency_us": self.exit_latency, "walk_latency_us": self.walk_latency}
        return {name: latency.encoded() for name, latency in latencies.items() if latency.count}

    # --- messages ------------------------------------------------------------------------------------------------

    def _act(self, body: m.Message, now: float) -> None:
        match body:
            case m.Entered():
                if self._exit_sent is not None:
                    self.exit_latency.record(now - self._exit_sent)
                    self._exit_sent = None
                self._to_core(body)
            case m.Walked() | m.WalkFault():
                if self._walk_sent is not None:
                    self.walk_latency.record(now - self._walk_sent)
                    self._walk_sent = None
                self._to_core(body)
            case m.Loaded() | m.Applied() | m.Kick():
                self._to_core(body)
            case m.Attached():
                self._take_place(body, now)
            case m.Resumed():
                self.resumed += 1
                self._frames += [TO_MMU.encode(envelope) for envelope in self._session.lacking(body)]
            case m.ErrorReply():
                self._refused(body)
            case m.Ended():
                self._ended(body)
            case _:
                pass

    def _take_place(self, attached: m.Attached, now: float) -> None:
        self.vcpu = attached.vcpu
        self.token = attached.token
        self._attached = attached
        self._timer = HeartbeatTimer(attached.heartbeat, now, missed=QUIET_INTERVALS)
        if self._draining and not self._was_done:
            self._send(m.Detach())
        elif self._vcpus is not None:
            self._start_core(self._vcpus)

    def _refused(self, refusal: m.ErrorReply) -> None:
        self._error_replies += 1
        session = self._session
        text = f"{refusal.code}: {refusal.text}"
        if session.attached and refusal.code == ErrorCode.ALREADY_ATTACHED:
            return  # our Attach came twice
        if session.resuming and refusal.code in NOTHING_TO_RESUME:
            if session.state is State.LEAVING and not self._was_done:
                self.end = End(in_order=True, text="detached")
            else:
                self._lose_incarnation(text)
        elif session.attached and refusal.code in NOTHING_TO_RESUME and session.token:
            self.reopen = Reopen.NOW  # the service was restarted
        elif self._place is not None and refusal.code in _NO_PLACE_YET:
            self.reopen = Reopen.LATER
        else:
            what = "to attach us" if self.vcpu is None else f"message {refusal.seq} of ours"
            self.fail(f"the MMU service refused {what}: {text}")

    def _to_core(self, body: m.MmuMessage) -> None:
        if self._core is not None:
            self._core.receive(body)

    def _ended(self, ended: m.Ended) -> None:
        if self._draining and ended.code in (ErrorCode.DETACHED.value, ErrorCode.FINISHED.value):
            self.end = End(in_order=True, text="detached")
            return
        info = error_info(ended.code)
        why = ended.text or (info.meaning if info is not None else "")
        text = f"the MMU service ended incarnation {self._session.incarnation}: {ended.code}: {why}"
        if ended.code in INCARNATION_LOST:
            self._lose_incarnation(text)
        else:
            self.fail(text)

    def _ship_output(self, core: Core) -> bool:
        """Sends what the core has to say; True if a log was among it."""
        logged = False
        for body in core.take_output():
            match body:
                case m.Log():
                    logged = True
                case m.Walk():
                    self._walk_sent = self._clock()
                case m.Exit():
                    self._walk_sent = None  # if one was under way, this abandons it
                    # A halt lasts until somebody interrupts it: that is no latency.
                    halted = isinstance(body.reason, m.HaltExit)
                    self._exit_sent = None if halted else self._clock()
                case _:
                    pass
            self._send(body)
        return logged

    def _send(self, body: m.VcpuMessage) -> None:
        if self.end is not None:
            return
        try:
            envelope = self._session.send(body)
            # Until the connection is taken up only Resume goes out; the session keeps the rest.
            if not self._session.resuming or isinstance(body, m.Resume):
                self._frames.append(TO_MMU.encode(envelope))
        except ProtocolError as error:
            self.fail(f"we were about to send what we may not: {error}")
            return
        if self._timer is not None:
            self._timer.sent(self._clock())
