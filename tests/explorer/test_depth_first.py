"""The systematic search sees everything, and what it leaves out shows nothing new."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator

import msgspec
import pytest

from shadowmmu.explorer.depth_first import DepthFirst
from shadowmmu.explorer.execution import Ending
from shadowmmu.explorer.fingerprint import fingerprint
from shadowmmu.explorer.library import find_test
from shadowmmu.explorer.litmus import parse_litmus
from shadowmmu.explorer.outcome import Outcome
from shadowmmu.explorer.scenario import Scenario
from shadowmmu.explorer.search import Budget, Search
from shadowmmu.explorer.strategy import Strategy
from shadowmmu.explorer.world import World

TABLES = """
[tables.root]
0 = "L3 wua"
[tables.L3]
0 = "L2 wua"
[tables.L2]
0 = "T wua"
[tables.T]
9 = "G wuad"
17 = "H wuad"
[memory]
"G[0]" = 1
"H[0]" = 2
"flag[0]" = 0
[addresses]
x = "0/0/0/9"
y = "0/0/0/17"
"""
WARM = """
v0: load x
v0: store @T[20] = 0
v1: store x[3] = 1
v1: store @flag[3] = 1
v0: store x[3] = 1
v0: store @flag[3] = 1
v0: store @T[20] = 0
"""


def scenario(*programs: str, setup: str = WARM, host: str = "", vcpus: int = 2, more: str = "") -> Scenario:
    parts = [f"setup = '''{setup}'''", more, f"[machine]\nvcpus = {vcpus}", TABLES]
    parts += [f"[[vcpu]]\nprogram = '''{program}'''" for program in programs]
    if host:
        parts.append(f"[[host]]\nprogram = '''{host}'''")
    return parse_litmus("\n".join(parts), "test")


STORE_BUFFERING = scenario("store @flag = 1\nr0 = load x[1]", "store x[1] = 1\nr0 = load @flag")
SMALL = {
    "loads and stores of the same words": STORE_BUFFERING,
    "stores to one word by both": scenario(
        "store x = 5\nstore x = 6\nr0 = load x", "r0 = load x\nstore x = 7", more="exists = 'G[0] == 7'"
    ),
    "a PTE changes under a TLB": scenario("store @T[9] = H wuad\nstore x = 9", "r0 = load x\nr1 = load x"),
    "locked operations": scenario("r0 = xadd x = 1\nr1 = xadd x = 1", "r0 = xadd x = 1\nr1 = load x"),
    "a walk beside stores": scenario(
        "store x = 5\nstore @flag = 1", "r0 = load y", setup=f"{WARM}v0: load y"
    ),
    "a value that is waited for": scenario(
        "store x = 5\nstore @flag = 1\nstore @flag = 2", "await @flag = 1\nr0 = load x"
    ),
    "an exit beside loads": scenario(
        "r0 = load x\nr1 = load @flag", "cr3", setup="v0: load x\nv0: load @flag"
    ),
    "an interrupt": scenario("ipi v1", "r0 = load x\nr1 = load x"),
    "a notifier beside a store": scenario("store x = 5", setup="v0: load x", host="age G", vcpus=1),
    "three vCPUs": scenario(
        "store x = 5", "r0 = load x\nstore @flag = 3", "r0 = load @flag\nr1 = load x",
        setup=f"{WARM}v2: load x\nv2: load @flag\nv1: store @flag[1] = 1", vcpus=3,
    ),
}  # fmt: skip
"""Few enough schedules that all can be executed without any reduction."""

MOST = 4000
"""Executions of the search without reductions, in any of these."""


def endings(search: DepthFirst, most: int = MOST) -> Iterator[Ending]:
    while not search.complete and search.executions < most:
        ending = search.next()
        if ending is not None:
            yield ending


def seen(ending: Ending) -> tuple[Outcome, str]:
    return ending.outcome, "" if ending.failure is None else ending.failure.kind


def both(test: Scenario, profile: str) -> tuple[DepthFirst, DepthFirst]:
    """The searches without and with reductions, after they have seen everything: the same."""
    every, fewer = DepthFirst(test, profile, reduce=False), DepthFirst(test, profile)
    assert set(map(seen, endings(every))) == set(map(seen, endings(fewer)))
    assert every.complete and fewer.complete
    return every, fewer


@pytest.mark.parametrize("name", SMALL)
def test_the_reductions_lose_no_outcome(name: str) -> None:
    every, fewer = both(SMALL[name], "fixed")
    assert every.pruned == 0
    assert fewer.executions <= every.executions


def test_the_reductions_leave_most_executions_out() -> None:
    every, fewer = both(SMALL["a notifier beside a store"], "fixed")
    assert 4 * fewer.executions < every.executions


def test_the_reductions_lose_no_failure() -> None:
    test = find_test("resync-by-sibling")
    profile = "fixed-sync-on-cr3-reload"
    alone = msgspec.structs.replace(test, programs=(test.programs[0][1:], test.programs[1][:1]))
    every, _ = both(alone, profile)
    assert every.executions > 1
    assert any(ending.failure for ending in endings(DepthFirst(alone, profile)))


@pytest.mark.parametrize("name", ["dirty-bit-lost", "host-frame-reused", "write-protect-versus-store"])
def test_no_other_search_sees_what_the_exhaustive_one_has_not(name: str) -> None:
    test = find_test(name)
    known = set(map(seen, endings(DepthFirst(test, "linux-3.1"))))
    for strategy in (Strategy.BOUNDED, Strategy.PCT, Strategy.RANDOM):
        search = Search(test, "linux-3.1", strategy, 3, time.monotonic)
        for source in search.sources:
            for _ in range(25):
                if not source.complete:
                    ending = source.next()
                    assert ending is None or seen(ending) in known


def test_both_outcomes_of_store_buffering_but_not_the_relaxed_one() -> None:
    outcomes = {
        tuple(dict(ending.outcome).values()) for ending in endings(DepthFirst(STORE_BUFFERING, "fixed"))
    }
    assert outcomes == {(0, 1), (1, 0), (1, 1)}


def test_more_delays_see_more_until_all_is_seen() -> None:
    counts = []
    for delays in range(5):
        search = DepthFirst(STORE_BUFFERING, "fixed", delays)
        counts.append(len(list(endings(search))))
        assert search.complete
    assert counts[0] == 1
    assert counts == sorted(counts)
    every = DepthFirst(STORE_BUFFERING, "fixed", reduce=False)
    assert counts[-1] == counts[-2] == len(list(endings(every)))


# --- stopping and going on -------------------------------------------------------------------------------------------


def digest(found: list[Ending]) -> str:
    return hashlib.blake2b(repr([(seen(ending), ending.schedule) for ending in found]).encode()).hexdigest()


@pytest.mark.parametrize("delays", [None, 2])
@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_search_that_was_stopped_goes_on_exactly(delays: int | None, stop_after: int) -> None:
    test = SMALL["an interrupt"]
    at_once = list(endings(DepthFirst(test, "fixed", delays)))
    first = DepthFirst(test, "fixed", delays)
    begun = list(endings(first, stop_after))
    second = DepthFirst(test, "fixed", delays)
    second.restore(msgspec.msgpack.decode(msgspec.msgpack.encode(first.state())))
    assert digest([*begun, *endings(second)]) == digest(at_once)


@pytest.mark.parametrize("strategy", list(Strategy))
def test_the_same_seed_gives_the_same_search(strategy: Strategy) -> None:
    digests = set()
    for _ in range(2):
        search = Search(find_test("dirty-bit-lost"), "linux-3.1", strategy, 5, time.monotonic)
        search.run(Budget(executions=20))
        digests.add(search.digest())
    assert len(digests) == 1


def test_another_seed_gives_another_search() -> None:
    digests = set()
    for seed in range(2):
        search = Search(find_test("dirty-bit-lost"), "linux-3.1", Strategy.RANDOM, seed, time.monotonic)
        search.run(Budget(executions=5))
        digests.add(search.digest())
    assert len(digests) == 2


# --- states ----------------------------------------------------------------------------------------------------------


def test_the_same_state_is_recognised_by_whatever_way_it_was_reached() -> None:
    prints = []
    for schedule in ([0, 1], [1, 0]):
        world = World(scenario("r0 = load x", "r0 = load x"), "fixed")
        for actor in schedule:
            world.step(actor)
        prints.append(fingerprint(world))
    assert prints[0] == prints[1]


def test_a_fault_is_not_taken_for_the_number_of_its_error_code() -> None:
    worlds = [World(scenario("r0 = load x", vcpus=1, setup=""), "fixed") for _ in range(2)]
    assert fingerprint(worlds[0]) == fingerprint(worlds[1])
    program = worlds[0].programs[0]
    number, fault = worlds[0], worlds[1]
    number.programs[0].retire(2)
    fault.programs[0].page_fault(2, 0)
    assert program.results == fault.programs[0].results  # equal as numbers
    assert fingerprint(number) != fingerprint(fault)


def test_entries_that_differ_in_no_execute_and_user_are_different_states() -> None:
    worlds = [World(scenario("load x", vcpus=1, setup="v0: load x"), "fixed") for _ in range(2)]
    page = next(iter(worlds[0].machine.kvm.page_header.values()))
    other = next(iter(worlds[1].machine.kvm.page_header.values()))
    page.spt[7], other.spt[7] = 0x5, 0x8000_0000_0000_0001
    assert hash(page.spt[7]) == hash(other.spt[7])  # Python's hash of numbers does not tell them apart
    assert fingerprint(worlds[0]) != fingerprint(worlds[1])


def test_a_pending_interrupt_is_part_of_the_state() -> None:
    worlds = [World(scenario("load x", vcpus=1, setup="v0: load x"), "fixed") for _ in range(2)]
    worlds[0].machine.lanes[0].interrupts.add(0)
    assert fingerprint(worlds[0]) != fingerprint(worlds[1])
