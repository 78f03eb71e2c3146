"""A TCP proxy that misbehaves on request: between processes that are to survive what networks do.

Bytes are passed on as they come. Connections can be cut, swallowed (half open: both ends believe that they are
connected, and nothing arrives), delayed, and new ones refused. Relies on asyncio alone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Final, Self

__all__ = ["Proxy", "local_ports"]

PIECE: Final = 1 << 16


class _Connection:
    """A connection through the proxy. `port` is that of the process that made it."""

    def __init__(self, port: int, *writers: asyncio.StreamWriter) -> None:
        self.port = port
        self.swallowing = False
        self._writers = writers

    def cut(self) -> None:
        for writer in self._writers:
            if not writer.transport.is_closing():
                writer.transport.abort()


class Proxy:
    """Listens on a port of the loopback interface for the service at `target`, another such port.

    `delay`: seconds that every piece takes longer, in each direction; `refusing`: new connections are closed at once.
    An async context manager that closes everything.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.delay = 0.0
        self.refusing = False
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def connections(self) -> int:
        """How many there are."""
        return len(self._connections)

    def cut(self, ports: Collection[int] | None = None) -> int:
        """Cuts the connections from these local ports (None: all); how many there were."""
        cut = self._of(ports)
        for connection in cut:
            connection.cut()
        return len(cut)

    def swallow(self, ports: Collection[int] | None = None) -> int:
        """From now on nothing passes on these connections, in neither direction; how many there were."""
        half_open = self._of(ports)
        for connection in half_open:
            connection.swallowing = True
        return len(half_open)

    def _of(self, ports: Collection[int] | None) -> list[_Connection]:
        return [one for one in self._connections if ports is None or one.port in ports]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self.refusing:
            writer.transport.abort()
            return
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:  # nobody listens there now
            writer.transport.abort()
            return
        connection = _Connection(writer.get_extra_info("peername")[1], writer, there_writer)
        self._connections.add(connection)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_on(connection, reader, there_writer))
                group.create_task(self._pass_on(connection, there_reader, writer))
        finally:
            connection.cut()
            self._connections.discard(connection)

    async def _pass_on(
        self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Until either end closes: then both are closed."""
        with contextlib.suppress(OSError):
            while data := await reader.read(PIECE):
                if self.delay:
                    await asyncio.sleep(self.delay)
                if not connection.swallowing:
                    writer.write(data)
                    await writer.drain()
        connection.cut()


def local_ports(pid: int) -> set[int]:
    """The local TCP (IPv4) ports of a process's sockets, from /proc; empty if it is gone."""
    inodes = set()
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                link = str(entry.readlink())
                if link.startswith("socket:["):
                    inodes.add(link[8:-1])
    rows = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return {int(row.split()[1].partition(":")[2], 16) for row in rows if row.split()[9] in inodes}
