"""A recording of a failing execution can be read by people and executed again, also by code that has changed."""

import json
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from shadowmmu.cli.main import app
from shadowmmu.explorer.repro import (
    Repro,
    ReproError,
    Sameness,
    decode_repro,
    encode_repro,
    load_repro,
    make_repro,
    replay_repro,
    save_repro,
)
from tests.explorer.failing import failing


@pytest.fixture(scope="module")
def repro() -> Repro:
    found = failing()
    return make_repro(found.scenario, found.profile, found.schedule)


@pytest.fixture
def file(repro: Repro, tmp_path: Path) -> Path:
    path = tmp_path / "missed-flush.repro"
    save_repro(repro, path)
    return path


def test_a_recording_survives_its_file(repro: Repro, file: Path) -> None:
    assert load_repro(file) == repro


def test_the_file_can_be_read_by_people(file: Path) -> None:
    data = json.loads(file.read_text())
    assert data["format"] == 1
    assert data["profile"] == "linux-3.1"
    assert data["failure"]["kind"] == "rule 4 (write-protection breach)"
    assert data["memory"]["0x28048"] == "0x30067"
    assert data["trail"][0] == "v0 0: guest"
    assert data["schedule"].startswith("v0*")


def test_the_same_code_replays_it_event_for_event(repro: Repro) -> None:
    replayed = replay_repro(repro)
    assert replayed.sameness is Sameness.IDENTICAL
    assert replayed.failure is not None
    assert replayed.failure.text == repro.text
    assert replayed.divergence is None


def test_with_the_fix_it_does_not_fail_and_says_where_it_went_another_way(repro: Repro) -> None:
    replayed = replay_repro(repro, "linux-3.1+tlbs-dirty-missed-wp")
    assert replayed.sameness is Sameness.NO_FAILURE
    assert replayed.divergence is not None


def test_counts_that_are_wrong_are_made_up_for_by_the_names(repro: Repro) -> None:
    """As if the code had lost points since: the schedule by counts goes astray, the trail does not."""
    changed = msgspec.structs.replace(repro, schedule=repro.schedule[::-1], digest="of another time")
    replayed = replay_repro(changed)
    assert replayed.sameness is Sameness.SAME_FAILURE
    assert replayed.divergence is None


def test_names_that_are_gone_are_passed_over(repro: Repro) -> None:
    """As if the code had had points that are not there any more."""
    extra = [place._replace(name="GONE") for place in repro.trail[:40:3]]
    changed = msgspec.structs.replace(repro, trail=(*extra, *repro.trail), digest="of another time")
    replayed = replay_repro(changed)
    assert replayed.sameness is Sameness.SAME_FAILURE
    assert replayed.divergence is not None


def test_a_trail_of_which_little_applies_counts_as_not_followed(repro: Repro) -> None:
    gone = tuple(place._replace(position=0, name="GONE") for place in repro.trail)
    fixed = msgspec.structs.replace(repro, profile="fixed", trail=gone)
    assert replay_repro(fixed).sameness is Sameness.NOT_FOLLOWED


def test_nothing_is_recorded_of_what_does_not_fail() -> None:
    found = failing()
    with pytest.raises(ReproError, match="nothing fails"):
        make_repro(found.scenario, "fixed", found.schedule)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": 2}, "format 2; this version reads format 1"),
        ({"profile": "linux-9"}, "linux-9"),
        ({"schedule": "v0*3 x1"}, "'x1' is no step"),
        ({"schedule": "v5"}, "names v5, which does not exist"),
        ({"trail": ["h0 0: begin"]}, "names h0, which does not exist"),
        ({"trail": ["nonsense"]}, "'nonsense' is no line"),
        ({"memory": {"0x10": "many"}}, "many"),
        ({"failure": {"rule": 77, "kind": "", "text": ""}}, "77"),
        ({"scenario": {}}, "scenario"),
    ],
)
def test_a_bad_file_is_refused_and_says_why(repro: Repro, change: dict[str, object], message: str) -> None:
    data = json.loads(encode_repro(repro)) | change
    with pytest.raises(ReproError, match=message) as refused:
        decode_repro(json.dumps(data).encode(), "bad.repro")
    assert str(refused.value).startswith("bad.repro: ")


def test_a_file_that_is_cut_off_is_refused(repro: Repro) -> None:
    with pytest.raises(ReproError, match=r"bad\.repro: "):
        decode_repro(encode_repro(repro)[:200], "bad.repro")


# --- the command -----------------------------------------------------------------------------------------------------


def test_replay_draws_the_failure_and_ends_with_1(file: Path) -> None:
    result = CliRunner().invoke(app, ["replay", str(file)])
    assert result.exit_code == 1
    assert "fails as recorded, event for event" in result.output
    assert "violates rule 4 (write-protection breach)" in result.output


def test_replay_ends_with_0_when_it_does_not_fail_any_more(repro: Repro, tmp_path: Path) -> None:
    path = tmp_path / "fixed.repro"
    save_repro(msgspec.structs.replace(repro, profile="fixed"), path)
    result = CliRunner().invoke(app, ["replay", str(path)])
    assert result.exit_code == 0
    assert "does not fail any more" in result.output
    assert "diverged" in result.output


def test_replay_ends_with_2_when_the_file_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "bad.repro"
    path.write_text("{}")
    result = CliRunner().invoke(app, ["replay", str(path)])
    assert result.exit_code == 2
    assert "format" in result.output


def test_a_recording_has_no_journal_to_stop_in(file: Path) -> None:
    result = CliRunner().invoke(app, ["replay", str(file), "--until", "3"])
    assert result.exit_code != 0
    assert "has no journal" in result.output
