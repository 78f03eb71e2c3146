"""A run's counters in Prometheus' text format, KVM's under the names that `kvm_stat` knows.

What grows is a counter (`kvm_pf_fixed_total`), what says how many there are now a gauge (`kvm_mmu_unsync`). Which
counter becomes which metric is a table; counters that no row knows keep their own names. Members name their counters
themselves, so whatever a name is made of, the text stays well-formed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry

from shadowmmu.coordinator.live.observation import MemberState, Observation
from shadowmmu.coordinator.run_types import Phase
from shadowmmu.coordinator.series import POINTS_INTERRUPTED, POINTS_REACHED
from shadowmmu.protocol.messages import Role, Verdict

__all__ = ["MetricName", "encode_metrics", "metric_name"]


class MetricName(msgspec.Struct, frozen=True):
    """A metric without `_total`, and its labels with their values."""

    family: str
    labels: dict[str, str] = {}
    gauge: bool = False


class _Family(msgspec.Struct, frozen=True):
    """Counters that are one metric: what follows `prefix`, at its last dots, are the values of `labels`."""

    prefix: str
    family: str
    labels: tuple[str, ...]


_FAMILIES: Final = (
    _Family("exits.", "kvm_exits", ("reason",)),
    _Family("kvm.notrap.", "kvm_notrap", ("where",)),
    _Family("outcome.", "shadowmmu_operations", ("operation", "outcome")),
    _Family("host.", "shadowmmu_host_requests", ("operation",)),
    _Family("errors.", "shadowmmu_error_replies", ("code",)),
    _Family("vcpu.exits.", "shadowmmu_vcpu_exits", ("reason",)),
    _Family("guest.episode.", "shadowmmu_guest_episodes", ("episode",)),
)
_POINT: Final = re.compile(r"point\.(.+)\.([a-z]+)")
_POINT_FAMILIES: Final = {
    "reached": "shadowmmu_point_reached",
    "parked": "shadowmmu_point_parked",
    "operation": "shadowmmu_point_operations",
    "store": "shadowmmu_point_stores",
}
_DEBUGFS_NAMES: Final = {"kvm.lpages": "kvm_largepages"}
"""Where `kvm_stat` has another name than `struct kvm_vm_stat`."""

_FROM_ZERO: Final = dict.fromkeys(
    (
        "accesses.applied",
        "events",
        "kicks.answered",
        "kicks.sent",
        "lock.taken",
        "lock.waited",
        "tlbs_dirty.cleared",
        "tlbs_dirty.raised",
    ),
    0,
)
"""Counters that members tell only once they have counted something: Prometheus misses the first count of a metric that
was not there before.
"""

_HELP: Final = {
    "kvm_pf_fixed": "Page faults that made a shadow entry.",
    "kvm_pf_guest": "Page faults that were the guest's own.",
    "kvm_remote_tlb_flush": "Remote TLB flushes that kicked somebody.",
    "kvm_mmu_unsync": "Shadow pages that are out of sync now.",
    "kvm_exits": "Guest exits by reason.",
    "kvm_tlbs_dirty": "Shadow entries dropped by sync_page whose flush is still put off.",
    "shadowmmu_lock_waited": "mmu_lock regions that had to wait for the lock.",
    "shadowmmu_kicks_sent": "vCPUs kicked out of guest mode.",
    "shadowmmu_point_reached": "How often operations reached the named point.",
    "shadowmmu_point_operations": "How often another vCPU's operation fell at the named point.",
    "shadowmmu_point_stores": "How often a guest store fell at the named point.",
    "shadowmmu_vcpu_instructions": "Guest instructions executed.",
}
_OTHER_HELP: Final = "See docs/REPORT.md, counters."

_NOT_A_NAME: Final = re.compile(r"[^a-zA-Z0-9_]")


def metric_name(counter: str) -> MetricName:
    """Which metric a counter of docs/REPORT.md is."""
    if point := _POINT.fullmatch(counter):
        family = _POINT_FAMILIES.get(point[2])
        if family is not None:
            return MetricName(family, {"point": point[1]})
    for one in _FAMILIES:
        values = counter.removeprefix(one.prefix).rsplit(".", len(one.labels) - 1)
        if counter.startswith(one.prefix) and len(values) == len(one.labels):
            return MetricName(one.family, dict(zip(one.labels, values, strict=True)))
    stem = counter.removesuffix(".current")
    gauge = stem != counter or counter.endswith((".highest", ".max"))
    base, dot, peak = stem.partition(".highest")
    name = _DEBUGFS_NAMES.get(base, base if base.startswith("kvm.") else f"shadowmmu.{base}")
    if base.startswith("tlbs_dirty."):
        name = f"kvm.{base}"
    return MetricName(_NOT_A_NAME.sub("_", name + dot + peak).removesuffix("_total"), gauge=gauge)


def encode_metrics(observation: Observation, accept: str) -> tuple[bytes, str]:
    """The text and its content type, in the format that the header `Accept` asks for."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(observation))
    encoder, content_type = choose_encoder(accept)
    return encoder(registry), content_type


