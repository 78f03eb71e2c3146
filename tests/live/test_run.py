"""A real run that is watched: by Prometheus, by people, by some who do not read, and by some who talk nonsense."""

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from shadowmmu.cli.main import app
from shadowmmu.coordinator import Coordinator, RunReport, RunSettings
from shadowmmu.coordinator.embedded import run_embedded
from shadowmmu.coordinator.live import LiveAddress, LiveServer
from shadowmmu.coordinator.live.metrics import metric_name
from shadowmmu.protocol.messages import Role, RunConfig, Verdict
from tests.live.conftest import get

OPS = 8000
READERS, NONSENSE = 80, 20


class Watched:
    """A run with a hundred clients of its live page."""

    def __init__(self, folder: Path) -> None:
        self.server = LiveServer(LiveAddress.parse("0"))
        self.folder = folder
        self.scraped: list[bytes] = []
        self.last_state: dict[str, object] = {}
        self.events: list[bytes] = []
        self._writers: list[asyncio.StreamWriter] = []

    async def run(self) -> RunReport:
        settings = RunSettings(config=RunConfig(ops=OPS), vcpus=2, hosts=1)
        with (self.folder / "run.log").open("wb") as log:
            report = await run_embedded(settings, self.folder, log, shown=self._shown)
        for writer in self._writers:
            writer.close()
        return report

    @contextlib.asynccontextmanager
    async def _shown(self, coordinator: Coordinator) -> AsyncIterator[None]:
        async with self.server.serving(coordinator):
            reader = asyncio.create_task(self._listen())
            for number in range(READERS + NONSENSE):
                _, writer = await asyncio.open_connection(self.server.address.host, self.server.address.port)
                writer.write(
                    b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n"
                    if number < READERS
                    else b"\0\xff\r\n\r\n"
                )
                self._writers.append(writer)
            self.scraped.append((await get(self.server.url + "metrics"))[0])
            yield
            self.scraped.append((await get(self.server.url + "metrics"))[0])
            self.last_state = json.loads((await get(self.server.url + "state"))[0])
        await reader

    async def _listen(self) -> None:
        """A client that reads, until the server ends the stream."""
        reader, writer = await asyncio.open_connection(self.server.address.host, self.server.address.port)
        writer.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async for line in reader:
            self.events.append(line)
        writer.close()


def values_of(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted((k, v) for k, v in sample.labels.items() if k != "run"))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


@pytest.mark.processes
async def test_a_run_passes_whoever_looks_and_its_metrics_are_its_report(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    report = await watched.run()
    assert report.verdict is Verdict.PASS, report.text

    first, last = (values_of(text) for text in watched.scraped)
    assert first["shadowmmu_run_verdict", (("verdict", "pass"),)] == 0.0
    assert last["shadowmmu_run_verdict", (("verdict", "pass"),)] == 1.0
    assert last["shadowmmu_run_phase", (("phase", "finished"),)] == 1.0
    compared = 0
    for counter, value in report.counters.items():
        if not counter.startswith(("vcpu.", "guest.")):
            name = metric_name(counter)
            full = name.family if name.gauge else f"{name.family}_total"
            assert last[full, tuple(sorted(name.labels.items()))] == value, counter
            compared += 1
    assert compared > 200
    for member in report.members:
        if member.role is Role.VCPU:
            number = (("vcpu", str(member.vcpu)),)
            assert last["shadowmmu_vcpu_instructions_total", number] == member.counters["vcpu.instructions"]
    assert math.isclose(last["shadowmmu_points_reached", ()], report.series[-1].counters["points.reached"])

    assert watched.last_state["verdict"] == "pass"
    assert watched.last_state["instructions"] == report.counters["vcpu.instructions"]
    names = [line for line in watched.events if line.startswith(b"event: ")]
    assert names[0] == b"event: series\n" and names[-1] == b"event: end\n"
    assert set(names[1:-1]) == {b"event: state\n"} and len(names) > 4


@pytest.mark.processes
def test_the_series_of_a_run_ends_with_its_counters(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["stress", "--vcpus", "1", "--ops", "2000", "--live", "0", "--json", "--out", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("Live: http://127.0.0.1:")
    report = json.loads((tmp_path / "report.json").read_text())
    last = report["series"][-1]["counters"]
    assert last["kvm.pf_fixed"] == report["counters"]["kvm.pf_fixed"]
    assert last["vcpu.instructions"] == report["counters"]["vcpu.instructions"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["stress", "--live", "8080:"], "has no port"),
        (["stress", "--live", "example.org:80"], "is no IP address"),
        (["stress", "--live", "203.0.113.1:0"], "cannot listen at 203.0.113.1:0"),
        (["stress", "--live", "0", "--in-process"], "a run with --in-process has no coordinator"),
        (["stress", "--live", "0", "--chaos", "1"], "a run with --chaos has no coordinator"),
        (["serve", "coordinator", "--live", "99999"], "has no port"),
    ],
)
def test_a_page_that_cannot_be_served_is_a_usage_error(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 64
    assert words in result.output


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [name for name in sys.modules if name.startswith("shadowmmu.coordinator.live")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = CliRunner().invoke(app, ["stress", "--live", "0"])
    assert result.exit_code == 64
    assert "the live page needs uvicorn: pip install 'shadowmmu[live]'" in result.output
