"""Random interleavings of host operations, hardware accesses and notifiers over one machine, with checks.

Every choice comes from one seeded generator, so a failure is repeated by its seed. This is a small explorer for the
tests of the model: all scheduling points and memory points are used, and TLBs forget nothing by themselves.
"""

from collections import Counter
from random import Random
from typing import Any

from shadowmmu.conform.hardware import Fault
from shadowmmu.kvm import (
    MEMORY_POINTS,
    EntryStatus,
    Instruction,
    InstructionKind,
    Kick,
    MemorySlot,
    MmuLock,
    Operation,
    Outcome,
    Point,
    Srcu,
    Vcpu,
    VcpuMode,
    host,
    kvm_mmu_change_mmu_pages,
    kvm_mmu_invlpg,
    kvm_mmu_notifier_clear_flush_young,
    kvm_mmu_page_fault,
    kvm_mmu_zap_all,
    kvm_set_cr3,
    kvm_set_memory_region,
    kvm_vm_ioctl_get_dirty_log,
    mmu_audit,
    mmu_shrink,
    set_dirty_logging,
    vcpu_enter_guest,
)
from shadowmmu.protocol.events import FrameBacked, FrameRevoked
from tests.kvm.kit import PAGE, READ, TABLE, WRITE, A, P, U, W, World, frame_address, gva, identity_map

ROOTS = (16, 28)
L3 = 17
L2S = (18, 19)
LEAF_TABLES = range(20, 24)
DATA = range(32, 52)  # frames that the guest maps, and now and then uses as tables
ENTRIES = 5  # entries in use at the start of each table
DEVICE_BASES, DEVICE_PAGES = (64, 72), 16  # of a slot that comes, moves and goes
DEVICE = range(64, 88)


class Task:
    """An operation in flight."""

    def __init__(self, name: str, operation: Operation[Any], vcpu: Vcpu | None) -> None:
        self.name = name
        self.operation = operation
        self.vcpu = vcpu
        self.effect: object = None
        self.waiting: list[tuple[int, int]] = []  # kicked (vCPU, entry) that have not left yet
        self.readers: list[Task] = []  # that may know the old memory slots


