"""Loads on a processor without a hypervisor: each does what its benchmark does, and leaves nothing behind."""

from __future__ import annotations

import copy
from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowmmu.cpu.guest.paging import frame_of
from shadowmmu.cpu.loads import WORK, Load, LoadConfig, LoadProgram, load_boot_image, make_load, memory_needed
from shadowmmu.cpu.loads.layout import LoadLayout
from shadowmmu.cpu.program import Touches
from shadowmmu.protocol.messages import RunConfig
from tests.cpu.plain import PlainMmu

LOADS = list(Load)
SMALL = {
    Load.FORK: {},
    Load.PAGE_FAULT: {"pages": 70},
    Load.MMAP: {"pages": 200},
    Load.TOUCH: {"pages": 100},
    Load.REMAP: {"pages": 200, "tables": 4, "edits": 5},
}


def config(load: Load, **changes: object) -> LoadConfig:
    return LoadConfig(**{"load": load, **SMALL.get(load, {}), **changes})  # type: ignore[arg-type]


class Guest:
    """A load that runs alone. `work`: all that it did."""

    def __init__(self, load: LoadConfig, seed: int = 1) -> None:
        run = RunConfig(memory_pages=memory_needed(load, 1), seed=seed)
        self.program = make_load(load, run, 0, 1)
        self.mmu = PlainMmu(load_boot_image(load, run, 1))
        self.work: Counter[str] = Counter()

    def iterate(self, iterations: int = 1) -> None:
        """Until so many more iterations are complete."""
        goal = self.program.iterations + iterations
        while True:
            self.program.fetch()
            self.work.update(self.program.work)
            self.program.work.clear()
            if self.program.iterations >= goal:
                return
            self.mmu.step(self.program)

    def begin(self) -> None:
        """After the first two iterations: whatever is set up once is set up."""
        self.iterate(2)
        self.work.clear()
        self.mmu.counts.clear()


def frames_in_use(program: LoadProgram) -> tuple[int, int, int]:
    """Free frames, references to data, and tables."""
    memory = program.memory
    return (
        len(memory.pool.free),
        sum(memory.pool.refs.values()),
        sum(len(space.tables) + len(space.roots()) for space in memory.spaces),
    )


@pytest.mark.parametrize("kpti", [False, True])
@pytest.mark.parametrize("load", LOADS)
def test_an_iteration_leaves_memory_as_it_was(load: Load, kpti: bool) -> None:
    guest = Guest(config(load, kpti=kpti))
    guest.begin()
    before = frames_in_use(guest.program)
    for _ in range(5):
        guest.iterate()
        # The next iteration has begun with a system call or an access, neither of which has taken anything yet.
        assert frames_in_use(guest.program) == before


@pytest.mark.parametrize("load", LOADS)
def test_every_frame_is_free_or_in_use_and_never_both(load: Load) -> None:
    load_config = config(load)
    guest = Guest(load_config)
    run = RunConfig(memory_pages=memory_needed(load_config, 1))
    for _ in range(4):
        guest.iterate()
        memory = guest.program.memory
        tables = [t.frame for space in memory.spaces for t in (*space.roots(), *space.tables.values())]
        frames = memory.pool.free + list(memory.pool.refs) + tables + [space.stack for space in memory.spaces]
        assert sorted(frames) == list(LoadLayout(load_config, run, 1).partition(0))


@pytest.mark.parametrize("load", LOADS)
def test_the_kernels_records_are_what_guest_memory_holds(load: Load) -> None:
    guest = Guest(config(load))
    for _ in range(3):
        guest.iterate()
        for space in guest.program.memory.spaces:
            for table in (*space.roots(), *space.tables.values()):
                accessed_and_dirty = 0x60
                held = {
                    index: guest.mmu.read(table.frame, index) | accessed_and_dirty
                    for index in range(512)
                    if guest.mmu.read(table.frame, index)
                }
                assert held == {index: entry | accessed_and_dirty for index, entry in table.entries.items()}


@pytest.mark.parametrize("load", LOADS)
def test_references_are_the_entries_that_name_a_frame(load: Load) -> None:
    guest = Guest(config(load))
    for _ in range(3):
        guest.iterate()
        memory = guest.program.memory
        named = Counter(frame_of(entry) for space in memory.spaces for _, entry in space.mapped())
        named.update([*memory.text, *memory.file])  # the page cache's
        assert named == memory.pool.refs


