"""`shadowmmu bugs` prints the catalogue: every fix, as a table and as JSON."""

import json

import pytest
from typer.testing import CliRunner

from shadowmmu.cli.main import app
from shadowmmu.kvm import FIXES


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("COLUMNS", "300")
    return CliRunner()


def test_the_table_has_every_fix_on_a_line_of_its_own(runner: CliRunner) -> None:
    result = runner.invoke(app, ["bugs"])
    assert result.exit_code == 0
    rows = [line.split() for line in result.output.splitlines()]
    listed = [row[1] for row in rows if len(row) > 4 and row[1] in FIXES]
    assert listed == list(FIXES)


def test_a_line_says_when_the_bug_lived_and_where_it_shows(runner: CliRunner) -> None:
    result = runner.invoke(app, ["bugs"])
    (line,) = (line for line in result.output.splitlines() if line.split()[1:2] == ["inherited-perms"])
    for words in ("A3", "latent", "2007-2021", "b1bd5cba3306 ", " 1 ", "inherited-perms.toml"):
        assert words in line


def test_a_commit_known_by_its_title_alone_has_no_hash(runner: CliRunner) -> None:
    result = runner.invoke(app, ["bugs"])
    (line,) = (line for line in result.output.splitlines() if line.split()[1:2] == ["gpa-base-change"])
    assert " ? " in line


def test_the_json_is_the_whole_catalogue(runner: CliRunner) -> None:
    result = runner.invoke(app, ["bugs", "--json"])
    assert result.exit_code == 0
    entries = {entry["slug"]: entry for entry in json.loads(result.output)}
    assert list(entries) == list(FIXES)
    for slug, fix in FIXES.items():
        entry = entries[slug]
        assert entry["bug"] == fix.bug
        assert entry["status"] == fix.status.value
        assert entry["finding"] == fix.finding.value
        assert entry["rules"] == list(fix.rules)
        assert entry["title"] == fix.title
        assert entry["litmus"] == f"{slug}.toml"
    assert entries["gpa-base-change"]["commit"] is None
    assert entries["inherited-perms"]["commit"] == FIXES["inherited-perms"].commit
