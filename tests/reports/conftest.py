"""Folders to report on, made once by the command line, and a real browser to open reports in."""

import json
import os
import shutil
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait
from typer.testing import CliRunner

from shadowmmu.cli.main import app

CHROMIUM = shutil.which("chromium")
CHROMEDRIVER = shutil.which("chromedriver")
# Without the flags about the background, the browser asks for things in the network by itself.
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
BUGS = Path(__file__).parents[2] / "docs" / "bugs"

SWEEP = """
title = "Fork by vCPUs"
question = "How does *fork* scale, with <b>vpid</b> & without?"
kind = "virtual"
replicates = 2
[fixed]
load.load = "fork"
load.pages = 16
iterations = 2
cost_model = "nehalem-2011"
[grid]
vpid = [true, false]
vcpus = [1, 2]
[[plots]]
title = "Cycles by vCPUs"
x = "vcpus"
y = "iteration_cycles"
color = "vpid"
log_x = true
[[plots]]
title = "Cycles in panels"
x = "vcpus"
y = "iteration_cycles"
facet = "vpid"
"""


def command(*arguments: str | Path) -> tuple[int, str]:
    """Exit status and everything that was printed."""
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def edit(folder: Path, **fields: object) -> None:
    """Changes fields of a folder's report.json."""
    path = folder / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture(scope="session")
def passed(made: Path) -> Path:
    """A run that passed."""
    folder = made / "passed"
    assert command("stress", "--in-process", "--vcpus", "3", "--ops", "4000", "--out", folder)[0] == 0
    return folder


@pytest.fixture(scope="session")
def pre_patch(made: Path) -> Path:
    """A run of the kernel with bypass_guest_pf."""
    folder = made / "pre-patch"
    options = ["--vcpus", "2", "--ops", "2500", "--profile", "pre-patch+fixed", "--seed", "5", "--no-vpid"]
    assert command("stress", "--in-process", *options, "--out", folder)[0] == 0
    return folder


@pytest.fixture(scope="session")
def violated(made: Path) -> Path:
    """A run with a violation, and a reproduction of one."""
    folder = made / "violated"
    options = ["--vcpus", "3", "--ops", "20000", "--mutant", "entry-flush-skipped"]
    assert command("stress", "--in-process", *options, "--out", folder)[0] == 1
    shutil.copy(BUGS / "invlpg-prefault-race.repro", folder / "violation.repro")
    return folder


@pytest.fixture(scope="session")
def simulated(made: Path) -> Path:
    """A run in virtual time."""
    return _simulate(made / "simulated", 2)


@pytest.fixture(scope="session")
def simulated_wider(made: Path) -> Path:
    """The same with more vCPUs."""
    return _simulate(made / "simulated-wider", 3)


def _simulate(folder: Path, vcpus: int) -> Path:
    options = ["load.load=fork", "load.pages=16", "iterations=3", "cost_model=nehalem-2011", f"vcpus={vcpus}"]
    assert command("simulate", *options, "--out", folder)[0] == 0
    return folder


@pytest.fixture(scope="session")
def sweep(made: Path) -> Path:
    """A sweep that is complete."""
    file, folder = made / "sweep.toml", made / "sweep"
    file.write_text(SWEEP)
    status, output = command("sweep", file, "--out", folder)
    assert status == 0, output
    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a folder, to be damaged."""
    return lambda folder: shutil.copytree(folder, tmp_path / "copy" / folder.name)


class Browser:
    """Chromium without a screen."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
        self.driver.get("about:blank")
        self._log("performance")  # what the browser's own first page has loaded

    def open(self, page: Path, *, width: int = 1280) -> None:
        """Opens a report by day, and waits until its script is done."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.prefer("light")
        self.driver.get(page.as_uri())
        WebDriverWait(self.driver, 60).until(lambda _: self.ask("document.documentElement.dataset.ready"))

    def prefer(self, scheme: str) -> None:
        """What the system says of colours: light or dark."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self.driver.execute_script(f"return {expression}")

    def complaints(self) -> list[str]:
        """What the page has written to the console."""
        return [str(entry["message"]) for entry in self._log("browser")]

    def requests(self) -> set[str]:
        """The schemes of everything that the page has asked for."""
        messages = [json.loads(entry["message"])["message"] for entry in self._log("performance")]
        return {
            message["params"]["request"]["url"].partition(":")[0]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        }

    def _log(self, kind: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self.driver.get_log(kind)  # type: ignore[no-untyped-call]
        return entries

    def screenshot(self, path: Path) -> bytes:
        """The whole page as PNG, also kept in a file."""
        size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
        )
        data = b64decode(shot["data"])
        path.write_bytes(data)
        return data


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None or CHROMEDRIVER is None:
        missing = "no chromium with its chromedriver; .ci/install-browser installs them"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.driver.quit()


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots are kept: SHADOWMMU_SCREENSHOTS, or a temporary folder."""
    chosen = os.environ.get("SHADOWMMU_SCREENSHOTS")
    folder = Path(chosen) if chosen else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