@pytest.mark.parametrize("load", LOADS)
def test_a_program_goes_on_from_its_state(load: Load) -> None:
    guest, other = Guest(config(load)), Guest(config(load), seed=2)
    guest.mmu.run(guest.program, 777)
    other.program.restore(guest.program.state())
    other.mmu = copy.deepcopy(guest.mmu)
    for each in (guest, other):
        each.mmu.run(each.program, 1000)
    assert other.program.state() == guest.program.state()
    assert other.mmu.words == guest.mmu.words


@pytest.mark.parametrize("load", LOADS)
def test_all_work_has_a_name_that_a_cost_model_knows(load: Load) -> None:
    guest = Guest(config(load, kpti=True))
    guest.iterate(3)
    assert guest.work.keys() <= WORK.keys()


def test_every_name_of_work_is_done_by_some_load() -> None:
    done: set[str] = set()
    for load in LOADS:
        guest = Guest(config(load, kpti=True))
        guest.iterate(3)
        done |= guest.work.keys()
    assert done == WORK.keys()


# --- what each load is ----------------------------------------------------------------------------------------------


def test_fork_copies_and_protects_each_own_page_and_the_child_takes_its_text_by_faults() -> None:
    guest = Guest(
        config(Load.FORK, pages=40, text_pages=32, child_reads=32, child_writes=8, parent_writes=12)
    )
    guest.begin()
    guest.iterate(10)
    per_iteration = {name: count / 10 for name, count in guest.work.items()}
    assert per_iteration["fork"] == per_iteration["exit"] == 1
    assert per_iteration["pte_copy"] == 40
    # Two faults around 16 pages for the text, 8 writes of the child, 12 of the parent, two of them before it waits.
    assert per_iteration["fault_handler"] == 2 + 8 + 12
    assert per_iteration["page_copy"] == 8, "the parent's two early writes copy, and the child's other six"
    assert per_iteration["pte_clear"] == 40 + 32, "what the child has mapped at its end"
    assert guest.mmu.counts["Invlpg"] == 10 * 8, "a page that is copied is invalidated"
    assert guest.mmu.counts["WriteRegister"] == 10 * 4, "two switches, and two flushes of everything"


def test_fork_writes_each_protected_entry_of_the_parent_once() -> None:
    guest = Guest(config(Load.FORK, parent_writes=12))
    guest.begin()
    writable = [gva for gva, entry in guest.program.here.mapped() if entry & 2]
    assert len(writable) == 12


def test_page_faults_map_as_many_pages_as_the_window_has() -> None:
    for window in (1, 4, 16):
        guest = Guest(config(Load.PAGE_FAULT, pages=64, fault_around=window))
        guest.begin()
        guest.iterate(4)
        assert guest.work["fault_handler"] == 4 * 64 // window
        assert guest.work["pte_map"] == 4 * 64


def test_a_protection_fault_is_one_signal() -> None:
    guest = Guest(config(Load.PROTECTION_FAULT))
    guest.begin()
    guest.iterate(20)
    assert guest.work["signal"] == guest.work["fault_handler"] == guest.mmu.counts["fault"] == 20


def test_mmap_writes_to_a_tenth_of_the_file_in_steps_of_four_pages() -> None:
    guest = Guest(config(Load.MMAP, pages=400))
    guest.begin()
    guest.iterate(3)
    assert guest.work["fault_handler"] == guest.work["pte_map"] == guest.work["pte_clear"] == 3 * 10


@pytest.mark.parametrize("kpti, writes", [(False, 0), (True, 2)])
def test_a_system_call_writes_cr3_twice_under_isolation(kpti: bool, writes: int) -> None:
    guest = Guest(config(Load.GETPID, kpti=kpti))
    guest.begin()
    guest.iterate(10)
    assert guest.mmu.counts["WriteRegister"] == 10 * writes
    assert guest.work["syscall"] == 10


def test_touch_needs_no_kernel() -> None:
    guest = Guest(config(Load.TOUCH, pages=100))
    guest.iterate(5)
    assert guest.work == Counter()
    assert guest.mmu.counts == Counter(touch=500, walk=len(guest.mmu.tlb))


