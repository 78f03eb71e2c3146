"""A service process that is killed, and another one that goes on from its journal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shadowmmu.client import HostClient, VcpuClient
from shadowmmu.machine import replay
from shadowmmu.protocol import messages as m
from tests.mmu.test_service import PAGE, WRITE, map_page

pytestmark = pytest.mark.processes

LIMIT = 60
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Service:
    """`shadowmmu serve mmu --recover` at one address, as often as it is started."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.address = "tcp://127.0.0.1:*"
        self.said: list[str] = []
        self.process: asyncio.subprocess.Process

    async def start(self, *options: str) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *(
                sys.executable,
                "-m",
                "shadowmmu.cli",
                "serve",
                "mmu",
                "--recover",
                "--vcpus=2",
                "--park-rate=0",
            ),
            *(f"--bind={self.address}", f"--out={self.directory}", *options),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        line = await self.says("serving")
        found = re.search(r"address=(\S+)", line)
        assert found is not None
        self.address = found[1]

    async def says(self, word: str) -> str:
        """The next line of its log that has this word."""
        assert self.process.stdout is not None
        async with asyncio.timeout(LIMIT):
            while True:
                line = ANSI.sub("", (await self.process.stdout.readline()).decode())
                assert line, "the service ended: " + "".join(self.said)
                self.said.append(line)
                if word in line:
                    return line

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)
        await self.process.communicate()

    async def stop(self) -> int:
        os.kill(self.process.pid, signal.SIGTERM)
        output, _ = await asyncio.wait_for(self.process.communicate(), LIMIT)
        self.said.append(output.decode())
        assert self.process.returncode is not None
        return self.process.returncode


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    service = Service(tmp_path)
    await service.start()
    yield service
    if service.process.returncode is None:
        await service.kill()


async def test_a_killed_service_goes_on_where_it_was(service: Service) -> None:
    """With its sessions, in the same incarnations; every locked operation took effect exactly once."""
    async with (
        await VcpuClient.connect(service.address, resumable=True) as vcpu,
        await HostClient.connect(service.address, resumable=True) as host,
    ):
        await vcpu.enter()
        walked = await map_page(vcpu)
        access: m.LoggedAccess = (WRITE, PAGE, walked.pfn, 8, 1)
        for number in range(6):
            adding = asyncio.ensure_future(vcpu.locked(access, m.LockedOp.XADD))
            if number % 2:
                await service.kill()
                await service.start()
            assert await adding == number
        assert vcpu.resumed == 3
        assert vcpu.session.incarnation == 1
        reply = asyncio.ensure_future(host.request(m.Unmap(100)))
        await vcpu.kicked()
        await service.kill()  # with an operation that waits for the vCPU
        await service.start()
        await vcpu.exit(m.ExternalInterruptExit())
        assert (await reply).result == 1
    assert await service.stop() == 0
    result = replay(service.directory, None)
    assert (result.divergence, result.digest) == ("", result.recorded_digest)


async def test_a_snapshot_shortens_the_recovery(service: Service) -> None:
    """What was under way when it was wanted, a flush that waits for a vCPU, has ended before it was taken."""
    await service.kill()
    (service.directory / "journal").unlink()
    await service.start("--snapshot-records=60")
    async with (
        await VcpuClient.connect(service.address, resumable=True) as vcpu,
        await HostClient.connect(service.address, resumable=True) as host,
    ):
        await vcpu.enter()
        access: m.LoggedAccess | None = None
        for number in range(120):
            walked = await map_page(vcpu)
            access = (WRITE, PAGE, walked.pfn, 8, 1)
            assert await vcpu.locked(access, m.LockedOp.XADD) == number
            if number % 10 == 0:
                reply = asyncio.ensure_future(host.request(m.Unmap(100)))
                await vcpu.kicked()
                await vcpu.exit(m.ExternalInterruptExit())
                assert (await reply).result == 1
        snapshots = list(service.directory.glob("snapshot-*"))
        assert len(snapshots) == 2
        await service.kill()
        await service.start("--snapshot-records=60")
        recovered = next(line for line in service.said if "recovered" in line)
        records, replayed = (int(number) for number in re.findall(r"(?:records|replayed)=(\d+)", recovered))
        assert replayed < records / 2
        assert access is not None
        walked = await map_page(vcpu)
        assert await vcpu.locked((WRITE, PAGE, walked.pfn, 8, 1), m.LockedOp.XADD) == 120
        assert (await host.request(m.TestAge(100))).result in {0, 1}
    assert await service.stop() == 0
    result = replay(service.directory, None)
    assert (result.divergence, result.digest) == ("", result.recorded_digest)


@pytest.mark.parametrize("torn", [1, 7, 40])
async def test_a_torn_tail_is_cut_off(service: Service, torn: int) -> None:
    async with await VcpuClient.connect(service.address, resumable=True) as vcpu:
        await vcpu.enter()
        await map_page(vcpu)
        await service.kill()
        journal = service.directory / "journal"
        with journal.open("ab") as file:
            file.write(journal.read_bytes()[:torn])  # the beginning of a frame
        await service.start()
        assert f"torn_bytes={torn}" in "".join(service.said)
        assert isinstance(await vcpu.walk(PAGE, WRITE), m.Walked)
    assert await service.stop() == 0


async def test_a_damaged_journal_is_not_guessed_at(service: Service) -> None:
    vcpu = await VcpuClient.connect(service.address)
    await vcpu.enter()
    await map_page(vcpu)
    await vcpu.close()
    await service.kill()
    journal = service.directory / "journal"
    data = bytearray(journal.read_bytes())
    data[len(data) // 2] ^= 1
    journal.write_bytes(data)
    with pytest.raises(AssertionError, match="JournalError"):
        await service.start()
    assert journal.read_bytes() == data
