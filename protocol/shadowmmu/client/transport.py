"""A ROUTER or DEALER socket in an asyncio loop, without zmq.asyncio.

Why by hand: `zmq.asyncio` makes a future per message and costs half the throughput. Here the loop's reader callback
drains the socket itself, in *turns*:

1. tell the owner of peers that were lost (`on_peer_lost`),
2. drain: at most `DRAIN_LIMIT` messages go to `on_message`, so that no flood keeps the loop from other things
   (among the peers of a ROUTER libzmq itself takes messages in turn),
3. call `on_batch` once: the owner writes its journal here,
4. send what the owner has handed to `send` in the meantime. With `on_batch` nothing is ever sent before it was called;
   without, `send` sends at once,
5. look whether there is more to do, and if so schedule another turn.

The last step is what makes this correct. libzmq's file descriptor (ZMQ_FD) is edge-triggered: it says "something has
happened", once, and any call that processes the socket's commands, *a send included*, takes that signal away. A
message that arrives before a send is then in the socket, but the descriptor stays silent. So ZMQ_EVENTS is asked
again after every send and after every drain. `tests/client/test_transport.py` reproduces the lost edge.

Where keys are in use (CURVE), nobody gets a connection whose key is not on the service's list, and `sender` says whose
key each message came with. Without keys a socket binds and connects on this machine alone, unless told otherwise.

Nothing is dropped silently. A message that would block waits in a bounded queue of its peer and is tried again; a
peer that cannot be reached, or whose queue is full, is reported with the number of messages that it will not get.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self, TypedDict, Unpack

import zmq

from shadowmmu.client.access import ANYBODY, User
from shadowmmu.client.keys import Authorized, ClientKeys, InsecureAddressError, Plain, ServerKeys
from shadowmmu.client.zap import DOMAIN, ZapHandler
from shadowmmu.protocol import TO_MMU, ErrorCode

__all__ = ["DRAIN_LIMIT", "QUEUE_LIMIT", "Endpoint", "EndpointOptions"]

DRAIN_LIMIT: Final = 64
"""Most messages taken from the socket in one turn."""
FRAME_LIMIT: Final = 512
"""Most frames taken from the socket in one turn, whatever messages they belong to."""
CUT_FRAMES: Final = 64
"""A message of more frames than this costs its sender the connection: reading it costs more than many others."""
PARTS_KEPT: Final = 8
"""Of a message with more frames than this only so many are handed on: enough to refuse it."""
QUEUE_LIMIT: Final = 1024
"""Most messages that wait for one peer, besides those in the socket."""
SOCKET_QUEUE: Final = 1000
"""Most messages per peer in the socket, in each direction (SNDHWM, RCVHWM)."""
RETRY_SECONDS: Final = 0.01
"""How often messages that would block are tried again, if nothing else happens.

