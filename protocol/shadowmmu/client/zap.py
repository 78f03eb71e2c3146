"""Asks the authorised list whether a connection may come about: a ZAP handler (RFC 27) in the asyncio loop.

libzmq asks once per connection, at its handshake, over a socket of the same context; so it costs messages nothing.
`zmq.auth` has a handler, but for asyncio only as a task over `zmq.asyncio`'s poller, which looks at every socket
anew for each question; this one is a reader callback, like the endpoint's. It knows CURVE and nothing else.

The answer names the key as the connection's user id, which libzmq then puts beside every message. Not its role:
what a key may do can change while it is connected.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import structlog
import zmq
from zmq.utils import z85

__all__ = ["DOMAIN", "ZapHandler"]

ADDRESS: Final = "inproc://zeromq.zap.01"
DOMAIN: Final = b"shadowmmu"
"""The domain that sockets of ours name; libzmq lets nobody in whose handler has gone."""
VERSION: Final = b"1.0"
TURN_LIMIT: Final = 16
"""Most questions answered in one turn of the loop: connections must not keep it from messages."""
LOG_SECONDS: Final = 1.0
"""Of those that are not let in one is logged in so many seconds: strangers must not fill the disk."""

log = structlog.get_logger(__name__)


class ZapHandler:
    """Answers for all sockets of a context. `is_authorized(key)`: whether the public key (in Z85) may connect.

    From construction on questions wait; `start` begins to answer them, in the running loop. One per context: a second
    one raises zmq.ZMQError.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], is_authorized: Callable[[str], bool]) -> None:
        self.refused = 0
        self._log_from = 0.0
        self._is_authorized = is_authorized
        self._loop: asyncio.AbstractEventLoop | None = None
        self._next: asyncio.Handle | None = None
        self._socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        try:
            self._socket.bind(ADDRESS)
        except zmq.ZMQError:
            self._socket.close()
            raise

    def start(self) -> None:
        """Begins to answer."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd(), self._turn)
        self._turn()

    def close(self) -> None:
        """Ends it; connections that come now are not let in."""
        if self._next is not None:
            self._next.cancel()
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._fd())
        self._socket.close()

    def _fd(self) -> Any:
        return self._socket.getsockopt(zmq.FD)

    def _turn(self) -> None:
        """Answers what is there. It asks until there is nothing: the descriptor is edge-triggered."""
        self._next = None
        for _ in range(TURN_LIMIT):
            try:
                question = self._socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            self._socket.send_multipart(self._answer(question))
        assert self._loop is not None
        self._next = self._loop.call_soon(self._turn)

    def _answer(self, question: list[bytes]) -> list[bytes]:
        version, request, _domain, address, _routing_id, mechanism, *credentials = question
        key = ""
        if version == VERSION and mechanism == b"CURVE" and len(credentials) == 1:
            key = z85.encode(credentials[0]).decode()
        if key and self._is_authorized(key):
            return [VERSION, request, b"200", b"OK", key.encode(), b""]
        self.refused += 1
        self._log_refusal(address.decode(errors="replace"), key)
        return [VERSION, request, b"400", b"not authorised", b"", b""]

    def _log_refusal(self, address: str, key: str) -> None:
        assert self._loop is not None
        now = self._loop.time()
        if now >= self._log_from:
            self._log_from = now + LOG_SECONDS
            log.warning("not let in", address=address, key=key or None, so_far=self.refused)
