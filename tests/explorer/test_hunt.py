"""The hunt: it finds the same however it is executed, tells findings apart by cause, and can be stopped and gone on with."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor
from itertools import count
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shadowmmu.checker import Rule
from shadowmmu.cli.main import app
from shadowmmu.explorer import hunt as hunting
from shadowmmu.explorer.attribution import Attribution, Explanation
from shadowmmu.explorer.campaign import pool
from shadowmmu.explorer.hunt import LAG, Hunt, HuntLimit, HuntState, HuntStateError
from shadowmmu.explorer.hunt_look import Caught, Cause, CauseKind, Look, Looked, look_at
from shadowmmu.explorer.litmus import parse_litmus
from shadowmmu.explorer.repro import Repro, load_repro, replay_repro
from tests.explorer.guests import ONE_PAGE

A6 = """
[machine]
vcpus = 1
[tables.root]
0 = "L3 wua"
[tables.L3]
0 = "L2 wua"
[tables.L2]
0 = "T wua"
[tables.T]
9 = "G uad"
[addresses]
x = "0/0/0/9"
[[vcpu]]
program = '''
uload x
store @T[9] = G ad
ustore x = 1
uload x
'''
"""
"""A guest in which a page fault leaves a stale entry behind (bug A6), whatever the schedule."""

RACING = """
[machine]
vcpus = 2
[tables.root]
[[vcpu]]
program = "load @root[0]"
[[vcpu]]
program = "load @root[1]"
"""

RANGE = """
[machine]
vcpus = 1
[tables.root]
[[vcpu]]
program = "load @root[0]"
[[host]]
program = "unmap_range root 1"
"""
"""A vCPU whose access faults again and again until the host, which has begun to unmap a range, goes on."""

WINDOW = f"""
setup = "v1: load x"
[machine]
vcpus = 2
{ONE_PAGE}
[[vcpu]]
program = "store @L2[0] = 0"
[[vcpu]]
program = '''
invlpg x
load x
'''
"""
"""A store to a table is in memory, and the table's shadow does not know of it yet."""

HARMLESS = """
[machine]
vcpus = 1
[tables.root]
[[vcpu]]
program = "cr3"
"""

DEVICE = f"""
setup = "v0: load x"
[machine]
vcpus = 1
{ONE_PAGE}
[[vcpu]]
program = '''
cr3
load x
'''
[[host]]
program = "write T[9] = 0"
"""
"""A device stores to a table whose shadow is in sync."""


