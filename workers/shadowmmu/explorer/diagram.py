"""A sequence diagram of one execution: who did what, in order, in lanes of vCPUs, mmu_lock and host threads.

The execution is made again, and listened to; what the events do not tell (shadow entries, where an operation stands
when another goes on) is looked up in the world between two steps. Steps that show nothing (levels of a walk, points at
which nobody else went on) leave no row. `diagram_text` and `diagram_svg` draw it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Final

import msgspec

from shadowmmu.checker import Violation
from shadowmmu.explorer.actors import KIND, Actor, number
from shadowmmu.explorer.choosers import FollowChooser
from shadowmmu.explorer.diagram_names import Names
from shadowmmu.explorer.diagram_state import (
    describe_entry,
    differ,
    shadow_entries,
    state_lines,
    table_lines,
    translation,
)
from shadowmmu.explorer.execution import describe
from shadowmmu.explorer.scenario import HostStep, Scenario
from shadowmmu.explorer.trail import HANDLER, host_task, standing
from shadowmmu.explorer.world import World
from shadowmmu.kvm import Point
from shadowmmu.machine import Task
from shadowmmu.machine.coverage import WaitPoint
from shadowmmu.protocol import events as ev
from shadowmmu.protocol.events import AccessFlag, Event, InvalidationCause

__all__ = ["Diagram", "Lane", "LaneKind", "Row", "RowKind", "draw"]


class LaneKind(enum.Enum):
    """What a lane stands for."""

    VCPU = "vcpu"
    LOCK = "lock"
    HOST = "host"


class Lane(msgspec.Struct, frozen=True):
    """A column: its heading."""

    kind: LaneKind
    name: str


class RowKind(enum.Enum):
    """What a row says; renderers choose colours by it."""

    INSTRUCTION = "instruction"  # as written in the scenario
    EFFECT = "effect"  # memory was loaded or stored
    TLB = "tlb"
    MODE = "mode"  # into or out of guest mode
    POINT = "point"  # an operation stands while others go on
    LOCK = "lock"  # taken: `holder` is the lane that has it from here on
    UNLOCK = "unlock"
    SHADOW = "shadow"  # shadow pages and their entries
    FLUSH = "flush"  # asked for, with arrows to `targets`; answered
    KICK = "kick"  # arrives
    VIOLATION = "violation"


class Row(msgspec.Struct, frozen=True):
    """One thing that happened, in step `step` (from 1), in lane number `lane`.

    `targets`: lanes that an arrow goes to. `holder`: the lane of who has mmu_lock after it, -1 for nobody.
    """

    step: int
    lane: int
    kind: RowKind
    text: str
    targets: tuple[int, ...] = ()
    holder: int = -1


class Diagram(msgspec.Struct, frozen=True):
    """The whole: what there was at the beginning, what happened, and what came of it.

    `tables`: the entries of named tables at the start. `setup`: its operations. `begin` and `end`: what each vCPU's TLB
    held after the set-up, and at the end. `rule` and `text` say what failed, `notes` what else the checker said.
    """

    title: str
    profile: str
    tables: tuple[str, ...]
    setup: tuple[str, ...]
    lanes: tuple[Lane, ...]
    rows: tuple[Row, ...]
    begin: tuple[str, ...]
    end: tuple[str, ...]
    rule: str
    text: str
    notes: tuple[str, ...]


def draw(scenario: Scenario, profile: str, schedule: Sequence[Actor]) -> Diagram:
    """Executes the schedule as far as it applies and records what happens.

    Raises ScenarioError if the set-up does not come to an end.
    """
    return _Artist(scenario, profile).draw(schedule)


_REASONS: Final = {
    "register_write": "MOV to a control register",
    "invlpg": "INVLPG",
    "halt": "HLT",
    "external_interrupt": "interrupt",
    "send_ipi": "sends an interrupt",
    "ept_misconfig": "EPT misconfiguration",
}
_ERROR_BITS: Final = {1: "protection", 2: "write", 4: "user", 8: "reserved bit", 16: "fetch"}
_MAX_ENTRIES: Final = 2
"""Changed entries of one shadow page that are shown one by one."""

_MAX_FRAMES: Final = 2
"""Host frames taken away in one step that are shown one by one."""


class _Artist:
    def __init__(self, scenario: Scenario, profile: str) -> None:
        self._scenario = scenario
        self._profile = profile
        self._names = Names(scenario)
        vcpus = scenario.vcpus
        self._lanes = (
            *(Lane(LaneKind.VCPU, f"v{n}") for n in range(vcpus)),
            Lane(LaneKind.LOCK, "mmu_lock"),
            *(Lane(LaneKind.HOST, f"h{n}") for n in range(len(scenario.hosts))),
        )
        self._lock_lane = vcpus
        self._rows: list[Row] = []
        self._actor: Actor = 0
        self._step = 0
        self._holder = -1
        self._lane_of_op: dict[int, int] = {}
        self._kick_arrives = False
        self._told: dict[Actor, int] = {}  # the position whose instruction has its row
        self._world = World(scenario, profile, self._listen)
        self._entries = shadow_entries(self._world)

    def draw(self, schedule: Sequence[Actor]) -> Diagram:
        world, scenario = self._world, self._scenario
        begin = state_lines(self._world, self._names)
        chooser = FollowChooser(schedule)
        while (enabled := world.enabled()) and self._step < _LONGEST:
            actor = chooser.choose(enabled)
            if self._step and actor != self._actor:
                self._pause(self._actor)
            self._actor = actor
            self._step += 1
            self._begin(actor)
            world.step(actor)
            self._compare_entries()
        failure = describe(world).failure
        rule = text = ""
        notes: tuple[str, ...] = ()
        if failure is not None:
            rule, text = failure.kind, self._names.explain(failure.text)
            notes = self._notes(failure.violation)
            lane = self._lane(self._actor) if failure.violation is None else failure.violation.vcpu
            self._row(
                max(lane, 0),
                RowKind.VIOLATION,
                f"violates {rule}" if failure.rule else "the forbidden final state",
            )
        return Diagram(
            title=scenario.title or scenario.name,
            profile=self._profile,
            tables=tuple(table_lines(self._scenario, self._names)),
            setup=tuple(
                f"{'host' if setup.vcpu < 0 else f'v{setup.vcpu}'}: {setup.step.text}"
                for setup in scenario.setup
            ),
            lanes=self._lanes,
            rows=tuple(_merged(self._rows)),
            begin=begin,
            end=state_lines(self._world, self._names),
            rule=rule,
            text=text,
            notes=notes,
        )

    def _row(self, lane: int, kind: RowKind, text: str, targets: Iterable[int] = ()) -> None:
        self._rows.append(Row(self._step, lane, kind, text, tuple(targets), self._holder))

    def _lane(self, actor: Actor) -> int:
        """The lane of whoever takes the step; a kick or a store buffer is its vCPU's affair."""
        return number(actor) + (self._lock_lane + 1 if actor // KIND == 2 else 0)

    # --- before a step, and between two actors ----------------------------------------------------------------------

    def _begin(self, actor: Actor) -> None:
        """The row of the instruction or host operation that begins with this step."""
        index = number(actor)
        match actor // KIND:
            case 0:
                position, where = standing(self._world, actor)
                step = self._world.programs[index].step
                begins = where == "guest" and not self._world.cores[index].log_pending
                if begins and step is not None and self._told.get(actor) != position:
                    self._told[actor] = position
                    handler = "in its handler: " if position >= HANDLER else ""
                    self._row(index, RowKind.INSTRUCTION, handler + step.text)
            case 1:
                self._kick_arrives = True
            case 2:
                if host_task(self._world, index) is None:
                    operation: HostStep = self._scenario.hosts[index][self._world.host_position[index]]
                    self._row(self._lane(actor), RowKind.INSTRUCTION, operation.text)
            case _:
                self._row(index, RowKind.EFFECT, "its host thread's oldest buffered store becomes visible")

    def _pause(self, actor: Actor) -> None:
        """Somebody else goes on: where this one stands."""
        index = number(actor)
        kind = actor // KIND
        task = host_task(self._world, index) if kind == 2 else None
        if kind == 0:
            lane = self._world.machine.lanes[index]
            task = lane.task if isinstance(lane.task, Task) else None
            if task is None and lane.runnable:
                self._row(index, RowKind.POINT, "stops in its walk")
        if task is None or (task.point is None and task.fresh and not task.readers):
            return
        match task.point:
            case Point() as point:
                text = f"stops at {point.name} ({point.value})"
            case WaitPoint.MMU_LOCK:
                text = "waits for mmu_lock"
            case WaitPoint.KICK:
                text = (
                    "waits for "
                    + ", ".join(f"v{vcpu}" for vcpu, _ in sorted(task.kick))
                    + " to leave guest mode"
                )
            case WaitPoint.SRCU:
                text = "waits for operations of vCPUs (SRCU)"
            case _:
                text = "waits for another operation"
        self._row(self._lane(actor), RowKind.POINT, text)

    # --- events ----------------------------------------------------------------------------------------------------

    def _listen(self, actor: Actor, events: list[Event]) -> None:
        if actor < 0:
            return  # the set-up
        for kind, run in groupby(events, type):
            group = list(run)
            if len(group) > _MAX_FRAMES and (kind is ev.FrameRevoked or kind is ev.FrameBacked):
                self._row(self._lane(actor), RowKind.SHADOW, self._frames_text(group))
            else:
                for event in group:
                    self._event(event)
        self._kick_arrives = False

    def _frames_text(self, events: list[Event]) -> str:
        """Many frames that are backed or taken away in one go."""
        gfns = [event.gfn for event in events if isinstance(event, ev.FrameRevoked | ev.FrameBacked)]
        what = "taken away" if isinstance(events[0], ev.FrameRevoked) else "backed by host frames"
        return f"{self._names.frame(gfns[0])} to {self._names.frame(gfns[-1])}: {what}"

    def _event(self, event: Event) -> None:
        names = self._names
        here = self._lane(self._actor)
        match event:
            case ev.Accesses(vcpu, _, items):
                for item in items:
                    self._access(vcpu, item)
            case ev.Walked(vcpu, _, gva, _, pfn, level, flags) if pfn >= 0:
                self._row(
                    vcpu,
                    RowKind.TLB,
                    f"TLB: {names.page(gva)} -> {translation(self._world, names, pfn, flags, level)}",
                )
            case ev.Bypassed(vcpu, gva, error_code):
                text = f"page fault at {names.address(gva)} goes to the guest without an exit ({_error(error_code)})"
                self._row(vcpu, RowKind.MODE, text)
            case ev.Exited(vcpu, _, reason, gva, error_code):
                self._exit(vcpu, reason, gva, error_code)
            case ev.Entered(vcpu, _, flush):
                self._row(vcpu, RowKind.MODE, "enters guest mode" + (", TLB emptied" if flush else ""))
            case ev.Invalidated(vcpu, gva, InvalidationCause.NO_VPID):
                self._row(vcpu, RowKind.TLB, "TLB emptied (no VPID)")
            case ev.Injected(vcpu, error_code, cr2):
                text = f"page fault for the guest at {names.address(cr2)} ({_error(error_code)})"
                self._row(vcpu, RowKind.MODE, text)
            case ev.PagingRegisters(vcpu, register, _, cr3) if register == "cr3":
                self._row(vcpu, RowKind.EFFECT, f"CR3 := {names.frame(cr3 >> 12)}")
            case ev.PagingRegisters(vcpu, register) if register:
                self._row(vcpu, RowKind.EFFECT, f"{register.upper()} := {getattr(event, register):#x}")
            case (
                ev.LockTaken()
                | ev.LockReleased()
                | ev.OperationStarted()
                | ev.FlushRequested()
                | ev.FlushAnswered()
            ):
                self._operation(event, here)
            case ev.GpteUpdate(_, gpa, _, value):
                text = f"KVM's walk sets A/D: {names.place(gpa)} := {names.value(value)}"
                self._row(here, RowKind.EFFECT, text)
            case ev.EmulatedStore(vcpu, gpa, _, value):
                self._row(vcpu, RowKind.EFFECT, f"emulated: {names.place(gpa)} := {names.value(value)}")
            case ev.EmulatedLoad(vcpu, gpa, _, value):
                self._row(vcpu, RowKind.EFFECT, f"emulated load of {names.place(gpa)} = {names.value(value)}")
            case ev.DeviceStored(words):
                for gpa, value in words:
                    self._row(here, RowKind.EFFECT, f"{names.place(gpa)} := {names.value(value)}")
            case ev.MmioAccess(vcpu, gpa):
                self._row(vcpu, RowKind.EFFECT, f"taken for a device's: {gpa:#x}")
            case _:
                text = self._host_text(event)
                if text:
                    self._row(here, RowKind.SHADOW, text)

    def _host_text(self, event: Event) -> str:
        """Events that are a text in the lane of whoever acts."""
        names = self._names
        match event:
            case ev.ShadowPageCreated(_, gfn, level, direct):
                kind = "direct " if direct else ""
                return f"{kind}shadow of {names.table(gfn)} made (level {level})"
            case ev.ShadowPageUnsynced(_, gfn):
                return f"{names.table(gfn)} is unsync from here on"
            case ev.ShadowPageSynced(_, gfn):
                return f"{names.table(gfn)} is in sync, write-protected"
            case ev.ShadowPageZapped(_, gfn):
                return f"shadow of {names.table(gfn)} zapped"
            case ev.TlbsDirtyRaised(value):
                return f"tlbs_dirty := {value} (flush put off)"
            case ev.TlbsDirtyCleared(value):
                return f"tlbs_dirty: {value} -> 0"
            case ev.FrameRevoked(gfn, pfn):
                return f"{names.frame(gfn)}: host frame {pfn:#x} is taken away"
            case ev.FrameBacked(gfn, pfn):
                return f"{names.frame(gfn)} is backed by host frame {pfn:#x}"
            case ev.DirtyLogStarted(slot):
                return f"dirty log of slot {slot} is read"
            case ev.DirtyLogRead(slot, gfns):
                return f"dirty log of slot {slot}: {', '.join(map(names.frame, gfns)) or 'nothing'}"
            case ev.SlotSettled(slot, _, npages, dirty_log):
                return f"slot {slot} has " + (f"{npages} pages, dirty log {'on' if dirty_log else 'off'}")
            case ev.SlotsPublished():
                return "new memory slots are visible"
            case ev.AuditFailed(check, text):
                return f"audit {check}: {names.explain(text)}"
            case ev.NoProgress(waiting):
                return "nothing can go on: " + ", ".join(waiting)
            case _:
                return ""

    def _access(self, vcpu: int, item: tuple[int, int, int, int, int, int]) -> None:
        flags, gva, gfn, pfn, _, value = item
        names = self._names
        place = names.place((gfn << 12) + (gva & 0xFFF)) if gfn >= 0 else f"host frame {pfn:#x}"
        if flags & AccessFlag.WRITE:
            text = f"{place} := {names.value(value)}"
        else:
            text = f"{'fetches' if flags & AccessFlag.FETCH else 'loads'} {place} = {names.value(value)}"
        self._row(vcpu, RowKind.EFFECT, text + (" (locked)" if flags & AccessFlag.LOCKED else ""))

    def _exit(self, vcpu: int, reason: str, gva: int, error_code: int) -> None:
        if self._kick_arrives and vcpu == number(self._actor):
            self._row(vcpu, RowKind.KICK, "the kick arrives: exit")
        elif reason == "page_fault":
            self._row(
                vcpu, RowKind.MODE, f"exit: page fault at {self._names.address(gva)} ({_error(error_code)})"
            )
        else:
            self._row(vcpu, RowKind.MODE, f"exit: {_REASONS.get(reason, reason)}")

    def _operation(self, event: Event, here: int) -> None:
        match event:
            case ev.OperationStarted(op, vcpu):
                self._lane_of_op[op] = vcpu if vcpu >= 0 else here
            case ev.LockTaken(op):
                self._holder = self._lane_of_op.get(op, here)
                self._row(self._lock_lane, RowKind.LOCK, self._lanes[self._holder].name)
            case ev.LockReleased(op):
                self._holder = -1
                self._row(self._lock_lane, RowKind.UNLOCK, self._lanes[self._lane_of_op.get(op, here)].name)
            case ev.FlushRequested(op, targets):
                kicked = sorted({vcpu for vcpu, _ in targets})
                text = "remote TLB flush: kicks " + ", ".join(f"v{vcpu}" for vcpu in kicked)
                self._row(self._lane_of_op.get(op, here), RowKind.FLUSH, text, kicked)
            case ev.FlushAnswered(op):
                self._row(
                    self._lane_of_op.get(op, here), RowKind.FLUSH, "remote TLB flush: all have answered"
                )
            case _:
                pass

    # --- state -------------------------------------------------------------------------------------------------------

    def _compare_entries(self) -> None:
        """The shadow entries that the step has changed; those of pages that are new or gone go without saying."""
        before, self._entries = self._entries, shadow_entries(self._world)
        for hpa, (gfn, entries) in self._entries.items():
            if not self._names.is_named(gfn):
                continue
            old = before[hpa][1] if hpa in before else {}
            changed = [i for i in sorted({*old, *entries}) if old.get(i, 0) != entries.get(i, 0)]
            if len(changed) > _MAX_ENTRIES:
                self._entry_row(f"shadow of {self._names.table(gfn)}: {len(changed)} entries change")
                continue
            for index in changed:
                if differ(old.get(index, 0), entries.get(index, 0)):
                    spte = describe_entry(self._world, self._names, entries.get(index, 0))
                    self._entry_row(f"shadow {self._names.table(gfn)}[{index}]: {spte}")

    def _entry_row(self, text: str) -> None:
        """The events come first, but what was changed was so before the flush for it, and before the unlock."""
        lane = self._lane(self._actor)
        rows = self._rows
        first = len(rows)
        while first and rows[first - 1].step == self._step:
            first -= 1
        later = (i for i in range(first, len(rows)) if rows[i].kind is RowKind.UNLOCK or rows[i].targets)
        at = next(later, None)
        if at is None:
            self._row(lane, RowKind.SHADOW, text)
        else:
            rows.insert(at, Row(self._step, lane, RowKind.SHADOW, text, (), lane))

    def _notes(self, violation: Violation | None) -> tuple[str, ...]:
        if violation is None:
            return ()
        return (self._names.explain(violation.blame),) if violation.blame else ()


_LONGEST: Final = 5_000
"""Steps of an execution that are drawn; one that does not end has no more to tell."""


def _error(error_code: int) -> str:
    bits = [name for bit, name in _ERROR_BITS.items() if error_code & bit]
    if not error_code & 1:
        bits.insert(0, "not present")
    return ", ".join(bits)


def _merged(rows: list[Row]) -> list[Row]:
    """Without lock regions in which nothing is told, and without texts that are told again at once."""
    merged: list[Row] = []
    for row in rows:
        last = merged[-1] if merged else None
        if last is not None:
            if row.kind is RowKind.UNLOCK and last.kind is RowKind.LOCK:
                merged.pop()
                continue
            if (row.lane, row.kind, row.text) == (last.lane, last.kind, last.text):
                continue
        merged.append(row)
    return merged
