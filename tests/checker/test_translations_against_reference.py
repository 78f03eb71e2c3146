"""Rules 1, 2 and 6 against the executable form of TLB_RULES, computed eagerly, on random streams.

The reference keeps for each vCPU and page the set of translations that it may have (Cand) and, per level, the set of
tables and rights that a walk may have come to (U), and extends them at every store. It looks at no history.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowmmu.checker import Checker, Rule
from shadowmmu.protocol.events import (
    Accesses,
    DeviceStored,
    Entered,
    Event,
    Exited,
    Injected,
    PagingRegisters,
)
from tests.checker.guest import (
    CR4,
    L1,
    L2,
    L3,
    OTHER_L1,
    OTHER_ROOT,
    PAGE,
    ROOT,
    TABLE,
    A,
    D,
    G,
    Guest,
    P,
    U,
    W,
    entry,
    gva,
    word,
)

PAGES = (gva(1), gva(2), gva(1, directory=1))
VCPUS = 2
FRAMES = (0x100, 0x200)
WORDS = [
    *(word(table, index) for table in (L1, OTHER_L1) for index in (1, 2)),
    word(L2, 0),
    word(L2, 1),
    word(L3, 0),
]
LEAVES = [
    0,
    *(
        entry(gfn, flags)
        for gfn in FRAMES
        for flags in (PAGE, PAGE | G, P | U | A | D, P | W | U | A, P | W | U)
    ),
]
UPPERS = [0, *(entry(gfn, flags) for gfn in (L1, OTHER_L1) for flags in (TABLE, P | U | A, P | W | U))]
TOPS = [0, entry(L2, TABLE), entry(L2, P | U | A)]


class Upper(NamedTuple):
    """Where a walk may have come to: the next table, the rights so far, and whether A was set at all levels."""

    table: int
    rights: int
    accessed: bool


class Leaf(NamedTuple):
    gfn: int
    rights: int
    accessed: bool
    dirty: bool
    is_global: bool


Levels: TypeAlias = list[set[Upper]]
KINDS = (4, 5)  # a user reads, a user writes


class Vcpu:
    """The sets of one vCPU; those with `new` only know what was there since its last exit."""

    def __init__(self, memory: dict[int, int], root: int) -> None:
        self.memory = memory
        self.root = root
        self.everything()
        self.exit()

    def fresh(self) -> Levels:
        return [{Upper(self.root, W | U, True)}, set(), set(), set()]

    def everything(self) -> None:
        self.u = {page: self.fresh() for page in PAGES}
        self.cand: dict[int, set[Leaf]] = {page: set() for page in PAGES}
        self.grow()

    def grow(self) -> None:
        """Walks of what memory has now, from all that walks may have come to before."""
        for page in PAGES:
            self.walk(page, self.u[page], self.cand[page])

    def walk(self, page: int, levels: Levels, leaves: set[Leaf]) -> bool:
        """Returns whether some walk meets an entry that is not present."""
        absent = False
        for depth, shift in enumerate((39, 30, 21, 12)):
            for upper in tuple(levels[depth]):
                value = self.memory.get(word(upper.table, page >> shift & 511), 0)
                if not value & P:
                    absent = True
                    continue
                rights = upper.rights & value
                accessed = upper.accessed and value & A != 0
                if depth < 3:
                    levels[depth + 1].add(Upper(value >> 12, rights, accessed))
                else:
                    leaves.add(Leaf(value >> 12, rights, accessed, value & D != 0, value & G != 0))
        return absent

    def exit(self) -> None:
        self.new_u = {page: self.fresh() for page in PAGES}
        self.new_cand: dict[int, set[Leaf]] = {page: set() for page in PAGES}
        self.absent = dict.fromkeys(PAGES, False)
        self.after_exit()

    def after_exit(self) -> None:
        for page in PAGES:
            self.walk(page, self.new_u[page], self.new_cand[page])
            # The upper levels may have been cached, the entry that is not present not.
            self.absent[page] |= self.walk(page, [set(level) for level in self.u[page]], set())

    def stored(self) -> None:
        self.grow()
        self.after_exit()

    def invlpg(self, page: int) -> None:
        self.cand[page] = set()
        self.u = {page: self.fresh() for page in PAGES}
        self.grow()

    def write_cr3(self, root: int) -> None:
        self.root = root
        self.cand = {page: {leaf for leaf in leaves if leaf.is_global} for page, leaves in self.cand.items()}
        self.u = {page: self.fresh() for page in PAGES}
        self.grow()

    def fault(self, page: int) -> None:
        self.u[page], self.cand[page] = self.new_u[page], self.new_cand[page]
        self.grow()

    def access(self, page: int, gfn: int, kind: int) -> Rule | None:
        write = kind & 1
        enough = [
            leaf
            for leaf in self.cand[page]
            if leaf.gfn == gfn and leaf.rights & U and (leaf.rights & W or not write)
        ]
        if any(leaf.accessed and (leaf.dirty or not write) for leaf in enough):
            return None
        return Rule.LOST_ACCESSED_DIRTY if enough else Rule.STALE_TRANSLATION

    def is_justified(self, page: int, error: int) -> bool:
        if not error & 1:
            return self.absent[page]
        write = error & 2
        return any(not leaf.rights & U or (write and not leaf.rights & W) for leaf in self.cand[page])


def reference(events: list[Event]) -> tuple[int, Rule] | None:
    memory: dict[int, int] = {}
    vcpus: dict[int, Vcpu] = {}
    faults: dict[int, int] = {}
    for index, event in enumerate(events):
        match event:
            case DeviceStored(words):
                for address, value in words:
                    memory[address] = value
                    for vcpu in vcpus.values():
                        vcpu.stored()
            case PagingRegisters(number, "", cr3=cr3):
                vcpus[number] = Vcpu(memory, cr3 >> 12)
            case PagingRegisters(number, "cr3", cr3=cr3):
                vcpus[number].write_cr3(cr3 >> 12)
            case PagingRegisters(number, _):
                vcpus[number].everything()
            case Exited(number, _, "invlpg", address, _):
                vcpus[number].exit()
                vcpus[number].invlpg(address)
            case Exited(number):
                vcpus[number].exit()
            case Injected(number, error, address):
                if not vcpus[number].is_justified(address, error):
                    return index, Rule.UNJUSTIFIED_FAULT
                faults[number] = address
            case Entered(number) if number in faults:
                vcpus[number].fault(faults.pop(number))
            case Accesses(number, _, [(kind, address, gfn, *_)]):
                rule = vcpus[number].access(address, gfn, kind)
                if rule is not None:
                    return index, rule
            case _:
                pass
    return None


VCPU = st.integers(0, VCPUS - 1)
STORE = st.one_of(
    st.tuples(st.just("store"), st.sampled_from(WORDS[:4]), st.sampled_from(LEAVES)),
    st.tuples(st.just("store"), st.sampled_from(WORDS[4:6]), st.sampled_from(UPPERS)),
    st.tuples(st.just("store"), st.just(WORDS[6]), st.sampled_from(TOPS)),
)
STEP = st.one_of(
    STORE,
    STORE,
    st.tuples(
        st.just("access"), VCPU, st.sampled_from(PAGES), st.sampled_from(FRAMES), st.sampled_from(KINDS)
    ),
    st.tuples(st.just("invlpg"), VCPU, st.sampled_from(PAGES), st.lists(STORE, max_size=1)),
    st.tuples(st.just("cr3"), VCPU, st.sampled_from([ROOT, ROOT, OTHER_ROOT])),
    st.tuples(st.just("pge"), VCPU),
    st.tuples(
        st.just("fault"),
        VCPU,
        st.sampled_from(PAGES),
        st.sampled_from([4, 5, 6, 7]),
        st.lists(STORE, max_size=2),
    ),
)


def stream(steps: list[tuple[object, ...]]) -> list[Event]:
    guest = Guest(VCPUS)
    guest.device((word(OTHER_ROOT, 0), entry(L3, TABLE)), (word(L2, 1), entry(OTHER_L1, TABLE)))
    roots = [ROOT] * VCPUS

    def store(step: tuple[object, ...]) -> None:
        _, address, value = step
        assert isinstance(address, int)
        assert isinstance(value, int)
        guest.device((address, value))

    for step in steps:
        match step:
            case ("store", _, _):
                store(step)
            case ("access", int(vcpu), int(page), int(gfn), int(kind)):
                guest.access(page, gfn, kind, vcpu=vcpu)
            case ("invlpg", int(vcpu), int(page), list(meanwhile)):
                guest.exit(vcpu, "invlpg", page)
                for inner in meanwhile:
                    store(inner)
                guest.enter(vcpu)
            case ("cr3", int(vcpu), int(root)):
                roots[vcpu] = root
                guest.write_cr3(vcpu, root << 12)
            case ("pge", int(vcpu)):
                for cr4 in (CR4 & ~0x80, CR4):
                    guest.exit(vcpu, "register_write").registers(
                        vcpu, "cr4", cr3=roots[vcpu] << 12, cr4=cr4
                    ).enter(vcpu)
            case ("fault", int(vcpu), int(page), int(error), list(meanwhile)):
                guest.exit(vcpu, "page_fault", page, error)
                for inner in meanwhile:
                    store(inner)
                guest.add(Injected(vcpu, error, page)).enter(vcpu)
            case _:
                raise AssertionError(step)
    return guest.events


TRANSLATION_RULES = {Rule.STALE_TRANSLATION, Rule.UNJUSTIFIED_FAULT, Rule.LOST_ACCESSED_DIRTY}


@settings(max_examples=400, deadline=None)
@given(st.lists(STEP, max_size=30))
def test_the_first_violation_is_the_one_that_candidate_sets_find(steps: list[tuple[object, ...]]) -> None:
    events = stream(steps)
    violation = Checker(TRANSLATION_RULES).feed_all(events)
    found = None if violation is None else (violation.event_index, violation.rule)
    assert found == reference(events)


@settings(max_examples=100, deadline=None)
@given(st.lists(STEP, max_size=30))
def test_forgetting_loses_violations_and_invents_none(steps: list[tuple[object, ...]]) -> None:
    events = stream(steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shadowmmu.checker.table_history.VALUES_LIMIT", 1)
        patch.setattr("shadowmmu.checker.table_history.WORTH_TRIMMING", 1)
        patch.setattr("shadowmmu.checker.table_history.FIRST_COLLECTION", 2)
        patch.setattr("shadowmmu.checker.processor.PAGES_LIMIT", 1)
        patch.setattr("shadowmmu.checker.processor.CLEARS_LIMIT", 2)
        patch.setattr("shadowmmu.checker.processor.ROOTS_LIMIT", 1)
        violation = Checker(TRANSLATION_RULES).feed_all(events)
    expected = reference(events)
    if violation is not None:
        assert expected is not None
        assert expected[0] <= violation.event_index


def long_steps(random: Random) -> list[tuple[object, ...]]:
    """Forty steps most of which a processor may make, so that what is old gets a chance to be used."""

    def store() -> tuple[object, ...]:
        draw = random.random()
        if draw < 0.6:
            return "store", random.choice(WORDS[:4]), random.choice(LEAVES)
        if draw < 0.85:
            return "store", random.choice(WORDS[4:6]), random.choice(UPPERS[random.random() < 0.8 :])
        return "store", WORDS[6], random.choice(TOPS[1:])

    def stores(most: int) -> list[tuple[object, ...]]:
        return [store() for _ in range(random.randrange(most + 1))]

    def step() -> tuple[object, ...]:
        draw, vcpu, page = random.random(), random.randrange(VCPUS), random.choice(PAGES)
        if draw < 0.45:
            return store()
        if draw < 0.75:
            return "access", vcpu, page, random.choice(FRAMES), random.choice(KINDS)
        if draw < 0.83:
            return "invlpg", vcpu, page, stores(1)
        if draw < 0.88:
            return "cr3", vcpu, random.choice([ROOT, ROOT, OTHER_ROOT])
        if draw < 0.9:
            return "pge", vcpu
        return "fault", vcpu, page, random.choice([4, 5, 6, 7]), stores(2)

    steps: list[tuple[object, ...]] = []
    for _ in range(40):
        new = step()
        legal = new[0] not in ("access", "fault") or reference(stream([*steps, new])) is None
        if legal or random.random() < 0.03:
            steps.append(new)
    return steps


@pytest.mark.parametrize("seed", range(60))
def test_long_streams_too(seed: int) -> None:
    events = stream(long_steps(Random(seed)))
    violation = Checker(TRANSLATION_RULES).feed_all(events)
    found = None if violation is None else (violation.event_index, violation.rule)
    assert found == reference(events)