class Interleaver:
    """`run(steps)` makes that many random choices; raises AssertionError at the first check that fails.

    With `memslots`, a slot comes, moves and goes, and guests use its frames too.
    """

    def __init__(
        self, seed: int, profile: str = "fixed", vcpus: int = 3, checks: bool = True, memslots: bool = False
    ) -> None:
        self.random = Random(seed)
        self.world = World(vcpus, profile, npages=64)
        self.kvm = self.world.kvm
        self.kvm.memory_points = MEMORY_POINTS
        self.entries = [0] * vcpus
        self.tasks: list[Task] = []
        self.owner: Task | None = None
        self.checks = checks
        self.data = (*DATA, *DEVICE) if memslots else tuple(DATA)
        self.memslots = memslots
        self.revoked: set[int] = set()
        self.seen: Counter[str] = Counter()
        self._current: object = None
        self._events = 0
        self._retries = [0] * vcpus
        world = self.world
        identity_map(world, pages=32)  # tables, not data: what maps data is to be rare
        for root in ROOTS:
            world.set_gpte(root, 0, L3, TABLE)
            world.set_gpte(root, 1, world.gpte(16, 1) >> 12, TABLE)  # the mapping of all frames stays
        for index in range(2):
            world.set_gpte(L3, index, L2S[index], TABLE)
        for table in (*L2S, *LEAF_TABLES, *DATA):
            for index in range(ENTRIES):
                world.set_gpte(table, index, *self._random_entry(table))
        world.boot()

    def _random_entry(self, table: int) -> tuple[int, int]:
        """What a guest may put into a table: mostly what suits its level."""
        random = self.random
        if table == L3:
            return random.choice(L2S), random.choice((TABLE, TABLE, P | U | A))
        if table in L2S:
            return random.choice((*LEAF_TABLES, random.choice(self.data))), random.choice((TABLE, TABLE, 0))
        bits = random.choice((0, PAGE, PAGE, PAGE, P | U | A, P | W | U | A, P | W | U))
        return random.choice((*LEAF_TABLES, *self.data)), bits

    def run(self, steps: int) -> None:
        self.run_unaudited(steps)
        assert mmu_audit(self.kvm) == []

    def run_unaudited(self, steps: int) -> None:
        """The same for a kernel whose bugs may leave its structures broken."""
        for _ in range(steps):
            self._step()
            self._check()
        while self.tasks:  # let everything end
            self._finish_some()
            self._check()

    # One step

    def _step(self) -> None:
        """Mostly go on with the same vCPU or operation: races need one to be slow while others do a lot."""
        busy = {task.vcpu for task in self.tasks}
        actors: list[Any] = [task for task in self.tasks if self._can_run(task)]
        actors += [vcpu for vcpu in self.world.vcpus if vcpu not in busy]
        if self.random.random() < 0.01 and not any(task.vcpu is None for task in self.tasks):
            actors = [None]
        if not actors:
            actors = [v for v in self.world.vcpus if v.mode is VcpuMode.EXITING_GUEST_MODE]
        actor = self.random.choice(actors)
        if self.random.random() < 0.9:
            actor = next((a for a in actors if getattr(a, "vcpu", a) is self._current), actor)
        self._current = getattr(actor, "vcpu", actor)
        if actor is None:
            self._start_host()
        elif isinstance(actor, Task):
            self._resume(actor)
        else:
            self._act(actor)

    def _finish_some(self) -> None:
        for vcpu in self.world.vcpus:
            if vcpu.mode is VcpuMode.EXITING_GUEST_MODE:
                self._exit(vcpu)
        ready = [task for task in self.tasks if self._can_run(task)]
        assert ready, "deadlock"
        self._resume(self.random.choice(ready))

    def _can_run(self, task: Task) -> bool:
        if task.effect is MmuLock.ACQUIRE:
            return self.owner is None
        if isinstance(task.effect, Kick):
            task.waiting = [
                (vcpu_id, entry)
                for vcpu_id, entry in task.waiting
                if self.entries[vcpu_id] == entry
                and self.world.vcpus[vcpu_id].mode is not VcpuMode.OUTSIDE_GUEST_MODE
            ]
            return not task.waiting
        if task.effect is Srcu.SYNCHRONIZE:
            return not any(reader in self.tasks for reader in task.readers)
        return True

    def _resume(self, task: Task) -> None:
        answer: bool | None = None
        if task.effect is MmuLock.ACQUIRE:
            assert self.owner is None
            self.owner = task
        elif isinstance(task.effect, Kick):
            answer = bool(task.effect.vcpus)
        try:
            task.effect = next(task.operation) if task.effect is None else task.operation.send(answer)
        except StopIteration as stop:
            self.tasks.remove(task)
            self._ended(task, stop.value)
            return
        if isinstance(task.effect, Point):
            self.seen[task.effect.name] += 1
        elif isinstance(task.effect, Kick):
            task.waiting = [(vcpu_id, self.entries[vcpu_id]) for vcpu_id in task.effect.vcpus]
        elif task.effect is Srcu.SYNCHRONIZE:
            task.readers = [other for other in self.tasks if other.vcpu is not None]
        elif task.effect is MmuLock.RELEASE:
            assert self.owner is task
            self.owner = None

    def _start(self, name: str, operation: Operation[Any], vcpu: Vcpu | None = None) -> None:
        self.tasks.append(Task(name, operation, vcpu))

    # vCPUs

    def _exit(self, vcpu: Vcpu) -> None:
        vcpu.mode = VcpuMode.OUTSIDE_GUEST_MODE
        if not any(task.vcpu is vcpu for task in self.tasks):
            self._start("vcpu_enter_guest", vcpu_enter_guest(vcpu), vcpu)

    def _ended(self, task: Task, result: Any) -> None:
        vcpu = task.vcpu
        if vcpu is None:
            return
        if task.name == "vcpu_enter_guest":
            assert result.status is EntryStatus.OK
            assert vcpu.mode is VcpuMode.IN_GUEST_MODE or vcpu.mode is VcpuMode.EXITING_GUEST_MODE
            self.entries[vcpu.vcpu_id] += 1
            if result.hw_flushes or result.root_loaded:
                self.world.tlbs[vcpu.vcpu_id].clear()
        else:
            if task.name == "kvm_mmu_page_fault":
                self._retries[vcpu.vcpu_id] = (
                    self._retries[vcpu.vcpu_id] + 1 if result.outcome is Outcome.RETRY else 0
                )
            self._start("vcpu_enter_guest", vcpu_enter_guest(vcpu), vcpu)

    def _act(self, vcpu: Vcpu) -> None:
        """A vCPU without an operation does something."""
        random = self.random
        if vcpu.mode is VcpuMode.OUTSIDE_GUEST_MODE:
            self._start("vcpu_enter_guest", vcpu_enter_guest(vcpu), vcpu)
            return
        if vcpu.mode is VcpuMode.EXITING_GUEST_MODE and random.random() < 0.5:
            self._exit(vcpu)
            return
        if random.random() < 0.3:  # computes for a while, its TLB full
            self._current = random.choice(self.world.vcpus)
            return
        what = random.random()
        address = gva(0, random.randrange(2), random.randrange(ENTRIES), random.randrange(ENTRIES))
        if what < 0.03:
            vcpu.mode = VcpuMode.OUTSIDE_GUEST_MODE
            self.world.tlbs[vcpu.vcpu_id].pop(address >> 12, None)
            self._start("kvm_mmu_invlpg", kvm_mmu_invlpg(vcpu, address), vcpu)
        elif what < 0.05:
            vcpu.mode = VcpuMode.OUTSIDE_GUEST_MODE
            self._start("kvm_set_cr3", kvm_set_cr3(vcpu, random.choice(ROOTS) << 12), vcpu)
        elif what < 0.4:  # a store to a table
            self._store_to_table(vcpu)
        else:
            kind = random.choice((READ, WRITE))
            self._access(vcpu, address + 8 * random.randrange(8) + 2048, kind, random.getrandbits(32))

    def _store_to_table(self, vcpu: Vcpu) -> None:
        table = self.random.choice((L3, *L2S, *LEAF_TABLES, *LEAF_TABLES))
        gfn, bits = self._random_entry(table)
        address = frame_address(table, 8 * self.random.randrange(2 if table == L3 else ENTRIES))
        self._access(vcpu, address, WRITE, gfn << 12 | bits if bits else 0)

    def _access(self, vcpu: Vcpu, address: int, kind: InstructionKind, value: int) -> None:
        write = kind is WRITE
        pfn = self.world.translate(vcpu, address, write)
        if isinstance(pfn, Fault):
            vcpu.mode = VcpuMode.OUTSIDE_GUEST_MODE
            instruction = Instruction(kind, address, 8, value, user=True)
            self._start(
                "kvm_mmu_page_fault", kvm_mmu_page_fault(vcpu, address, pfn.error_code, instruction), vcpu
            )
            return
        if self.checks:
            assert pfn not in self.revoked, f"host frame {pfn} can be used after it was revoked"
        self.world._perform(pfn, address, write, value)

    # The rest of the host

    def _start_host(self) -> None:
        random, kvm = self.random, self.kvm
        if self.memslots and random.random() < 0.5:
            self._start("set_memory_region", self._set_memory_region())
            return
        gfn = random.choice((*LEAF_TABLES, *DATA, *DATA))
        name, operation = random.choice(
            (
                lambda: ("unmap", host.unmap(kvm, gfn)),
                lambda: ("reclaim", host.reclaim(kvm, gfn)),
                lambda: ("unmap_range", host.unmap_range(kvm, gfn, 4)),
                lambda: (
                    "move",
                    host.move(kvm, gfn, kvm.host.take_pfn(kvm.host.slot(gfn)), random.random() < 0.5),
                ),
                lambda: ("age", kvm_mmu_notifier_clear_flush_young(kvm, gfn)),
                lambda: ("set_dirty_logging", set_dirty_logging(kvm, 0, random.random() < 0.5)),
                lambda: ("dirty_log", kvm_vm_ioctl_get_dirty_log(kvm, 0)),
                lambda: ("shrink", mmu_shrink(kvm, 1)),
                lambda: ("zap_all", kvm_mmu_zap_all(kvm)),
                lambda: ("set_mmu_pages", kvm_mmu_change_mmu_pages(kvm, random.choice((64, 70)))),
            )
        )()
        self._start(name, operation)

    def _set_memory_region(self) -> Operation[None]:
        """The slot of the device comes, moves or goes; its memory goes with it."""
        kvm = self.kvm
        old = kvm.memslot(1)
        base = self.random.choice(DEVICE_BASES)
        log = self.random.choice((True, False, None))
        if old is not None and self.random.random() < 0.4:
            slot = yield from kvm_set_memory_region(kvm, MemorySlot(1, base, 0))
            yield from host.munmap(kvm, slot)
        else:
            yield from kvm_set_memory_region(kvm, MemorySlot(1, base, DEVICE_PAGES), log)

    # Checks

    def _check(self) -> None:
        for event in self.world.events[self._events :]:
            if isinstance(event, FrameRevoked):
                self.revoked.add(event.pfn)
                if self.checks:
                    self._check_revoked(event.pfn)
            elif isinstance(event, FrameBacked):
                self.revoked.discard(event.pfn)
        self._events = len(self.world.events)
        if self.owner is not None or not self.checks:
            return
        for vcpu_id, gfn in self.world.breaches():
            raise AssertionError(f"vCPU {vcpu_id} can write frame {gfn}, a table in sync")
        if self.random.random() < 0.1:
            assert mmu_audit(self.kvm) == []

    def _check_revoked(self, pfn: int) -> None:
        """The notifier has returned: no vCPU in guest mode may still have the frame in its TLB."""
        for vcpu in self.world.vcpus:
            if vcpu.mode is not VcpuMode.OUTSIDE_GUEST_MODE:
                frames = {frame for frame, _ in self.world.tlbs[vcpu.vcpu_id].values()}
                assert pfn not in frames, f"host frame {pfn} can be used after it was revoked"
