"""The endpoint on real sockets: lost edges, fairness, unreachable and slow peers, oversize, closing."""

from __future__ import annotations

import asyncio
import itertools
import select
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import zmq

from shadowmmu.client import DRAIN_LIMIT, Endpoint
from shadowmmu.client.transport import CUT_FRAMES, FRAME_LIMIT, PARTS_KEPT
from shadowmmu.protocol import ErrorCode
from tests.client.conftest import Until

Context = zmq.Context[zmq.Socket[bytes]]
Dealer = Callable[[str, bytes], "zmq.Socket[bytes]"]
HARD_LIMIT = 1 << 20


class Owner:
    """Collects what an endpoint tells."""

    def __init__(self) -> None:
        self.got: list[tuple[bytes, list[bytes]]] = []
        self.lost: list[tuple[bytes, ErrorCode, int]] = []
        self.failures: list[Exception] = []

    def on_message(self, peer: bytes, frames: list[bytes]) -> None:
        self.got.append((peer, frames))

    def on_peer_lost(self, peer: bytes, code: ErrorCode, undelivered: int) -> None:
        self.lost.append((peer, code, undelivered))


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture
async def router(context: Context, owner: Owner) -> AsyncIterator[Endpoint]:
    async with Endpoint.router(
        owner.on_message,
        on_peer_lost=owner.on_peer_lost,
        on_failure=owner.failures.append,
        context=context,
        hard_limit=HARD_LIMIT,
        queue_limit=100,
        socket_queue=10,
    ) as endpoint:
        yield endpoint


@pytest.fixture
def dealer(context: Context) -> Iterator[Dealer]:
    """A plain, blocking peer."""
    sockets: list[zmq.Socket[bytes]] = []

    def connect(address: str, routing_id: bytes) -> zmq.Socket[bytes]:
        socket = context.socket(zmq.DEALER)
        sockets.append(socket)
        socket.setsockopt(zmq.ROUTING_ID, routing_id)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, 10)
        socket.setsockopt(zmq.RCVTIMEO, 20_000)
        socket.setsockopt(zmq.SNDTIMEO, 20_000)
        socket.connect(address)
        return socket

    yield connect
    for socket in sockets:
        socket.close(linger=0)


def readable(endpoint: Endpoint) -> bool:
    fd = endpoint.socket.getsockopt(zmq.FD)
    assert isinstance(fd, int)
    return bool(select.select([fd], [], [], 0)[0])


def has_message(endpoint: Endpoint) -> bool:
    events = endpoint.socket.getsockopt(zmq.EVENTS)
    assert isinstance(events, int)
    return bool(events & zmq.POLLIN)


@pytest.mark.parametrize("retest", [False, True])
async def test_the_lost_edge(
    router: Endpoint,
    dealer: Dealer,
    owner: Owner,
    until: Until,
    monkeypatch: pytest.MonkeyPatch,
    *,
    retest: bool,
) -> None:
    """A send takes away the descriptor's signal of a message that has arrived; asking ZMQ_EVENTS again finds it."""
    address = router.bind("inproc://edge")  # so that a message is there as soon as it is sent
    peer = dealer(address, b"peer")
    peer.send(b"hello")
    await until(lambda: owner.got)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not readable(router)

    if not retest:
        monkeypatch.setattr(router, "_schedule", lambda: None)
    peer.send(b"the one in question")
    assert readable(router)
    for _ in range(1_000_000):  # libzmq looks for signals at a send only if the last look was a while ago
        router.send(b"peer", [b"something else"])
        peer.recv()
        if not readable(router):
            break
    assert not readable(router)

    for _ in range(100):
        await asyncio.sleep(0)
    if retest:
        assert [frames for _, frames in owner.got] == [[b"hello"], [b"the one in question"]]
    else:
        assert [frames for _, frames in owner.got] == [[b"hello"]]
        assert has_message(router)


async def test_a_flood_starves_neither_peers_nor_the_loop(
    context: Context, dealer: Dealer, owner: Owner, until: Until
) -> None:
    turns = 0
    position: list[int] = []

    def on_batch() -> None:
        nonlocal turns
        turns += 1

    async with Endpoint.router(owner.on_message, on_batch=on_batch, context=context) as router:
        address = router.bind("inproc://flood")
        flood, quiet = dealer(address, b"flood"), dealer(address, b"quiet")
        router.pause()
        total = 1500
        for i in range(total):
            flood.send(b"%d" % i)
        quiet.send(b"me too")
        before = turns
        for _ in range(50):
            await asyncio.sleep(0)
        assert not owner.got
        ticks = 0
        router.resume()

        async def tick() -> None:
            nonlocal ticks
            while len(owner.got) < total + 1:
                ticks += 1
                position.append(len(owner.got))
                await asyncio.sleep(0)

        async with asyncio.timeout(20):
            await tick()
        assert [peer for peer, _ in owner.got].index(b"quiet") < 4
        assert [frames[0] for peer, frames in owner.got if peer == b"flood"] == [
            b"%d" % i for i in range(total)
        ]
        assert ticks >= total // DRAIN_LIMIT
        assert max(b - a for a, b in itertools.pairwise(position)) <= 2 * DRAIN_LIMIT
        assert turns - before >= total // DRAIN_LIMIT