A ROUTER says that it is writable when any of its peers is, and the signal that a certain one has become writable can
be taken away by sending to another: so the descriptor alone does not suffice."""
LIST_SECONDS: Final = 1.0
"""How often the list of authorised keys is looked at."""

_MORE: Final = int(zmq.DONTWAIT | zmq.SNDMORE)
_LAST: Final = int(zmq.DONTWAIT)
_EVENTS: Final = int(zmq.EVENTS)
_POLLIN: Final = int(zmq.POLLIN)
_RCVMORE: Final = int(zmq.RCVMORE)
_EHOSTUNREACH: Final = int(zmq.EHOSTUNREACH)


class EndpointOptions(TypedDict, total=False):
    """What an endpoint may be told besides its `on_message(peer, frames)`.

    `on_batch()`: once per turn (see the module). `on_peer_lost(peer, code, undelivered)`: `undelivered` messages
    will not arrive, because there is no connection (ErrorCode.UNREACHABLE) or the queue is full (SLOW_CONSUMER);
    messages sent later may. `on_failure(error)`: a callback raised; reading has ended, and what waits is not sent
    (default: the loop's exception handler). `context`: shared with others (default: its own). `hard_limit`: bytes
    of a frame above which the sender's connection is cut. `queue_limit`, `socket_queue`: messages per peer.
    `routing_id`: of a DEALER; stays the same over reconnections, and must be unlike all others' (and not to be guessed:
    who has it and an authorised key could take the connection over). `security`: ServerKeys for a socket that binds,
    ClientKeys for one that connects (default: none, and so on this machine alone). An endpoint with ServerKeys
    answers for its context, so no two of them may share one.
    """

    on_batch: Callable[[], None]
    on_peer_lost: Callable[[bytes, ErrorCode, int], None]
    on_failure: Callable[[Exception], None]
    context: zmq.Context[zmq.Socket[bytes]]
    hard_limit: int
    queue_limit: int
    socket_queue: int
    routing_id: bytes
    security: ServerKeys | ClientKeys | Plain


class Endpoint:
    """One bound or connected socket: `Endpoint.router(...)` or `Endpoint.dealer(...)`, `bind` or `connect`, `start`.

    `on_message(peer, frames)`: a message came; `peer` is the routing id, b"" for a DEALER's only peer.
    As an async context manager it starts and closes itself.
    """

    def __init__(
        self,
        kind: zmq.SocketType,
        on_message: Callable[[bytes, list[bytes]], None],
        **options: Unpack[EndpointOptions],
    ) -> None:
        self._on_message = on_message
        self._on_batch = options.get("on_batch")
        self._on_peer_lost = options.get("on_peer_lost")
        self._on_failure = options.get("on_failure")
        self._queue_limit = options.get("queue_limit", QUEUE_LIMIT)
        context = options.get("context")
        self._own_context = context is None
        self._context: zmq.Context[zmq.Socket[bytes]] = context if context is not None else zmq.Context()
        self._routed = kind == zmq.ROUTER
        self.socket: zmq.Socket[bytes] = self._context.socket(kind)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.MAXMSGSIZE, options.get("hard_limit", TO_MMU.hard_limit))
        self.socket.setsockopt(zmq.SNDHWM, options.get("socket_queue", SOCKET_QUEUE))
        self.socket.setsockopt(zmq.RCVHWM, options.get("socket_queue", SOCKET_QUEUE))
        if self._routed:
            self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if "routing_id" in options:
            self.socket.setsockopt(zmq.ROUTING_ID, options["routing_id"])

        self._security = options.get("security", Plain())
        self._authorized: Authorized | None = None
        self._zap: ZapHandler | None = None
        self._list_timer: asyncio.TimerHandle | None = None
        self.sender: User | None = ANYBODY
        """Whose key the message has that `on_message` is given; None: of nobody who is authorised any more."""
        self._set_keys()

        self.error: Exception | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fd = -1
        self._next_turn: asyncio.Handle | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._in_turn = False
        self._paused = False
        self._closed = False
        self._parts: list[bytes] = []  # of a message whose frames are still being taken in
        self._frames = 0  # how many of it were taken
        self.cut = 0
        """Connections that were cut."""
        self._outbox: deque[tuple[bytes, Sequence[bytes]]] = deque()
        self._blocked: dict[bytes, deque[Sequence[bytes]]] = {}
        self._lost: dict[tuple[bytes, ErrorCode], int] = {}

    @classmethod
    def router(
        cls, on_message: Callable[[bytes, list[bytes]], None], **options: Unpack[EndpointOptions]
    ) -> Self:
        """A service's end: many peers."""
        return cls(zmq.SocketType.ROUTER, on_message, **options)

    @classmethod
    def dealer(
        cls, on_message: Callable[[bytes, list[bytes]], None], **options: Unpack[EndpointOptions]
    ) -> Self:
        """A peer's end: one service."""
        return cls(zmq.SocketType.DEALER, on_message, **options)

    def _set_keys(self) -> None:
        security = self._security
        match security:
            case ServerKeys():
                # First the handler: without one libzmq would let nobody in, but only if the domain is enforced.
                self._authorized = security.authorized
                self._zap = ZapHandler(self._context, self._is_authorized)
                self.socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
                self.socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
                self.socket.setsockopt(zmq.CURVE_SERVER, 1)
                self.socket.setsockopt(zmq.CURVE_SECRETKEY, security.pair.secret.encode())
            case ClientKeys():
                self.socket.setsockopt(zmq.CURVE_SERVERKEY, security.server.encode())
                self.socket.setsockopt(zmq.CURVE_PUBLICKEY, security.pair.public.encode())
                self.socket.setsockopt(zmq.CURVE_SECRETKEY, security.pair.secret.encode())
            case Plain():
                pass

    def _is_authorized(self, key: str) -> bool:
        return self._authorized is not None and self._authorized.user(key) is not None

    def _check_address(self, address: str) -> None:
        if isinstance(self._security, Plain):
            self._security.check(address)
        elif address.startswith("inproc:"):
            raise InsecureAddressError(f"{address}: CURVE has no effect within a process")

    def bind(self, address: str) -> str:
        """Bind; returns the real address (`tcp://127.0.0.1:*` takes a free port).

        Raises InsecureAddressError if others could reach it and there are no keys.
        """
        self._check_address(address)
        self.socket.bind(address)
        last = self.socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(last, bytes)
        return last.rstrip(b"\0").decode()

    def connect(self, address: str) -> None:
        """Connect, when there is something to connect to. Raises InsecureAddressError as `bind` does."""
        self._check_address(address)
        self.socket.connect(address)

    def start(self) -> None:
        """Begin to read, in the running loop."""
        if self._loop is not None or self._closed:
            raise RuntimeError("an endpoint is started once")
        fd = self.socket.getsockopt(zmq.FD)
        assert isinstance(fd, int)
        self._loop = asyncio.get_running_loop()
        self._fd = fd
        self._loop.add_reader(fd, self._turn)
        if self._zap is not None:
            self._zap.start()
            self._look_at_list()
        self._schedule()  # what came before may not make the descriptor readable again

    async def __aenter__(self) -> Self:
        if self._loop is None:
            self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self, linger: float = 0.0) -> int:
        """Send what waits, let libzmq deliver it for at most `linger` seconds, and close socket and own context.

        Returns how many messages had to be given up because they could not even be put into the socket.
        """
        if self._closed:
            return 0
        if self.error is None and not self._in_turn:
            self._last_turn()
        undelivered = len(self._outbox) + sum(map(len, self._blocked.values())) + sum(self._lost.values())
        self.drop(linger)
        if self._own_context:
            if linger > 0:
                await asyncio.to_thread(self._context.term)
            else:
                self._context.term()
        return undelivered

    def drop(self, linger: float = 0.0) -> None:
        """Close the socket as it is, without sending what waits. The context, if it is shared, goes on."""
        if self._closed:
            return
        self._stop()
        self._closed = True
        if self._zap is not None:
            self._zap.close()
        self.socket.close(linger=math.ceil(linger * 1000))

    # --- flow -----------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Take no more messages for now: they wait in the socket, then at their senders. Sending goes on."""
        self._paused = True

    def resume(self) -> None:
        """Take messages again."""
        if self._paused:
            self._paused = False
            self._schedule()

    @property
    def paused(self) -> bool:
        return self._paused

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def not_let_in(self) -> int:
        """How many connections failed because their keys are not authorised."""
        return 0 if self._zap is None else self._zap.refused

    def queued(self, peer: bytes = b"") -> int:
        """How many messages wait for the peer because the socket would block."""
        return len(self._blocked.get(peer, ()))

    def forget(self, peer: bytes) -> int:
        """Drop what waits for a peer whose session is over. Returns how many messages that were."""
        return len(self._blocked.pop(peer, ()))

    # --- sending --------------------------------------------------------------------------------------------------

    def send(self, peer: bytes, frames: Sequence[bytes]) -> None:
        """Send a message: at once, or at the end of the turn if there is an `on_batch`."""
        if self._closed or self.error is not None:
            raise ConnectionError("the endpoint is closed")
        if self._on_batch is not None:
            self._outbox.append((peer, frames))
        else:
            self._transmit(peer, frames)
        if not self._in_turn:
            self._schedule()  # the send may have taken the descriptor's signal away

    def _transmit(self, peer: bytes, frames: Sequence[bytes]) -> None:
        waiting = self._blocked.get(peer)
        if waiting is None:
            problem = self._put(peer, frames)
            if problem is None:
                return
            if problem is ErrorCode.UNREACHABLE:
                self._note_lost(peer, problem, 1)
                return
            waiting = self._blocked[peer] = deque()
        waiting.append(frames)
        if len(waiting) > self._queue_limit:
            del self._blocked[peer]
            self._note_lost(peer, ErrorCode.SLOW_CONSUMER, len(waiting))

    def _put(self, peer: bytes, frames: Sequence[bytes]) -> ErrorCode | None:
        """Put a message into the socket. Only its first frame can fail, so it is sent as a whole or not at all."""
        socket = self.socket
        try:
            if self._routed:
                socket.send(peer, _MORE)
            for frame in frames[:-1]:
                socket.send(frame, _MORE)
            socket.send(frames[-1], _LAST)
        except zmq.Again:
            return ErrorCode.SLOW_CONSUMER
        except zmq.ZMQError as error:
            if error.errno != _EHOSTUNREACH:
                raise
            return ErrorCode.UNREACHABLE
        return None

    def _note_lost(self, peer: bytes, code: ErrorCode, undelivered: int) -> None:
        """Remember to tell the owner: not here, where it may be in the middle of something."""
        self._lost[peer, code] = self._lost.get((peer, code), 0) + undelivered

    def _flush(self) -> None:
        while self._outbox:
            self._transmit(*self._outbox.popleft())

    def _flush_blocked(self) -> None:
        for peer in list(self._blocked):
            waiting = self._blocked[peer]
            while waiting:
                problem = self._put(peer, waiting[0])
                if problem is ErrorCode.SLOW_CONSUMER:
                    break
                if problem is not None:
                    self._note_lost(peer, problem, len(waiting))
                    waiting.clear()
                    break
                waiting.popleft()
            if not waiting:
                del self._blocked[peer]

    # --- turns ----------------------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        if self._next_turn is None and self._loop is not None and not self._closed and self.error is None:
            self._next_turn = self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        if self._next_turn is not None:
            self._next_turn.cancel()
            self._next_turn = None
        if self._closed or self.error is not None:
            return
        self._in_turn = True
        try:
            if self._lost:
                self._tell_lost()
            if not self._paused:
                self._drain()
            if self._on_batch is not None and not self._closed:
                self._on_batch()
            if not self._closed:
                self._flush()
                if self._blocked:
                    self._flush_blocked()
        except Exception as error:  # noqa: BLE001 (the owner's callbacks; nothing more may be sent after one failed)
            self._fail(error)
            return
        finally:
            self._in_turn = False
        if self.closed:
            return
        if self._lost or self._has_more():
            self._schedule()
        elif self._blocked and self._retry is None and self._loop is not None:
            self._retry = self._loop.call_later(RETRY_SECONDS, self._retry_blocked)

    def _has_more(self) -> bool:
        """Whether a message is there. Asking processes the socket's commands, so it is asked even while paused."""
        return bool(self.socket.getsockopt(_EVENTS) & _POLLIN) and not self._paused  # type: ignore[operator]

    def _retry_blocked(self) -> None:
        self._retry = None
        self._turn()

    def _drain(self) -> None:
        zmq_socket = self.socket
        frames_left = FRAME_LIMIT
        for _ in range(DRAIN_LIMIT):
            if not self._has_more():
                return
            parts = self._parts
            more: object = True
            while more:
                if not frames_left:
                    return
                frames_left -= 1
                self._frames += 1
                if self._frames == CUT_FRAMES:
                    self._cut(zmq_socket.recv(_LAST, copy=False))
                elif parts or self._authorized is None:
                    part = zmq_socket.recv(_LAST)
                    if len(parts) <= PARTS_KEPT:
                        parts.append(part)
                else:
                    parts.append(self._recv_address())
                more = zmq_socket.getsockopt(_RCVMORE)
            self._parts = []
            self._frames = 0
            peer = parts.pop(0) if self._routed else b""
            self._on_message(peer, parts)
            if self._closed:
                return

    def _cut(self, frame: zmq.Frame) -> None:
        """Shuts down the connection that a frame came by. libzmq has no call for that, but tells the descriptor."""
        self.cut += 1
        with contextlib.suppress(OSError, zmq.ZMQError):  # it is gone already, or there is none (inproc)
            descriptor = os.dup(int(frame.get(zmq.SRCFD)))
            with socket.socket(fileno=descriptor) as connection:
                connection.shutdown(socket.SHUT_RDWR)

    def _recv_address(self) -> bytes:
        """The first frame of a message to a service with keys, and whose key its connection has.

        That costs a microsecond per message. The routing id alone says nothing: another connection may take it over.
        """
        assert self._authorized is not None
        frame = self.socket.recv(_LAST, copy=False)
        self.sender = self._authorized.user(str(frame.get("User-Id")))
        return frame.bytes

    def _look_at_list(self) -> None:
        assert self._loop is not None
        assert self._authorized is not None
        self._authorized.refresh()
        self._list_timer = self._loop.call_later(LIST_SECONDS, self._look_at_list)

    def _tell_lost(self) -> None:
        lost, self._lost = self._lost, {}
        for (peer, code), undelivered in lost.items():
            if self._on_peer_lost is not None:
                self._on_peer_lost(peer, code, undelivered)

    def _last_turn(self) -> None:
        """Before closing: what the owner has handed over goes out, after its journal was written."""
        self._in_turn = True
        try:
            if self._outbox and self._on_batch is not None:
                self._on_batch()
            self._flush()
            self._flush_blocked()
        except Exception as error:  # noqa: BLE001 (as in _turn)
            self._fail(error)
        finally:
            self._in_turn = False

    def _fail(self, error: Exception) -> None:
        self.error = error
        self._stop()
        if self._on_failure is not None:
            self._on_failure(error)
        elif self._loop is not None:
            self._loop.call_exception_handler(
                {"message": f"{error!r} in a callback of {self!r}", "exception": error}
            )

    def _stop(self) -> None:
        if self._next_turn is not None:
            self._next_turn.cancel()
            self._next_turn = None
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._list_timer is not None:
            self._list_timer.cancel()
            self._list_timer = None
        if self._fd >= 0 and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # a loop that was closed before us
                self._loop.remove_reader(self._fd)
            self._fd = -1
