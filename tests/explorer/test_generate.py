"""Random guests: the same for the same seed, all of them litmus tests that run, and colliding as races need it."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import pytest

from shadowmmu.explorer.choosers import FollowChooser
from shadowmmu.explorer.execution import execute
from shadowmmu.explorer.generate import draw_test, generate
from shadowmmu.explorer.litmus import parse_litmus
from shadowmmu.explorer.scenario import Access, AccessKind, Invlpg, LoadCr3, Scenario, Step
from shadowmmu.explorer.world import ScenarioError, World

SEEDS = range(300)
LINEAR_64 = 0xFFFF_8800_0000_0000


@pytest.fixture(scope="module")
def guests() -> list[Scenario]:
    return [generate(seed) for seed in SEEDS]


def _operations(guest: Scenario) -> Counter[str]:
    return Counter(step.text.split()[0] for host in guest.hosts for step in host)


def _table_words(program: tuple[Step, ...]) -> set[int]:
    """The words of the linear map, where the tables are, that a program stores to."""
    return {
        step.instruction.gva
        for step in program
        if isinstance(step.instruction, Access)
        and step.instruction.kind is AccessKind.STORE
        and step.instruction.gva >= LINEAR_64
    }


def test_a_seed_always_gives_the_same_guest() -> None:
    assert generate(7) == generate(7)
    assert generate(7) != generate(8)


def test_a_guest_is_the_litmus_test_that_it_is_written_as() -> None:
    assert generate(11) == parse_litmus(draw_test(11), "random-11")


def test_guests_are_small(guests: list[Scenario]) -> None:
    for guest in guests:
        assert 1 <= guest.vcpus <= 3
        assert len(guest.hosts) <= 2
        assert sum(map(len, guest.hosts)) <= 8
        assert all(1 <= len(program) <= 20 for program in guest.programs)


def test_most_guests_have_two_vcpus_in_64_bit_mode_and_some_have_not(guests: list[Scenario]) -> None:
    vcpus = Counter(guest.vcpus for guest in guests)
    long_mode = Counter(guest.machine.registers[0].efer >> 10 & 1 for guest in guests)
    assert vcpus.most_common(1)[0][0] == 2
    assert set(vcpus) == {1, 2, 3}
    assert long_mode[1] > 2 * long_mode[0] > 0


def test_every_host_operation_is_drawn(guests: list[Scenario]) -> None:
    drawn = sum(map(_operations, guests), Counter[str]())
    assert {
        "unmap", "unmap_range", "reclaim", "move", "age", "dirty_log", "get_dirty_log", "write", "shrink", "zap_all",
    } <= set(drawn)  # fmt: skip


def test_few_guests_have_a_device_that_stores_where_tables_are(guests: list[Scenario]) -> None:
    stores = sum(_operations(guest)["write"] > 0 for guest in guests)
    assert 0 < stores < len(guests) / 5


def test_vcpus_store_to_entries_that_others_use(guests: list[Scenario]) -> None:
    colliding = [
        guest
        for guest in guests
        if guest.vcpus == 2 and _table_words(guest.programs[0]) & _table_words(guest.programs[1])
    ]
    assert len(colliding) > len(guests) / 20


def _is_switched_and_back(test: str) -> bool:
    """Whether some L2 entry is stored another table or large page, and the one that it had at the start."""
    begin = {
        f"{table}[{index}]": frame
        for table, entries in re.findall(r"^\[tables\.(L2\w)\]\n((?:\d.*\n)*)", test, re.MULTILINE)
        for index, frame in re.findall(r'^(\d+) = "(\w+) ', entries, re.MULTILINE)
    }
    stored: dict[str, set[str]] = {}
    for place, frame in re.findall(r"^(?:store|xchg) @(L2\w\[\d+\]) = (\w+) ", test, re.MULTILINE):
        stored.setdefault(place, set()).add(frame)
    return any(begin.get(place) in frames and len(frames) > 1 for place, frames in stored.items())


def test_some_guests_let_another_table_take_the_place_of_one_for_a_while() -> None:
    assert sum(_is_switched_and_back(draw_test(seed)) for seed in SEEDS) > len(SEEDS) / 30


def test_some_changes_are_followed_by_an_invalidation_and_some_are_not(guests: list[Scenario]) -> None:
    followed: Counter[bool] = Counter()
    for guest in guests:
        for program in guest.programs:
            for step, after in pairwise(program):
                if step.text.startswith("store @"):
                    followed[isinstance(after.instruction, Invlpg | LoadCr3)] += 1
    assert min(followed[True], followed[False]) > 50


def test_nearly_every_guest_can_be_executed(guests: list[Scenario]) -> None:
    stuck = 0
    for guest in guests[:60]:
        try:
            execute(guest, "fixed", FollowChooser(()))
        except ScenarioError:
            stuck += 1
    assert stuck <= 2


def test_a_good_part_of_the_guests_begins_with_tables_out_of_sync(guests: list[Scenario]) -> None:
    """Without any there would be little to go stale."""
    unsync = 0
    for guest in guests[:60]:
        world = World(guest, "fixed")
        unsync += any(page.unsync for page in world.machine.kvm.active_mmu_pages.values())
    assert unsync > 10
