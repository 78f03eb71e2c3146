"""What a scene is: what the service does to a client besides serving it. Pure; sockets and processes are the stage's.

The client is served by the real machine. A scene may hold answers back, ask for what a host might ask for, kick, or
end the session, all of it within the specification; and it says whom to blame if the client comes to grief in it.
A scene sees each message that the client sends (`heard`: True if the machine is not to have it) and each that the
machine sends (`outgoing`: what is to be sent for it, now).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from shadowmmu.kvm import Kvm
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.codec import FROM_MMU
from shadowmmu.protocol.session import Session
from shadowmmu.protocol_check.client_checks import ClientCheck

__all__ = ["HELD_SECONDS", "Hand", "Scene"]

HELD_SECONDS: Final = 0.25
"""How long an answer is held back, so that the client has to wait for it."""


class Hand(Protocol):
    """What a scene may do; all of it to the client's vCPU."""

    @property
    def now(self) -> float: ...

    @property
    def session(self) -> Session: ...

    @property
    def kvm(self) -> Kvm: ...

    def submit(self, body: m.VcpuMessage) -> None:
        """Gives the machine a message, as if the client had sent it."""
        ...

    def host(self, operation: m.HostOperation) -> None:
        """Starts a host operation, if its arguments are possible."""
        ...

    def send(self, body: m.MmuMessage, *, late: bool = False) -> None: ...

    def send_crossing(self, body: m.MmuMessage) -> None:
        """Sends what a service would have sent before it saw the client's last message."""
        ...

    def end(self, code: str, text: str) -> None:
        """Ends the session."""
        ...

    def lose_connection(self) -> None:
        """From now on nothing arrives on the client's connection, in neither direction; on another it may resume."""
        ...

    def fail(self, check: ClientCheck, text: str) -> None: ...

    def exercise(self, *checks: ClientCheck) -> None: ...


class Scene:
    """Serves, and does nothing else. Base of the others.

    `blame`: the check that fails if the client disappears; `heartbeat`: seconds; `ending`: the scene ends the session
    itself, so that the client need not detach; `delays`: seconds that it adds to the client's life; `config`: of the
    machine.
    """

    name = "ordinary"
    blame = ClientCheck.LEAVE
    heartbeat = 0.5
    ending = False
    delays = 0.0
    config: m.RunConfig = m.RunConfig(
        ops=4000, park_rate=0.0, host_rate=0.0, audit=m.Audit.NEVER, workload=m.Workload.MIXED
    )

    def refuses_attach(self, attempt: int) -> m.ErrorReply | None:  # noqa: ARG002
        """What an Attach, the client's `attempt`th (from 1), is answered with instead."""
        return None

    def heard(self, hand: Hand, body: m.VcpuMessage) -> bool:  # noqa: ARG002
        return False

    def outgoing(self, hand: Hand, body: m.MmuMessage) -> Sequence[m.MmuMessage]:  # noqa: ARG002
        return (body,)

    def after(self, hand: Hand, body: m.MmuMessage) -> None:
        """`body` has just been sent."""

    def tick(self, hand: Hand) -> None:
        """Time has passed; several times per HELD_SECONDS."""

    def frames(self, envelope: m.Envelope) -> list[bytes]:
        """The message's encoding."""
        return FROM_MMU.encode(envelope)

    def times(self, envelope: m.Envelope) -> int:  # noqa: ARG002
        """How often the message comes."""
        return 1
