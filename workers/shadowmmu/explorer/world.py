"""One execution of a scenario: the machine, the processors and the checker, driven step by step by a schedule.

Everything that could happen next is an *actor* (`actors`); `enabled` says who can take a step, `step` lets one take it.
Nothing else is decided by chance: the same schedule gives the same execution. What real runs do with sockets in between
happens at once here, except for kicks, whose delivery is a step of its own.

Relies on `shadowmmu.machine` in its stepwise form, where operations stop at every point, on the processor's core
(`shadowmmu.cpu`), and on `shadowmmu.checker`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from typing import Final

from shadowmmu.checker import Checker, Rule, Violation
from shadowmmu.cpu import VcpuCore
from shadowmmu.explorer.actors import KIND, Actor
from shadowmmu.explorer.footprint import Footprint, Kind, footprint_of
from shadowmmu.explorer.outcome import Outcome, holds, memory_words, parse_condition
from shadowmmu.explorer.pairs import PairCoverage
from shadowmmu.explorer.program import LitmusProgram
from shadowmmu.explorer.scenario import HostStep, Scenario, SetupStep
from shadowmmu.explorer.turns import Turns
from shadowmmu.explorer.workload_program import WorkloadProgram
from shadowmmu.kvm import Backing, KvmConfig, MemorySlot, Profile, Tracepoints
from shadowmmu.machine import (
    Attached,
    HostAsked,
    HostDone,
    HostRefused,
    Machine,
    Task,
    ToVcpu,
    VcpuSent,
    welcome,
)
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import Event

__all__ = ["ScenarioError", "StepLimitError", "World", "run_config"]

WORDS_PER_REQUEST: Final = 4096
MAX_STEPS: Final = 100_000
"""An execution that takes more steps than this does not end."""


class ScenarioError(Exception):
    """The scenario cannot be run: its set-up does not come to an end."""


class StepLimitError(Exception):
    """The execution does not end."""


class FirstChoice:
    """No choices: the machine applies one access at a time, and parks nothing."""

    def below(self, bound: int) -> int:  # noqa: ARG002 - the protocol's
        """The first."""
        return 0

    def chance(self, rate: float) -> bool:  # noqa: ARG002 - the protocol's
        """No."""
        return False


class EventTap:
    """The events since they were last taken."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.emit: Callable[[Event], None] = self.events.append


def _memory_model(scenario: Scenario) -> m.MemoryModel:
    return m.MemoryModel.TSO if scenario.machine.tso else m.MemoryModel.SC


def run_config(scenario: Scenario, profile: str) -> m.RunConfig:
    """The run's configuration as far as processors and machine look at it."""
    return m.RunConfig(
        profile=profile,
        vpid=scenario.machine.vpid,
        tdp=scenario.machine.tdp,
        memory_model=_memory_model(scenario),
        audit=m.Audit.ALWAYS,
        park_rate=0.0,
        host_rate=0.0,
        ops=1 << 40 if scenario.workload is None else scenario.workload.ops,
        tlb_sets=8,
        tlb_ways=8,
    )


def kvm_config(scenario: Scenario, profile: str) -> KvmConfig:
    """The virtual machine of a scenario."""
    spec = scenario.machine
    return KvmConfig(
        memslots=tuple(
            MemorySlot(slot.id, slot.gfn, slot.npages, Backing(slot.backing)) for slot in spec.slots
        ),
        n_max_mmu_pages=spec.mmu_pages,
        profile=Profile.parse(profile),
        tdp=spec.tdp,
        memory_model=_memory_model(scenario),
        tlbs_dirty_bits=spec.tlbs_dirty_bits,
    )


