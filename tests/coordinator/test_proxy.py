"""The proxy between processes: passes bytes, cuts, swallows, refuses."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import pytest

from shadowmmu.coordinator.proxy import Proxy, local_ports


@pytest.fixture
async def echo() -> AsyncIterator[Proxy]:
    """A proxy in front of a service that sends back what it gets."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1000):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, Proxy(server.sockets[0].getsockname()[1]) as proxy:
        yield proxy


async def connect(proxy: Proxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, int]:
    """A connection that works, and its local port."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"hello")
    assert await asyncio.wait_for(reader.readexactly(5), 20) == b"hello"
    return reader, writer, writer.get_extra_info("sockname")[1]


async def ended(reader: asyncio.StreamReader) -> bool:
    return await ended_task(asyncio.create_task(reader.read(10)))


async def ended_task(reading: asyncio.Task[bytes]) -> bool:
    """Whether it reads the end, and nothing else."""
    try:
        return await asyncio.wait_for(reading, 20) == b""
    except ConnectionError:
        return True


async def test_one_processes_connections_are_cut_and_no_others(echo: Proxy) -> None:
    one, one_writer, port = await connect(echo)
    other, other_writer, _ = await connect(echo)
    assert echo.connections == 2
    assert echo.cut({port}) == 1
    assert await ended(one)
    other_writer.write(b"still")
    assert await asyncio.wait_for(other.readexactly(5), 20) == b"still"
    one_writer.close()
    other_writer.close()


async def test_on_a_half_open_connection_nothing_passes_and_nobody_is_told(echo: Proxy) -> None:
    reader, writer, _ = await connect(echo)
    assert echo.swallow() == 1
    writer.write(b"lost")
    answer = asyncio.create_task(reader.read(10))
    _, new_writer, _ = await connect(echo)  # meanwhile others get answers
    assert not answer.done()
    echo.cut()
    assert await ended_task(answer)
    writer.close()
    new_writer.close()


async def test_new_connections_are_refused_when_told_so(echo: Proxy) -> None:
    echo.refusing = True
    reader, writer = await asyncio.open_connection("127.0.0.1", echo.port)
    assert await ended(reader)
    writer.close()


async def test_without_a_service_a_connection_ends(echo: Proxy) -> None:
    async with Proxy(1) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await ended(reader)
        writer.close()


async def test_the_ports_of_a_process_are_known(echo: Proxy) -> None:
    _, writer, port = await connect(echo)
    assert {port, echo.port} <= local_ports(os.getpid())
    writer.close()
    assert local_ports(2**22 + 1) == set()
