"""Which kernel is simulated: a base and switches.

A profile is a base (`linux-3.1`: as released, with the bugs it really had; `fixed`: with every catalogued fix;
`pre-patch`: the tree just before "KVM: MMU: remove bypass_guest_pf", July 2011) and switches of single fixes:
`linux-3.1+tlbs-dirty-missed-wp`, `fixed-sync-drop-noflush`; `pre-patch+fixed` switches every fix on. The model reads a
fix as a plain boolean (`profile.link_before_sync`) at each place where the behaviour differs. Relies on the catalogue
(`fixes`).
"""

from __future__ import annotations

import enum
from typing import Final

from shadowmmu.kvm.errors import UnknownFixError, UnknownProfileError
from shadowmmu.kvm.fixes import FIXES, FixStatus

__all__ = ["ALL_FIXES", "BASE_PROFILES", "KernelTree", "Profile"]


class KernelTree(enum.Enum):
    """The code that is simulated, apart from fixes."""

    LINUX_3_1 = "linux-3.1"
    PRE_PATCH = "pre-patch"  # bypass_guest_pf is there, MMIO shadow entries are not yet


_IN_3_1: Final = frozenset(s for s, fix in FIXES.items() if fix.status in (FixStatus.MUTANT, FixStatus.LATER))
_ALL: Final = frozenset(s for s, fix in FIXES.items() if fix.status is not FixStatus.ALTERNATIVE)

BASE_PROFILES: Final[dict[str, frozenset[str]]] = {
    "linux-3.1": _IN_3_1,
    "fixed": _ALL,
    "pre-patch": _IN_3_1,
}
"""The fixes that each base has on."""

ALL_FIXES: Final = "fixed"
"""The switch that stands for every fix but the alternatives."""


class Profile:
    """A kernel to simulate: a tree, a name and one boolean per fix (True: the fix is in).

    `Profile.parse("fixed-link-before-sync")`; equal if the tree is the same and the same fixes are on.
    """

    fixes: frozenset[str]
    kernel: KernelTree
    name: str
    # part A
    tlbs_dirty_missed_wp: bool
    link_before_sync: bool
    notifier_flush_outside_lock: bool
    stale_mmio_cache: bool
    gpa_base_change: bool
    # part B
    sync_drop_noflush: bool
    memslot_delete_flush: bool
    # part C, and alternatives

    __slots__ = ("fixes", "kernel", "name", *(fix.attribute for fix in FIXES.values()))

    def __init__(self, name: str, fixes: frozenset[str], kernel: KernelTree = KernelTree.LINUX_3_1) -> None:
        self.name = name
        self.kernel = kernel
        self.fixes = fixes
        for slug, fix in FIXES.items():
            setattr(self, fix.attribute, slug in fixes)

    @classmethod
    def parse(cls, text: str) -> Profile:
        """A base profile's name, then any number of `+slug` and `-slug`.

        Raises UnknownProfileError or UnknownFixError, which say what was not known and what is.
        """
        base = max((b for b in BASE_PROFILES if _is_prefix(b, text)), key=len, default=None)
        if base is None:
            raise UnknownProfileError(text, sorted(BASE_PROFILES))
        fixes = set(BASE_PROFILES[base])
        rest = text[len(base) :]
        while rest:
            sign, rest = rest[0], rest[1:]
            # Slugs contain the sign '-': the longest known slug that fits is meant.
            slug = max((s for s in (*FIXES, ALL_FIXES) if _is_prefix(s, rest)), key=len, default=None)
            if slug is None:
                raise UnknownFixError(rest.split("+")[0], sorted(FIXES))
            switched = _ALL if slug == ALL_FIXES else {slug}
            (fixes.update if sign == "+" else fixes.difference_update)(switched)
            rest = rest[len(slug) :]
        kernel = KernelTree.PRE_PATCH if base == KernelTree.PRE_PATCH.value else KernelTree.LINUX_3_1
        return cls(text, frozenset(fixes), kernel)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Profile) and (self.kernel, self.fixes) == (other.kernel, other.fixes)

    def __hash__(self) -> int:
        return hash((self.kernel, self.fixes))

    def __repr__(self) -> str:
        return f"Profile({self.name!r})"


def _is_prefix(name: str, text: str) -> bool:
    """Whether `text` is `name`, or `name` followed by a switch."""
    return text.startswith(name) and text[len(name) : len(name) + 1] in ("", "+", "-")
