"""What Prometheus and Grafana are told in the compose profile `observability`, against what the coordinator exports."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from shadowmmu.coordinator.inprocess import run_in_this_process
from shadowmmu.coordinator.live.metrics import encode_metrics
from shadowmmu.coordinator.live.observation import observe
from shadowmmu.coordinator.run_state import RunState
from shadowmmu.coordinator.run_types import RunSettings
from shadowmmu.protocol.messages import RunConfig

yaml: Any = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "deploy" / "grafana"
DASHBOARD = GRAFANA / "dashboards" / "shadowmmu.json"
METRIC = re.compile(r"\b((?:kvm|shadowmmu)_[a-z0-9_]+)")
LABELS = re.compile(r"\{\{(\w+)\}\}|by \(([\w, ]+)\)")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Each metric of a real run, with its labels."""
    report = run_in_this_process(RunConfig(ops=3000), 2, tmp_path_factory.mktemp("run"))
    state = RunState(RunSettings(config=report.config), 0.0, lambda: b"token")
    vcpu = {name: count for name, count in report.counters.items() if name.startswith("vcpu.")}
    seen = msgspec.structs.replace(
        observe(state, "r", report.started, 1.0), counters=report.counters, vcpus={0: vcpu}
    )
    text = encode_metrics(seen, "")[0].decode()
    return {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))[
        "services"
    ]
    return loaded


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_every_metric_and_label_of_the_dashboard_is_exported(
    dashboard: dict[str, Any], exported: dict[str, set[str]]
) -> None:
    asked = 0
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            metrics = METRIC.findall(target["expr"])
            assert metrics, target
            assert set(metrics) <= exported.keys(), target["expr"]
            for found in LABELS.findall(target["legendFormat"] + target["expr"]):
                for label in re.findall(r"\w+", "".join(found)):
                    assert label in exported[metrics[0]], (panel["title"], label)
            asked += 1
    assert asked > 25
    run = dashboard["templating"]["list"][0]
    assert run["query"]["query"] == "label_values(shadowmmu_run_info, run)"
    assert "run" in exported["shadowmmu_run_info"]


def test_panels_have_numbers_and_places_of_their_own(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_the_dashboard_asks_the_data_source_that_is_provided(
    dashboard: dict[str, Any], services: dict[str, Any]
) -> None:
    source = read(GRAFANA / "provisioning" / "datasources" / "prometheus.yml")["datasources"][0]
    assert source["type"] == "prometheus"
    assert source["url"] == "http://prometheus:9090" and "prometheus" in services
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["uid"]}
    scraped = read(ROOT / "deploy" / "prometheus" / "prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scraped


def test_prometheus_scrapes_the_coordinator_where_it_listens(services: dict[str, Any]) -> None:
    scrape = read(ROOT / "deploy" / "prometheus" / "prometheus.yml")["scrape_configs"][0]
    assert scrape.keys() <= {"job_name", "static_configs"}  # the path is /metrics then
    (target,) = scrape["static_configs"][0]["targets"]
    port = target.removeprefix("coordinator:")
    assert services["coordinator"]["environment"]["SHADOWMMU_LIVE"] == f"${{LIVE-0.0.0.0:{port}}}"


def test_files_are_where_the_containers_look_for_them(
    services: dict[str, Any], dashboard: dict[str, Any]
) -> None:
    grafana = services["grafana"]
    mounts = dict(volume.removesuffix(":ro").split(":") for volume in grafana["volumes"])
    assert {ROOT / source for source in mounts} == {GRAFANA / "provisioning", GRAFANA / "dashboards"}
    provider = read(GRAFANA / "provisioning" / "dashboards" / "shadowmmu.yml")["providers"][0]
    assert provider["options"]["path"] == mounts["./deploy/grafana/dashboards"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{DASHBOARD.name}"


def test_only_the_profile_publishes_ports_and_only_to_this_machine(services: dict[str, Any]) -> None:
    for name, service in services.items():
        observes = name in ("prometheus", "grafana")
        assert service.get("profiles", []) == (["observability"] if observes else []), name
        for port in service.get("ports", []):
            assert observes and port.startswith("127.0.0.1:"), name
