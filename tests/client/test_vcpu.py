"""The vCPU's and the host agent's client against an honest service on loopback."""

from __future__ import annotations

import asyncio

import pytest
import zmq

from shadowmmu.client import HostClient, Kicked, RequestRefused, ServiceLost, SessionEnded, VcpuClient, probe
from shadowmmu.protocol import TO_MMU, Envelope, ErrorCode, LocalProtocolError, State
from shadowmmu.protocol import messages as m
from tests.client.conftest import Until
from tests.client.fakes import FakeMmu

Context = zmq.Context[zmq.Socket[bytes]]


async def test_a_page_fault(mmu: FakeMmu, context: Context) -> None:
    async with await VcpuClient.connect(mmu.address, vcpu=3, context=context) as vcpu:
        assert vcpu.vcpu == 3
        assert vcpu.attached.vpid
        entered = await vcpu.enter()
        assert entered.entry == 1 and entered.flush
        fault = await vcpu.walk(0x1000, 1)
        assert isinstance(fault, m.WalkFault)
        entered = await vcpu.exit(m.PageFaultExit(0x1000, fault.error_code, m.Instruction(1)))
        assert entered.entry == vcpu.entry == 2
        walked = await vcpu.walk(0x1000, 1)
        assert isinstance(walked, m.Walked) and walked.pfn == 1 and walked.walk == 2
        assert await vcpu.load((8, 0x1000, 1, 8, 77)) == 77
        assert await vcpu.locked((16, 0x1000, 1, 8, 5), m.LockedOp.XADD) == 5
        for i in range(3 * m.LOG_CREDITS):
            await vcpu.log([(1, 0x1000, 1, 8, i)])
        await vcpu.applied()
    assert isinstance(mmu.taken[-1][1], m.Detach)
    assert isinstance(mmu.taken[-2][1], m.Exit)
    assert mmu.sessions[mmu.peer].state is State.ENDED


async def test_one_thing_at_a_time(mmu: FakeMmu, context: Context) -> None:
    mmu.answers[m.Walk] = lambda _peer, _envelope: None
    async with await VcpuClient.connect(mmu.address, context=context) as vcpu:
        await vcpu.enter()
        walk = asyncio.create_task(vcpu.walk(0x100000))
        await asyncio.sleep(0)
        with pytest.raises(LocalProtocolError, match="one thing at a time"):
            await vcpu.walk(0x200000)
        walk.cancel()
        await asyncio.wait([walk])
        with pytest.raises(LocalProtocolError, match="Walk by the peer in state waiting-walk"):
            await vcpu.walk(0x200000)


async def test_a_kick_abandons_a_walk(mmu: FakeMmu, context: Context, until: Until) -> None:
    mmu.answers[m.Walk] = lambda _peer, _envelope: None
    async with await VcpuClient.connect(mmu.address, context=context) as vcpu:
        await vcpu.enter()
        walk = asyncio.create_task(vcpu.walk(0x100000))
        await until(lambda: mmu.sessions[mmu.peer].state is State.WAITING_WALK)
        mmu.send(mmu.peer, m.Kick(1))
        with pytest.raises(Kicked):
            await walk
        assert await vcpu.kicked() == 1
        with pytest.raises(Kicked):
            await vcpu.walk(0x100000)
        entered = await vcpu.exit(m.ExternalInterruptExit())
        assert entered.entry == 2
        # The answer comes late, while the next walk is under way: it is dropped.
        walk = asyncio.create_task(vcpu.walk(0x200000))
        await until(lambda: mmu.sessions[mmu.peer].state is State.WAITING_WALK)
        mmu.send(mmu.peer, m.Walked(1, 1, 0x100, 1, 0))
        mmu.send(mmu.peer, m.Walked(2, 2, 0x200, 1, 0))
        walked = await walk
        assert isinstance(walked, m.Walked) and walked.pfn == 0x200


async def test_a_kick_that_crosses_an_exit_is_ignored(mmu: FakeMmu, context: Context) -> None:
    def exit_(peer: bytes, envelope: Envelope) -> m.Message:
        entry = mmu.sessions[peer].entry
        stale = Envelope(envelope.incarnation, mmu.sessions[peer].send_seq, m.Kick(entry))
        mmu.sessions[peer].send_seq += 1  # as if it had been sent before the Exit came
        mmu.endpoint.send(peer, mmu.outgoing.encode(stale))
        return m.Entered(entry + 1)

    mmu.answers[m.Exit] = exit_
    async with await VcpuClient.connect(mmu.address, context=context) as vcpu:
        await vcpu.enter()
        await vcpu.exit(m.HaltExit())
        assert vcpu.entry == 2
        assert not vcpu.kick_pending


async def test_a_refused_attach(mmu: FakeMmu, context: Context) -> None:
    mmu.answers[m.Attach] = lambda _peer, _envelope: m.ErrorReply(ErrorCode.VCPU_TAKEN, "vCPU 3 is attached")
    with pytest.raises(RequestRefused, match="vcpu-taken: vCPU 3") as refused:
        await VcpuClient.connect(mmu.address, vcpu=3, context=context)
    assert refused.value.definite
    assert refused.value.info is not None and not refused.value.info.ends


async def test_no_service(context: Context) -> None:
    with context.socket(zmq.ROUTER) as silent:
        silent.setsockopt(zmq.LINGER, 0)
        port = silent.bind_to_random_port("tcp://127.0.0.1")
        with pytest.raises(ServiceLost, match="no answer"):
            await VcpuClient.connect(f"tcp://127.0.0.1:{port}", timeout=0.01, context=context)


