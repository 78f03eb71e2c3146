"""Searches of schedules at the points of a sweep: campaigns of `shadowmmu explore`.

Limits are numbers of executions, never seconds, so that a point comes out the same on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec

from shadowmmu.cpu.guest import working_frames
from shadowmmu.experiments.parameters import ParameterError, Parameters
from shadowmmu.experiments.values import Metric, Value
from shadowmmu.explorer.campaign import SearchSpec, run_search
from shadowmmu.explorer.library import find_test
from shadowmmu.explorer.litmus import LitmusError
from shadowmmu.explorer.scenario import Scenario
from shadowmmu.explorer.search import Budget
from shadowmmu.explorer.strategy import Strategy
from shadowmmu.explorer.workload import workload_scenario
from shadowmmu.kvm import KvmError, Profile
from shadowmmu.protocol.messages import GuestMode, RunConfig, Workload

__all__ = ["ExploreKind", "ExplorePoint"]


class ExplorePoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A search, of a litmus test (`test`: a name or a file) or else of random guests of a workload.

    `profile` None: the one that the test names, linux-3.1 for a workload. `first`: stop at the first failure. The other
    fields belong to a workload.
    """

    test: str | None = None
    profile: str | None = None
    strategy: Strategy = Strategy.PORTFOLIO
    executions: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)] = 1000
    first: bool = False
    workload: Workload | None = None
    mode: GuestMode = GuestMode.PAGING64
    vcpus: Annotated[int, msgspec.Meta(ge=1, le=60)] = 3
    ops: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)] = 200
    host_ops: Annotated[int, msgspec.Meta(ge=0, le=1 << 32)] = 20
    memory_pages: Annotated[int, msgspec.Meta(ge=1024, le=1 << 20)] = 1024
    mmu_pages: Annotated[int, msgspec.Meta(ge=64, le=1 << 20)] = 64


class ExploreKind:
    """Searches of schedules."""

    title = "search of schedules"
    repeatable = True
    parameters = Parameters(ExplorePoint)

    def check(self, values: Mapping[str, Value]) -> None:
        """Raises ParameterError if there is no such test, profile or guest."""
        self._search(values, 0)

    def run(self, values: Mapping[str, Value], seed: int) -> dict[str, Metric]:
        """The numbers of executions, outcomes and failures, and which execution failed first."""
        report = run_search(self._search(values, seed))
        first = report.first
        return {
            "executions_made": report.executions,
            "pruned": report.pruned,
            "complete": report.complete,
            "outcomes": len(report.outcomes),
            "exists": report.exists,
            "failures": sum(report.failures.values()),
            "found": first is not None,
            "first_execution": None if first is None else first.execution,
            "first_steps": None if first is None else len(first.schedule),
            "pairs": report.pairs,
            "pairs_never": len(report.never),
            "digest": report.digest,
        }

    def _search(self, values: Mapping[str, Value], seed: int) -> SearchSpec:
        point = self.parameters.build(values)
        scenario = _scenario(point, seed)
        profile = point.profile or scenario.profile
        try:
            Profile.parse(profile)
        except KvmError as error:
            raise ParameterError("profile", str(error)) from error
        budget = Budget(executions=point.executions, first=point.first)
        return SearchSpec(scenario, profile, point.strategy, seed, budget)


def _scenario(point: ExplorePoint, seed: int) -> Scenario:
    if point.test is not None:
        if point.workload is not None:
            raise ParameterError("workload", "there is a test already; a search has one of both")
        try:
            return find_test(point.test)
        except LitmusError as error:
            raise ParameterError("test", str(error)) from error
    if point.workload is None:
        raise ParameterError("test", "name a litmus test, or a workload")
    if point.mode is not GuestMode.PAGING64 and point.workload is not Workload.MODES:
        raise ParameterError("workload", f"guests in mode {point.mode.value} run workload modes only")
    config = RunConfig(
        workload=point.workload,
        mode=point.mode,
        profile=point.profile or "linux-3.1",
        ops=point.ops,
        seed=seed,
        memory_pages=point.memory_pages,
        mmu_pages=point.mmu_pages,
    )
    try:
        working_frames(config, point.vcpus)
        return workload_scenario(config, point.vcpus, point.host_ops)
    except KvmError as error:
        raise ParameterError("profile", str(error)) from error
    except ValueError as error:  # too many for the guest programs, or for the guest's memory
        raise ParameterError("vcpus", str(error)) from error