async def test_nothing_is_sent_before_on_batch(
    context: Context, dealer: Dealer, owner: Owner, until: Until
) -> None:
    trace: list[str] = []

    def on_message(peer: bytes, frames: list[bytes]) -> None:
        owner.on_message(peer, frames)
        router.send(peer, [b"reply"])
        trace.append("message")

    def on_batch() -> None:
        if trace[-1:] == ["message"]:
            assert not client.poll(0)
        trace.append("batch")

    async with Endpoint.router(on_message, on_batch=on_batch, context=context) as router:
        client = dealer(router.bind("inproc://batch"), b"peer")
        router.pause()
        for _ in range(3):
            client.send(b"request")
        router.resume()
        await until(lambda: client.poll(0))
        assert "message message message batch" in " ".join(trace)
        assert [client.recv() for _ in range(3)] == [b"reply"] * 3
        # Also what is sent outside of turns waits for its turn, and so for on_batch.
        trace.clear()
        router.send(b"peer", [b"unasked"])
        assert not client.poll(0)
        await until(lambda: client.poll(0))
        assert trace[0] == "batch"


async def test_an_unreachable_peer_is_reported(router: Endpoint, owner: Owner, until: Until) -> None:
    router.bind("tcp://127.0.0.1:*")
    router.send(b"nobody", [b"a"])
    router.send(b"nobody", [b"b"])
    assert not owner.lost  # not from inside of send
    await until(lambda: owner.lost)
    assert owner.lost == [(b"nobody", ErrorCode.UNREACHABLE, 2)]


async def test_a_slow_peer_gets_everything_or_is_reported(
    router: Endpoint, dealer: Dealer, owner: Owner, until: Until
) -> None:
    address = router.bind("inproc://slow")
    slow, other = dealer(address, b"slow"), dealer(address, b"other")
    slow.send(b"hello")
    other.send(b"hello")
    await until(lambda: len(owner.got) == 2)

    sent = 0
    while router.queued(b"slow") < 50:
        router.send(b"slow", [b"%d" % sent])
        sent += 1
    router.send(b"other", [b"quick"])
    assert other.recv() == b"quick"
    received: list[bytes] = []
    while len(received) < sent:
        await until(lambda: slow.poll(0))
        received.append(slow.recv())
    assert received == [b"%d" % i for i in range(sent)]
    assert router.queued(b"slow") == 0
    assert not owner.lost

    for i in range(1000):
        router.send(b"slow", [b"%d" % i])
    await until(lambda: owner.lost)
    assert {(peer, code) for peer, code, _ in owner.lost} == {(b"slow", ErrorCode.SLOW_CONSUMER)}
    undelivered = sum(count for _, _, count in owner.lost) + router.forget(b"slow")
    arrived = 0
    while slow.poll(0):
        slow.recv()
        arrived += 1
    assert arrived + undelivered == 1000


async def test_a_peer_that_is_gone_while_its_queue_waits(
    router: Endpoint, dealer: Dealer, owner: Owner, until: Until
) -> None:
    slow = dealer(router.bind("inproc://gone"), b"slow")
    slow.send(b"hello")
    await until(lambda: owner.got)
    while router.queued(b"slow") < 5:
        router.send(b"slow", [b"x"])
    slow.close(linger=0)
    await until(lambda: owner.lost)
    assert owner.lost == [(b"slow", ErrorCode.UNREACHABLE, 5)]
    assert router.queued(b"slow") == 0


async def test_oversize_cuts_the_connection_and_no_other(
    router: Endpoint, dealer: Dealer, owner: Owner, until: Until
) -> None:
    address = router.bind("tcp://127.0.0.1:*")
    bad, good = dealer(address, b"bad"), dealer(address, b"good")
    monitor = bad.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    bad.send(bytes(HARD_LIMIT))
    good.send(b"before")
    await until(lambda: len(owner.got) == 2)
    assert not monitor.poll(0)
    bad.send(bytes(HARD_LIMIT + 1))
    await until(lambda: monitor.poll(0))
    bad.disable_monitor()
    monitor.close()
    good.send(b"after")
    await until(lambda: (b"good", [b"after"]) in owner.got)
    assert max(len(frames[0]) for _, frames in owner.got) == HARD_LIMIT
    bad.send(b"again")  # libzmq has connected anew
    await until(lambda: (b"bad", [b"again"]) in owner.got)


