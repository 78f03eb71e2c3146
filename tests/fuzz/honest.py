"""A vCPU that keeps to the protocol, as a state machine without sockets: the one whose run must go on.

It attaches, enters, and then again and again walks, takes a page-fault exit if need be, loads what it has mapped, and answers kicks. Its
session judges every message that comes back.
"""

from __future__ import annotations

from shadowmmu.cpu.guest.layout import direct
from shadowmmu.protocol import FROM_MMU, MMU, TO_MMU, Envelope, Session, Side, State
from shadowmmu.protocol import messages as m

__all__ = ["HonestVcpu"]

FIRST_PAGE = 600
PAGES = 32


class HonestVcpu:
    """`outbox`: frames to be delivered; `answers`: how many of its requests were answered; `shut_down`: its guest is broken.

    `receive(frames)` raises RemoteProtocolError if the service sends what it may not, AssertionError if it refuses what is legal.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.session = Session(MMU, Side.PEER)
        self.outbox: list[list[bytes]] = []
        self.answers = 0
        self.ends: list[str] = []
        self._kicked = False
        self._fault: int | None = None
        self.attach()

    @property
    def shut_down(self) -> bool:
        return "shutdown" in self.ends

    def attach(self) -> None:
        """Attaches, anew if it must."""
        self.session = Session(MMU, Side.PEER)
        self._fault = None
        self._send(m.Attach(m.Role.VCPU, self.name))

    def beat(self) -> None:
        """A heartbeat."""
        if self.session.attached and self.session.state is not State.LEAVING:
            self._send(m.Heartbeat())

    def receive(self, frames: list[bytes]) -> None:
        envelope = FROM_MMU.decode(frames)
        if not self.session.receive(envelope):
            return
        self._take(envelope)
        self._go_on()

    def _send(self, body: m.VcpuMessage) -> None:
        self.outbox.append(TO_MMU.encode(self.session.send(body)))

    def _take(self, envelope: Envelope) -> None:
        body = envelope.body
        match body:
            case m.ErrorReply():
                raise AssertionError(f"{self.name} keeps to the protocol and is refused: {body}")
            case m.Ended():
                self.ends.append(body.code)
            case m.Kick():
                self._kicked = True
            case m.WalkFault():
                self._fault = body.error_code
                self.answers += 1
            case m.Walked():
                self._fault = None
                self.answers += 1
                self._loadable = body.pfn
            case m.Attached() | m.Entered() | m.Loaded():
                self._kicked = False
                self.answers += 1
            case _:
                pass
        self._last = type(body)

    @property
    def gva(self) -> int:
        return direct(FIRST_PAGE + self.answers // 8 % PAGES << 12)

    def _go_on(self) -> None:
        session = self.session
        match session.state:
            case State.OUTSIDE:
                self._send(m.Enter())
            case State.IN_GUEST | State.WAITING_WALK if self._kicked:
                self._send(m.Exit(session.entry, m.ExternalInterruptExit()))
            case State.IN_GUEST if self._fault is not None:
                fault, self._fault = self._fault, None
                self._send(m.Exit(session.entry, m.PageFaultExit(self.gva, fault, m.Instruction(0))))
            case State.IN_GUEST if self._last is m.Walked:
                self._send(m.Load(session.entry, (0, self.gva, self._loadable, 8, 0)))
            case State.IN_GUEST:
                self._send(m.Walk(session.entry, session.walk + 1, self.gva, 0))
            case _:
                pass
