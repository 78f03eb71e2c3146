"""A peer's connection to a service that is made anew when it is lost.

libzmq connects again by itself and says nothing of it, so that what was on the way is missed later, if ever. Here the
socket's monitor tells that a connection is lost, and the next one is a new socket with a new routing id: what comes
over it can only be meant for it. The owner then says what has to be said first (`on_open`): Attach, Join, or Resume.

    open() --> on_open() ... messages ... (lost) ... after a pause: --> on_open() ... messages ...
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any, Final, Unpack

import zmq
from zmq.utils.monitor import recv_monitor_message

from shadowmmu.client.transport import Endpoint, EndpointOptions

__all__ = ["Line"]

FIRST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 1.0
"""Seconds between two attempts to connect; each pause is twice as long as the one before."""
ATTEMPT_SECONDS: Final = 3.0
"""An attempt that has not led to a connection by then is given up: of a name that cannot be resolved libzmq says
nothing."""

_MADE: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED
_LOST: Final = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_POLLIN: Final = int(zmq.POLLIN)
_EVENTS: Final = int(zmq.EVENTS)


class Line:
    """One connection at a time to the service at `address`. Belongs to the running loop.

    `on_message(frames)`; `on_open()`: there is a new connection (or an attempt at one: messages wait until it is made),
    and nothing has been sent on it. `name` is the beginning of the routing ids. `options` are those of Endpoint, but
    for `routing_id` and `on_peer_lost`. Whether a connection is silent is for the owner to say: it calls `open`.
    `endpoint` is the one there is now, None between two connections.
    """

    def __init__(
        self,
        address: str,
        name: str,
        on_message: Callable[[list[bytes]], None],
        on_open: Callable[[], None],
        **options: Unpack[EndpointOptions],
    ) -> None:
        self.address = address
        self._name = name.encode("ascii", "replace")[:64]
        self._on_message = on_message
        self._on_open = on_open
        self._options = options
        self._loop = asyncio.get_running_loop()
        context = options.get("context")
        self._own_context = context is None
        self._context: zmq.Context[zmq.Socket[bytes]] = context if context is not None else zmq.Context()
        self.endpoint: Endpoint | None = None
        self._monitor: Any = None
        self._monitor_fd = -1
        self._pause = FIRST_PAUSE
        self._attempt: asyncio.TimerHandle | None = None
        self._made = False
        self._deadline: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def error(self) -> Exception | None:
        """What made a callback fail, and so ended this line."""
        return None if self.endpoint is None else self.endpoint.error

    def open(self) -> None:
        """Makes a connection; one that there is, is dropped with what waits in it."""
        self._drop()
        if self._closed:
            return
        options = self._options.copy()
        options["context"] = self._context
        # Unlike all others', and not beginning with 0 (those are libzmq's own).
        options["routing_id"] = self._name + b"-" + os.urandom(8)
        options["on_peer_lost"] = lambda _peer, _code, _undelivered: self._went()
        endpoint = Endpoint.dealer(lambda _peer, frames: self._message(endpoint, frames), **options)
        self.endpoint = endpoint
        endpoint.socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._monitor = endpoint.socket.get_monitor_socket(_LOST | _MADE)
        fd = self._monitor.getsockopt(zmq.FD)
        assert isinstance(fd, int)
        self._monitor_fd = fd
        self._made = False
        self._deadline = self._loop.call_later(ATTEMPT_SECONDS, self._overdue)
        endpoint.connect(self.address)
        endpoint.start()
        self._loop.add_reader(fd, self._look_at_monitor)
        self._loop.call_soon(self._look_at_monitor)  # the descriptor tells only of what comes from now on
        self._on_open()

    def open_later(self) -> None:
        """Drops the connection, and makes one after a pause."""
        self._drop()
        if self._attempt is None and not self._closed:
            self._attempt = self._loop.call_later(self._pause, self._try)
            self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def send(self, frames: Sequence[bytes]) -> None:
        """Sends on the connection that there is; without one the message is gone."""
        endpoint = self.endpoint
        if endpoint is not None and endpoint.error is None:
            endpoint.send(b"", frames)

    async def close(self, linger: float) -> None:
        """Closes for good; what waits has `linger` seconds to leave."""
        self._closed = True
        if self._attempt is not None:
            self._attempt.cancel()
        self._end_monitor()
        if self.endpoint is not None:
            await self.endpoint.close(linger)
        if self._own_context:
            await asyncio.to_thread(self._context.term)

    # --- inside --------------------------------------------------------------------------------------------------

    def _message(self, endpoint: Endpoint, frames: list[bytes]) -> None:
        if endpoint is self.endpoint:
            self._pause = FIRST_PAUSE
            self._on_message(frames)

    def _try(self) -> None:
        self._attempt = None
        self.open()

    def _went(self) -> None:
        """The connection is gone, or did not come about."""
        if not self._closed and self.endpoint is not None:
            self.open_later()

    def _look_at_monitor(self) -> None:
        lost = False
        while self._monitor is not None and self._monitor.getsockopt(_EVENTS) & _POLLIN:
            if recv_monitor_message(self._monitor)["event"] == _MADE:
                self._made = True
            else:
                lost = True
        if lost:
            self._went()

    def _overdue(self) -> None:
        if not self._made:
            self._went()

    def _end_monitor(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        if self._monitor is None:
            return
        with contextlib.suppress(RuntimeError):  # a loop that was closed before us
            self._loop.remove_reader(self._monitor_fd)
        monitor, self._monitor = self._monitor, None
        if self.endpoint is not None:
            self.endpoint.socket.disable_monitor()
        monitor.close(linger=0)

    def _drop(self) -> None:
        self._end_monitor()
        endpoint, self.endpoint = self.endpoint, None
        if endpoint is not None:
            endpoint.drop()