async def test_a_message_of_very_many_frames(
    router: Endpoint, dealer: Dealer, owner: Owner, until: Until
) -> None:
    address = router.bind("inproc://frames")
    bad, good = dealer(address, b"bad"), dealer(address, b"good")
    bad.send_multipart([b"x"] * (20 * FRAME_LIMIT))
    good.send(b"hello")
    await until(lambda: len(owner.got) == 2)
    by_peer = dict(owner.got)
    assert len(by_peer[b"bad"]) == PARTS_KEPT
    assert by_peer[b"good"] == [b"hello"]


async def test_pause_and_resume(router: Endpoint, dealer: Dealer, owner: Owner, until: Until) -> None:
    peer = dealer(router.bind("tcp://127.0.0.1:*"), b"peer")
    peer.send(b"1")
    await until(lambda: owner.got)
    router.pause()
    assert router.paused
    peer.send(b"2")
    router.send(b"peer", [b"still sent"])
    assert await asyncio.to_thread(peer.recv) == b"still sent"
    await until(lambda: has_message(router))
    assert len(owner.got) == 1
    router.resume()
    await until(lambda: len(owner.got) == 2)


async def test_handover(router: Endpoint, dealer: Dealer, owner: Owner, until: Until) -> None:
    address = router.bind("tcp://127.0.0.1:*")
    first = dealer(address, b"same")
    first.send(b"1")
    await until(lambda: len(owner.got) == 1)
    second = dealer(address, b"same")
    second.send(b"2")
    await until(lambda: len(owner.got) == 2)
    router.send(b"same", [b"to the second"])
    assert await asyncio.to_thread(second.recv) == b"to the second"


async def test_a_failing_callback_stops_everything(
    context: Context, dealer: Dealer, owner: Owner, until: Until
) -> None:
    def on_batch() -> None:
        if owner.got:
            raise OSError("disk full")

    def on_message(peer: bytes, frames: list[bytes]) -> None:
        owner.on_message(peer, frames)
        endpoint.send(peer, [b"must not be sent"])

    async with Endpoint.router(
        on_message, on_batch=on_batch, on_failure=owner.failures.append, context=context
    ) as endpoint:
        peer = dealer(endpoint.bind("inproc://fail"), b"peer")
        peer.send(b"x")
        await until(lambda: owner.failures)
        assert isinstance(owner.failures[0], OSError)
        assert endpoint.error is owner.failures[0]
        assert not peer.poll(0)
        with pytest.raises(ConnectionError):
            endpoint.send(b"peer", [b"y"])
        assert await endpoint.close() == 1


async def test_closing_sends_what_waits_and_counts_what_cannot_go(context: Context, dealer: Dealer) -> None:
    batches = 0

    def on_batch() -> None:
        nonlocal batches
        batches += 1

    hello: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    router = Endpoint.router(
        lambda _peer, _frames: hello.set_result(None), on_batch=on_batch, context=context, socket_queue=10
    )
    peer = dealer(router.bind("tcp://127.0.0.1:*"), b"peer")
    async with router:
        peer.send(b"hello")
        await hello
        before = batches
        router.send(b"peer", [b"last words"])
        assert await router.close(linger=5.0) == 0
        assert batches == before + 1
    assert await asyncio.to_thread(peer.recv) == b"last words"
    assert router.closed
    assert await router.close() == 0

    queue: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    router = Endpoint.router(lambda _peer, _frames: queue.set_result(None), context=context, socket_queue=10)
    peer = dealer(router.bind("inproc://full"), b"full")
    async with router:
        peer.send(b"hello")
        await queue
        while router.queued(b"full") < 7:
            router.send(b"full", [b"x"])
        assert await router.close() == 7


async def test_an_endpoint_has_its_own_context() -> None:
    async with Endpoint.router(lambda _peer, _frames: None) as router:
        router.bind("tcp://127.0.0.1:*")
        with pytest.raises(RuntimeError):
            router.start()
    assert router.socket.closed
    assert router._context.closed


async def test_a_message_of_very_many_frames_costs_its_sender_the_connection(
    router: Endpoint, dealer: Dealer, owner: Owner, until: Until
) -> None:
    """And nobody else: what others send is read as before."""
    address = router.bind("tcp://127.0.0.1:*")
    bad, good = dealer(address, b"bad"), dealer(address, b"good")
    monitor = bad.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    bad.send_multipart([b"x"] * (CUT_FRAMES + 10))
    await until(lambda: monitor.poll(0))
    bad.disable_monitor()
    monitor.close()
    good.send(b"hello")
    await until(lambda: (b"good", [b"hello"]) in owner.got)
    assert router.cut == 1
