"""The service over real sockets: it serves, refuses without harm, gives up, and writes what it consumed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from shadowmmu.client import HostClient, RequestRefused, SessionEnded, VcpuClient, probe
from shadowmmu.cpu.guest.layout import direct
from shadowmmu.machine import replay
from shadowmmu.mmu.patience import worker_next
from shadowmmu.mmu.service import KICK_SECONDS
from shadowmmu.protocol import MISSED_LIMIT, VERSION_FRAME
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import AccessFlag
from tests.mmu.conftest import CONFIG, Served, Until

PAGE = direct(100 << 12)
PFN = 0x100000 + 100
WRITE = int(AccessFlag.WRITE)


async def map_page(vcpu: VcpuClient, gva: int = PAGE, flags: int = WRITE) -> m.Walked:
    """Takes the page-fault exits that it needs to have `gva` mapped."""
    for _ in range(4):
        answer = await vcpu.walk(gva, flags)
        if isinstance(answer, m.Walked):
            return answer
        await vcpu.exit(m.PageFaultExit(gva, answer.error_code, m.Instruction(flags)))
    raise AssertionError("the page was never mapped")


async def test_a_client_takes_a_page_fault_and_stores(served: Served) -> None:
    async with await served.vcpu() as vcpu:
        entered = await vcpu.enter()
        assert (vcpu.vcpu, entered.entry) == (0, 1)
        walked = await map_page(vcpu)
        assert walked.pfn == PFN
        await vcpu.log([(WRITE, PAGE, walked.pfn, 8, 42)])
        assert await vcpu.load((0, PAGE, walked.pfn, 8, 0)) == 42
        assert await vcpu.locked((WRITE, PAGE, walked.pfn, 8, 1), m.LockedOp.XADD) == 42
        assert await vcpu.load((0, PAGE, walked.pfn, 8, 0)) == 43


async def test_a_host_operation_waits_for_the_kicked_vcpu(served: Served) -> None:
    async with await served.vcpu() as vcpu, await served.host() as host:
        await vcpu.enter()
        await map_page(vcpu)
        reply = asyncio.ensure_future(host.request(m.Unmap(100)))
        assert await vcpu.kicked() == vcpu.entry
        assert not reply.done()
        entered = await vcpu.exit(m.ExternalInterruptExit())
        assert entered.flush
        assert (await reply).result == 1
        assert served.service.kick_latency.get_total_count() == 1


async def test_impossible_arguments_are_refused_and_the_session_goes_on(served: Served) -> None:
    async with await served.host() as host:
        with pytest.raises(RequestRefused, match="no memory slot"):
            await host.request(m.Unmap(1 << 30))
        with pytest.raises(RequestRefused, match="no memory slot 9"):
            await host.request(m.GetDirtyLog(9))
        with pytest.raises(RequestRefused, match="not an aligned word"):
            await host.request(m.WritePhys([(3, 1)]))
        with pytest.raises(RequestRefused, match="no vCPU 77"):
            await host.request(m.SetRegisters(77, 0, 0, 0, 0))
        assert (await host.request(m.TestAge(100))).result == 0


async def test_vcpus_get_numbers_until_there_are_no_more(served: Served) -> None:
    async with await served.vcpu() as first, await served.vcpu() as second:
        assert {first.vcpu, second.vcpu} == {0, 1}
        with pytest.raises(RequestRefused, match="all 2 vCPUs"):
            await served.vcpu()
        with pytest.raises(RequestRefused, match="vCPU 1 is attached"):
            await served.vcpu(vcpu=1)
        with pytest.raises(RequestRefused, match="vCPU 9; there are 2"):
            await served.vcpu(vcpu=9)
    async with await served.vcpu(vcpu=1) as again:
        assert again.vcpu == 1


async def test_a_probe_is_answered(served: Served) -> None:
    assert (await probe(served.address, context=served.context)).vcpu is None


@pytest.fixture
def stranger(served: Served) -> Iterator[zmq.Socket[bytes]]:
    socket = served.context.socket(zmq.SocketType.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(served.address)
    yield socket
    socket.close(linger=0)


@pytest.mark.parametrize(
    "frames, code",
    [
        ([b"nonsense"], "bad-part-count"),
        ([VERSION_FRAME, b"\xc1"], "malformed"),
        ([b"SMMU/9.0", b"\x93\x00\x00\x80"], "unsupported-version"),
        ([VERSION_FRAME, b"\x93\x00\x00\x81\xa1t\xa6attach"], "malformed"),
        ([VERSION_FRAME, b"x" * 300_000], "too-large"),
        ([VERSION_FRAME, b"\x93\x05\x01\x81\xa1t\xa5enter"], "not-attached"),
        ([VERSION_FRAME] + [b""] * 50, "bad-part-count"),
    ],
)
async def test_a_bad_message_gets_its_error_and_others_are_served(
    served: Served, stranger: zmq.Socket[bytes], until: Until, frames: list[bytes], code: str
) -> None:
    async with await served.vcpu() as vcpu:
        await vcpu.enter()
        records = served.service.runner.records
        stranger.send_multipart(frames)
        await until(lambda: stranger.poll(0))
        answer = b"".join(stranger.recv_multipart())
        assert code.encode() in answer
        assert served.service.runner.records == records
        assert isinstance(await map_page(vcpu), m.Walked)


async def test_over_the_hard_limit_the_connection_is_cut_and_others_are_served(
    served: Served, stranger: zmq.Socket[bytes]
) -> None:
    async with await served.vcpu() as vcpu:
        await vcpu.enter()
        stranger.send_multipart([VERSION_FRAME, b"x" * 3_000_000])
        assert isinstance(await map_page(vcpu), m.Walked)


async def test_an_unknown_frame_is_refused_and_changes_nothing(served: Served) -> None:
    vcpu = await served.vcpu(tolerate_refusals=True)
    await vcpu.enter()
    await map_page(vcpu)
    records = served.service.runner.records
    vcpu.send(m.Log(vcpu.entry, [(WRITE, PAGE, 5, 8, 1)]))
    assert (await vcpu.refusal()).code == "unknown-frame"
    assert served.service.runner.records == records
    await vcpu.close()


async def test_a_silent_vcpu_is_given_up_and_may_attach_again(served: Served, until: Until) -> None:
    async with await served.host() as host:
        vcpu = await served.vcpu()
        await vcpu.enter()
        await map_page(vcpu)
        first = vcpu.attached.incarnation
        waiting = asyncio.ensure_future(host.request(m.Unmap(100)))
        await vcpu.kicked()
        for peer in served.service.peers:
            if peer.vcpu is None:
                peer.timer.missed = 1000  # the host agent is patient here
        served.silence()
        assert (await waiting).result == 1  # released: nobody waits for the dead
        assert served.lost and served.lost[0][0] == 0
        with pytest.raises(SessionEnded, match="given-up"):
            await vcpu.walk(PAGE)
        await vcpu.close()
        async with await served.vcpu(vcpu=0) as again:
            assert again.attached.incarnation > first
            assert (await again.enter()).entry == 1


async def test_draining_ends_every_session_and_the_journal_replays(served: Served) -> None:
    vcpu = await served.vcpu()
    host = await served.host()
    await vcpu.enter()
    walked = await map_page(vcpu)
    await vcpu.log([(WRITE, PAGE, walked.pfn, 8, 7)])
    await vcpu.applied()
    digest = await served.service.drain()
    with pytest.raises(SessionEnded, match="finished"):
        await vcpu.walk(PAGE)
    with pytest.raises(SessionEnded, match="finished"):
        await host.request(m.TestAge(100))
    await vcpu.close()
    await host.close()
    with pytest.raises(RequestRefused, match="being ended"):
        await served.vcpu()
    replayed = replay(served.path.parent, None)
    assert replayed.digest == replayed.recorded_digest == digest


async def test_a_broken_sequence_ends_the_incarnation(served: Served, until: Until) -> None:
    vcpu = await served.vcpu(tolerate_refusals=True)
    await vcpu.enter()
    vcpu.session.send_seq += 1  # as if a message had been lost
    vcpu.send(m.Heartbeat())
    assert (await vcpu.refusal()).code == "sequence-gap"
    await until(lambda: served.service.peers.vcpu(0) is None)
    assert served.lost[0][0] == 0
    await vcpu.close()


async def test_back_pressure_stops_reading_and_nothing_is_lost(served: Served) -> None:
    async with await served.vcpu() as vcpu:
        await vcpu.enter()
        walked = await map_page(vcpu)
        served.service.set_blocked(True)
        await vcpu.log([(WRITE, PAGE, walked.pfn, 8, 7)])
        applied = asyncio.ensure_future(vcpu.applied())
        records = served.service.runner.records
        await asyncio.wait([applied], timeout=0.05)
        assert not applied.done() and served.service.runner.records == records
        served.service.set_blocked(False)
        await applied


async def test_a_journal_that_cannot_be_written_ends_the_service(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    vcpu = await served.vcpu()

    def full(_data: bytes) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(served.service.runner._journal, "_write", full)
    vcpu.send(m.Enter())
    with pytest.raises(OSError, match="no space left"):
        async with asyncio.timeout(20):
            await served.service.failure
    await vcpu.close()
    served.service.failure = asyncio.get_running_loop().create_future()  # it has been seen


async def test_a_long_operation_looks_like_no_death(served: Served, until: Until) -> None:
    """It waits for a vCPU for many intervals, in which nobody has anything to say but that it lives."""

    async def tick() -> None:
        while True:
            served.service.tick(time.monotonic())
            await asyncio.sleep(0.01)

    ticking = asyncio.create_task(tick())
    vcpu = VcpuClient(served.address, context=served.context)
    host = HostClient(served.address, context=served.context)
    await vcpu._open(m.Attach(m.Role.VCPU, "slow", heartbeat=0.1))
    await host._open(m.Attach(m.Role.HOST, "patient", heartbeat=0.1))
    async with vcpu, host:
        await vcpu.enter()
        await map_page(vcpu)
        reply = asyncio.ensure_future(host.request(m.Unmap(100)))
        await vcpu.kicked()
        heard = host.session.receive_seq
        await until(lambda: host.session.receive_seq >= heard + 3 * MISSED_LIMIT)
        assert not reply.done()
        await vcpu.exit(m.ExternalInterruptExit())
        assert (await reply).result == 1
    assert served.lost == []
    ticking.cancel()


async def test_a_vcpu_that_lives_and_answers_no_kick_is_given_up(served: Served) -> None:
    """Others wait for it in a remote TLB flush."""
    vcpu = await served.vcpu(missed=1000)
    async with await served.host() as host:
        await vcpu.enter()
        await map_page(vcpu)
        reply = asyncio.ensure_future(host.request(m.Unmap(100)))
        await vcpu.kicked()
        for peer in served.service.peers:
            peer.timer.heard(time.monotonic() + KICK_SECONDS)
        served.service.tick(time.monotonic() + KICK_SECONDS)
        assert (await reply).result == 1
    ((number, text),) = served.lost
    assert number == 0
    assert "no answer to a kick" in text
    with pytest.raises(SessionEnded, match="given-up"):
        await vcpu.exit(m.ExternalInterruptExit())
    await vcpu.close()


async def test_requests_before_the_start_wait_for_it(tmp_path: Path, until: Until) -> None:
    """They neither run on a machine without a guest, nor are their answers lost among those of its loading."""
    early = Served(tmp_path / "journal", start=False)
    try:
        async with early.endpoint, await early.host() as host:
            records = early.service.runner.records
            reply = asyncio.ensure_future(host.request(m.TestAge(100)))
            (peer,) = early.service.peers
            await until(lambda: peer.session.request)
            assert early.service.runner.records == records
            early.service.start(1)
            assert (await reply).result == 0
    finally:
        early.journal.close()
        early.context.destroy(linger=0)


async def test_a_parked_operation_waits_for_a_worker_that_is_to_send_and_for_nobody_else(
    tmp_path: Path, until: Until
) -> None:
    """Of two vCPUs one enters, and is parked where nothing has fallen yet; the other is to send, and then is gone."""
    config = msgspec.structs.replace(CONFIG, park_rate=1.0)
    served = Served(tmp_path / "journal", config=config, patience=3600.0)
    machine = served.service.runner.machine
    try:
        async with served.endpoint, await served.vcpu() as one, await served.vcpu() as other:
            entered = asyncio.ensure_future(one.enter())
            await until(lambda: machine.parked)
            await until(lambda: worker_next(machine))
            for _ in range(3):
                await probe(served.address, context=served.context)
            assert machine.parked
            assert not entered.done()
            await other.detach()
            assert (await entered).entry == 1
    finally:
        served.journal.close()
        served.context.destroy(linger=0)
