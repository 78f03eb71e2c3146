"""Repetitions, lost connections and takeovers: nothing is executed twice, nothing that was applied is lost."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from shadowmmu.client import RequestRefused, SessionEnded, VcpuClient
from shadowmmu.protocol import TO_MMU, Envelope, ErrorCode
from shadowmmu.protocol import messages as m
from tests.mmu.conftest import Served, Until
from tests.mmu.test_service import PAGE, WRITE, map_page

XADD: tuple[Any, ...] = (m.LockedOp.XADD,)


async def cut(client: VcpuClient) -> None:
    """The client's connection is lost with what is on its way in both directions."""
    client._line.open_later()
    await asyncio.sleep(0)


async def test_a_repeated_request_gets_the_same_answer_and_is_not_executed_again(
    served: Served, until: Until
) -> None:
    async with await served.vcpu(resumable=True) as vcpu:
        await vcpu.enter()
        walked = await map_page(vcpu)
        access: m.LoggedAccess = (WRITE, PAGE, walked.pfn, 8, 5)
        assert await vcpu.locked(access, m.LockedOp.XADD) == 0
        number = vcpu.session.send_seq - 1
        again = Envelope(vcpu.session.incarnation, number, m.Locked(vcpu.entry, access, m.LockedOp.XADD))
        for _ in range(3):
            vcpu.endpoint.send(b"", TO_MMU.encode(again))
        await until(lambda: served.service.counters["repeated"] == 3)
        assert await vcpu.load((0, PAGE, walked.pfn, 8, 0)) == 5


async def test_a_session_goes_on_over_another_connection(served: Served, until: Until) -> None:
    async with await served.vcpu(resumable=True) as vcpu:
        await vcpu.enter()
        walked = await map_page(vcpu)
        incarnation, entry = vcpu.session.incarnation, vcpu.entry
        for times in range(1, 4):
            await cut(vcpu)
            access: m.LoggedAccess = (WRITE, PAGE, walked.pfn, 8, 1)
            assert await vcpu.locked(access, m.LockedOp.XADD) == times - 1
            assert vcpu.resumed == times
        assert (vcpu.session.incarnation, vcpu.entry) == (incarnation, entry)
        assert served.service.counters["resumed"] == 3


async def test_what_was_on_its_way_arrives_once(served: Served, until: Until) -> None:
    """Requests that the service has and answers that it lost with the connection; and the other way round."""
    async with await served.vcpu(resumable=True) as vcpu:
        await vcpu.enter()
        walked = await map_page(vcpu)
        access: m.LoggedAccess = (WRITE, PAGE, walked.pfn, 8, 1)
        records = served.service.runner.records
        answer = asyncio.ensure_future(vcpu.locked(access, m.LockedOp.XADD))
        await until(lambda: served.service.runner.records > records)
        await cut(vcpu)  # the answer is somewhere between
        assert await answer == 0
        await cut(vcpu)
        lost = asyncio.ensure_future(vcpu.locked(access, m.LockedOp.XADD))  # goes nowhere, at first
        assert await lost == 1
        assert await vcpu.load((0, PAGE, walked.pfn, 8, 0)) == 2


async def test_a_kick_finds_its_vcpu_on_the_new_connection(served: Served, until: Until) -> None:
    async with await served.vcpu(resumable=True) as vcpu, await served.host() as host:
        await vcpu.enter()
        await map_page(vcpu)
        await cut(vcpu)
        reply = asyncio.ensure_future(host.request(m.Unmap(100)))
        await vcpu.kicked()
        assert not reply.done()
        await vcpu.exit(m.ExternalInterruptExit())
        assert (await reply).result == 1


async def test_who_does_not_come_back_is_given_up(served: Served) -> None:
    vcpu = await served.vcpu(resumable=True)
    await vcpu.enter()
    await vcpu.close()
    served.silence()
    await asyncio.sleep(0)
    assert served.lost[0][0] == 0


async def test_a_wrong_token_resumes_nothing(served: Served, until: Until) -> None:
    async with (
        await served.vcpu(resumable=True) as vcpu,
        await served.vcpu(tolerate_refusals=True) as other,
    ):
        await vcpu.enter()
        resume = Envelope(vcpu.session.incarnation, 0, m.Resume(bytes(16), 1))
        other.endpoint.send(b"", TO_MMU.encode(resume))
        assert (await other.refusal()).code == ErrorCode.NOT_RESUMABLE
        with pytest.raises(RequestRefused, match="not-resumable"):
            await served.vcpu(vcpu=vcpu.vcpu, token=bytes(16), resumable=True)
        assert isinstance(await vcpu.walk(PAGE), m.Walked | m.WalkFault)


async def test_a_replacement_goes_on_behind_the_last_applied_access(served: Served, until: Until) -> None:
    first = await served.vcpu(resumable=True)
    await first.enter()
    walked = await map_page(first)
    state = b"what the program knows"
    access: m.LoggedAccess = (WRITE, PAGE, walked.pfn, 8, 7)
    loaded = await first._ask(m.Load(first.entry, (0, PAGE, walked.pfn, 8, 0), state))
    assert isinstance(loaded, m.Loaded)
    await first.log([access, access])
    assert await first.locked(access, m.LockedOp.XADD) == 7
    async with await served.vcpu(vcpu=0, token=first.attached.token, resumable=True) as second:
        with pytest.raises(SessionEnded, match="replaced"):
            await first.kicked()
        entered = await second.enter()
        assert entered.entry == 1
        resume = entered.resume
        assert resume is not None
        assert resume.state == state
        told = [(step.accesses, step.asked, getattr(step.answer, "value", None)) for step in resume.trail]
        assert told == [(0, m.Asked.LOAD, 0), (2, m.Asked.LOCKED, 7)]
        assert resume.accesses == 0
    await first.close()


async def test_heartbeats_are_as_the_peer_wishes_within_reason(served: Served) -> None:
    for wish, given in ((0.5, 0.5), (1e-9, 1.0), (1e9, 1.0)):
        client = VcpuClient(served.address, context=served.context)
        await client._open(m.Attach(m.Role.VCPU, "wisher", heartbeat=wish))
        assert client.attached.heartbeat == given
        await client.detach()
        await client.close()