def _guests(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Every guest that is drawn is this one, which is so small that it shows everything soon."""
    monkeypatch.setattr(
        "shadowmmu.explorer.hunt_look.generate", lambda seed: parse_litmus(text, f"guest-{seed}")
    )
    for name, effort in {"FIRST_EFFORT": 30, "SHRINK_EFFORT": 60, "RUNS": 8, "EXECUTIONS": 8}.items():
        monkeypatch.setattr(f"shadowmmu.explorer.hunt_look.{name}", effort)


def _hunt(state: HuntState, scenarios: int, executor: Executor | None = None) -> list[tuple[int, Repro]]:
    kept: list[tuple[int, Repro]] = []
    seconds = count()
    going = Hunt(
        state, executor, lambda: float(next(seconds)), lambda number, repro: kept.append((number, repro))
    )
    going.run(HuntLimit(scenarios=scenarios), lambda _: True)
    going.finish()
    return kept


@pytest.fixture
def two_processes() -> Iterator[Executor]:
    with pool(2) as executor:
        yield executor


def test_a_failure_is_attributed_to_the_fix_that_prevents_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _guests(monkeypatch, A6)
    caught = look_at(Look(0, 1, "linux-3.1")).caught
    assert caught is not None
    assert caught.rule is Rule.STALE_TRANSLATION
    assert caught.cause == Cause(CauseKind.FIXES, ("pf-injection-no-sync",))
    assert look_at(Look(0, 1, "linux-3.1+pf-injection-no-sync")).caught is None


def test_what_takes_a_device_that_stores_to_tables_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    _guests(monkeypatch, DEVICE)
    caught = look_at(Look(0, 1, "fixed")).caught
    assert caught is not None
    assert caught.cause == Cause(CauseKind.DEVICE_STORE)


def _no_fix_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Attribution(Explanation.NOT_ATTRIBUTED, (), ())
    monkeypatch.setattr("shadowmmu.explorer.hunt_look.attribute", lambda *_, **__: nothing)


def test_what_no_fix_prevents_is_told_by_where_others_stood(monkeypatch: pytest.MonkeyPatch) -> None:
    _guests(monkeypatch, WINDOW)
    _no_fix_helps(monkeypatch)
    caught = look_at(Look(0, 1, "linux-3.1")).caught
    assert caught is not None
    assert caught.cause.kind is CauseKind.UNKNOWN
    assert "meanwhile at PTE_WRITE" in caught.cause.detail


def test_what_is_known_well_and_has_no_fix_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    _guests(monkeypatch, WINDOW)
    _no_fix_helps(monkeypatch)
    causes: set[Cause] = set()
    while (caught := look_at(Look(0, 1, "linux-3.1", often=tuple(causes))).caught) is not None:
        assert caught.cause not in causes
        causes.add(caught.cause)
    assert causes


def test_a_vcpu_that_waits_for_the_host_is_not_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    _guests(monkeypatch, RANGE)
    assert look_at(Look(0, 1, "fixed")).caught is None


def test_a_program_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    _guests(monkeypatch, HARMLESS)

    def broken(*_: object, **__: object) -> None:
        raise ArithmeticError("a defect of the model")

    monkeypatch.setattr("shadowmmu.explorer.hunt_look._finish", broken)
    caught = look_at(Look(0, 1, "fixed")).caught
    assert caught is not None
    assert caught.cause == Cause(CauseKind.CRASH, detail="ArithmeticError: a defect of the model")
    assert caught.rule is None


def test_a_guest_that_shows_nothing_new_is_executed_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    _guests(monkeypatch, RACING)
    fresh = look_at(Look(0, 1, "fixed"))
    known = look_at(Look(1, 1, "fixed", fresh.pairs))
    assert known.executions < fresh.executions


def test_findings_are_shrunk_and_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    _guests(monkeypatch, A6)
    state = HuntState("linux-3.1", 0)
    ((number, repro),) = _hunt(state, 2)
    assert number == 0
    assert state.findings[0].size == repro.scenario.size <= 4
    assert repro.profile == "fixed-pf-injection-no-sync"
    assert replay_repro(repro).failure is not None


def test_the_fix_of_what_is_found_often_is_switched_in_for_every_other_guest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    profiles: list[str] = []
    cause = Cause(CauseKind.FIXES, ("pf-injection-no-sync",))
    scenario = parse_litmus(HARMLESS, "guest")

    def always_found(look: Look) -> Looked:
        profiles.append(look.profile)
        caught = Caught(scenario, look.profile, (), Rule.STALE_TRANSLATION, "stale", cause)
        return Looked(look.number, look.seed, 1, "0", caught)

    _guests(monkeypatch, HARMLESS)
    monkeypatch.setattr(hunting, "look_at", always_found)
    _hunt(HuntState("linux-3.1", 0), LAG + 103)
    assert set(profiles[: LAG + 3]) == {"linux-3.1"}
    switched_in = profiles[LAG + 3 :].count("linux-3.1+pf-injection-no-sync")
    assert 30 < switched_in < 70


def test_a_hunt_finds_the_same_after_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    _guests(monkeypatch, A6)
    whole, begun = HuntState("linux-3.1", 3), HuntState("linux-3.1", 3)
    _hunt(whole, 4)
    _hunt(begun, 2)
    gone_on = HuntState.decode(begun.encode(), "linux-3.1", 3)
    _hunt(gone_on, 4)
    assert gone_on.digest == whole.digest
    assert [f.times for f in gone_on.findings] == [f.times for f in whole.findings] == [4]


def test_a_hunt_finds_the_same_with_any_number_of_processes(two_processes: Executor) -> None:
    alone, together = HuntState("fixed", 5), HuntState("fixed", 5)
    _hunt(alone, 3)
    _hunt(together, 3, two_processes)
    assert alone.digest == together.digest
    assert alone.executions == together.executions


def test_a_hunt_of_another_seed_is_not_gone_on_with() -> None:
    with pytest.raises(HuntStateError, match="seed 1"):
        HuntState.decode(HuntState("fixed", 1).encode(), "fixed", 2)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_keeps_what_it_finds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _guests(monkeypatch, A6)
    arguments = ["hunt", "--jobs", "1", "--profile", "linux-3.1", "--out", str(tmp_path), "--scenarios"]
    result = CliRunner().invoke(app, [*arguments, "3"])
    assert result.exit_code == 1
    assert "pf-injection-no-sync" in result.stdout
    assert "1 distinct findings in 3 random guests" in result.stdout
    assert load_repro(tmp_path / "finding-0.repro").rule is Rule.STALE_TRANSLATION
    again = CliRunner().invoke(app, [*arguments, "5"])
    assert "1 distinct findings in 5 random guests" in again.stdout


def test_the_command_says_when_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _guests(monkeypatch, HARMLESS)
    result = CliRunner().invoke(app, ["hunt", "--jobs", "1", "--profile", "fixed", "--scenarios", "3"])
    assert result.exit_code == 0
    assert "0 distinct findings in 3 random guests" in result.stdout


def test_a_hunt_that_loses_a_process_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: Look) -> Looked:
        raise BrokenExecutor("a process was terminated abruptly")

    monkeypatch.setattr(hunting, "look_at", lost)
    result = CliRunner().invoke(app, ["hunt", "--jobs", "1", "--scenarios", "3"])
    assert result.exit_code == 2
    assert "shadowmmu hunt: a process was terminated abruptly" in result.output


def test_an_interrupted_hunt_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Look) -> Looked:
        raise KeyboardInterrupt

    monkeypatch.setattr(hunting, "look_at", interrupted)
    assert CliRunner().invoke(app, ["hunt", "--jobs", "1", "--scenarios", "3"]).exit_code == 2


@pytest.mark.parametrize("arguments", [["--profile", "linux-9"], ["--jobs", "0"], ["--scenarios", "0"]])
def test_wrong_options_are_refused(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["hunt", *arguments]).exit_code == 64
