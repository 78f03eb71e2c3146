"""The live page's server, and clients that do as they please."""

import asyncio
import json
import socket
from http.client import IncompleteRead
from urllib.error import HTTPError

import pytest

from shadowmmu.checker import Rule, Violation
from shadowmmu.coordinator.live import LiveAddress, LiveServer
from shadowmmu.coordinator.live.app import LISTENER_LIMIT
from tests.live.conftest import Conducted, eventually, fetch, get


async def talk(server: LiveServer, request: bytes) -> bytes:
    """All that comes back until the server closes the connection."""
    reader, writer = await asyncio.open_connection(server.address.host, server.address.port)
    try:
        writer.write(request)
        async with asyncio.timeout(20):
            return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


def events_in(stream: bytes) -> list[tuple[str, object]]:
    """Names and data of server-sent events."""
    found = []
    for block in stream.decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


async def test_the_page_may_run_its_own_script_and_reach_nobody_else(page: LiveServer) -> None:
    body, headers = await get(page.url)
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src 'self'" in policy and "unsafe" not in policy
    assert headers["cache-control"] == "no-store" and headers["x-content-type-options"] == "nosniff"
    html = body.decode()
    assert "http://" not in html.replace("http://www.w3.org/2000/svg", "") and "https://" not in html
    assert " src=" not in html and " style=" not in html and html.count("<script>") == 1


async def test_the_state_is_the_run_as_it_is(conducted: Conducted, page: LiveServer) -> None:
    conducted.start()
    conducted.step(kvm__pf_fixed=9)
    state = json.loads((await get(page.url + "state"))[0])
    assert (state["phase"], state["verdict"], state["vcpus"]) == ("running", None, 2)
    assert state["instructions"] == 1000
    assert state["sample"]["counters"]["kvm.pf_fixed"] == 9
    assert [member["state"] for member in state["members"]] == ["running"] * 3
    assert state["config"]["ops"] == 100_000


async def test_health_says_ok(page: LiveServer) -> None:
    assert (await get(page.url + "healthz"))[0] == b"ok\n"


async def test_events_begin_with_the_series_and_end_with_the_last_state(conducted: Conducted) -> None:
    server = LiveServer(LiveAddress.parse("0"))
    async with server.serving(conducted.coordinator):
        conducted.start()
        conducted.step()
        stream = asyncio.create_task(
            talk(server, b"GET /events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        )
        conducted.step()
        await eventually(lambda: server.connections)
        conducted.end()
    head, _, body = (await stream).partition(b"\r\n\r\n")
    assert b"content-type: text/event-stream" in head
    chunks = b"".join(chunk for chunk in body.split(b"\r\n")[1::2])
    events = events_in(chunks)
    assert events[0][0] == "series" and isinstance(events[0][1], list)
    assert {name for name, _ in events[1:-1]} == {"state"}
    last = events[-2][1]
    assert isinstance(last, dict) and (last["phase"], last["verdict"]) == ("finished", "unknown")
    assert events[-1] == ("end", {})


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "", "127.0.0.1.evil"]
)
async def test_a_request_in_the_name_of_another_host_is_refused(page: LiveServer, host: str) -> None:
    for path in ("", "state", "metrics", "events", "healthz"):
        with pytest.raises(HTTPError) as refused:
            await get(page.url + path, Host=host)
        assert refused.value.code == 400
        refused.value.close()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:80", "LOCALHOST"])
async def test_this_machine_has_several_names(page: LiveServer, host: str) -> None:
    assert await get(page.url + "healthz", Host=host)


