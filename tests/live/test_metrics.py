"""Counters as Prometheus metrics."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from shadowmmu.coordinator.live.metrics import MetricName, encode_metrics, metric_name
from shadowmmu.coordinator.live.observation import Observation, observe
from shadowmmu.coordinator.run_state import RunState
from shadowmmu.coordinator.run_types import RunSettings
from shadowmmu.kvm.stats import COUNTERS
from shadowmmu.protocol import messages as m

Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


def observation(counters: dict[str, int], vcpus: dict[int, dict[str, int]] | None = None) -> Observation:
    state = RunState(RunSettings(config=m.RunConfig()), 0.0, lambda: b"token")
    seen = observe(state, "r", "2026-01-01T00:00:00+00:00", 1.0)
    return msgspec.structs.replace(seen, counters=counters, vcpus=vcpus or {})


def values_of(text: bytes) -> Values:
    """Each sample: its name and labels without the run's."""
    found: Values = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            assert sample.labels["run"] == "r"
            key = (sample.name, frozenset((k, v) for k, v in sample.labels.items() if k != "run"))
            assert key not in found
            found[key] = sample.value
    return found


@pytest.mark.parametrize(
    "counter, name",
    [
        ("kvm.pf_fixed", MetricName("kvm_pf_fixed")),
        ("kvm.mmu_unsync.current", MetricName("kvm_mmu_unsync", gauge=True)),
        ("kvm.mmu_unsync.highest", MetricName("kvm_mmu_unsync_highest", gauge=True)),
        ("kvm.lpages.current", MetricName("kvm_largepages", gauge=True)),
        ("kvm.lpages.highest", MetricName("kvm_largepages_highest", gauge=True)),
        ("kvm.notrap.on_sync", MetricName("kvm_notrap", {"where": "on_sync"})),
        ("exits.page_fault", MetricName("kvm_exits", {"reason": "page_fault"})),
        ("tlbs_dirty.raised", MetricName("kvm_tlbs_dirty_raised")),
        ("kicks.sent", MetricName("shadowmmu_kicks_sent")),
        ("lock.waited", MetricName("shadowmmu_lock_waited")),
        ("point.WALK_LEVEL.store", MetricName("shadowmmu_point_stores", {"point": "WALK_LEVEL"})),
        (
            "outcome.host.get_dirty_log.done",
            MetricName("shadowmmu_operations", {"operation": "host.get_dirty_log", "outcome": "done"}),
        ),
        ("host.move", MetricName("shadowmmu_host_requests", {"operation": "move"})),
        ("vcpu.tlb_misses", MetricName("shadowmmu_vcpu_tlb_misses")),
        ("vcpu.exits.halt", MetricName("shadowmmu_vcpu_exits", {"reason": "halt"})),
    ],
)
def test_a_counter_has_its_metric(counter: str, name: MetricName) -> None:
    assert metric_name(counter) == name


def test_every_counter_of_the_kernel_has_a_metric_under_its_name() -> None:
    counters = {f"kvm.{name}": 3 for name in COUNTERS if name not in ("mmu_unsync", "lpages")}
    exported = values_of(encode_metrics(observation(counters), "")[0])
    for name in counters:
        assert exported[f"kvm_{name.removeprefix('kvm.')}_total", frozenset()] == 3.0


def test_what_is_put_off_now_is_a_gauge() -> None:
    counters = {"tlbs_dirty.raised": 9, "tlbs_dirty.cleared": 7}
    exported = values_of(encode_metrics(observation(counters), "")[0])
    assert exported["kvm_tlbs_dirty", frozenset()] == 2.0


def test_a_vcpus_counters_have_its_number() -> None:
    seen = observation({"vcpu.instructions": 7}, {0: {"vcpu.instructions": 3}, 1: {"vcpu.instructions": 4}})
    exported = values_of(encode_metrics(seen, "")[0])
    assert exported["shadowmmu_vcpu_instructions_total", frozenset({("vcpu", "0")})] == 3.0
    assert exported["shadowmmu_vcpu_instructions_total", frozenset({("vcpu", "1")})] == 4.0
    assert ("shadowmmu_vcpu_instructions_total", frozenset()) not in exported


# Names that a member might give its counters, the families' own among them.
parts = st.sampled_from(
    ["kvm", "exits", "point", "outcome", "host", "total", "pf_fixed_total", "current", "vcpu", ""]
)
names = st.lists(parts | st.text(max_size=5), min_size=1, max_size=4).map(".".join)
any_counters = st.dictionaries(names, st.integers(0, (1 << 64) - 1), max_size=12)


@given(any_counters, st.dictionaries(st.integers(0, 3), any_counters, max_size=2))
def test_whatever_counters_are_called_the_text_is_well_formed(
    counters: dict[str, int], vcpus: dict[int, dict[str, int]]
) -> None:
    seen = observation(counters, vcpus)
    text, content_type = encode_metrics(seen, "")
    assert content_type.startswith("text/plain")
    values_of(text)
    text, content_type = encode_metrics(seen, "application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert list(parse_openmetrics(text.decode()))  # type: ignore[no-untyped-call]
