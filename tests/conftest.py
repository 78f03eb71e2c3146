"""For all tests: hypothesis asserts no time, since the machine may be busy with others; and one browser for all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.browser import Browser

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def _chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """It takes a second to begin: so one browser serves all tests."""
    from tests.browser import CHROMEDRIVER, CHROMIUM, Browser

    if CHROMIUM is None or CHROMEDRIVER is None:
        missing = "no chromium with its chromedriver; .ci/install-browser installs them"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.driver.quit()


@pytest.fixture
def browser(_chromium: Browser) -> Iterator[Browser]:
    """A browser with an empty page; the page of a test is left before what it shows is gone."""
    _chromium.reset()
    yield _chromium
    _chromium.driver.get("about:blank")


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots are kept: SHADOWMMU_SCREENSHOTS, or a temporary folder."""
    chosen = os.environ.get("SHADOWMMU_SCREENSHOTS")
    folder = Path(chosen) if chosen else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