@pytest.mark.parametrize("processes", [2, 5])
def test_each_context_switch_runs_the_next_process(processes: int) -> None:
    guest = Guest(config(Load.CONTEXT_SWITCH, processes=processes))
    roots = set()
    for _ in range(processes):
        guest.iterate()
        roots.add(guest.mmu.cr3)
    assert len(roots) == processes


@pytest.mark.parametrize("share, late", [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_remap_edits_all_tables_and_a_share_of_them_last(share: float, late: int) -> None:
    guest = Guest(config(Load.REMAP, table_share=share))
    guest.begin()
    guest.iterate(6)
    assert guest.work["munmap"] + guest.work["mprotect"] == 6 * 4
    assert guest.work["fault_handler"] == 6 * 4 * 5
    assert guest.mmu.counts["Invlpg"] == 6 * late * 5
    assert guest.mmu.counts["WriteRegister"] == 6


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_remap_protects_a_share_of_what_it_edits(share: float) -> None:
    guest = Guest(config(Load.REMAP, protect_share=share))
    guest.begin()
    guest.iterate(8)
    assert guest.work["mprotect"] == 8 * 4 * share


# --- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", LOADS)
def test_256_processors_fit_and_have_memory_of_their_own(load: Load) -> None:
    load_config = config(load)
    run = RunConfig(memory_pages=memory_needed(load_config, 256))
    assert run.memory_pages <= 1 << 20
    image = load_boot_image(load_config, run, 256)
    gpas = [gpa for gpa, _ in image.words]
    assert len(set(gpas)) == len(gpas)
    assert len({registers.cr3 for registers in image.registers}) == 256
    last = make_load(load_config, run, 255, 256)
    mmu = PlainMmu(image, 255)
    mmu.run(last, 2000)
    assert last.iterations > 0


def test_one_block_less_than_needed_is_refused() -> None:
    needed = memory_needed(config(Load.FORK), 64)
    LoadLayout(config(Load.FORK), RunConfig(memory_pages=needed), 64)
    with pytest.raises(ValueError, match=rf"64 vCPUs needs {needed} pages"):
        LoadLayout(config(Load.FORK), RunConfig(memory_pages=needed - 512), 64)


@pytest.mark.parametrize("vcpus", [0, 257])
def test_no_processors_and_too_many_are_refused(vcpus: int) -> None:
    with pytest.raises(ValueError, match="1 to 256 vCPUs"):
        load_boot_image(config(Load.TOUCH), RunConfig(), vcpus)


@pytest.mark.parametrize(
    "bad",
    [
        {"pages": -1},
        {"write_share": 1.5},
        {"fault_around": 12},
        {"processes": 1},
        {"load": "remap", "pages": 3, "tables": 4},
        {"load": "remap", "pages": 3000, "tables": 4},
        {"load": "fork-bomb"},
        {"unknown": 1},
    ],
)
def test_bad_configurations_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(bad, LoadConfig)


@given(
    st.builds(
        LoadConfig,
        load=st.sampled_from(LOADS),
        pages=st.integers(4, 700),
        text_pages=st.integers(0, 90),
        child_reads=st.integers(0, 90),
        child_writes=st.integers(0, 90),
        parent_writes=st.integers(0, 90),
        fault_around=st.sampled_from([1, 16, 512]),
        tables=st.integers(2, 4),
        kpti=st.booleans(),
    )
)
@settings(max_examples=40, deadline=None)
def test_any_size_fits_the_memory_that_it_is_said_to_need(load: LoadConfig) -> None:
    guest = Guest(load)
    guest.iterate(2)
    free = len(guest.program.memory.pool.free)
    guest.iterate(1)
    assert len(guest.program.memory.pool.free) == free


def test_a_processor_that_faults_for_ever_gets_past_the_access() -> None:
    guest = Guest(config(Load.TOUCH))
    run = guest.program.fetch()
    assert isinstance(run, Touches)
    for _ in range(9):
        while guest.program.fetch() is not run:
            guest.mmu.step(guest.program)
        guest.program.page_fault(0, run.items[0][1])
    assert run.position == 1
    assert guest.program.counters()["skipped"] == 1


def test_an_idle_program_halts_for_ever() -> None:
    guest = Guest(config(Load.FORK))
    guest.iterate()
    guest.program.idle()
    guest.mmu.run(guest.program, 10)
    assert guest.mmu.counts["Halt"] == 10
