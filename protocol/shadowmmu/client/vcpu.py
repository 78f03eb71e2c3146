"""`VcpuClient`: a vCPU's connection to the MMU service.

There is no processor in it: no TLB, no guest program. It says what a processor would say and returns what the service
answers, so that a test can play any processor it likes, also a broken one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Self, Unpack

from shadowmmu.client.connection import ClientOptions, Connection
from shadowmmu.client.errors import Kicked
from shadowmmu.protocol import MMU, ErrorCode, LocalProtocolError, Message, State
from shadowmmu.protocol.messages import (
    Attach,
    Attached,
    Detach,
    Enter,
    Entered,
    Exit,
    ExitReason,
    ExternalInterruptExit,
    Kick,
    Load,
    Loaded,
    Locked,
    LockedOp,
    Log,
    LoggedAccess,
    Role,
    Walk,
    Walked,
    WalkFault,
)

__all__ = ["VcpuClient"]


class VcpuClient(Connection):
    """A vCPU. Made by `await VcpuClient.connect(...)`; as an async context manager it detaches at the end.

    One thing at a time: the answer to each walk, load, locked operation or exit is awaited, as a processor does.
    Methods raise ServiceError (RequestRefused, SessionEnded, ServiceLost) when the connection has failed, and
    LocalProtocolError for what is not legal in the present state.
    """

    default_name = "vcpu"
    attached: Attached
    """What the service said when we attached."""

    def __init__(self, address: str, **options: Unpack[ClientOptions]) -> None:
        super().__init__(MMU, address, **options)
        self._reply: asyncio.Future[Any] | None = None  # of the one thing under way
        self._kicked_entry = 0

    @classmethod
    async def connect(
        cls, address: str, *, vcpu: int | None = None, token: bytes = b"", **options: Unpack[ClientOptions]
    ) -> Self:
        """Connect and attach, as the vCPU of that number if given. Raises RequestRefused or ServiceLost.

        `token`: of the vCPU's incarnation before, whose program goes on (`Entered.resume` says where).
        """
        client = cls(address, **options)
        resumable = options.get("resumable", False)
        await client._open(Attach(Role.VCPU, client.name, vcpu, resumable=resumable, token=token))
        return client

    @property
    def vcpu(self) -> int:
        """Our number."""
        assert self.session.vcpu is not None
        return self.session.vcpu

    @property
    def entry(self) -> int:
        """The number of the last guest entry."""
        return self.session.entry

    # --- guest mode and back --------------------------------------------------------------------------------------

    async def enter(self) -> Entered:
        """Ask for the first guest entry."""
        entered = await self._ask(Enter())
        assert isinstance(entered, Entered)
        return entered

    async def exit(self, reason: ExitReason) -> Entered:
        """Leave guest mode for `reason`; returns with the next entry. Answers a kick."""
        entered = await self._ask(Exit(self.entry, reason))
        assert isinstance(entered, Entered)
        return entered

    async def detach(self, timeout: float = 5.0) -> None:
        """Leave, from guest mode by an exit. What was sent before takes effect first.

        Returns when the service has said that we are out.
        """
        if self.session.state in (State.IN_GUEST, State.WAITING_WALK):
            self.send(Exit(self.entry, ExternalInterruptExit()))
        self.send(Detach())
        async with asyncio.timeout(timeout):
            await asyncio.shield(self._last)

    async def _leave(self) -> None:
        await self.detach()

    # --- in guest mode --------------------------------------------------------------------------------------------

    async def walk(self, gva: int, flags: int = 0) -> Walked | WalkFault:
        """Have the shadow tables walked for an access (AccessFlag bits 0 to 4).

        Raises Kicked if a kick of this entry is pending or comes before the answer.
        """
        if self.kick_pending:
            raise Kicked(self.entry)
        answer = await self._ask(Walk(self.entry, self.session.walk + 1, gva, flags))
        assert isinstance(answer, Walked | WalkFault)
        return answer

    async def load(self, access: LoggedAccess) -> int:
        """A load whose value is used: (AccessFlag bits, gva, pfn, size, 0)."""
        loaded = await self._ask(Load(self.entry, access))
        assert isinstance(loaded, Loaded)
        return loaded.value

    async def locked(self, access: LoggedAccess, op: LockedOp, expected: int = 0) -> int:
        """A locked operation; returns the old value."""
        loaded = await self._ask(Locked(self.entry, access, op, expected))
        assert isinstance(loaded, Loaded)
        return loaded.value

    async def log(self, accesses: Sequence[LoggedAccess]) -> None:
        """Ship accesses that hit the TLB. Waits for a credit, not for their being applied."""
        await self._until(lambda: self.session.log_credits)
        self.send(Log(self.entry, list(accesses)))

    async def applied(self) -> None:
        """Wait until all logs that were shipped are applied."""
        await self._until(lambda: not self.session.logs)

    # --- kicks ----------------------------------------------------------------------------------------------------

    @property
    def kick_pending(self) -> bool:
        """Whether a kick of the current guest entry came and was not answered by an exit yet."""
        return self.session.in_guest and self._kicked_entry == self.entry

    async def kicked(self) -> int:
        """Wait for a kick of the guest entry; returns the entry's number. Answer it by `exit`."""
        await self._until(lambda: self.kick_pending)
        return self.entry

    # --- inside ---------------------------------------------------------------------------------------------------

    async def _ask(self, body: Message) -> Message:
        if self._reply is not None:
            raise LocalProtocolError(
                ErrorCode.UNEXPECTED_MESSAGE, "one thing at a time: an answer is awaited"
            )
        self._reply = reply = self._future()
        try:
            self.send(body)
            answer: Message = await reply
        finally:
            self._reply = None
            reply.cancel()
        return answer

    def _handle(self, body: Message) -> None:
        match body:
            case Attached():
                self.attached = body
            case Kick():
                self._kicked_entry = body.entry
                if self.session.state is State.WAITING_WALK and self._reply and not self._reply.done():
                    self._reply.set_exception(Kicked(body.entry))
            case Entered() | Walked() | WalkFault() | Loaded():
                self._answer(self._reply, body)
            case _:
                pass  # Applied: the session counts
