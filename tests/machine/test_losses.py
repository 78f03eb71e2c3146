"""Workers are lost at random moments, and others go on with their programs: nothing is lost, nothing executed twice."""

from __future__ import annotations

import io
from typing import Any

import msgspec
import pytest

from shadowmmu.checker import Checker, Violation
from shadowmmu.cpu.vcpu_core import VcpuCore
from shadowmmu.machine import InProcessResult, JournalError, Record, lane, read_journal, run_in_process
from shadowmmu.machine.program_check import ProgramCheck, check_programs
from shadowmmu.machine.trail import Trail
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.errors import RemoteProtocolError
from shadowmmu.protocol.events import Event

OPS = 3000
NONPAGING = {"workload": m.Workload.MODES, "mode": m.GuestMode.NONPAGING}
OLD_KERNEL = {"profile": "pre-patch+fixed", "bypass_guest_pf": True}


class Run:
    """A run with losses, the first violation, and what the check of the programs found.

    `refused`: what a worker said of a trail that did not fit its program; the run ends with that.
    """

    def __init__(self, vcpus: int, loss_rate: float = 0.02, **changes: Any) -> None:
        config = m.RunConfig(**{"ops": OPS, "seed": 1, "host_rate": 20.0, **changes})
        self.violation: Violation | None = None
        self.result: InProcessResult | None = None
        self.refused: RemoteProtocolError | None = None
        self._checker = Checker()
        self._patience = 500
        self._journal: list[bytes] = []
        try:
            self.result = run_in_process(
                config,
                vcpus,
                self._journal.append,
                self._check,
                progress=self._goes_on,
                loss_rate=loss_rate,
            )
        except RemoteProtocolError as error:
            self.refused = error

    def _goes_on(self, _counters: dict[str, int]) -> bool:
        """A guest that waits for what has been lost would wait for ever."""
        self._patience -= 1
        return self._patience > 0

    def _check(self, _first: int, events: list[Event], _data: bytes) -> None:
        for event in events:
            if self.violation is None:
                self.violation = self._checker.feed(event)

    def records(self) -> list[Record]:
        return list(read_journal(io.BytesIO(b"".join(self._journal))))

    def programs(self) -> ProgramCheck:
        return check_programs(self.records())


def assert_whole(run: Run, vcpus: int) -> None:
    """The run came to its end, coherent, and its programs were executed once, from beginning to end."""
    assert run.refused is None
    assert run.result is not None
    assert not run.result.stuck
    assert not run.result.stopped
    assert run.violation is None
    assert run.result.counters["vcpu.resumed"] > 0
    programs = run.programs()
    assert [str(difference) for difference in programs.differences] == []
    executed = sum(programs.instructions.values())
    assert executed >= OPS
    # The last HLT of a vCPU never ends; the processor has counted it.
    assert 0 <= run.result.counters["vcpu.instructions"] - executed <= vcpus


@pytest.mark.parametrize("workload", m.Workload)
@pytest.mark.parametrize("vcpus, vpid", [(1, True), (2, False), (4, True)])
def test_each_workload_survives_the_loss_of_its_workers(workload: m.Workload, vcpus: int, vpid: bool) -> None:
    assert_whole(Run(vcpus, workload=workload, vpid=vpid), vcpus)


@pytest.mark.parametrize(
    "changes",
    [
        *({"workload": m.Workload.MODES, "mode": mode} for mode in m.GuestMode),
        *({**NONPAGING, "tdp": tdp} for tdp in m.Tdp),
        {"memory_model": m.MemoryModel.TSO},
        *({**OLD_KERNEL, "workload": workload} for workload in (m.Workload.MPROTECT, m.Workload.SLOPPY)),
        {**OLD_KERNEL, "workload": m.Workload.MODES, "mode": m.GuestMode.MIXED},
    ],
    ids=lambda changes: "-".join(str(getattr(value, "value", value)) for value in changes.values()),
)
def test_so_does_each_mode_and_table_format(changes: dict[str, Any]) -> None:
    assert_whole(Run(3, **changes, audit=m.Audit.ALWAYS), 3)


