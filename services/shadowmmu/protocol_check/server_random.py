"""Checks of a service: random clients.

Two vCPUs and a host agent do random things, each legal by the tables of legal order, with random contents, at the same
time; now and then something illegal is said in between, which must be refused with a code that the specification
allows. Properties: `Session` finds nothing wrong with any answer, every question is answered in time, every word has
the value that its owner stored last, and what was refused changed nothing.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec

from shadowmmu.protocol import LOG_LIMIT, Envelope, ErrorCode, State
from shadowmmu.protocol import messages as m
from shadowmmu.protocol_check.lab import DATA, SMALL_GFN, USED, WRITE, Host, Lab, Vcpu, gva_of
from shadowmmu.protocol_check.peer import Peer
from shadowmmu.protocol_check.registry import CheckFailed, CheckSkipped, checks, require
from shadowmmu.protocol_check.server_sessions import samples

__all__: list[str] = []

_LOCKED: Final = 25
_U64: Final = (1 << 64) - 1
WORDS: Final = 24
"""Words of its own that each vCPU stores to, over some pages of both sizes."""
FIRST_GFN: Final = SMALL_GFN + 64
QUIET_SECONDS: Final = 0.002
"""How long is waited for a message when nobody could go on."""
_ANSWERED: Final = frozenset(
    {State.ATTACHING, State.HANDLING, State.WAITING_WALK, State.WAITING_VALUE, State.LEAVING}
)


class _Pending(msgspec.Struct, frozen=True):
    """A message that has to be refused: with one of these codes."""

    codes: frozenset[ErrorCode]
    incarnation: int
    number: int
    text: str


class _Walker:
    """What one peer does, and what it is owed."""

    def __init__(self, lab: Lab, choices: random.Random, illegal: float) -> None:
        self.lab = lab
        self.random = choices
        self.illegal = illegal
        self.refusals: deque[_Pending] = deque()
        self.progress = time.monotonic()
        self.said = 0
        self.peer: Peer

    def turn(self) -> bool:
        """Takes what has come, and says something if it is its turn. False if it waits."""
        peer = self.peer
        peer.drain()
        while peer.received:
            self.progress = time.monotonic()
            self._received(peer.received.popleft())
        if self.refusals or peer.session.state in _ANSWERED:
            late = time.monotonic() - self.progress
            require(
                late < self.lab.patience or self.may_wait(), f"{peer.name}: {self.owed()} for {late:.1f} s"
            )
        else:
            self.progress = time.monotonic()
        if len(self.refusals) < 8 and self.random.random() < self.illegal and self._say_illegal():
            return True
        return self.act()

    def owed(self) -> str:
        """What is waited for."""
        if self.refusals:
            return f"the refusal of {self.refusals[0].text} did not come"
        return f"nothing came in state {self.peer.session.state.value}"

    def may_wait(self) -> bool:
        """There may be no answer for ever."""
        return False

    def act(self) -> bool:
        """Says something legal, if it is its turn."""
        raise NotImplementedError

    def illegal_message(self) -> tuple[m.Message, set[ErrorCode]] | None:
        """Something that is not legal whatever the service knows, and the codes that it may be refused with."""
        raise NotImplementedError

    def heard(self, body: m.Message) -> None:
        """An answer."""

    def _received(self, envelope: Envelope) -> None:
        body = envelope.body
        if not isinstance(body, m.ErrorReply) or envelope.seq:
            self.heard(body)
            return
        require(bool(self.refusals), f"{self.peer.name}: {body!r} for something legal")
        pending = self.refusals.popleft()
        require(
            body.code in {code.value for code in pending.codes},
            f"{self.peer.name}: {pending.text} was refused with {body.code}, not {' or '.join(sorted(pending.codes))}",
        )
        require(
            (envelope.incarnation, body.seq) == (pending.incarnation, pending.number),
            f"{self.peer.name}: {body!r} does not name message {pending.number} of {pending.incarnation}",
        )

    def _say_illegal(self) -> bool:
        session = self.peer.session
        if not session.attached:
            return False
        illegal = self.illegal_message()
        if illegal is None:
            return False
        body, codes = illegal
        number, incarnation = session.send_seq, session.incarnation
        draw = self.random.random()
        if draw < 0.15:
            # Something else under a number that was taken: a repetition, whatever is in it.
            if session.send_seq > 1 and isinstance(body, m.VcpuMessage):
                self.peer.post(body, number=self.random.randrange(1, session.send_seq))
                self.said += 1
                return True
            number, codes = 0, codes | {ErrorCode.BAD_ARGUMENT}
        elif draw < 0.25:
            incarnation += self.random.choice((-1, 1, 1 << 30))
            codes = codes | {ErrorCode.STALE_INCARNATION}
        self.refuse(body, codes, incarnation, number)
        return True

    def refuse(self, body: m.Message, codes: set[ErrorCode], incarnation: int, number: int) -> None:
        """Sends what has to be refused."""
        name = f"{type(body).__name__} in state {self.peer.session.state.value}"
        self.refusals.append(_Pending(frozenset(codes), incarnation, number, name))
        self.peer.post(body, incarnation=incarnation, number=number)
        self.said += 1


class _RandomVcpu(_Walker):
    """A vCPU that owns some words."""

    def __init__(self, lab: Lab, choices: random.Random, illegal: float, place: int) -> None:
        super().__init__(lab, choices, illegal)
        self.peer: Vcpu = lab.vcpu()
        self.peer.answers = False
        base = 512 * place
        self.words = [DATA + 0x10000 + base + 8 * n for n in range(WORDS)]
        self.words += [gva_of(FIRST_GFN + n % 4) + base + 8 * n for n in range(WORDS)]
        self.values: dict[int, int] = {}
        self.held: dict[int, tuple[int, int]] = {}  # by word: frame and rights
        self._walk_for = (0, 0)
        self._asked = (0, 0)  # word, and what it will be afterwards
        self._halted = False

    def may_wait(self) -> bool:
        return self._halted and not self.refusals

    # --- legal ---------------------------------------------------------------------------------------------------

    def act(self) -> bool:
        session = self.peer.session
        match session.state:
            case State.IN_GUEST:
                if self.peer.kicked == session.entry:
                    return self._exit(m.ExternalInterruptExit())
                return self._act_in_guest()
            case State.WAITING_WALK if self.peer.kicked == session.entry and self.random.random() < 0.5:
                return self._exit(m.ExternalInterruptExit())
            case State.OUTSIDE:
                self._say(m.Enter() if self.random.random() < 0.9 else m.Detach())
            case State.HANDLING if self._halted and self.random.random() < 0.05:
                self._say(m.Detach())
            case State.ENDED:
                self.held.clear()
                self._halted = False
                self._say(m.Attach(m.Role.VCPU, self.peer.name))
            case _:
                return False
        return True

    def _say(self, body: m.VcpuMessage) -> None:
        self.peer.send(body)
        self.said += 1

    def _act_in_guest(self) -> bool:
        draw = self.random.random()
        word = self.random.choice(self.words)
        if word not in self.held or draw < 0.1:
            flags = self.random.choice((0, WRITE, USED))
            self._walk_for = word, flags
            self._say(m.Walk(self.peer.session.entry, self.peer.session.walk + 1, word, flags))
        elif draw < 0.4:
            return self._log()
        elif draw < 0.6:
            self._asked = word, -1
            frame, rights = self.held[word]
            self._say(m.Load(self.peer.session.entry, (USED | rights, word, frame, 8, 0)))
        elif draw < 0.75:
            return self._locked(word)
        elif draw < 0.95:
            return self._exit(self._reason(word))
        elif draw < 0.97 and not self.peer.session.logs and not self.refusals and self.illegal:
            number = self.peer.session.send_seq + self.random.randrange(1, 5)
            self.refuse(m.Heartbeat(), {ErrorCode.SEQUENCE_GAP}, self.peer.session.incarnation, number)
            # Ended follows; until then nothing that is sent can be right.
            self._await_end()
        elif draw < 0.99:
            self._exit(m.ExternalInterruptExit())
            self._say(m.Detach())
        else:
            self._say(m.Heartbeat())
        return True

    def _await_end(self) -> None:
        until = time.monotonic() + self.lab.patience
        while self.peer.session.attached:
            require(time.monotonic() < until, f"{self.peer.name}: a gap did not end its incarnation")
            self.lab.look_after(self.peer)
            self.peer.socket.poll(10)
            self.peer.drain()
        while self.peer.received:
            self._received(self.peer.received.popleft())

    def _writable(self, word: int) -> bool:
        return word in self.held and self.held[word][1] & 0x900 == 0x900

    def _log(self) -> bool:
        if not self.peer.session.log_credits:
            return False
        accesses: list[m.LoggedAccess] = []
        for _ in range(self.random.choice((1, 3, LOG_LIMIT))):
            word = self.random.choice(list(self.held))
            frame, rights = self.held[word]
            if self._writable(word) and self.random.random() < 0.7:
                value = self.random.getrandbits(64)
                accesses.append((WRITE | rights, word, frame, 8, value))
                self.values[word] = value
            else:
                accesses.append((rights, word, frame, 8, 0))
        self._say(m.Log(self.peer.session.entry, accesses))
        return True

    def _locked(self, word: int) -> bool:
        if not self._writable(word) or word not in self.values:
            return False
        frame, rights = self.held[word]
        operand = self.random.choice((0, 1, _U64, self.random.getrandbits(64)))
        old = self.values[word]
        op = self.random.choice(list(m.LockedOp))
        expected = 0
        match op:
            case m.LockedOp.XADD:
                new = (old + operand) & _U64
            case m.LockedOp.XCHG:
                new = operand
            case _:
                expected = self.random.choice((old, old ^ 1))
                new = operand if expected == old else old
        self._asked = word, new
        self._say(
            m.Locked(self.peer.session.entry, (_LOCKED | rights, word, frame, 8, operand), op, expected)
        )
        return True

    def _reason(self, word: int) -> m.ExitReason:
        draw = self.random.random()
        if draw < 0.5:
            return m.InvlpgExit(word)
        if draw < 0.8:
            return m.SendIpiExit(list(range(self.lab.vcpus)), self.random.randrange(32, 256))
        if draw < 0.85:
            return m.HaltExit()
        return m.ExternalInterruptExit()

    def _exit(self, reason: m.ExitReason) -> bool:
        # A vCPU may drop its translations at any time: this one does at every exit.
        self.held.clear()
        self._halted = isinstance(reason, m.HaltExit)
        self._say(m.Exit(self.peer.session.entry, reason))
        return True

    def heard(self, body: m.Message) -> None:
        match body:
            case m.Walked():
                word, _ = self._walk_for
                frame = body.pfn + ((word >> 12) & ((1 << 9 * (body.level - 1)) - 1))
                self.held[word] = frame, body.flags
            case m.WalkFault() if self.peer.session.state is State.IN_GUEST:
                word, flags = self._walk_for
                self._exit(m.PageFaultExit(word, body.error_code, m.Instruction(flags)))
            case m.Loaded():
                word, after = self._asked
                wanted = self.values.get(word)
                require(
                    wanted in (None, body.value),
                    f"{self.peer.name}: {word:#x} has {body.value:#x} instead of {wanted}, which it stored last",
                )
                self.values[word] = body.value if after < 0 else after
            case m.Entered():
                self._halted = False
                if body.completed is not None or body.inject is not None:
                    require(
                        body.inject is None,
                        f"{self.peer.name}: {body!r}: its pages are all mapped by the guest",
                    )
            case m.Ended():
                codes = (ErrorCode.DETACHED.value, ErrorCode.SEQUENCE_GAP.value)
                require(body.code in codes, f"{self.peer.name}: {body!r}")
            case _:
                pass

    # --- illegal -------------------------------------------------------------------------------------------------

    def illegal_message(self) -> tuple[m.Message, set[ErrorCode]] | None:
        session = self.peer.session
        state = session.state
        if state is State.LEAVING:
            return None  # Ended may be on its way
        future = session.entry + self.random.randrange(2, 100)
        unexpected = {ErrorCode.UNEXPECTED_MESSAGE}
        kinds: list[Callable[[], tuple[m.Message, set[ErrorCode]]]] = [
            lambda: (m.Join(m.Role.VCPU, "x"), unexpected),
            lambda: (m.Applied(1), unexpected),
            lambda: (m.HostRequest(1, m.ZapAll()), unexpected),
        ]
        if state is not State.OUTSIDE:
            kinds.append(lambda: (m.Enter(), unexpected))
        bodies = [body for body in samples(future, session.walk + 1) if "entry" in body.__struct_fields__]
        # unknown-frame: the sample's frame is none of this machine's, if it has been moved since.
        wrong = unexpected | {ErrorCode.UNKNOWN_ENTRY, ErrorCode.UNKNOWN_FRAME}
        kinds += [lambda body=body: (body, wrong) for body in bodies]  # type: ignore[misc]
        if state is State.IN_GUEST:
            entry = session.entry
            kinds += [
                lambda: (m.Walk(entry, session.walk + 2, DATA, 0), {ErrorCode.UNKNOWN_REQUEST}),
                lambda: (m.Walk(entry, session.walk, DATA, 0), {ErrorCode.UNKNOWN_REQUEST}),
                lambda: (m.Load(entry, (USED, DATA, 1 << 39, 8, 0)), {ErrorCode.UNKNOWN_FRAME}),
                lambda: (m.Exit(entry - 1, m.HaltExit()), {ErrorCode.STALE_ENTRY}),
            ]
        return self.random.choice(kinds)()


class _RandomHost(_Walker):
    """A host agent that takes the vCPUs' pages away."""

    def __init__(self, lab: Lab, choices: random.Random, illegal: float) -> None:
        super().__init__(lab, choices, illegal)
        self.peer: Host = lab.host()

    def act(self) -> bool:
        session = self.peer.session
        if not session.host_credits or self.random.random() < 0.5:
            if session.requests and time.monotonic() - self.progress > 2 * self.lab.patience:
                raise CheckFailed(f"{self.peer.name}: no answer to requests {sorted(session.requests)}")
            return False
        gfn = FIRST_GFN + self.random.randrange(4)
        operation = self.random.choice(
            (
                m.Unmap(gfn),
                m.Reclaim(gfn),
                m.Move(gfn, writable=self.random.random() < 0.5),
                m.UnmapRange(0xC00, 512),
                m.UnmapRange(FIRST_GFN, 4),
                m.ReclaimIdle([gfn]),
                m.Age(gfn),
                m.TestAge(gfn),
                m.Shrink(self.random.randrange(64)),
                m.ZapAll(),
                m.Migrate(self.random.randrange(self.lab.vcpus), self.random.randrange(3)),
            )
        )
        self.progress = time.monotonic()
        self.peer.ask(operation)
        self.said += 1
        return True

    def illegal_message(self) -> tuple[m.Message, set[ErrorCode]] | None:
        session = self.peer.session
        wrong = m.HostRequest(session.request + self.random.randrange(2, 9), m.ZapAll())
        if self.random.random() < 0.5:
            return wrong, {ErrorCode.UNKNOWN_REQUEST, ErrorCode.CREDIT_EXCEEDED}
        body = self.random.choice(
            [b for b in samples(1, 1) if not isinstance(b, m.HostRequest | m.Heartbeat | m.Detach)]
        )
        return body, {ErrorCode.UNEXPECTED_MESSAGE}


