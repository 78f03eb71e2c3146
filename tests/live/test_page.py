"""The live page in a real browser."""

import asyncio
from pathlib import Path

import pytest

from shadowmmu.checker import Rule, Violation
from shadowmmu.coordinator.live import LiveAddress, LiveServer
from tests.browser import Browser
from tests.live.conftest import WAIT_SECONDS, Conducted

PHONE = 360
"""Pixels across."""
PLOTS = 6
PATHS = "[...document.querySelectorAll('#plots path')].map((path) => path.getAttribute('d'))"


async def until(browser: Browser, condition: str) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not await asyncio.to_thread(browser.ask, condition):  # noqa: ASYNC110 (nobody tells when it holds)
            await asyncio.sleep(0.05)


async def text(browser: Browser, selector: str) -> str:
    return str(await asyncio.to_thread(browser.ask, f"document.querySelector('{selector}').textContent"))


async def opened(browser: Browser, page: LiveServer) -> None:
    await asyncio.to_thread(browser.driver.get, page.url)
    await until(browser, "document.getElementById('link').textContent === 'live'")


async def test_plots_are_drawn_and_move_while_the_run_goes_on(
    conducted: Conducted, page: LiveServer, browser: Browser, screenshots: Path
) -> None:
    conducted.start()
    for number in range(30):
        conducted.step(
            lock__taken=40 + number,
            lock__waited=number,
            tlbs_dirty__raised=3,
            tlbs_dirty__cleared=2,
            exits__invlpg=number % 7,
            kvm__pf_fixed=25,
            kicks__answered=11,
            point__BEFORE_LOCK__reached=5,
            point__BEFORE_LOCK__store=1,
        )
    await opened(browser, page)
    await until(browser, f"document.querySelectorAll('#plots svg[role=img] path').length >= {PLOTS}")
    before = await asyncio.to_thread(browser.ask, PATHS)
    assert isinstance(before, list) and all("NaN" not in path and len(path) > 100 for path in before)
    heights = [point.partition(",")[2] for point in before[0].removeprefix("M").split("L")]
    assert (
        len(heights) > 30 and len(set(heights)) == 1
    )  # so many instructions per second all the time, from the first on
    assert await asyncio.to_thread(
        browser.ask,
        "[...document.querySelectorAll('#plots svg[role=img]')].every((plot) => plot.clientWidth > 200 && plot.clientHeight > 100)",
    )
    conducted.step(seconds=5.0)
    await until(browser, f"{PATHS}.join() !== {before!r}.join()")
    assert "15,500" in await text(browser, "#members")
    assert "page_fault" in await text(browser, "#exits")
    assert "never" in await text(browser, "#coverage")
    assert "running" in await text(browser, "#phase")
    await asyncio.to_thread(browser.screenshot, screenshots / "live.png")
    assert await asyncio.to_thread(browser.complaints) == []


async def test_the_verdict_stays_when_the_run_is_over(
    conducted: Conducted, browser: Browser, screenshots: Path
) -> None:
    server = LiveServer(LiveAddress.parse("0"))
    async with server.serving(conducted.coordinator):
        conducted.start()
        conducted.step()
        await opened(browser, server)
        conducted.step()
        conducted.end("somebody ended it")
    await until(browser, "document.getElementById('verdict').textContent === 'unknown'")
    await until(browser, "document.getElementById('link').textContent.startsWith('The run is over')")
    assert "somebody ended it" in await text(browser, "#problems")
    await asyncio.to_thread(browser.screenshot, screenshots / "live-over.png")
    assert await asyncio.to_thread(browser.complaints) == []


@pytest.mark.parametrize("dark", [False, True])
async def test_a_narrow_window_and_the_dark_need_no_scrolling_sideways(
    conducted: Conducted, page: LiveServer, browser: Browser, screenshots: Path, dark: bool
) -> None:
    conducted.start()
    for _ in range(4):
        conducted.step()
    await asyncio.to_thread(browser.resize, PHONE)
    if dark:
        await asyncio.to_thread(browser.prefer, "dark")
    await opened(browser, page)
    await until(browser, f"document.querySelectorAll('#plots svg[role=img] path').length >= {PLOTS}")
    assert await asyncio.to_thread(browser.ask, "document.documentElement.scrollWidth") <= PHONE
    back = await asyncio.to_thread(browser.ask, "getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
    await asyncio.to_thread(
        browser.screenshot, screenshots / f"live-narrow-{'dark' if dark else 'light'}.png"
    )
    assert await asyncio.to_thread(browser.complaints) == []


async def test_what_a_member_says_is_text_and_runs_nowhere(
    conducted: Conducted, page: LiveServer, browser: Browser
) -> None:
    evil = "<img src=x onerror=window.evil=1><script>window.evil=1</script>"
    conducted.gather(name=evil)
    conducted.state.notes.append(evil)
    violation = Violation(Rule.STALE_TRANSLATION, evil, 0, None, 7, 9, "nobody flushed")
    conducted.state.violated(violation, conducted.time)
    await opened(browser, page)
    await until(browser, "document.querySelectorAll('#members tbody tr').length === 3")
    assert evil in await text(browser, "#members")
    assert evil in await text(browser, "#notes")
    assert evil in await text(browser, "#violation")
    assert await asyncio.to_thread(browser.ask, "window.evil ?? null") is None
    assert await asyncio.to_thread(browser.complaints) == []
