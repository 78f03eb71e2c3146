"""The catalogue of fixes, and the kernels that are made of it."""

import re

import pytest

from shadowmmu.kvm import (
    BASE_PROFILES,
    FIXES,
    Finding,
    FixStatus,
    KernelTree,
    Profile,
    UnknownFixError,
    UnknownProfileError,
)

LATENT, MUTANT, LATER, ALTERNATIVE = (
    FixStatus.LATENT,
    FixStatus.MUTANT,
    FixStatus.LATER,
    FixStatus.ALTERNATIVE,
)

IN_BASE = {
    "linux-3.1": {MUTANT, LATER},
    "pre-patch": {MUTANT, LATER},
    "fixed": {LATENT, MUTANT, LATER},
}
"""The fixes of which status each base has."""


# The catalogue


@pytest.mark.parametrize("bug", [*(f"A{n}" for n in range(1, 17)), "C1", "C2", "C8"])
def test_every_bug_of_3_1_and_some_of_later_kernels_can_be_switched(bug: str) -> None:
    of_bug = [fix.status for fix in FIXES.values() if fix.bug == bug]
    assert (LATER if bug.startswith("C") else LATENT) in of_bug


@pytest.mark.parametrize("slug", sorted(FIXES))
def test_an_entry_of_the_catalogue_is_complete(slug: str) -> None:
    fix = FIXES[slug]
    assert fix.slug == slug
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug)
    parts = {LATENT: "AN", MUTANT: "B", LATER: "C", ALTERNATIVE: "ABC"}
    assert fix.bug[0] in parts[fix.status]
    assert fix.bug[1:].isdigit()
    assert re.fullmatch(r"[0-9a-f]{12,40}", fix.commit) or fix.commit == fix.title
    assert re.fullmatch(r"((\?|\d{4})-)?(\d{4}|\?)", fix.years)
    assert fix.title
    assert fix.description
    assert set(fix.rules) <= set(range(1, 10))
    assert fix.rules or fix.finding is not Finding.FOUND


def test_no_two_fixes_have_a_name_in_common() -> None:
    assert len({fix.attribute for fix in FIXES.values()}) == len(FIXES)
    assert not {fix.attribute for fix in FIXES.values()} & {"fixes", "kernel", "name"}


def test_the_profile_declares_exactly_the_fixes() -> None:
    declared = {name for name, of_type in Profile.__annotations__.items() if of_type == "bool"}
    assert declared == {fix.attribute for fix in FIXES.values()}


# Bases and switches


@pytest.mark.parametrize("base", sorted(BASE_PROFILES))
def test_the_bases(base: str) -> None:
    expected = {slug for slug, fix in FIXES.items() if fix.status in IN_BASE[base]}
    assert Profile.parse(base).fixes == BASE_PROFILES[base] == expected


@pytest.mark.parametrize("slug", sorted(FIXES))
def test_each_fix_is_one_boolean(slug: str) -> None:
    attribute = FIXES[slug].attribute
    for base in BASE_PROFILES:
        on, off = Profile.parse(f"{base}+{slug}"), Profile.parse(f"{base}-{slug}")
        assert getattr(on, attribute) is True
        assert getattr(off, attribute) is False
        assert on.fixes - off.fixes == {slug}
        others = [fix.attribute for fix in FIXES.values() if fix.slug != slug]
        assert [getattr(on, name) for name in others] == [getattr(off, name) for name in others]


def test_switches_apply_in_order() -> None:
    switched = Profile.parse("linux-3.1+link-before-sync-sync-drop-noflush").fixes
    assert switched == (BASE_PROFILES["linux-3.1"] | {"link-before-sync"}) - {"sync-drop-noflush"}
    assert Profile.parse("fixed-link-before-sync+link-before-sync") == Profile.parse("fixed")
    assert Profile.parse("fixed-link-before-sync").name == "fixed-link-before-sync"


def test_every_fix_but_the_alternatives_is_one_switch() -> None:
    profile = Profile.parse("pre-patch+fixed")
    assert profile.fixes == BASE_PROFILES["fixed"]
    assert profile.kernel is KernelTree.PRE_PATCH


@pytest.mark.parametrize("text", ["linux-9", "", "fixedish", "+link-before-sync"])
def test_unknown_bases_are_named(text: str) -> None:
    with pytest.raises(UnknownProfileError, match=r"known: fixed, linux-3\.1") as caught:
        Profile.parse(text)
    assert caught.value.text == text


@pytest.mark.parametrize(
    "text, slug",
    [
        ("fixed+nonsense", "nonsense"),
        ("fixed-link-before", "link-before"),
        ("linux-3.1+link-before-syncs+x", "link-before-syncs"),
        ("fixed+", ""),
    ],
)
def test_unknown_fixes_are_named_with_the_known_ones(text: str, slug: str) -> None:
    with pytest.raises(UnknownFixError, match="tlbs-dirty-missed-wp") as caught:
        Profile.parse(text)
    assert caught.value.slug == slug
