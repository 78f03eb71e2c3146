"""Failing executions that the tests of shrinking, keeping, drawing and attributing begin with."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from shadowmmu.explorer.actors import Actor
from shadowmmu.explorer.execution import Failure
from shadowmmu.explorer.library import bug_test
from shadowmmu.explorer.litmus import parse_litmus
from shadowmmu.explorer.scenario import Scenario
from shadowmmu.explorer.search import Budget, Search
from shadowmmu.explorer.strategy import Strategy

MISSED_FLUSH = "tlbs-dirty-missed-wp"

MISSED_FLUSH_TEST = """
title = "a frame becomes a page table while another vCPU can still write it"
bug = "tlbs-dirty-missed-wp"
setup = '''
v1: store x = 1                 # the TLB of vCPU 1: x -> G, writable
v0: load x
v0: store @T[10] = other wuad   # T is unsync from now on
'''
[frames]
root = 16
L3 = 24
L2 = 32
T = 40
G = 48
other = 56
P1 = 64
[tables.root]
0 = "L3 wua"
[tables.L3]
0 = "L2 wua"
[tables.L2]
0 = "T wua"
1 = "T wua"
[tables.T]
9 = "G wuad"
10 = "other wuad"
[tables.G]
5 = "P1 wuad"
[addresses]
x = "0/0/0/9"
y = "0/0/1/10"
z = "0/0/2/5"
[[vcpu]]
program = '''
store @T[9] = 0
load y
store @L2[2] = G wua
load z
'''
[[vcpu]]
program = "store x[5] = 0"
"""
"""The library's test of the same name as it was once: what the tests look for in it must not move."""


class Failing(NamedTuple):
    """A scenario, the profile and the schedule under which it fails, and how."""

    scenario: Scenario
    profile: str
    failure: Failure
    schedule: tuple[Actor, ...]


def search(scenario: Scenario, profile: str, strategy: Strategy = Strategy.PORTFOLIO) -> Failing:
    """The first failure that a search finds."""
    found = Search(scenario, profile, strategy, 1, lambda: 0.0)
    found.run(Budget(executions=2000, first=True))
    assert found.first is not None, f"{scenario.name} does not fail under {profile}"
    return Failing(scenario, profile, found.first.failure, found.first.schedule)


@cache
def failing(slug: str = MISSED_FLUSH, profile: str = "linux-3.1") -> Failing:
    """A failure of a bug's litmus test."""
    scenario = parse_litmus(MISSED_FLUSH_TEST, MISSED_FLUSH) if slug == MISSED_FLUSH else bug_test(slug)
    assert scenario is not None
    return search(scenario, profile)
