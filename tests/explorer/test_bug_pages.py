"""docs/bugs: every bug has a page, and what the pages show still happens."""

from pathlib import Path

import pytest

from shadowmmu.explorer.attribution import lacking
from shadowmmu.explorer.catalogue import catalogue_slugs
from shadowmmu.explorer.repro import REPRO_SUFFIX, load_repro, replay_repro
from shadowmmu.kvm import FIXES, Finding

FOLDER = Path(__file__).parents[2] / "docs" / "bugs"
REPROS = sorted(FOLDER.glob(f"*{REPRO_SUFFIX}"))


def test_every_bug_has_a_page_and_the_index_has_them_all() -> None:
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    for slug in catalogue_slugs():
        assert (FOLDER / f"{slug}.md").exists(), slug
        assert f"({slug}.md)" in index


def test_every_bug_that_is_to_be_found_has_a_reproduction() -> None:
    shown = {path.stem for path in REPROS}
    assert shown >= {slug for slug in catalogue_slugs() if FIXES[slug].finding is Finding.FOUND}


@pytest.mark.parametrize("path", REPROS, ids=lambda path: path.stem)
def test_a_reproduction_still_fails_as_recorded(path: Path) -> None:
    repro = load_repro(path)
    assert path.stem in lacking(repro.profile)
    assert repro.scenario.size <= 12
    replayed = replay_repro(repro)
    assert replayed.failure is not None
    assert replayed.failure.same_kind(repro.failure)


@pytest.mark.parametrize("path", REPROS, ids=lambda path: path.stem)
def test_with_all_fixes_the_same_schedule_shows_nothing(path: Path) -> None:
    assert replay_repro(load_repro(path), "fixed").failure is None
