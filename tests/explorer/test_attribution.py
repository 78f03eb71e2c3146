"""A failure is put down to the bug that it comes from, by running it again with fixes switched in."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shadowmmu.cli.main import app
from shadowmmu.explorer.attribution import Attribution, Explanation, attribute, lacking
from shadowmmu.explorer.litmus import parse_litmus
from shadowmmu.explorer.repro import make_repro, save_repro
from shadowmmu.kvm import FIXES
from shadowmmu.kvm.fixes import FixStatus
from tests.explorer.failing import MISSED_FLUSH, Failing, failing, search

RUNS = 12


def attribution_of(found: Failing, runs: int = RUNS) -> Attribution:
    return attribute(found.scenario, found.profile, found.failure, found.schedule, runs=runs)


def test_a_failure_of_linux_3_1_is_put_down_to_its_bug_among_all_that_it_has() -> None:
    found = failing()
    attribution = attribution_of(found)
    assert attribution.explanation is Explanation.ONE_BUG
    assert attribution.fixes == (MISSED_FLUSH,)
    by_fix = {trial.fixes: trial for trial in attribution.trials}
    assert by_fix[MISSED_FLUSH,].failures == 0
    assert by_fix[MISSED_FLUSH,].runs > RUNS
    unrelated = [slug for slug in lacking("linux-3.1") if slug != MISSED_FLUSH]
    assert all(by_fix[slug,].failures for slug in unrelated)


def test_the_bug_alone_is_enough_for_it() -> None:
    last = attribution_of(failing()).trials[-1]
    assert last.profile == f"fixed-{MISSED_FLUSH}"
    assert last.failures


def test_an_attribution_costs_about_an_execution_for_each_unrelated_fix() -> None:
    assert attribution_of(failing()).executions < 4 * RUNS + 2 * len(lacking("linux-3.1"))


def test_a_profile_that_lacks_one_fix_leaves_one_suspect() -> None:
    attribution = attribution_of(failing("wr-ro-noflush", "fixed-wr-ro-noflush"))
    assert attribution.fixes == ("wr-ro-noflush",)
    assert [trial.fixes for trial in attribution.trials] == [(), ("wr-ro-noflush",)]


def test_bugs_that_only_together_do_harm_are_named_together() -> None:
    """B3 and B4: a table that maps itself is left writable only if both are there."""
    attribution = attribution_of(failing("selfref-sync", "fixed-selfref-sync-writable-sync-sp"))
    assert attribution.explanation is Explanation.BUGS_TOGETHER
    assert set(attribution.fixes) == {"selfref-sync", "writable-sync-sp"}


def test_bugs_each_of_which_is_enough_are_named_together() -> None:
    found = failing("sync-drop-noflush", "fixed-sync-drop-noflush-sync-drop-noflush-count-wr-ro-noflush")
    attribution = attribution_of(found, 40)
    assert attribution.explanation is Explanation.ANY_OF_SEVERAL
    assert set(attribution.fixes) == {"sync-drop-noflush", "sync-drop-noflush-count"}


NOBODYS_BUG = """
forbidden = "v0:r0 == 5"
[tables.root]
0 = "L3 wua"
[[vcpu]]
program = '''
store @root[7] = 5
r0 = load @root[7]
'''
"""


def test_what_no_fix_prevents_is_not_attributed() -> None:
    attribution = attribution_of(search(parse_litmus(NOBODYS_BUG, "nobody"), "linux-3.1"), 3)
    assert attribution.explanation is Explanation.NOT_ATTRIBUTED
    assert not attribution.attributed


def test_what_fails_although_every_fix_is_in_is_not_attributed() -> None:
    attribution = attribution_of(search(parse_litmus(NOBODYS_BUG, "nobody"), "fixed"), 3)
    assert attribution.explanation is Explanation.NOT_ATTRIBUTED


def test_a_failure_that_does_not_recur_is_said_not_to() -> None:
    found = failing()
    attribution = attribute(found.scenario, "fixed", found.failure, found.schedule, runs=RUNS)
    assert attribution.explanation is Explanation.NOT_REPRODUCED
    assert not attribution.attributed


def test_the_same_input_gives_the_same_attribution() -> None:
    assert attribution_of(failing()) == attribution_of(failing())


def test_alternatives_are_no_suspects() -> None:
    assert not any(FIXES[slug].status is FixStatus.ALTERNATIVE for slug in lacking("linux-3.1"))
    assert lacking("fixed") == ()
    assert lacking(f"fixed-{MISSED_FLUSH}") == (MISSED_FLUSH,)


# --- the command -----------------------------------------------------------------------------------------------------


def recorded(found: Failing, path: Path) -> Path:
    save_repro(make_repro(found.scenario, found.profile, found.schedule), path)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return recorded(failing(), tmp_path / "missed-flush.repro")


def test_explain_names_the_bug_its_commit_and_years_and_draws_what_happened(file: Path) -> None:
    result = CliRunner().invoke(app, ["explain", str(file), "--runs", "8"])
    assert result.exit_code == 0
    for words in (
        "A1 tlbs-dirty-missed-wp (2010-2021)",
        "f81602958c11",
        "0 of ",
        "violates rule 4",
        "T[9] := 0",
    ):
        assert words in result.output


def test_explain_gives_the_attribution_as_json_and_the_diagram_as_svg(file: Path, tmp_path: Path) -> None:
    svg = tmp_path / "diagram.svg"
    result = CliRunner().invoke(app, ["explain", str(file), "--runs", "8", "--json", "--svg", str(svg)])
    assert result.exit_code == 0
    report = json.loads(result.output)
    assert report["explanation"] == "one_bug"
    assert [fix["bug"] for fix in report["fixes"]] == ["A1"]
    assert svg.read_text().startswith("<svg")


def test_explain_ends_with_1_when_no_bug_explains_it(tmp_path: Path) -> None:
    file = recorded(search(parse_litmus(NOBODYS_BUG, "nobody"), "fixed"), tmp_path / "nobody.repro")
    result = CliRunner().invoke(app, ["explain", str(file), "--runs", "3"])
    assert result.exit_code == 1
    assert "Not attributed" in result.output


def test_explain_ends_with_2_when_there_is_no_such_file(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["explain", str(tmp_path / "none.repro")])
    assert result.exit_code == 2
