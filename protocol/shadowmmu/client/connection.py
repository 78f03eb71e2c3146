"""What all clients have in common: a line to a service, one session, heartbeats, and one way to fail.

A client object belongs to the loop in which it was made. Messages are handled in the loop's reader callback, so they
are taken in the order in which they came; awaiting methods are woken through futures. Once anything is wrong (the
service ended the session, fell silent, or violated the protocol) the client has *failed*: every waiting and every
later call raises the same error.

The loss of a connection is such a failure, but not for a client that is `resumable`: it goes on with its session over
another one, and nobody who waits notices.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self, TypedDict, TypeVar, Unpack

import zmq

from shadowmmu.client.errors import RequestRefused, ServiceError, ServiceLost, SessionEnded
from shadowmmu.client.keys import ClientKeys, Plain
from shadowmmu.client.line import Line
from shadowmmu.client.transport import Endpoint, EndpointOptions
from shadowmmu.protocol import (
    FROM_COORDINATOR,
    FROM_MMU,
    MISSED_LIMIT,
    TO_COORDINATOR,
    TO_MMU,
    Direction,
    Envelope,
    ErrorCode,
    HeartbeatTimer,
    Message,
    ProtocolError,
    Service,
    Session,
    Side,
    State,
)
from shadowmmu.protocol.continuity import INCARNATION_LOST, NOTHING_TO_RESUME, QUIET_INTERVALS
from shadowmmu.protocol.messages import (
    Attach,
    Attached,
    Ended,
    ErrorReply,
    Finished,
    Heartbeat,
    Join,
    Joined,
    Resume,
    Resumed,
)

__all__ = ["ClientOptions", "Connection"]

PATIENCE_LOOKS: Final = 16
"""A pause of our own counts for one sixteenth of our patience, at most."""

T = TypeVar("T")

_DIRECTIONS: Final[dict[Service, tuple[Direction, Direction]]] = {
    Service.MMU: (TO_MMU, FROM_MMU),
    Service.COORDINATOR: (TO_COORDINATOR, FROM_COORDINATOR),
}


class ClientOptions(TypedDict, total=False):
    """What every client may be told.

    `name`: who we are, for people. `timeout`: seconds to wait for the welcome. `missed`: heartbeats after which the
    service is given up. `context`: a ZeroMQ context shared with others. `tolerate_refusals`: error replies about
    messages that were not accepted do not end the connection but are kept for `refusal()`: for tests that send what
    they should not (through `endpoint`). `security`: our keys and the service's (default: none, which goes on this
    machine alone). `resumable`: the session survives its connection; the service is given up after `patience` seconds
    of silence (60).
    """

    name: str
    timeout: float
    missed: int
    context: zmq.Context[zmq.Socket[bytes]]
    tolerate_refusals: bool
    security: ClientKeys | Plain
    resumable: bool
    patience: float


class Connection:
    """A client's end of a conversation; the base of the clients for each role.

    `session` is the protocol's view of it; `endpoint` the socket, through which a test may send anything at all.
    """

    default_name = "client"

    def __init__(self, service: Service, address: str, **options: Unpack[ClientOptions]) -> None:
        self._loop = asyncio.get_running_loop()
        self._outgoing, self._incoming = _DIRECTIONS[service]
        self.address = address
        self.name = options.get("name", self.default_name)
        self.session = Session(service, Side.PEER)
        self.error: ServiceError | None = None
        self._closing = False
        self._timeout = options.get("timeout", 5.0)
        self._missed = options.get("missed", MISSED_LIMIT)
        self._refusals: asyncio.Queue[ErrorReply] | None = (
            asyncio.Queue() if options.get("tolerate_refusals", False) else None
        )
        self._timer: HeartbeatTimer | None = None
        self._beat_handle: asyncio.TimerHandle | None = None
        self._waiting: set[asyncio.Future[Any]] = set()
        self._changes: list[asyncio.Future[Any]] = []
        self._welcome: asyncio.Future[Any] | None = None
        self._last: asyncio.Future[Any] = self._loop.create_future()  # the message that ends the session

        self._resumable = options.get("resumable", False)
        patience = options.get("patience", 60.0)
        self._patience = HeartbeatTimer(patience / PATIENCE_LOOKS, self._loop.time(), missed=PATIENCE_LOOKS)
        self._opening: Attach | Join | None = None
        self.resumed = 0
        """How often the session went on over another connection."""

        endpoint_options: EndpointOptions = {
            "on_failure": self._on_failure,
            "hard_limit": self._incoming.hard_limit,
        }
        if "context" in options:
            endpoint_options["context"] = options["context"]
        self._key_advice = ""
        if "security" in options:
            endpoint_options["security"] = security = options["security"]
            if isinstance(security, ClientKeys):  # a service does not answer those whom it does not let in
                self._key_advice = f"; is our key authorised there, and {security.server} the service's?"
        self._line = Line(address, self.name, self._on_frames, self._on_open, **endpoint_options)
        self._line.open()

    @property
    def endpoint(self) -> Endpoint:
        """The socket, through which a test may send anything at all. Raises ServiceLost between two connections."""
        if self._line.endpoint is None:
            raise ServiceLost(f"there is no connection to {self.address}")
        return self._line.endpoint

    # --- opening and closing --------------------------------------------------------------------------------------

    async def _open(self, body: Attach | Join) -> None:
        """Attach or join, and wait for the welcome; closes the client if there is none."""
        self._opening = body
        self._welcome = self._future()
        self.send(body)
        try:
            async with asyncio.timeout(self._timeout):
                await self._welcome
        except BaseException as error:
            await self.close()
            if isinstance(error, TimeoutError):
                raise ServiceLost(
                    f"no answer from {self.address} within {self._timeout} s{self._key_advice}"
                ) from None
            raise

    async def close(self, linger: float = 0.0) -> None:
        """End everything at once. What waits raises SessionEnded."""
        self._closing = True
        self._fail(SessionEnded(ErrorCode.DETACHED, "the client was closed"))
        await self._line.close(linger)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self.error is None:
                await self._leave()
        finally:
            await self.close()

    async def _leave(self) -> None:
        """Say good-bye, before closing in good order."""

    # --- messages -------------------------------------------------------------------------------------------------

    def send(self, body: Message) -> Envelope:
        """Number and send a message. Raises LocalProtocolError if it is not legal now."""
        self._check()
        frames = self._outgoing.encode(
            self.session.preview(body)
        )  # first: what cannot be encoded is not numbered
        envelope = self.session.send(body)
        # Until a new connection is taken up only Resume goes out; the session keeps the rest.
        if not self.session.resuming or isinstance(body, Resume):
            self._line.send(frames)
        if self._timer is not None:
            self._timer.sent(self._loop.time())
        return envelope

    def _attach_anew(self) -> bool:
        """The incarnation is lost: begins another one, if the role can."""
        if not self._resumable or not self._incarnation_lost():
            return False
        if self._beat_handle is not None:
            self._beat_handle.cancel()
        self._timer = None
        self.session = Session(self.session.service, Side.PEER)
        self.session.state = State.ATTACHING  # `_on_open` asks
        self._loop.call_soon(self._line.open)
        return True

    def _incarnation_lost(self) -> bool:
        """Whether a client of this role goes on with a new incarnation; makes it ready for that."""
        return False

    def _handle(self, body: Message) -> None:
        """Act on a message of the role's own."""
        raise NotImplementedError

    def _on_open(self) -> None:
        """There is a connection, the first or another one."""
        session = self.session
        if self.error is not None or self._opening is None:
            return
        if session.state is State.ATTACHING:
            session.reset()
            session.state = State.DETACHED
            self.send(self._opening)
        elif self._resumable and session.attached and session.token:
            self.send(Resume(session.token, session.continuity.received))
        else:
            self._fail(ServiceLost(f"the connection to {self.address} was lost"))

    def _on_frames(self, frames: list[bytes]) -> None:
        if self.error is not None:
            return
        try:
            envelope = self._incoming.decode(frames)
            act = self.session.receive(envelope)
        except ProtocolError as error:
            if error.code is ErrorCode.SEQUENCE_GAP and self._resumable and self.session.token:
                self._loop.call_soon(self._line.open)  # something was lost on the way
            else:
                self._fail(ServiceError(error.code, f"the service violated the protocol: {error.text}"))
            return
        self._patience.heard(self._loop.time())
        if self._timer is not None:
            self._timer.heard(self._loop.time())
        if act or (self._refusals is not None and isinstance(envelope.body, ErrorReply)):
            self._dispatch(envelope)
            self._notify()

    def _dispatch(self, envelope: Envelope) -> None:
        body = envelope.body
        match body:
            case Heartbeat():
                pass
            case ErrorReply() if not envelope.seq:
                self._refused(body)
            case Attached() | Joined():
                self._start_heartbeats(body.heartbeat)
                self._handle(body)
                self._answer(self._welcome, body)
            case Resumed():
                self.resumed += 1
                for again in self.session.lacking(body):
                    self._line.send(self._outgoing.encode(again))
            case Ended() if body.code in INCARNATION_LOST and self._attach_anew():
                pass
            case Ended():
                self._answer(self._last, body)
                self._fail(SessionEnded(body.code, body.text))
            case Finished():
                self._answer(self._last, body)
                self._fail(SessionEnded(ErrorCode.RUN_FINISHED, body.text or body.verdict.value))
            case _:
                self._handle(body)

    def _refused(self, error: ErrorReply) -> None:
        """A message of ours was not accepted: what follows it will not be either, so this connection is finished."""
        session = self.session
        if self._refusals is not None and session.attached:
            self._refusals.put_nowait(error)
        elif error.code == ErrorCode.ALREADY_ATTACHED and session.attached:
            pass  # our opening came twice
        elif error.code in NOTHING_TO_RESUME and session.token and self._resumable and not session.resuming:
            self._loop.call_soon(self._line.open)  # the service was restarted
        elif error.code in NOTHING_TO_RESUME and session.resuming and self._attach_anew():
            pass
        else:
            self._fail(RequestRefused(error.code, error.text, error.seq))

    async def refusal(self) -> ErrorReply:
        """The next error reply about a message that was not accepted; only with `tolerate_refusals`."""
        if self._refusals is None:
            raise RuntimeError("refusals end this connection; connect with tolerate_refusals=True")
        return await self._refusals.get()

    # --- waiting and failing --------------------------------------------------------------------------------------

    def _future(self) -> asyncio.Future[Any]:
        """A future that fails when the connection does."""
        self._check()
        future: asyncio.Future[Any] = self._loop.create_future()
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        return future

    async def _until(self, condition: Callable[[], object]) -> None:
        """Wait until the condition holds; it is asked again after each message that was acted on."""
        while not condition():
            future = self._future()
            self._changes.append(future)
            await future

    def _notify(self) -> None:
        if self._changes:
            changes, self._changes = self._changes, []
            for future in changes:
                self._answer(future, None)

    @staticmethod
    def _answer(future: asyncio.Future[T] | None, value: T) -> None:
        if future is not None and not future.done():
            future.set_result(value)

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def _fail(self, error: ServiceError) -> None:
        if self.error is not None:
            return
        self.error = error
        if self._beat_handle is not None:
            self._beat_handle.cancel()
        for future in (*self._waiting, self._last):
            if not future.done():
                future.set_exception(error)
                future.exception()  # seen: asyncio need not warn if nobody waits for it
        self._failed(error)

    def _failed(self, error: ServiceError) -> None:
        """Called once, when the connection has failed."""

    def _on_failure(self, error: Exception) -> None:
        self._fail(ServiceError(ErrorCode.INTERNAL, f"the client itself failed: {error!r}"))
        self._loop.call_exception_handler({"message": "a client's callback failed", "exception": error})

    # --- signs of life --------------------------------------------------------------------------------------------

    def _start_heartbeats(self, interval: float) -> None:
        missed = QUIET_INTERVALS if self._resumable else self._missed
        if self._beat_handle is not None:
            self._beat_handle.cancel()
        self._timer = HeartbeatTimer(interval, self._loop.time(), missed=missed)
        self._beat_handle = self._loop.call_later(interval / 2, self._beat)

    def _beat(self) -> None:
        timer = self._timer
        assert timer is not None
        now = self._loop.time()
        expired = timer.expired(now)
        lost = self._patience.expired(now) or not self._resumable
        if expired and not lost:
            timer.heard(now)  # the next connection has as long
            self._loop.call_soon(self._line.open)
        elif expired:
            silence = self._patience.silence if self._resumable else timer.silence
            self._fail(ServiceLost(f"nothing heard from {self.address} for {silence:.1f} s"))
            return
        if timer.due(now):
            self.send(Heartbeat())
        self._beat_handle = self._loop.call_later(timer.interval / 2, self._beat)
