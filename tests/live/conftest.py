"""A run that does what the test says, its live page, and a browser to look at it with."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from shadowmmu.coordinator import Coordinator, RunSettings
from shadowmmu.coordinator.live import LiveAddress, LiveServer
from shadowmmu.protocol import messages as m

WAIT_SECONDS = 30.0
CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
ARGUMENTS = (
    "--headless",
    "--no-sandbox",  # of a container whose user is root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,900",
)


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


class Browser:
    """Chromium without a screen."""

    def __init__(self, profile: Path, *more: str) -> None:
        assert CHROMIUM is not None
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in (*ARGUMENTS, f"--user-data-dir={profile}", *more):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))

    def resize(self, width: int, height: int) -> None:
        """The page's own size: that of a window cannot be as small as a telephone."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def dark(self) -> None:
        feature = {"name": "prefers-color-scheme", "value": "dark"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def ask(self, expression: str) -> object:
        answer: object = self.driver.execute_script(f"return {expression}")
        return answer

    def complaints(self) -> list[str]:
        return [str(entry["message"]) for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]

    def screenshot(self, path: Path) -> None:
        height = self.ask("document.documentElement.scrollHeight")
        width = self.ask("document.documentElement.clientWidth")
        assert isinstance(height, int) and isinstance(width, int)
        self.resize(width, height)
        assert self.driver.save_screenshot(str(path))


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Callable[..., Browser]]:
    if CHROMIUM is None or CHROMEDRIVER is None:
        missing = "no chromium with its chromedriver (Debian's packages chromium and chromium-driver)"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    browsers: list[Browser] = []

    def start(*more: str) -> Browser:
        browsers.append(Browser(tmp_path / f"profile-{len(browsers)}", *more))
        return browsers[-1]

    yield start
    for one in browsers:
        one.driver.quit()


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    """Where screenshots go."""
    folder = Path(os.environ.get("SHADOWMMU_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
