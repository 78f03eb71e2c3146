"""Runs in virtual time at the points of a sweep (`shadowmmu.machine.virtual_time`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, cast

import msgspec

from shadowmmu.cpu.guest import working_frames
from shadowmmu.cpu.loads import WORK, LoadConfig, memory_needed
from shadowmmu.experiments.cost_model import CostModel, CostModelError, load_cost_model, scaled
from shadowmmu.experiments.parameters import ParameterError, Parameters
from shadowmmu.experiments.values import Metric, Value
from shadowmmu.kvm import KvmError, Profile
from shadowmmu.kvm.profiles import KernelTree
from shadowmmu.machine.costs import Costs
from shadowmmu.machine.timed_config import HostActor, HostActorKind, TimedConfig
from shadowmmu.machine.virtual_time import run_timed
from shadowmmu.protocol.messages import GuestMode, RunConfig, Workload

__all__ = ["VirtualKind", "VirtualPoint"]

Factor = Annotated[float, msgspec.Meta(ge=0.0, le=1e6)]
Interval = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
PagesPerVcpu = Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]

LEAST_MEMORY: Final = 1024
LEAST_MMU_PAGES: Final = 64
SCHEDULING: Final = "point."
"""Counters of scheduling points begin so; in virtual time nothing is parked at one."""
NO_MEANING: Final = (
    "run.seed",
    "run.park_rate",
    "run.park_steps",
    "run.host_rate",
    "run.audit",
    "run.mutant",
    "run.check",
)
"""Of a run's configuration: what belongs to schedulers and journals; and the seed, which the sweep chooses."""


class HostIntervals(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Threads of the host: one that does this every so many cycles (0: none does)."""

    dirty_log: Interval = 0
    unmap: Interval = 0
    age: Interval = 0
    mixed: Interval = 0

    def actors(self) -> tuple[HostActor, ...]:
        """The threads, in the order of the fields."""
        intervals = msgspec.structs.asdict(self)
        return tuple(
            HostActor(kind=HostActorKind(name.replace("_", "-")), interval=interval)
            for name, interval in intervals.items()
            if interval
        )


class VirtualPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A run in virtual time: that of `TimedConfig`, in a form whose parts have names, and its cost model.

    With a load, guest memory is what the load needs, if that is more than `run.memory_pages`. `mmu_pages_per_vcpu`: the
    limit on shadow pages is so many for each vCPU instead of `run.mmu_pages` (0: it is not).
    """

    cost_model: str = "cascadelake-2019"
    vcpus: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    warmup: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 1
    iterations: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 10
    oos_shadow: bool = True
    mmu_pages_per_vcpu: PagesPerVcpu = 0
    load: LoadConfig | None = None
    host: HostIntervals = HostIntervals()
    run: RunConfig = RunConfig()


_GuestFactors = msgspec.defstruct("_GuestFactors", [(name, Factor, 1.0) for name in WORK], frozen=True)
_CostFactors = msgspec.defstruct(
    "_CostFactors",
    [
        *((name, Factor, 1.0) for name in Costs.__struct_fields__ if name != "guest"),
        ("guest", _GuestFactors, msgspec.field(default_factory=_GuestFactors)),
    ],
    frozen=True,
)
_PointWithFactors = msgspec.defstruct(
    "_PointWithFactors",
    [("cost", _CostFactors, msgspec.field(default_factory=_CostFactors))],
    bases=(VirtualPoint,),
    frozen=True,
    kw_only=True,
)


class VirtualKind:
    """Runs in virtual time. The seed is that of the run."""

    title = "run in virtual time"
    repeatable = True
    parameters: Parameters[VirtualPoint] = Parameters(
        cast("type[VirtualPoint]", _PointWithFactors), without=NO_MEANING, transparent=("run",)
    )

    def check(self, values: Mapping[str, Value]) -> None:
        """Raises ParameterError if there is no such cost model, or no such run."""
        self.resolve(values, 0)

    def resolve(self, values: Mapping[str, Value], seed: int) -> tuple[TimedConfig, CostModel]:
        """The run that these values describe, and its cost model. Raises ParameterError."""
        return self._config(values, seed), self._model(values)

    def run(self, values: Mapping[str, Value], seed: int) -> dict[str, Metric]:
        """Cycles, by cause and per iteration; counters; latencies."""
        config, model = self.resolve(values, seed)
        result = run_timed(config, model.costs)
        metrics: dict[str, Metric] = {
            "cycles": result.cycles,
            "seconds": result.cycles / (model.ghz * 1e9),
            "iteration_cycles": result.iteration_cycles,
            "iteration_us": result.iteration_cycles / (model.ghz * 1e3),
            "lock_held": result.lock_held,
            "steps": result.steps,
            "digest": result.digest,
        }
        metrics |= {f"cause.{name}": cycles for name, cycles in result.causes.items()}
        metrics |= {name: n for name, n in result.counters.items() if not name.startswith(SCHEDULING)}
        for name, latency in result.latencies.items():
            for field in ("count", "mean", "p50", "p99", "max"):
                metrics[f"latency.{name}.{field}"] = getattr(latency, field)
        return metrics

    def _model(self, values: Mapping[str, Value]) -> CostModel:
        factors = {}
        for given, value in values.items():
            name = self.parameters.find(given).name
            if name.startswith("cost."):
                factors[name.removeprefix("cost.")] = float(value)
        try:
            model = load_cost_model(self.parameters.build(values).cost_model)
            return scaled(model, factors) if factors else model
        except CostModelError as error:
            raise ParameterError("cost_model", str(error)) from error

    def _config(self, values: Mapping[str, Value], seed: int) -> TimedConfig:
        point = self.parameters.build(values, run__seed=seed)
        run = point.run
        if point.mmu_pages_per_vcpu:
            pages = max(LEAST_MMU_PAGES, point.mmu_pages_per_vcpu * point.vcpus)
            run = msgspec.structs.replace(run, mmu_pages=pages)
        try:
            if point.load is None:
                working_frames(run, point.vcpus)
            else:
                needed = memory_needed(point.load, point.vcpus)
                run = msgspec.structs.replace(run, memory_pages=max(run.memory_pages, needed, LEAST_MEMORY))
        except ValueError as error:  # too many for the guest programs, or for the guest's memory
            raise ParameterError("vcpus", str(error)) from error
        _check_run(run)
        return TimedConfig(
            run=run,
            vcpus=point.vcpus,
            load=point.load,
            warmup=point.warmup,
            iterations=point.iterations,
            oos_shadow=point.oos_shadow,
            host=point.host.actors(),
        )


def _check_run(run: RunConfig) -> None:
    """What of a run's configuration does not go together."""
    try:
        kernel = Profile.parse(run.profile).kernel
    except KvmError as error:
        raise ParameterError("profile", str(error)) from error
    if run.bypass_guest_pf and (kernel is not KernelTree.PRE_PATCH or run.tdp is not None):
        raise ParameterError("bypass_guest_pf", "this is a parameter of profile pre-patch, without tdp")
    if run.tdp is not None and run.mode is not GuestMode.NONPAGING:
        raise ParameterError("tdp", "guests run with paging off: it goes with mode nonpaging")
    if run.mode is not GuestMode.PAGING64 and run.workload is not Workload.MODES:
        raise ParameterError("mode", f"{run.mode.value} goes with workload modes only")
