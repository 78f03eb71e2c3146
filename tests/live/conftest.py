"""A run that does what the test says, and its live page."""

import asyncio
from collections.abc import AsyncIterator, Callable
from urllib.request import Request, urlopen

import pytest

from shadowmmu.coordinator import Coordinator, RunSettings
from shadowmmu.coordinator.live import LiveAddress, LiveServer
from shadowmmu.protocol import messages as m

WAIT_SECONDS = 30.0


class Conducted:
    """A coordinator's run whose members are played by the test: no sockets, and time goes on as the test says."""

    def __init__(self, vcpus: int = 2, ops: int = 100_000) -> None:
        self.time = 100.0
        self.coordinator = Coordinator(
            RunSettings(config=m.RunConfig(ops=ops), vcpus=vcpus), clock=lambda: self.time
        )
        self.state = self.coordinator.state
        self._vcpus = vcpus
        self.mmu_counters: dict[str, int] = {}
        self.instructions = 0

    def say(self, peer: str, body: m.MemberMessage) -> None:
        self.state.receive(peer, body, self.time)

    def gather(self, *, name: str = "worker") -> None:
        self.say("mmu", m.Join(m.Role.MMU, "mmu", "tcp://mmu:1"))
        self.say("mmu", m.Ready())
        for vcpu in range(self._vcpus):
            self.say(f"vcpu{vcpu}", m.Join(m.Role.VCPU, f"{name}-{vcpu}", ""))
            self.say(f"vcpu{vcpu}", m.Ready(vcpu=vcpu))

    def start(self) -> None:
        self.gather()
        self.say("mmu", m.Progress({}))

    def step(self, seconds: float = 0.25, **more: int) -> None:
        """So much time passes, in which everybody gets on and tells it; `more`: counters that grow, `__` for a dot."""
        self.time += seconds
        self.instructions += 500
        for vcpu in range(self._vcpus):
            self.say(
                f"vcpu{vcpu}", m.Progress({"vcpu.instructions": self.instructions, "vcpu.tlb_misses": 7})
            )
        growth = {
            "exits__page_fault": 30,
            "exits__halt": 5,
            "kvm__remote_tlb_flush": 8,
            "kicks__sent": 11,
        } | more
        for name, count in growth.items():
            key = name.replace("__", ".")
            self.mmu_counters[key] = self.mmu_counters.get(key, 0) + count
        self.say("mmu", m.Progress(dict(self.mmu_counters)))
        self.coordinator._sample()

    def end(self, text: str = "enough") -> None:
        self.state.failed(text, self.time)
        for peer in [*(f"vcpu{vcpu}" for vcpu in range(self._vcpus)), "mmu"]:
            self.say(peer, m.Report({}))


@pytest.fixture
async def conducted() -> AsyncIterator[Conducted]:
    run = Conducted()
    async with run.coordinator:
        yield run


@pytest.fixture
async def page(conducted: Conducted) -> AsyncIterator[LiveServer]:
    """The live page of `conducted`."""
    server = LiveServer(LiveAddress.parse("0"))
    async with server.serving(conducted.coordinator):
        yield server


def fetch(url: str, **headers: str) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an answer; raises HTTPError if it is not 200."""
    with urlopen(Request(url, headers=headers), timeout=20) as answer:
        return answer.read(), {name.lower(): value for name, value in answer.headers.items()}


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():  # noqa: ASYNC110 (nobody tells when it holds)
            await asyncio.sleep(0.01)


async def get(url: str, **headers: str) -> tuple[bytes, dict[str, str]]:
    return await asyncio.to_thread(fetch, url, **headers)
