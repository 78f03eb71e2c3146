"""Reports opened in a real browser: drawn, quiet, without network, readable on a phone and in the dark, inert."""

import html
import json
import shutil
from pathlib import Path

import pytest
from selenium.webdriver.support.ui import WebDriverWait

from shadowmmu.reports import Page, render_html
from shadowmmu.reports.page import Section, code, number, table
from tests.browser import Browser
from tests.reports.conftest import command, edit

PAGES = [("violated", None), ("pre_patch", "passed"), ("simulated", "simulated_wider"), ("sweep", "sweep")]
"""Fixtures: a folder, and which one it is compared with."""
PHONE = 390
"""Pixels across."""
CHARTS = "[...document.querySelectorAll('[data-chart]')]"
DRAWN = f"""{CHARTS}.map(place => {{
  const svg = place.querySelector('svg'), size = svg ? svg.getBoundingClientRect() : {{width: 0, height: 0}};
  const marks = svg ? [...svg.querySelectorAll('.role-mark path, .role-mark line, .role-mark rect')] : [];
  return [place.id || place.dataset.chart, place.dataset.drawn, size.width, size.height,
          marks.filter(mark => mark.getBBox().width + mark.getBBox().height > 0).length];
}})"""
# By how much legends go beyond their plots.
CUT_OFF = """[...document.querySelectorAll('.plot .role-legend')].map(one =>
  one.getBoundingClientRect().right - one.closest('svg').getBoundingClientRect().right)"""
