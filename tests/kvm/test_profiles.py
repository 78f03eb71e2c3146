import pytest

from shadowmmu.kvm import BASE_PROFILES, FIXES, FixStatus, Profile, UnknownFixError, UnknownProfileError


def test_the_bases() -> None:
    assert Profile.parse("linux-3.1").fixes == {"sync-drop-noflush", "memslot-delete-flush"}
    assert Profile.parse("fixed").fixes == set(FIXES)


def test_switches_apply_in_order() -> None:
    switched = Profile.parse("linux-3.1+link-before-sync-sync-drop-noflush").fixes
    assert switched == {"link-before-sync", "memslot-delete-flush"}
    assert Profile.parse("fixed-link-before-sync+link-before-sync") == Profile.parse("fixed")
    assert Profile.parse("fixed-link-before-sync").name == "fixed-link-before-sync"


@pytest.mark.parametrize("slug", sorted(FIXES))
def test_each_fix_is_one_boolean(slug: str) -> None:
    fix = FIXES[slug]
    assert getattr(Profile.parse(f"linux-3.1+{slug}"), fix.attribute) is True
    assert getattr(Profile.parse(f"fixed-{slug}"), fix.attribute) is False
    assert (slug in BASE_PROFILES["linux-3.1"]) is (fix.status is FixStatus.MUTANT)
    others = {s: getattr(Profile.parse(f"fixed-{slug}"), FIXES[s].attribute) for s in FIXES if s != slug}
    assert all(others.values())


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
