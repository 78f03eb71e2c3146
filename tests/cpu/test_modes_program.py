"""The program of workload `modes` on an ideal machine: it goes on in every paging mode, whatever happens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowmmu.cpu import boot_image, huge_base, make_program
from shadowmmu.cpu.guest import working_frames
from shadowmmu.cpu.guest.modes import ModesLayout, ModesProgram, episodes
from shadowmmu.cpu.guest.modes.layout import PDPT_OFFSET, USER
from shadowmmu.cpu.program import Halt, Invlpg, LockedAccess, Op, Touches, UsedLoad, WriteRegister
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import AccessFlag
from tests.cpu.ideal_modes import ModesMachine

MODES = [m.GuestMode.PAGING64, m.GuestMode.PAE, m.GuestMode.PAGING32, m.GuestMode.NONPAGING]
WRITE = int(AccessFlag.WRITE)
USER_WRITE = int(AccessFlag.USER | AccessFlag.WRITE)


def config(mode: m.GuestMode = m.GuestMode.MIXED, **changes: object) -> m.RunConfig:
    fields = {"workload": m.Workload.MODES, "mode": mode, "ops": 20_000, "seed": 1, **changes}
    return m.RunConfig(**fields)  # type: ignore[arg-type]


class Watch:
    """Looks at every access of a run when it is applied."""

    def __init__(self, layout: ModesLayout) -> None:
        self.roots: dict[int, int] = {}
        for vcpu in range(layout.vcpus):
            first = (layout.frames(vcpu).root32[0] << 12) + PDPT_OFFSET
            self.roots.update(dict.fromkeys(range(first, first + 32), vcpu))
        self.pdpts = {layout.frames(vcpu).pdpt for vcpu in range(layout.vcpus)}
        self.machine: ModesMachine | None = None

    def __call__(self, vcpu: int, access: m.LoggedAccess) -> None:
        flags, gva, pfn, size, value = access
        assert (gva & 0xFFF) + size <= 0x1000
        if not flags & WRITE:
            return
        gpa = (pfn << 12) + (gva & 0xFFF)
        assert self.machine is not None
        if flags & USER_WRITE == USER_WRITE:
            assert gva % 8 == 0 and not value & 0x1_0000_0001, "data cannot make a present paging entry"
        if gpa in self.roots:
            assert self.roots[gpa] == vcpu, "only its owner writes a PAE root that others load"
            assert (size, value) == (8, self.machine.load(gpa, 8)), "and nobody changes it"
        elif pfn in self.pdpts and value & 1:
            assert size == 8 and value >> 12 < self.machine.config.memory_pages


def run(run_config: m.RunConfig, vcpus: int) -> ModesMachine:
    watch = Watch(ModesLayout(run_config, vcpus))
    machine = watch.machine = ModesMachine(run_config, vcpus, watch=watch)
    machine.run()
    counters = machine.counters()
    assert counters.get("refused_unexpectedly", 0) == 0
    assert counters.get("given_up", 0) <= counters.get("page_faults", 0) // 50
    assert counters.get("refused", 0) == machine.counts["refused"]
    return machine


def modes_of(machine: ModesMachine) -> set[m.GuestMode]:
    """The modes that the programs say they were in."""
    return {m.GuestMode(name[5:]) for name in machine.counters() if name.startswith("mode.")}


@pytest.mark.parametrize("vcpus", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_a_run_of_one_mode_stays_in_it_but_for_repairs(mode: m.GuestMode, vcpus: int) -> None:
    machine = run(config(mode), vcpus)
    assert all(vcpu.core.instructions >= 20_000 // vcpus for vcpu in machine.vcpus)
    assert mode in modes_of(machine) <= {mode, m.GuestMode.NONPAGING}
    assert modes_of(machine) >= machine.modes
    if mode is not m.GuestMode.NONPAGING:
        assert machine.counters()["page_faults"] > 0


@pytest.mark.parametrize("vcpus", [1, 2, 4])
def test_a_mixed_run_is_in_every_mode_and_switches(vcpus: int) -> None:
    machine = run(config(ops=40_000), vcpus)
    assert machine.modes == modes_of(machine) == set(MODES)
    assert machine.counters()["switches"] > 10


def test_tables_are_read_in_several_formats_at_several_levels_and_by_others() -> None:
    machine = run(config(ops=60_000), 4)
    partitions = working_frames(machine.config, 4)
    uses: dict[int, set[tuple[m.GuestMode, int]]] = {}
    by_others = set()
    for vcpu, processor in enumerate(machine.processors):
        for frame, mode, shift in processor.tables:
            uses.setdefault(frame, set()).add((mode, shift))
            if frame not in partitions[vcpu]:
                by_others.add((frame, mode))
    formats = {frozenset(mode for mode, _ in seen) for seen in uses.values()}
    assert any({m.GuestMode.PAGING64, m.GuestMode.PAE} <= modes for modes in formats), "shared by two roots"
    assert any({m.GuestMode.PAE, m.GuestMode.PAGING32} <= modes for modes in formats), "read in two formats"
    for mode in MODES[:3]:
        levels = [{shift for used_in, shift in seen if used_in is mode} for seen in uses.values()]
        assert any(len(shifts) > 1 for shifts in levels), f"a table that maps itself, {mode}"
    assert {mode for _, mode in by_others} >= set(MODES[:3])


NO_WRITE, NOT_USER, RESERVED, NO_FETCH = 3, 5, 9, 17


@pytest.mark.parametrize("mode", MODES[:3])
def test_the_guest_gets_page_faults_of_every_kind(mode: m.GuestMode) -> None:
    codes = {code for seed in range(4) for _, code in run(config(mode, seed=seed, ops=40_000), 2).faults}
    wide = mode is not m.GuestMode.PAGING32
    for wanted in (NO_WRITE, NOT_USER, RESERVED, *((NO_FETCH,) if wide else ())):
        assert any(code & wanted == wanted for code in codes), wanted
    assert any(not code & 1 for code in codes)


def test_neighbours_of_a_mixed_run_begin_in_different_modes() -> None:
    machine = ModesMachine(config(), 8)
    assert [processor.mode for processor in machine.processors] == MODES * 2


@pytest.mark.parametrize("mode", [m.GuestMode.NONPAGING, m.GuestMode.MIXED])
def test_with_two_dimensional_paging_the_guest_does_not_page(mode: m.GuestMode) -> None:
    machine = run(config(mode, tdp=m.Tdp.EPT), 2)
    assert machine.modes == modes_of(machine) == {m.GuestMode.NONPAGING}


@pytest.mark.parametrize("vcpus, pages", [(8, 1024), (8, 4096), (3, 1500), (2, 2048), (16, 8192)])
def test_runs_with_more_vcpus_and_less_memory(vcpus: int, pages: int) -> None:
    run(config(memory_pages=pages), vcpus)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1 << 32), vcpus=st.integers(1, 5), mode=st.sampled_from(m.GuestMode))
def test_it_goes_on_whatever_the_seed(seed: int, vcpus: int, mode: m.GuestMode) -> None:
    run(config(mode, seed=seed, ops=6000), vcpus)


EPISODES = sorted({do for _, do in episodes.EPISODES}, key=lambda do: do.__name__)


@pytest.mark.parametrize("mode", m.GuestMode)
@pytest.mark.parametrize("episode", EPISODES, ids=lambda do: do.__name__)
def test_each_episode_alone_over_and_over(
    episode: Callable[[ModesProgram], list[Op]], mode: m.GuestMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(episodes, "EVERY", [episode])
    run(config(mode, ops=2500, memory_pages=1024), 2)


def test_the_same_seed_gives_the_same_run() -> None:
    first, again, other = (run(config(seed=seed), 3) for seed in (5, 5, 6))
    states = [[program.state() for program in machine.programs] for machine in (first, again, other)]
    assert states[0] == states[1] != states[2]
    assert first.memory == again.memory


# --- the program by itself --------------------------------------------------------------------------------------------


def play(program: ModesProgram, steps: int, seed: int) -> list[object]:
    """Executes instructions with made-up answers."""
    trace: list[object] = []
    number = seed
    for _ in range(steps):
        number = number * 1103515245 + 12345 & 0x7FFFFFFF
        op = program.fetch()
        trace.append(repr(op))
        paging = program.mode is not m.GuestMode.NONPAGING
        if isinstance(op, Touches):
            if paging and number % 31 == 0:
                program.page_fault(number >> 8 & 7, op.items[op.position][1])
            else:
                op.position = min(len(op.items), op.position + 1 + number % 50)
        elif isinstance(op, UsedLoad | LockedAccess) and paging and number % 41 == 0:
            program.page_fault(number >> 8 & 7, op.gva)
        else:
            program.retire(number % 5)
            if isinstance(op, WriteRegister) and number % 13 == 0:
                program.general_protection()
    return trace


@pytest.mark.parametrize("mode", m.GuestMode)
@settings(max_examples=8, deadline=None)
@given(before=st.integers(0, 3000), seed=st.integers(1, 1 << 20))
def test_a_stored_program_goes_on_where_it_was(mode: m.GuestMode, before: int, seed: int) -> None:
    program, restored = (ModesProgram(config(mode, seed=seed), 1, 3) for _ in range(2))
    play(program, before, seed)
    stored = program.state()
    restored.restore(stored)
    assert restored.state() == stored
    assert play(program, 400, seed + 1) == play(restored, 400, seed + 1)
    assert program.state() == restored.state()
    assert len(stored) < 96_000


@pytest.mark.parametrize("mode", m.GuestMode)
def test_nine_of_ten_instructions_are_in_long_runs(mode: m.GuestMode) -> None:
    program = make_program(config(mode), 0, 2)
    long = total = 0
    while total < 30_000:
        op = program.fetch()
        if isinstance(op, Touches):
            left = len(op.items) - op.position
            long += left if len(op.items) > 8 else 0
            total += left
            op.position = len(op.items)
        else:
            total += 1
            program.retire(0)
    assert long > 0.9 * total


def test_an_idle_program_only_halts_and_takes_interrupts() -> None:
    program = make_program(config(), 0, 1)
    program.fetch()
    program.idle()
    for _ in range(3):
        assert program.fetch() == Halt()
        program.interrupt(40)
        program.retire(0)


def first_user_store(program: ModesProgram) -> Touches:
    """Goes on to a store to a user page in a run."""
    while True:
        op = program.fetch()
        if not isinstance(op, Touches):
            program.retire(0)
        elif op.items[op.position][0] == USER_WRITE and USER <= op.items[op.position][1] < 2 * USER:
            return op
        else:
            op.position += 1


@pytest.mark.parametrize("mode", MODES[:3])
def test_an_access_that_faults_for_ever_is_retried_then_repaired_then_given_up(mode: m.GuestMode) -> None:
    program = ModesProgram(config(mode), 0, 1)
    run_ = first_user_store(program)
    page = USER  # mapped, writable: the records do not explain the fault
    position = run_.position
    run_.items[position] = USER_WRITE, page, 8, 2
    seen: list[type] = []
    faults = 0
    while (op := program.fetch()) is not run_ or op.items[position][1] == page:
        if op is run_:
            program.page_fault(6, page)
            faults += 1
        elif isinstance(op, Touches):
            seen.append(Touches)
            op.position = len(op.items)
        else:
            seen.append(type(op))
            program.retire(0)
        assert faults < 20
    assert faults == 6
    assert {Invlpg, WriteRegister, Touches} <= set(seen)
    counters = program.counters()
    assert counters["spurious_faults"] == counters["repairs"] == counters["rewrites"] == 1
    assert counters["full_rewrites"] == counters["given_up"] == 1
    assert program.mode is mode


@pytest.mark.parametrize("mode", MODES[:3])
def test_a_store_to_the_own_tables_that_faults_goes_on_after_a_repair_with_paging_off(
    mode: m.GuestMode,
) -> None:
    program = ModesProgram(config(mode), 0, 1)
    layout = ModesLayout(config(mode), 1)
    gpa = layout.frames(0).small8[0] << 12
    store = Touches([(WRITE, gpa, 8, 0)])
    program.push(store)
    program.registers.cr3 = layout.cr3(0, mode, 1)
    program.page_fault(3, gpa)
    off = program.fetch()
    assert isinstance(off, WriteRegister) and off.register is m.ControlRegister.CR0 and not off.value >> 31
    program.retire(0)
    assert program.mode is m.GuestMode.NONPAGING
    stored = program.fetch()
    assert isinstance(stored, Touches) and stored is not store
    while program.fetch() is not store:
        op = program.fetch()
        if isinstance(op, Touches):
            op.position = len(op.items)
        else:
            program.retire(0)
    assert program.mode is mode
    assert program.registers.cr3 == layout.cr3(0, mode, 0)


def test_a_fault_of_a_page_that_the_records_refuse_skips_what_would_fault_likewise() -> None:
    program = ModesProgram(config(m.GuestMode.PAGING32), 0, 1)
    nowhere = USER + (200 << 22)
    items = [(USER_WRITE, nowhere + 8 * n, 8, 0) for n in range(20)]
    hit = (USER_WRITE, USER, 8, 0)
    program.push(Touches([*items, hit]))
    program.page_fault(6, nowhere)
    left = program.fetch()
    assert isinstance(left, Touches) and left.items[left.position :] == [hit]


# --- layout and boot image --------------------------------------------------------------------------------------------


@given(st.integers(1024, 1 << 20), st.integers(1, 62))
def test_nothing_overlaps(pages: int, vcpus: int) -> None:
    try:
        layout = ModesLayout(config(memory_pages=pages), vcpus)
    except ValueError:
        assert pages // vcpus < 200
        return
    used: list[int] = []
    for vcpu in range(vcpus):
        own = layout.frames(vcpu)
        fixed = [*own.root64, *own.l3, *own.l2, *own.root32, own.pdpt, own.window_l2, own.window_l1]
        frames = [*fixed, own.window_l1_32, *own.small8, *own.small4, *own.data]
        assert set(frames) <= set(layout.partition(vcpu))
        assert len(own.data) >= 16
        used += frames
    assert len(set(used)) == len(used)
    assert all(frame % 1024 for frame in used), (
        "a 4 MiB page's first frame is taken for a table without CR4.PSE"
    )
    assert max(used) < layout.window_end <= layout.data_blocks[0]
    assert layout.window_end << 12 <= USER
    assert all(block + 512 <= pages for block in layout.data_blocks)
    assert min(huge_base(pages), pages - 512) <= layout.data_blocks[0] + 511


@pytest.mark.parametrize("vcpus", [1, 4, 8])
def test_the_boot_image_is_aligned_in_memory_and_written_once(vcpus: int) -> None:
    image = boot_image(config(), vcpus)
    addresses = [gpa for gpa, _ in image.words]
    assert len(set(addresses)) == len(addresses)
    assert all(gpa % 8 == 0 and gpa >> 12 < 4096 for gpa in addresses)
    assert all(value < 1 << 64 for _, value in image.words)
    assert [registers.vcpu for registers in image.registers] == list(range(vcpus))


def test_the_host_is_told_of_the_partitions_of_whichever_program_runs() -> None:
    modes, kernel = config(), config(m.GuestMode.PAGING64, workload=m.Workload.ANON)
    assert working_frames(modes, 3) == [ModesLayout(modes, 3).partition(vcpu) for vcpu in range(3)]
    assert working_frames(kernel, 3) != working_frames(modes, 3)


def test_too_little_memory_and_too_many_vcpus_are_refused() -> None:
    with pytest.raises(ValueError, match="are needed"):
        boot_image(config(memory_pages=1024), 40)
    with pytest.raises(ValueError, match="1 to 62"):
        make_program(config(memory_pages=1 << 16), 0, 63)
    with pytest.raises(ValueError, match="vCPU 4 of 4"):
        make_program(config(), 4, 4)
