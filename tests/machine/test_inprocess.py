"""Runs in one process: repeatable to the digest, replayed from their journals, clean in `fixed`, caught as mutants."""

from __future__ import annotations

import io
from typing import Any

import msgspec
import pytest

from shadowmmu.checker import Checker, Violation
from shadowmmu.machine import InProcessResult, read_journal, replay_records, run_in_process
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import Event


class Run:
    """A run, its journal and the first violation."""

    def __init__(self, config: m.RunConfig, vcpus: int, *, stop_at_violation: bool = True) -> None:
        self.violation: Violation | None = None
        self._checker = Checker()
        journal: list[bytes] = []
        self.result: InProcessResult = run_in_process(
            config,
            vcpus,
            journal.append,
            self._check,
            progress=lambda _counters: not (stop_at_violation and self.violation),
        )
        self.journal = b"".join(journal)

    def _check(self, _first: int, events: list[Event], _data: bytes) -> None:
        for event in events:
            if self.violation is None:
                self.violation = self._checker.feed(event)


def config(**changes: Any) -> m.RunConfig:
    return msgspec.structs.replace(m.RunConfig(ops=6000, seed=1), **changes)


@pytest.mark.parametrize("workload", m.Workload)
@pytest.mark.parametrize("vpid", [True, False])
def test_a_run_of_each_workload_ends_clean_and_replays_to_its_digest(
    workload: m.Workload, vpid: bool
) -> None:
    run = Run(config(workload=workload, vpid=vpid), 3)
    assert run.violation is None
    assert not run.result.stuck
    assert run.result.counters["vcpu.instructions"] >= 6000
    replayed = replay_records(read_journal(io.BytesIO(run.journal)), None)
    assert replayed.diverged_at is None, replayed.divergence
    assert replayed.digest == replayed.recorded_digest == run.result.digest


NONPAGING = {"workload": m.Workload.MODES, "mode": m.GuestMode.NONPAGING}


@pytest.mark.parametrize(
    "changes",
    [
        *({"workload": m.Workload.MODES, "mode": mode} for mode in m.GuestMode),
        *({**NONPAGING, "tdp": tdp} for tdp in m.Tdp),
        *({"profile": "pre-patch+fixed", "bypass_guest_pf": bypass} for bypass in (True, False)),
        {
            "workload": m.Workload.MODES,
            "mode": m.GuestMode.MIXED,
            "profile": "pre-patch+fixed",
            "bypass_guest_pf": True,
        },
    ],
    ids=lambda changes: "-".join(str(getattr(value, "value", value)) for value in changes.values()),
)
def test_every_mode_and_table_format_ends_clean_and_replays_to_its_digest(changes: dict[str, Any]) -> None:
    run = Run(config(**changes, audit=m.Audit.ALWAYS), 3)
    assert run.violation is None
    assert not run.result.stuck
    replayed = replay_records(read_journal(io.BytesIO(run.journal)), None)
    assert replayed.diverged_at is None, replayed.divergence
    assert replayed.digest == run.result.digest


def test_only_ept_knows_misconfigurations_and_only_the_old_kernel_bypasses() -> None:
    ept = Run(config(**NONPAGING, tdp=m.Tdp.EPT), 3).result.counters
    npt = Run(config(**NONPAGING, tdp=m.Tdp.NPT), 3).result.counters
    assert ept["exits.ept_misconfig"] > 0
    assert "exits.ept_misconfig" not in npt
    old = config(profile="pre-patch+fixed", bypass_guest_pf=True)
    assert Run(old, 3).result.counters["vcpu.bypassed"] > 0
    assert "vcpu.bypassed" not in Run(config(), 3).result.counters


def test_the_same_seed_gives_the_same_run_and_another_one_does_not() -> None:
    first, again, other = Run(config(), 2), Run(config(), 2), Run(config(seed=2), 2)
    assert first.journal == again.journal
    assert first.result.digest == again.result.digest
    assert first.result.digest != other.result.digest


@pytest.mark.parametrize("vcpus", [1, 2, 8])
def test_the_audit_finds_nothing_after_any_operation(vcpus: int) -> None:
    run = Run(config(ops=5000, audit=m.Audit.ALWAYS), vcpus)
    assert run.violation is None
    assert run.result.counters["audits"] > 100


# Where each defect shows soonest: one run may miss it.
MUTANTS: dict[m.Mutant, dict[str, Any]] = {
    m.Mutant.FLUSH_NOT_AWAITED: {},
    m.Mutant.ENTRY_FLUSH_SKIPPED: {},
    m.Mutant.ANSWER_BEFORE_LOG: {"host_rate": 20.0, "park_rate": 0.2},
    m.Mutant.NOTIFIER_IGNORES_TLBS_DIRTY: {
        "workload": m.Workload.SLOPPY,
        "host_rate": 60.0,
        "ops": 120_000,
    },
}


@pytest.mark.parametrize("mutant", m.Mutant)
def test_each_mutant_is_caught(mutant: m.Mutant) -> None:
    changes = {"ops": 60_000, **MUTANTS[mutant]}
    caught = (Run(config(mutant=mutant, seed=seed, **changes), 4).violation for seed in range(12))
    assert any(caught)


def test_the_bugs_of_linux_3_1_are_found_and_not_in_fixed() -> None:
    changes = {"workload": m.Workload.SLOPPY, "ops": 100_000}
    seeds = (
        seed for seed in range(12) if Run(config(profile="linux-3.1", seed=seed, **changes), 4).violation
    )
    seed = next(seeds)
    assert Run(config(profile="fixed", seed=seed, **changes), 4).violation is None


def test_a_journal_of_another_course_is_noticed() -> None:
    run = Run(config(), 2)
    records = list(read_journal(io.BytesIO(run.journal)))
    header = records[0]
    assert hasattr(header, "config")
    changed = msgspec.structs.replace(header, config=msgspec.structs.replace(header.config, vpid=False))
    assert replay_records([changed, *records[1:]], None).diverged_at is not None


def test_a_replay_stops_where_it_is_told_to_and_shows_the_state() -> None:
    run = Run(config(), 2)
    stopped = replay_records(read_journal(io.BytesIO(run.journal)), 100)
    assert stopped.records == 100
    assert stopped.state is not None and stopped.state["sps"]
