"""Chromium without a screen, for tests that look at pages: one for all of them (`browser` in tests/conftest.py).

Relies on Debian's packages chromium and chromium-driver, and on selenium. What a test has asked of the browser is
undone by `reset`.
"""

import json
import shutil
from base64 import b64decode
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

__all__ = ["CHROMEDRIVER", "CHROMIUM", "Browser"]

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
HEIGHT = 900
# Without the flags about the background, the browser asks for things in the network by itself.
FLAGS = [
    "--headless=new",
    "--no-sandbox",  # of a container whose user is root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
]


class Browser:
    """A window that is as wide as a test wants it."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))

    def reset(self) -> None:
        """An empty page by day, and nothing in the logs."""
        self.driver.get("about:blank")
        self.resize(1280)
        self.prefer("light")
        self.complaints()
        self.requests()

    def resize(self, width: int) -> None:
        """The page's own size: that of a window cannot be as small as a telephone."""
        metrics = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme: str) -> None:
        """What the system says of colours: light or dark."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self.driver.execute_script(f"return {expression}")

    def complaints(self) -> list[str]:
        """What the page has written to the console since it was asked last."""
        return [str(entry["message"]) for entry in self._log("browser")]

    def requests(self) -> set[str]:
        """The schemes of everything that pages have asked for since they were asked last."""
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
        how = {"captureBeyondViewport": True, "clip": clip, "optimizeForSpeed": True}
        shot = self.driver.execute_cdp_cmd("Page.captureScreenshot", how)
        data = b64decode(shot["data"])
        path.write_bytes(data)
        return data