class World:
    """An execution of `scenario` under `profile`, standing where its set-up has ended.

    `violation` is what the checker found; nothing is enabled after it. `schedule` is who took the steps so far.
    `listener` is called with the events of each step, and the actor (-1: the set-up). `coverage` counts pairs of
    points. `tracepoints` makes, from the events of a step so far, who is told of tracepoints.
    """

    def __init__(
        self,
        scenario: Scenario,
        profile: str,
        listener: Callable[[Actor, list[Event]], None] | None = None,
        coverage: PairCoverage | None = None,
        tracepoints: Callable[[Sized], Tracepoints] | None = None,
    ) -> None:
        self.scenario = scenario
        self.schedule: list[Actor] = []
        self.violation: Violation | None = None
        config = run_config(scenario, profile)
        self._tap = EventTap()
        self._listener = listener
        self._coverage = coverage
        self.checker = Checker()
        self.turns = Turns()
        self.machine = Machine(config, FirstChoice(), self._tap, kvm_config(scenario, profile))
        if tracepoints is not None:
            self.machine.kvm.tracepoints = tracepoints(self._tap.events)
        vcpus = scenario.vcpus
        workload = scenario.workload
        self.programs: list[LitmusProgram | WorkloadProgram] = [
            LitmusProgram(registers, scenario.handlers[n] if scenario.handlers else ())
            if workload is None
            else WorkloadProgram(workload, n, vcpus)
            for n, registers in enumerate(scenario.machine.registers)
        ]
        self.cores = [VcpuCore(config, n, vcpus, program) for n, program in enumerate(self.programs)]
        self.kicks: list[m.Kick | None] = [None] * vcpus
        self.host_position = [0] * len(scenario.hosts)
        self._hosts: list[tuple[HostStep, ...]] = [()] * len(scenario.hosts)
        self._host_busy = [False] * len(scenario.hosts)
        self._records = 0
        self.track_footprints = False
        self.footprint: Footprint = (Kind.ANYTHING, -1)
        self.frames_in_use = sorted(
            {gpa >> 12 for gpa, _ in scenario.words} | {gfn for _, gfn in scenario.frames}
        )
        # A workload's programs are there from the beginning, and wait for the end of the set-up.
        self._held = workload is not None
        self._boot(config)
        self._held = False
        for step in scenario.setup:
            self._set_up(step)
        self.machine.stepwise = True  # the set-up has run without stops
        for program, steps in zip(self.programs, scenario.programs, strict=True):
            program.load(steps)
        self._hosts = list(scenario.hosts)
        self._look(-1)

    # --- set-up --------------------------------------------------------------------------------------------------

    def _boot(self, config: m.RunConfig) -> None:
        machine = self.machine
        for number in range(self.scenario.vcpus):
            self._submit(Attached(number, 1))
        words = list(self.scenario.words)
        for start in range(0, len(words), WORDS_PER_REQUEST):
            self._submit(HostAsked(0, m.WritePhys(words[start : start + WORDS_PER_REQUEST])))
            self._settle()
        for number, registers in enumerate(self.scenario.machine.registers):
            self._submit(
                HostAsked(
                    0, m.SetRegisters(number, registers.cr0, registers.cr3, registers.cr4, registers.efer)
                )
            )
        machine.outputs.clear()
        for number, core in enumerate(self.cores):
            core.receive(welcome(config, number, 1, heartbeat=0.0))
            core.start()
            self._send(number)
            self._settle()

    def _set_up(self, setup: SetupStep) -> None:
        if isinstance(setup.step, HostStep):
            self._submit(HostAsked(0, setup.step.operation))
        else:
            self.programs[setup.vcpu].load((setup.step,))
        self._settle()

    def _settle(self) -> None:
        """Lets everybody go on, kicks first, until nobody can."""
        for _ in range(MAX_STEPS):
            enabled = self.enabled()
            if not enabled:
                other = [task for task in self.machine.ready() if isinstance(task, Task)]
                if not other:
                    break
                self.machine.advance(other[0])
                self._collect()
            else:
                self._take(next((a for a in enabled if a // KIND == 1), enabled[0]))
            self._look(-1)
        else:
            raise ScenarioError(f"{self.scenario.name}: the set-up does not come to an end")
        if self.machine.tasks() or not (self._held or all(program.done for program in self.programs)):
            raise ScenarioError(f"{self.scenario.name}: the set-up is stuck")

    # --- who can go on -------------------------------------------------------------------------------------------

    def enabled(self) -> list[Actor]:
        """The actors that can take a step, in order of their numbers; none after a violation."""
        if self.violation is not None:
            return []
        machine = self.machine
        ready = {id(thing) for thing in machine.ready()}
        found = [n for n in range(len(self.cores)) if self._vcpu_enabled(n, ready)]
        found += [KIND + n for n, kick in enumerate(self.kicks) if kick is not None]
        for number, steps in enumerate(self._hosts):
            if self._host_busy[number]:
                if id(self._host_task(number)) in ready:
                    found.append(2 * KIND + number)
            elif self.host_position[number] < len(steps) and not machine.at_memory_point:
                when = steps[self.host_position[number]].when
                if when is None or self._word(when.gpa) == when.value:
                    found.append(2 * KIND + number)
        found += [
            3 * KIND + vcpu.vcpu_id
            for vcpu in machine.kvm.vcpus
            if vcpu.store_buffer is not None and vcpu.store_buffer.drainable
        ]
        return self.turns.of(found)

    def _vcpu_enabled(self, number: int, ready: set[int]) -> bool:
        lane = self.machine.lanes[number]
        if lane.task is not None:
            return id(lane.task) in ready
        if lane.runnable:
            return True
        core = self.cores[number]
        if core.waiting:
            return False
        if core.log_pending:
            return True
        program = self.programs[number]
        if self._held or program.done:
            return False
        awaited = program.awaits
        return awaited is None or self._word(awaited[0]) == awaited[1]

    def _word(self, gpa: int) -> int:
        """A word of guest memory; 0 where there is none any more, because the slot was deleted or moved."""
        if self.machine.kvm.gfn_to_memslot(gpa >> 12) is None:
            return 0
        return self.machine.memory.read(gpa, 8)

    def _host_task(self, number: int) -> Task | None:
        return next((t for t in self.machine.tasks() if t.lane is None and t.ticket == number + 1), None)

    # --- steps ---------------------------------------------------------------------------------------------------

    def step(self, actor: Actor) -> None:
        """Lets an enabled actor take its step."""
        if len(self.schedule) >= MAX_STEPS:
            raise StepLimitError(f"{self.scenario.name}: the execution does not end")
        self.schedule.append(actor)
        number = actor % KIND
        in_guest = actor < KIND and self.machine.lanes[number].task is None
        self._take(actor)
        if self.track_footprints:
            lane = self.machine.lanes[number] if in_guest else None
            self.footprint = footprint_of(
                self._tap.events,
                lane is not None and lane.task is None and self.cores[number].in_guest,
                lane is not None and lane.runnable,
            )
        self._look(actor)

    def replay(self, schedule: Iterable[Actor]) -> None:
        """Steps that were taken before, from here: what they lead to is not audited again."""
        self.machine.audited = False
        for actor in schedule:
            self.step(actor)
        self.machine.audited = True

    def _take(self, actor: Actor) -> None:
        number = actor % KIND
        match actor // KIND:
            case 0:
                self._step_vcpu(number)
            case 1:
                kick = self.kicks[number]
                assert kick is not None
                self.kicks[number] = None
                self.cores[number].receive(kick)
                self._send(number)
                self._apply(number)
            case 2:
                self._step_host(number)
            case _:
                buffer = self.machine.kvm.vcpus[number].store_buffer
                assert buffer is not None
                self.machine.advance(buffer)
        self._collect()

    def _step_vcpu(self, number: int) -> None:
        lane = self.machine.lanes[number]
        if lane.task is not None:
            assert isinstance(lane.task, Task)
            self._advance(lane.task)
        elif lane.runnable:
            self.machine.advance(lane)
        else:
            core = self.cores[number]
            if not core.log_pending:
                core.run(1)
            core.ship_log()
            self._send(number)
            self._apply(number)

    def _apply(self, number: int) -> None:
        """What the processor has sent takes effect, up to a walk, which takes steps of its own."""
        lane = self.machine.lanes[number]
        while lane.runnable and not isinstance(lane.queue[0], m.Walk):
            self.machine.advance(lane)

    def _step_host(self, number: int) -> None:
        if self._host_busy[number]:
            task = self._host_task(number)
        else:
            step = self._hosts[number][self.host_position[number]]
            self._host_busy[number] = True
            self._submit(HostAsked(number + 1, step.operation))
            task = self._host_task(number)
        if task is not None:  # else it was refused: there is no such slot, or no such page in it
            self._advance(task)

    def _advance(self, task: Task) -> None:
        if self._coverage is not None and not self._held:
            self._coverage.advances(self.machine, task)
        self.machine.advance(task)

    def _send(self, number: int) -> None:
        for body in self.cores[number].take_output():
            assert not isinstance(body, m.Heartbeat | m.Attach | m.Resume | m.HostRequest)
            self._submit(VcpuSent(number, body))

    def _submit(self, item: Attached | HostAsked | VcpuSent) -> None:
        self._records += 1
        self.machine.submit(item, self._records)

    def _collect(self) -> None:
        """Delivers what the machine has sent, all but kicks."""
        machine = self.machine
        while machine.outputs:
            outputs, machine.outputs = machine.outputs, []
            for output in outputs:
                match output:
                    case ToVcpu(vcpu, _, m.Kick() as kick):
                        self.kicks[vcpu] = kick
                    case ToVcpu(vcpu, _, body):
                        self.cores[vcpu].receive(body)
                        self._send(vcpu)
                        self._apply(vcpu)
                    case HostDone(ticket) | HostRefused(ticket) if ticket:
                        self._host_busy[ticket - 1] = False
                        self.host_position[ticket - 1] += 1
                    case HostDone() | HostRefused():
                        pass
        for number, pending in enumerate(self.kicks):
            if pending is not None and not (
                self.cores[number].in_guest and pending.entry == machine.lanes[number].entry
            ):
                self.kicks[number] = None  # it has left by itself: that was the answer

    def _look(self, actor: Actor) -> None:
        """Shows the new events to the checker and the listener."""
        events = self._tap.events
        self.turns.look(actor, events)
        if not events:
            return
        violation = self.checker.feed_all(events)
        if self._listener is not None:
            self._listener(actor, list(events))
        events.clear()
        if violation is not None and self.violation is None:
            self.violation = violation

    def executed(self, actor: Actor) -> int:
        """How many instructions a vCPU, or operations a host thread, has executed."""
        number = actor % KIND
        return self.programs[number].position if actor < KIND else self.host_position[number]

    def host_progress(self) -> tuple[object, ...]:
        """How far the host threads are, for comparison."""
        return (*self.host_position, *self._host_busy)

    # --- what came of it -----------------------------------------------------------------------------------------

    def end(self) -> None:
        """Nobody can take a step any more: if that is because everybody waits for somebody, it is a violation."""
        if self.violation is None and self.stuck:
            where = ", ".join(f"{task.name} at {task.stop.name}" for task in self.machine.tasks())
            self.violation = Violation(
                rule=Rule.NO_PROGRESS,
                text=f"nothing can go on: {where}",
                vcpu=-1,
                access=None,
                journal_record=self._records,
                event_index=self.checker.events - 1,
                blame="whoever should have let them go on",
            )

    @property
    def stuck(self) -> bool:
        """Nobody can go on, and something is left to do. (An `await` that waits for ever is the scenario's doing.)"""
        return not self.enabled() and bool(self.machine.tasks())

    @property
    def waiting(self) -> bool:
        """Nobody can go on, and some vCPU waits for a value that does not come."""
        return not self.enabled() and any(not program.done for program in self.programs)

    def values(self) -> dict[str, int]:
        """The programs' registers, and the words that the scenario's conditions name."""
        values = {
            f"v{number}:{name}": value
            for number, program in enumerate(self.programs)
            for name, value in sorted(program.results.items())
        }
        frames = dict(self.scenario.frames)
        for text in filter(None, (self.scenario.forbidden, self.scenario.exists)):
            for name, index in sorted(memory_words(parse_condition(text))):
                values[f"{name}[{index}]"] = self._word((frames[name] << 12) + 8 * index)
        return values

    def outcome(self) -> Outcome:
        """The final state, to be compared and counted."""
        return tuple(self.values().items())

    def condition_holds(self) -> bool:
        """Whether the scenario's forbidden condition is true."""
        text = self.scenario.forbidden
        return bool(text) and holds(parse_condition(text), self.values())