@pytest.mark.parametrize(
    "request_, status",
    [
        (b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"404"),
        (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"404"),
        (
            b"POST /state HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            b"405",
        ),
        (b"DELETE / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"405"),
        (b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00 TLS?\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 100_000, b"400"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000, b"400"),
    ],
    ids=["unknown", "above", "post", "delete", "no host", "tls", "long path", "many headers"],
)
async def test_nonsense_is_answered_and_the_next_client_is_served(
    page: LiveServer, request_: bytes, status: bytes
) -> None:
    answer = await talk(page, request_)
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert (await get(page.url + "healthz"))[0] == b"ok\n"


@pytest.mark.parametrize("path", ["/", "/state", "/events", "/metrics", "/healthz"])
async def test_who_asks_for_the_head_gets_no_more(page: LiveServer, path: str) -> None:
    request = f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    head, _, body = (await talk(page, request.encode())).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert body == b""


async def test_too_many_clients_are_told_so(page: LiveServer) -> None:
    request = b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n"
    connections = [
        await asyncio.open_connection(page.address.host, page.address.port)
        for _ in range(LISTENER_LIMIT + 36)
    ]
    for _, writer in connections:
        writer.write(request)
    async with asyncio.timeout(30):
        lines = [await reader.readline() for reader, _ in connections]
    assert sum(line.startswith(b"HTTP/1.1 200") for line in lines) == LISTENER_LIMIT
    assert sum(line.startswith(b"HTTP/1.1 503") for line in lines) == 36
    assert (await get(page.url + "healthz"))[0] == b"ok\n"
    for _, writer in connections:
        writer.close()
    await asyncio.gather(*(writer.wait_closed() for _, writer in connections), return_exceptions=True)
    await eventually(lambda: not page.connections)
    assert (await get(page.url + "healthz"))[0] == b"ok\n"


async def test_clients_that_do_not_read_hold_nobody_up(conducted: Conducted) -> None:
    server = LiveServer(LiveAddress.parse("0"))
    silent = []
    async with server.serving(conducted.coordinator):
        conducted.start()
        for request in (b"", b"GET / HT", *[b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n"] * 3):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            connection.connect((server.address.host, server.address.port))
            connection.send(request)
            silent.append(connection)
        conducted.state.notes.extend(["much to be told " * 5000] * 20)
        await eventually(lambda: server.connections >= len(silent))
        assert (await get(server.url + "healthz"))[0] == b"ok\n"
        conducted.end()
    assert not server.connections
    for connection in silent:
        connection.close()


async def test_an_address_in_use_is_an_error_at_once(page: LiveServer) -> None:
    with pytest.raises(OSError, match="in use"):
        LiveServer(page.address)


async def test_after_the_run_nobody_listens(conducted: Conducted) -> None:
    server = LiveServer(LiveAddress.parse("[::1]:0"))
    async with server.serving(conducted.coordinator):
        assert (await get(server.url + "healthz"))[0] == b"ok\n"
    with pytest.raises(OSError, match="refused"):
        fetch(server.url)


async def test_a_violation_is_told_with_its_rule(conducted: Conducted, page: LiveServer) -> None:
    conducted.start()
    violation = Violation(Rule.STALE_TRANSLATION, "a stale entry was used", 0, None, 7, 9, "nobody flushed")
    conducted.state.violated(violation, conducted.time)
    state = json.loads((await get(page.url + "state"))[0])
    assert state["violation"] == "Rule 1, stale translation: a stale entry was used"
    assert state["phase"] == "draining"


async def test_members_that_are_missed_are_told(conducted: Conducted, page: LiveServer) -> None:
    conducted.start()
    conducted.state.gone("vcpu1", "its connection is gone", conducted.time)
    state = json.loads((await get(page.url + "state"))[0])
    missed = state["members"][2]
    assert (missed["state"], missed["text"]) == ("absent", "its connection is gone")


async def test_a_defect_of_the_page_is_its_own(
    conducted: Conducted, page: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_arguments: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("shadowmmu.coordinator.live.server.observe", fails)
    for path in ("state", "metrics"):
        with pytest.raises(HTTPError) as failed:
            await get(page.url + path)
        assert failed.value.code == 500
        failed.value.close()
    with pytest.raises((IncompleteRead, ConnectionError)):
        await get(page.url + "events")
    assert (await get(page.url + "healthz"))[0] == b"ok\n"