async def test_heartbeats_both_ways_and_their_end(mmu: FakeMmu, context: Context, until: Until) -> None:
    mmu.heartbeat = 0.05
    vcpu = await VcpuClient.connect(mmu.address, missed=4, context=context)
    await until(lambda: [type(body) for _, body in mmu.taken].count(m.Heartbeat) >= 5)
    mmu.silent = True
    waiting = asyncio.create_task(vcpu.kicked())
    with pytest.raises(ServiceLost, match=r"nothing heard"):
        await waiting
    with pytest.raises(ServiceLost):
        await vcpu.enter()
    with pytest.raises(ServiceLost) as lost:
        await vcpu.kicked()
    assert not lost.value.definite
    await vcpu.close()


async def test_the_service_ends_the_incarnation(mmu: FakeMmu, context: Context) -> None:
    async with await VcpuClient.connect(mmu.address, context=context) as vcpu:
        await vcpu.enter()
        waiting = asyncio.create_task(vcpu.kicked())
        await asyncio.sleep(0)
        mmu.send(mmu.peer, m.Ended(ErrorCode.GIVEN_UP, "silent for 5 s"))
        with pytest.raises(SessionEnded, match="given-up"):
            await waiting
    late = VcpuClient.connect(mmu.address, vcpu=0, context=context)
    async with await late as again:
        assert again.attached.incarnation == 2


@pytest.mark.parametrize(
    "frames, code",
    [
        ([b"SMMU/1.0"], ErrorCode.BAD_PART_COUNT),
        ([b"SMMU/1.0", b"", b""], ErrorCode.BAD_PART_COUNT),
        ([b"SMMU/1.0"] * 60, ErrorCode.BAD_PART_COUNT),
        ([b"SMMU/2.0", b""], ErrorCode.UNSUPPORTED_VERSION),
        ([b"HTTP/1.1", b""], ErrorCode.MALFORMED),
        ([b"SMMU/1.0", b"\xc1"], ErrorCode.MALFORMED),
        ([b"SMMU/1.0", bytes(TO_MMU.soft_limit + 1)], ErrorCode.TOO_LARGE),
        (TO_MMU.encode(Envelope(0, 0, m.Attach(m.Role.VCPU, "again"))), ErrorCode.ALREADY_ATTACHED),
        (TO_MMU.encode(Envelope(9, 1, m.Heartbeat())), ErrorCode.STALE_INCARNATION),
        (TO_MMU.encode(Envelope(1, 2, m.Detach())), None),
        (TO_MMU.encode(Envelope(1, 2, m.Walk(7, 1, 0, 0))), ErrorCode.UNKNOWN_ENTRY),
    ],
)
async def test_what_is_refused_changes_nothing(
    mmu: FakeMmu, context: Context, frames: list[bytes], code: ErrorCode | None
) -> None:
    mmu.answers[m.Heartbeat] = lambda _peer, _envelope: None
    async with (
        await VcpuClient.connect(mmu.address, tolerate_refusals=True, context=context) as vcpu,
        await VcpuClient.connect(mmu.address, context=context) as other,
    ):
        await vcpu.enter()
        await other.enter()
        if code is not None:
            vcpu.endpoint.send(b"", frames)
            assert (await vcpu.refusal()).code == code
        assert isinstance(await other.walk(0x100000), m.Walked)
        assert isinstance(await vcpu.walk(0x100000), m.Walked)


async def test_a_gap_ends_the_incarnation(mmu: FakeMmu, context: Context) -> None:
    async with await VcpuClient.connect(mmu.address, tolerate_refusals=True, context=context) as vcpu:
        await vcpu.enter()
        vcpu.endpoint.send(b"", TO_MMU.encode(Envelope(1, 3, m.Exit(1, m.HaltExit()))))
        with pytest.raises(SessionEnded, match="sequence-gap"):
            await vcpu.kicked()
        assert (await vcpu.refusal()).seq == 3


async def test_a_refusal_ends_an_ordinary_connection(mmu: FakeMmu, context: Context) -> None:
    async with await VcpuClient.connect(mmu.address, context=context) as vcpu:
        await vcpu.enter()
        with pytest.raises(RuntimeError):
            await vcpu.refusal()
        vcpu.endpoint.send(b"", [b"?", b"?"])
        with pytest.raises(RequestRefused, match="malformed"):
            await vcpu.kicked()


async def test_what_cannot_be_encoded_is_not_numbered(mmu: FakeMmu, context: Context) -> None:
    async with await VcpuClient.connect(mmu.address, context=context) as vcpu:
        await vcpu.enter()
        with pytest.raises(LocalProtocolError, match="cannot encode"):
            await vcpu.walk(1 << 64)
        assert isinstance(await vcpu.walk(0x100000), m.Walked)


async def test_a_service_that_violates_the_protocol(mmu: FakeMmu, context: Context) -> None:
    mmu.answers[m.Enter] = lambda peer, _envelope: mmu.endpoint.send(peer, [b"SMMU/1.0", b"\xc1"])
    async with await VcpuClient.connect(mmu.address, context=context) as vcpu:
        with pytest.raises(Exception, match="the service violated the protocol"):
            await vcpu.enter()


async def test_host_requests(mmu: FakeMmu, context: Context) -> None:
    async with await HostClient.connect(mmu.address, context=context) as host:
        replies = await asyncio.gather(*(host.request(m.Age(gfn)) for gfn in range(50)))
        assert [reply.request for reply in replies] == list(range(1, 51))
        with pytest.raises(RequestRefused, match="bad-argument") as refused:
            await host.request(m.Unmap(5000))
        assert refused.value.definite
        assert (await host.request(m.Unmap(5))).result == 1


async def test_probe(mmu: FakeMmu, context: Context) -> None:
    assert (await probe(mmu.address, context=context)).vpid
    mmu.silent = True
    with pytest.raises(ServiceLost):
        await probe(mmu.address, context=context, timeout=0.01)