# Colours of texts and of what they stand on, as the browser computes them: by their contrast (WCAG 2).
CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const known = new Map();
  const rgb = (colour) => { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
                            return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = (colour) => { if (!known.has(colour)) known.set(colour, measured(colour));
      return known.get(colour); };
  const measured = (colour) => { const [r, g, b] = rgb(colour).slice(0, 3).map(part => { part /= 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4; });
      return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = (node) => { for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (colour !== 'rgba(0, 0, 0, 0)') return colour; }
    return 'white'; };
  const found = [];
  for (const node of document.querySelectorAll('h1, h2, p, dt, dd, th, td, a, figcaption, .badge, svg text')) {
    if (!node.textContent.trim() || !node.getClientRects().length) continue;
    const style = getComputedStyle(node);
    const [a, b] = [light(node instanceof SVGElement ? style.fill : style.color), light(ground(node))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.tagName + ' ' + node.textContent.slice(0, 40)]);
  }
  return found.sort((x, y) => x[0] - y[0])[0];
})()"""
READABLE = 4.5
"""The contrast that WCAG 2 wants of text, level AA."""


def write(made: Path, name: str, *arguments: Path | str) -> Path:
    """A report, made once."""
    target = made / f"{name}.html"
    if not target.exists():
        status, output = command("report", *arguments, "-o", target)
        assert status == 0, output
    return target


def show(browser: Browser, page: Path, *, width: int = 1280) -> None:
    """Opens a report by day, and waits until its script is done."""
    browser.resize(width)
    browser.prefer("light")
    browser.driver.get(page.as_uri())
    WebDriverWait(browser.driver, 60).until(lambda _: browser.ask("document.documentElement.dataset.ready"))


@pytest.mark.parametrize("folder, against", PAGES)
def test_a_report_is_drawn_readable_and_asks_nothing_of_the_network(
    *,
    folder: str,
    against: str | None,
    browser: Browser,
    made: Path,
    screenshots: Path,
    request: pytest.FixtureRequest,
) -> None:
    other = [] if against is None else ["--against", request.getfixturevalue(against)]
    page = write(made, folder, request.getfixturevalue(folder), *other)
    show(browser, page)
    drawn = browser.ask(DRAWN)
    assert len(drawn) == page.read_text(encoding="utf-8").count("data-chart=") > 0
    for chart, done, width, height, marks in drawn:
        assert (done, marks > 0) == ("yes", True), chart
        assert width > 200, chart
        assert height > 50, chart

    for scheme, ground in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(13, 17, 23)")):
        browser.prefer(scheme)
        assert browser.ask("getComputedStyle(document.body).backgroundColor") == ground
        contrast, where = browser.ask(CONTRAST)
        assert contrast >= READABLE, f"{scheme}: {where}"
        assert browser.screenshot(screenshots / f"{page.stem}-{scheme}.png").startswith(b"\x89PNG")

    show(browser, page, width=PHONE)
    assert browser.ask("document.documentElement.scrollWidth") <= PHONE
    assert all(width > 0 for _, _, width, _, _ in browser.ask(DRAWN))
    assert max(browser.ask(CUT_OFF)) <= 1
    pictures = browser.ask("[...document.querySelectorAll('.drawing img')].map(one => one.naturalWidth)")
    assert len(pictures) == (folder == "violated")
    assert all(width > 300 for width in pictures)
    assert browser.complaints() == []
    assert browser.requests() <= {"file", "data"}


# A page without charts is there at once.
ROWS = [
    [code("point.KICK.reached"), number(1_200)],
    [code("lock.taken"), number(None)],
    [code("kicks"), number(9)],
]
SMALL = Page(
    title="Small",
    subtitle="",
    badge=None,
    sections=[
        Section("counters", "Counters", [table("All", ["counter", "value"], ROWS, numbers=(1,), search=True)])
    ],
    foot="",
)
NAMES = "[...document.querySelectorAll('tbody tr')].filter(row => row.offsetHeight > 0).map(row => row.cells[0].textContent)"


class TestTables:
    @pytest.fixture
    def opened(self, browser: Browser, tmp_path: Path) -> Browser:
        target = tmp_path / "small.html"
        target.write_text(render_html(SMALL), encoding="utf-8")
        show(browser, target)
        return browser

    def test_a_filter_leaves_rows_with_that_text(self, opened: Browser) -> None:
        opened.driver.execute_script(
            "const input = document.querySelector('input[type=search]');"
            "input.value = 'Point.Kick'; input.dispatchEvent(new Event('input'))"
        )
        assert opened.ask(NAMES) == ["point.KICK.reached"]

    def test_clicks_on_a_heading_sort_by_numbers_largest_first_and_then_last(self, opened: Browser) -> None:
        click = "document.querySelectorAll('thead button')[1].click()"
        opened.driver.execute_script(click)
        assert opened.ask(NAMES) == ["point.KICK.reached", "kicks", "lock.taken"]
        opened.driver.execute_script(click)
        assert opened.ask(NAMES) == ["lock.taken", "kicks", "point.KICK.reached"]


HOSTILE = (
    "<script>window.broken = 1</script></script><img src=x onerror='window.broken = 2'>\"'&{{7*7}}\u2028"
)


def test_text_of_a_run_is_never_executed(browser: Browser, violated: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(violated, tmp_path / "hostile")
    report = json.loads((folder / "report.json").read_text())
    report["violation"] |= {
        "text": HOSTILE,
        "blame": HOSTILE,
        "name": HOSTILE,
        "related": [{"index": 1, "type": HOSTILE, "note": HOSTILE, "fields": {HOSTILE: HOSTILE}}],
    }
    report["counters"] |= {f"exits.{HOSTILE}": 10**9, HOSTILE: 7}
    report["histograms"][HOSTILE] = report["histograms"]["lock_wait_steps"] | {"encoded": HOSTILE}
    member = {"member": 1, "role": "vcpu", "name": HOSTILE, "vcpu": 0, "reported": True, "counters": {}}
    report["members"] = [member | {"info": {HOSTILE: HOSTILE}}]
    edit(
        folder,
        **report
        | {
            "text": HOSTILE,
            "problems": [HOSTILE],
            "notes": [HOSTILE],
            "version": HOSTILE,
            "started": HOSTILE,
        },
    )
    (folder / "chaos.json").write_text(json.dumps({"seed": HOSTILE}))
    target = tmp_path / "hostile.html"
    assert command("report", folder, "--against", violated, "-o", target)[0] == 0

    show(browser, target)
    assert browser.ask("typeof window.broken") == "undefined"
    assert browser.ask("document.querySelectorAll('img[src=x]').length") == 0
    assert browser.ask("document.querySelector('#violation p').textContent") == HOSTILE
    assert browser.complaints() == []
    assert browser.requests() <= {"file", "data"}
    written = target.read_text(encoding="utf-8")
    assert "<script>window.broken" not in written
    assert html.escape("<script>window.broken") in written


def test_the_policy_alone_would_stop_a_script(browser: Browser, tmp_path: Path) -> None:
    target = tmp_path / "policy.html"
    injected = (
        "<script>window.broken = 1</script><img src='nowhere.png'><p onclick='window.broken = 2' id='p'></p>"
    )
    written = render_html(SMALL).replace('<main id="main">', f'<main id="main">{injected}')
    target.write_text(written, encoding="utf-8")
    show(browser, target)
    browser.driver.execute_script("document.getElementById('p').click()")
    assert browser.ask("typeof window.broken") == "undefined"
    complaints = browser.complaints()
    assert len(complaints) >= 3
    assert all("Content Security Policy" in complaint for complaint in complaints)