def _play(lab: Lab, seconds: float, illegal: float) -> None:
    choices = random.Random(lab.random.getrandbits(64))
    walkers: list[_Walker] = [_RandomVcpu(lab, choices, illegal, n) for n in range(min(2, lab.vcpus))]
    if not walkers:
        raise CheckSkipped("the service has no vCPU")
    walkers.append(_RandomHost(lab, choices, illegal))
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        busy = False
        for walker in walkers:
            lab.look_after(walker.peer)
            busy = walker.turn() or busy
        if not busy:
            walkers[0].peer.socket.poll(round(QUIET_SECONDS * 1000))
    _settle(lab, walkers)


def _settle(lab: Lab, walkers: list[_Walker]) -> None:
    """What was refused has to be refused in time; then everybody leaves."""
    until = time.monotonic() + lab.patience
    while any(walker.refusals for walker in walkers):
        for walker in walkers:
            walker.illegal = 0.0
            require(time.monotonic() < until, f"{walker.peer.name}: {walker.owed()}")
            lab.look_after(walker.peer)
            walker.turn()
    for walker in walkers:
        if isinstance(walker.peer, Vcpu):
            walker.peer.answers = True


@checks("random.legal", "Random legal clients are served, and find what they stored", "Legal order")
def _random_legal(lab: Lab) -> None:
    _play(lab, lab.budget / 2, 0.0)


@checks(
    "random.illegal", "Random illegal messages in between are refused, and change nothing", "Refused messages"
)
def _random_illegal(lab: Lab) -> None:
    _play(lab, lab.budget / 2, 0.2)
