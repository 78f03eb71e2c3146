"""Hunts at the points of a sweep: campaigns of `shadowmmu hunt`, each in one process.

The limit is a number of random guests, never seconds, so that a point comes out the same on any machine.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated

import msgspec

from shadowmmu.experiments.parameters import ParameterError, Parameters
from shadowmmu.experiments.values import Metric, Value
from shadowmmu.explorer.hunt import Finding, Hunt, HuntLimit, HuntState
from shadowmmu.kvm import KvmError, Profile

__all__ = ["HuntKind", "HuntPoint"]


class HuntPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A hunt in `profile` that ends after so many random guests."""

    profile: str = "linux-3.1"
    scenarios: Annotated[int, msgspec.Meta(ge=1, le=1 << 32)] = 100


class HuntKind:
    """Hunts in random guests."""

    title = "hunt in random guests"
    repeatable = True
    parameters = Parameters(HuntPoint)

    def check(self, values: Mapping[str, Value]) -> None:
        """Raises ParameterError if there is no such profile."""
        self._point(values)

    def run(self, values: Mapping[str, Value], seed: int) -> dict[str, Metric]:
        """The numbers of guests, executions and findings; of each cause how often, and in which guest first."""
        point = self._point(values)
        hunt = Hunt(HuntState(point.profile, seed), None, time.monotonic, lambda _number, _repro: None)
        hunt.run(HuntLimit(scenarios=point.scenarios), lambda _hunt: True)
        hunt.finish()
        state = hunt.state
        metrics: dict[str, Metric] = {
            "scenarios_made": state.scenarios,
            "executions_made": state.executions,
            "findings": len(state.findings),
            "failures": sum(finding.times for finding in state.findings),
            "digest": state.digest,
        }
        for finding in state.findings:
            cause = _cause(finding)
            times, first = metrics.get(f"times.{cause}"), metrics.get(f"first.{cause}")
            metrics[f"times.{cause}"] = finding.times + (times if isinstance(times, int) else 0)
            metrics[f"first.{cause}"] = min(
                finding.scenario, first if isinstance(first, int) else finding.scenario
            )
        return metrics

    def _point(self, values: Mapping[str, Value]) -> HuntPoint:
        point = self.parameters.build(values)
        try:
            Profile.parse(point.profile)
        except KvmError as error:
            raise ParameterError("profile", str(error)) from error
        return point


def _cause(finding: Finding) -> str:
    """The fixes that explain it, or what kind of cause it is."""
    return "+".join(finding.cause.fixes) or finding.cause.kind.value.replace(" ", "-")