@pytest.mark.parametrize("workload", [m.Workload.MIXED, m.Workload.MODES])
def test_a_trail_from_the_programs_beginning_will_do(
    workload: m.Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worker ever sends a state."""
    monkeypatch.setattr(VcpuCore, "_state_if_due", lambda _core: None)
    assert_whole(Run(3, workload=workload), 3)


@pytest.mark.parametrize("loss_rate", [0.001, 0.1])
def test_few_losses_and_many(loss_rate: float) -> None:
    assert_whole(Run(4, loss_rate, seed=3), 4)


# --- the check of the programs finds what it is there for ----------------------------------------------------------


class Mutant(Trail):
    """A trail that is wrong at its end, where it still fits the program that follows it."""

    def resumption(self) -> m.Resumption:
        sound = super().resumption()
        return self.changed(sound) if sound.trail or sound.accesses else sound

    def changed(self, sound: m.Resumption) -> m.Resumption:
        raise NotImplementedError

    def last_answer_changed(self, sound: m.Resumption, kind: type, **changes: Any) -> m.Resumption:
        if not sound.trail or not isinstance(sound.trail[-1].answer, kind):
            return sound
        *others, last = sound.trail
        answer = msgspec.structs.replace(last.answer, **changes)
        return msgspec.structs.replace(sound, trail=[*others, msgspec.structs.replace(last, answer=answer)])


class LosesAValue(Mutant):
    """What was loaded last is forgotten."""

    def changed(self, sound: m.Resumption) -> m.Resumption:
        return self.last_answer_changed(sound, m.Loaded, value=0)


class LosesInterrupts(Mutant):
    """Interrupts that came with the last entry are forgotten."""

    def changed(self, sound: m.Resumption) -> m.Resumption:
        return self.last_answer_changed(sound, m.Entered, interrupts=[])


class LosesAFault(Mutant):
    """A page fault that was injected last is forgotten."""

    def changed(self, sound: m.Resumption) -> m.Resumption:
        return self.last_answer_changed(sound, m.Entered, inject=None)


class LosesAnEmulatedInstruction(Mutant):
    """An instruction that was emulated last is executed again."""

    def changed(self, sound: m.Resumption) -> m.Resumption:
        return self.last_answer_changed(sound, m.Entered, completed=None)


class CountsAnAccessTooMuch(Mutant):
    """Of a log that was applied in part, more is counted."""

    def changed(self, sound: m.Resumption) -> m.Resumption:
        return msgspec.structs.replace(sound, accesses=sound.accesses + bool(sound.accesses))


class ForgetsAccesses(Mutant):
    """Accesses behind the last step are not counted."""

    def changed(self, sound: m.Resumption) -> m.Resumption:
        return msgspec.structs.replace(sound, accesses=0)


class ForgetsAStep(Mutant):
    """The last step, and what was applied behind it, is executed again."""

    def changed(self, sound: m.Resumption) -> m.Resumption:
        return msgspec.structs.replace(sound, trail=sound.trail[:-1], accesses=0)


@pytest.mark.parametrize("mutant", Mutant.__subclasses__())
def test_a_trail_that_is_wrong_is_found(mutant: type[Mutant], monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(_found(mutant, seed, monkeypatch) for seed in range(12))


def _found(mutant: type[Mutant], seed: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the check, whose own trails are sound, finds that something is wrong with such a run."""
    with monkeypatch.context() as patch:
        patch.setattr(lane, "Trail", mutant)
        run = Run(3, seed=seed, workload=m.Workload.SLOPPY)
    return bool(run.programs().differences)


def test_a_journal_that_does_not_give_what_it_says_is_not_judged() -> None:
    records = Run(2).records()
    header = records[0]
    assert hasattr(header, "config")
    changed = msgspec.structs.replace(header, config=msgspec.structs.replace(header.config, vpid=False))
    with pytest.raises(JournalError):
        check_programs([changed, *records[1:]])


def test_a_run_without_losses_is_whole_too_and_its_programs_can_be_chosen() -> None:
    run = Run(3, 0.0)
    assert run.programs().differences == []
    assert sorted(check_programs(run.records(), only=[1]).instructions) == [1]
