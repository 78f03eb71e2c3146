"""Guest programs on an ideal machine: they go on whatever happens, keep their promises, and can be stored."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowmmu.cpu import Layout, boot_image, huge_base, make_program
from shadowmmu.cpu.guest.kernel import Kernel
from shadowmmu.cpu.guest.layout import ALIAS_SLOT, DIRECT_MAP, MAX_VCPUS
from shadowmmu.cpu.guest.memory import FIRST_TABLE_IN_VIEW
from shadowmmu.cpu.guest.paging import frame_of
from shadowmmu.cpu.guest.shootdown import SHOOTDOWN_VECTOR, WAKE_VECTOR
from shadowmmu.cpu.guest.steps import STEPS, Step
from shadowmmu.cpu.guest.workloads import RECIPES, Recipe
from shadowmmu.cpu.program import LockedAccess, Program, Touches, UsedLoad
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import AccessFlag
from tests.cpu.ideal import IdealMachine

WRITE = int(AccessFlag.WRITE)
USER_WRITE = int(AccessFlag.USER | AccessFlag.WRITE)
WORKLOADS = [workload for workload in m.Workload if workload is not m.Workload.MODES]
"""Those of the 64-bit kernel."""
SLOPPY = (m.Workload.SLOPPY, m.Workload.MIXED)
EPISODES = sorted(
    {episode for recipe in RECIPES.values() for _, episode in recipe.episodes}, key=lambda e: e.__name__
)


def config(workload: m.Workload = m.Workload.MIXED, **changes: object) -> m.RunConfig:
    return m.RunConfig(**{"workload": workload, "ops": 20_000, "seed": 1, **changes})  # type: ignore[arg-type]


class Watch:
    """Looks at every access when it is applied.

    `strays`: accesses of users to frames that are not in use as data, or of others to an arena by a translation that
    its owner has taken back (and has, as far as it knows, made everybody forget).
    """

    def __init__(self) -> None:
        self.machine: IdealMachine | None = None
        self.strays = 0

    def __call__(self, vcpu: int, access: m.LoggedAccess) -> None:
        flags, gva, pfn, size, value = access
        assert (gva & 0xFFF) + size <= 0x1000
        if gva >= DIRECT_MAP:
            return
        if flags & USER_WRITE == USER_WRITE:
            assert not value & 1 and not gva & 7, "data cannot make a present paging entry"
        assert self.machine is not None
        kernels = [self.machine.kernel(n) for n in range(len(self.machine.vcpus))]
        layout = kernels[0].layout
        holders = [kernel for kernel in kernels if pfn in layout.partition(kernel.vcpu)]
        if holders:
            self.strays += pfn not in holders[0].memory.pool.refs
        else:
            assert pfn >= layout.data_blocks[0], "only data frames are mapped for users"
        owner = kernels[(gva >> 30) % ALIAS_SLOT]
        if owner.vcpu != vcpu and not any(
            isinstance(item, Step) and item.name in MAKING_OTHERS_FORGET for item in owner.stack
        ):
            space = layout.spaces.index(self.machine.vcpus[vcpu].cr3 >> 12)
            self.strays += not allowed(owner, space, gva >> 12 & 0x3FFFF, pfn, bool(flags & WRITE))


MAKING_OTHERS_FORGET = {"ask", "ask_those", "await_acks", "check_acks"}


def allowed(owner: Kernel, space: int, page: int, pfn: int, write: bool) -> bool:
    """Whether the owner of an arena has `page` mapped so."""
    arena = owner.memory.arenas[space]
    index = page >> 9
    above = arena.directory.entries.get(index, 0)
    entry = above + ((page & 511) << 12) if arena.table_of(page) is None else arena.entry(page)
    return bool(entry & 1) and frame_of(entry) == pfn and (not write or bool(entry & above & 2))


def run(run_config: m.RunConfig, vcpus: int) -> tuple[IdealMachine, Watch]:
    watch = Watch()
    machine = watch.machine = IdealMachine(run_config, vcpus, watch=watch)
    machine.run()
    return machine, watch


@pytest.mark.parametrize("vpid", [True, False])
@pytest.mark.parametrize("vcpus", [1, 4])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_workload_runs_to_its_end_and_nobody_uses_a_frame_that_is_free_or_a_table(
    workload: m.Workload, vcpus: int, vpid: bool
) -> None:
    machine, watch = run(config(workload, vpid=vpid), vcpus)
    for number, vcpu in enumerate(machine.vcpus):
        assert vcpu.core.instructions >= 20_000 // vcpus
        check_frames(machine.kernel(number))
    if workload not in SLOPPY:
        assert watch.strays == 0


@pytest.mark.parametrize("workload", [m.Workload.FORK, m.Workload.MPROTECT])
def test_without_shootdowns_that_would_be_seen(workload: m.Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STEPS, "ask", lambda _kernel, _what, _gva: None)
    _, watch = run(config(workload, ops=40_000), 4)
    assert watch.strays > 0


@pytest.mark.parametrize("vcpus, pages", [(8, 1024), (8, 4096), (3, 1500), (16, 8192)])
def test_mixed_runs_with_more_vcpus_and_less_memory(vcpus: int, pages: int) -> None:
    machine, _ = run(config(ops=30_000, memory_pages=pages), vcpus)
    served = sum(machine.kernel(n).counters().get("requests_served", 0) for n in range(vcpus))
    assert served > 0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1 << 32), vcpus=st.integers(2, 5), kicks=st.sampled_from([0.0, 0.05, 0.3]))
def test_shootdowns_end_whatever_the_order(seed: int, vcpus: int, kicks: float) -> None:
    watch = Watch()
    run_config = config(m.Workload.MMAP_CHURN, seed=seed, ops=8000)
    machine = watch.machine = IdealMachine(run_config, vcpus, watch=watch, kick_rate=kicks)
    machine.run()
    assert watch.strays == 0


def check_frames(kernel: Kernel) -> None:
    """No frame is free twice, or free and in use, or used as data and as a table; few are on their way."""
    pool = kernel.memory.pool
    tables = [arena.directory.frame for arena in kernel.memory.arenas]
    for arena in kernel.memory.arenas:
        tables += [table.frame for index, table in arena.tables.items() if index < FIRST_TABLE_IN_VIEW]
    uses = Counter([*pool.free, *pool.refs, *tables])
    assert max(uses.values()) == 1
    partition = kernel.layout.partition(kernel.vcpu)
    assert set(uses) <= set(partition)
    assert len(partition) - len(uses) <= 24


@pytest.mark.parametrize("episode", EPISODES, ids=lambda episode: episode.__name__)
def test_each_episode_alone_over_and_over(episode: object, monkeypatch: pytest.MonkeyPatch) -> None:
    # With `grow`, so that there is something to work on.
    (grow,) = [candidate for candidate in EPISODES if candidate.__name__ == "grow"]
    recipe = Recipe(((4, episode), (1, grow)), 40)  # type: ignore[arg-type]
    monkeypatch.setitem(RECIPES, m.Workload.ANON, recipe)
    machine, _ = run(config(m.Workload.ANON, ops=6000, memory_pages=1024), 2)
    for number in range(2):
        check_frames(machine.kernel(number))


def test_the_same_seed_gives_the_same_run() -> None:
    first, again, other = (run(config(seed=seed), 3)[0] for seed in (5, 5, 6))
    states = [[program.state() for program in machine.programs] for machine in (first, again, other)]
    assert states[0] == states[1] != states[2]
    assert first.memory == again.memory


def play(program: Program, steps: int, seed: int) -> list[object]:
    """Executes instructions with made-up answers."""
    trace: list[object] = []
    number = seed
    for _ in range(steps):
        number = number * 1103515245 + 12345 & 0x7FFFFFFF
        op = program.fetch()
        trace.append(repr(op))
        if number % 97 == 0:
            program.interrupt(SHOOTDOWN_VECTOR if number % 2 else WAKE_VECTOR)
        elif isinstance(op, Touches):
            if number % 31 == 0:
                program.page_fault(number >> 8 & 7, op.items[op.position][1])
            else:
                op.position = min(len(op.items), op.position + 1 + number % 50)
        elif isinstance(op, UsedLoad | LockedAccess) and number % 41 == 0:
            program.page_fault(number >> 8 & 7, op.gva)
        else:
            program.retire(number % 5)
    return trace


@pytest.mark.parametrize("workload", m.Workload)
@settings(max_examples=8, deadline=None)
@given(before=st.integers(0, 3000), seed=st.integers(1, 1 << 20))
def test_a_stored_program_goes_on_where_it_was(workload: m.Workload, before: int, seed: int) -> None:
    run_config = config(workload, seed=seed)
    program = make_program(run_config, 1, 3)
    play(program, before, seed)
    stored = program.state()
    restored = make_program(run_config, 1, 3)
    restored.restore(stored)
    assert restored.state() == stored
    assert play(program, 400, seed + 1) == play(restored, 400, seed + 1)
    assert program.state() == restored.state()
    assert len(stored) < 64_000


def test_an_access_that_faults_for_ever_is_given_up_and_counted() -> None:
    program = make_program(config(m.Workload.ANON), 0, 1)
    op = program.fetch()
    while not (isinstance(op, Touches) and op.items[op.position][0] == USER_WRITE):
        if isinstance(op, Touches):
            op.position = len(op.items)
        else:
            program.retire(0)
        op = program.fetch()
    gva = 3 << 12  # mapped, writable: the records do not explain the fault
    op.items[op.position] = USER_WRITE, gva, 8, 2
    faults = 0
    while True:
        current = program.fetch()
        assert isinstance(current, Touches | UsedLoad) or current.__struct_config__.tag == "invlpg"
        if current is op and op.items[op.position] == (USER_WRITE, gva, 8, 2):
            program.page_fault(6, gva)
            faults += 1
        elif current is op:
            break
        elif isinstance(current, Touches):
            current.position = len(current.items)
        else:
            program.retire(0)
    assert faults == 9
    assert program.counters()["faults_for_ever"] == 1
    assert program.counters()["repairs"] > 0


# --- layout and boot image --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pages, base", [(1024, 1024), (2048, 1536), (4096, 3072), (5000, 3976)])
def test_the_last_quarter_in_whole_blocks_has_large_host_pages(pages: int, base: int) -> None:
    assert huge_base(pages) == base


@given(st.integers(1024, 1 << 20), st.integers(1, MAX_VCPUS))
def test_nothing_overlaps(pages: int, vcpus: int) -> None:
    try:
        layout = Layout(config(memory_pages=pages), vcpus)
    except ValueError:
        assert pages // vcpus < 200
        return
    kernel = [layout.kernel_l3, *layout.direct_l2, *layout.direct_l1.values(), layout.window_l2]
    kernel += [*layout.window_l1, layout.words, *layout.cpu_data, *layout.spaces, *layout.space_l3]
    assert len(set(kernel)) == len(kernel)
    assert 0 not in kernel
    previous = max(kernel)
    for vcpu in range(vcpus):
        partition = layout.partition(vcpu)
        assert previous < partition.start < partition.stop <= layout.data_blocks[0]
        previous = partition.stop - 1
    assert all(block % 512 == 0 and block + 512 <= pages for block in layout.data_blocks)


@pytest.mark.parametrize("vcpus", [1, 4, 8])
def test_the_boot_image_is_aligned_in_memory_and_written_once(vcpus: int) -> None:
    image = boot_image(config(), vcpus)
    addresses = [gpa for gpa, _ in image.words]
    assert len(set(addresses)) == len(addresses)
    assert all(gpa % 8 == 0 and gpa >> 12 < 4096 for gpa in addresses)
    assert [registers.vcpu for registers in image.registers] == list(range(vcpus))
    assert all(registers.efer == 0xD01 and registers.cr0 == 0x8001_0001 for registers in image.registers)


def test_too_little_memory_and_too_many_vcpus_are_refused() -> None:
    with pytest.raises(ValueError, match="are needed"):
        boot_image(config(memory_pages=1024), 40)
    with pytest.raises(ValueError, match="1 to 62"):
        make_program(config(memory_pages=1 << 16), 0, 63)
    with pytest.raises(ValueError, match="vCPU 4 of 4"):
        make_program(config(), 4, 4)