class _Collector(Collector):
    """What prometheus-client asks for metrics: those of one observation."""

    def __init__(self, observation: Observation) -> None:
        self._seen = observation
        self._families: dict[str, Metric] = {}
        self._labels: dict[str, tuple[str, ...]] = {}
        self._values: dict[str, dict[tuple[str, ...], int]] = {}

    def collect(self) -> Iterable[Metric]:
        yield from self._of_the_run()
        for name, value in (_FROM_ZERO | self._seen.counters).items():
            # Those of vCPUs come with their number, below; the others are the whole run's.
            if not name.startswith(("vcpu.", "guest.")):
                self._count(metric_name(name), value, {})
        for vcpu, counters in self._seen.vcpus.items():
            for name, value in counters.items():
                self._count(metric_name(name), value, {"vcpu": str(vcpu)})
        counters = self._seen.counters
        dirty = counters.get("tlbs_dirty.raised", 0) - counters.get("tlbs_dirty.cleared", 0)
        self._count(MetricName("kvm_tlbs_dirty", gauge=True), dirty, {})
        yield from self._counted()

    def _count(self, name: MetricName, value: int, more: Mapping[str, str]) -> None:
        labels = {"run": self._seen.run.run, **more, **name.labels}
        family = name.family
        if family not in self._families:
            kind = GaugeMetricFamily if name.gauge else CounterMetricFamily
            self._families[family] = kind(family, _HELP.get(family, _OTHER_HELP), labels=list(labels))
            self._labels[family] = tuple(labels)
            self._values[family] = {}
        if self._labels[family] == tuple(labels):
            # Two names of counters that become one are one.
            values = self._values[family]
            key = tuple(labels.values())
            values[key] = values.get(key, 0) + value

    def _counted(self) -> Iterator[Metric]:
        for name, family in self._families.items():
            assert isinstance(family, CounterMetricFamily | GaugeMetricFamily)
            for labels, value in self._values[name].items():
                family.add_metric(labels, value)
            yield family

    def _of_the_run(self) -> Iterator[Metric]:
        run = self._seen.run
        config = run.config
        about = {
            "version": run.version,
            "profile": config.profile,
            "workload": config.workload.value,
            "mode": config.mode.value,
            "seed": str(config.seed),
        }
        yield self._gauge("shadowmmu_run_info", "What is run; always 1.", [(about, 1)])
        phases = [({"phase": one.value}, int(one is run.phase)) for one in Phase]
        yield self._gauge("shadowmmu_run_phase", "1 for the phase in which the run is.", phases)
        verdicts = [({"verdict": one.value}, int(one is run.verdict)) for one in Verdict]
        yield self._gauge("shadowmmu_run_verdict", "1 for the verdict, once there is one.", verdicts)
        for name, text, value in (
            ("shadowmmu_run_seconds", "Seconds since the guests started.", run.sample.seconds),
            ("shadowmmu_run_vcpus", "Virtual processors that the run started with.", run.vcpus),
            ("shadowmmu_run_instructions", "Guest instructions executed so far.", run.instructions),
            ("shadowmmu_run_instructions_wanted", "Guest instructions to be executed.", config.ops),
            ("shadowmmu_points", "Named points of the kernel's code.", len(run.coverage.points)),
            (
                "shadowmmu_points_reached",
                "Named points that were reached.",
                run.sample.counters[POINTS_REACHED],
            ),
            (
                "shadowmmu_points_interrupted",
                "Named points where another vCPU's operation, or a guest store, fell.",
                run.sample.counters[POINTS_INTERRUPTED],
            ),
        ):
            yield self._gauge(name, text, [({}, value)])
        members = Counter((member.role, member.state) for member in run.members)
        rows = [
            ({"role": role.value, "state": state.value}, members[role, state])
            for role in (Role.MMU, Role.VCPU, Role.HOST)
            for state in MemberState
        ]
        yield self._gauge("shadowmmu_members", "Members of the run by role and state.", rows)

    def _gauge(self, name: str, text: str, rows: Sequence[tuple[dict[str, str], float]]) -> Metric:
        gauge = GaugeMetricFamily(name, text, labels=["run", *rows[0][0]])
        for labels, value in rows:
            gauge.add_metric([self._seen.run.run, *labels.values()], value)
        return gauge
