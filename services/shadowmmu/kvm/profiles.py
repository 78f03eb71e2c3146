"""Which kernel is simulated, and the catalogue of fixes that can be switched on and off.

A profile is a base (`linux-3.1`: as released, with the bugs it really had; `fixed`: with every catalogued fix;
`pre-patch`: the tree just before "KVM: MMU: remove bypass_guest_pf", July 2011) and switches:
`linux-3.1+tlbs-dirty-missed-wp`, `fixed-sync-drop-noflush`; `pre-patch+fixed` switches every fix on. A fix is *latent*
if Linux 3.1 lacks it, and a *mutant* if Linux 3.1 has it, so that taking it out puts an older bug back. The model reads
a fix as a plain boolean (`profile.link_before_sync`) at each place where the behaviour differs.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

from shadowmmu.kvm.errors import UnknownFixError, UnknownProfileError

__all__ = ["ALL_FIXES", "BASE_PROFILES", "FIXES", "Fix", "FixStatus", "KernelTree", "Profile"]


class KernelTree(enum.Enum):
    """The code that is simulated, apart from fixes."""

    LINUX_3_1 = "linux-3.1"
    PRE_PATCH = "pre-patch"  # bypass_guest_pf is there, MMIO shadow entries are not yet


class FixStatus(enum.Enum):
    """Whether Linux 3.1 has the fix."""

    LATENT = "latent"  # 3.1 has the bug: off in linux-3.1, on in fixed
    MUTANT = "mutant"  # 3.1 has the fix: on in both; without it an older bug is back


class Fix(msgspec.Struct, frozen=True):
    """One switch. `bug` is its entry in BUGS.md; `commit` the upstream commit, or its title if the hash is unsure."""

    slug: str
    bug: str
    commit: str
    title: str
    years: str
    status: FixStatus
    description: str

    @property
    def attribute(self) -> str:
        """The name of the profile's boolean for it."""
        return self.slug.replace("-", "_")


FIXES: Final[dict[str, Fix]] = {
    fix.slug: fix
    for fix in (
        Fix(
            slug="tlbs-dirty-missed-wp",
            bug="A1",
            commit="f81602958c115fc7c87b985f71574042a20ff858",
            title="KVM: X86: Fix missed remote tlb flush in rmap_write_protect()",
            years="2010-2021",
            status=FixStatus.LATENT,
            description="write protection of a table also flushes when tlbs_dirty is not 0 (the deferral is kept)",
        ),
        Fix(
            slug="link-before-sync",
            bug="A2",
            commit="65855ed8b03437e79e42f2a89a993206981ac6cb",
            title="KVM: X86: Synchronize the shadow pagetable before link it",
            years="2008-2021",
            status=FixStatus.LATENT,
            description="an upper-level shadow page that is found is synchronised before it is linked",
        ),
        Fix(
            slug="notifier-flush-outside-lock",
            bug="A10",
            commit="KVM: mmu_notifier: Flush TLBs before releasing mmu_lock",
            title="KVM: mmu_notifier: Flush TLBs before releasing mmu_lock",
            years="2008-2012",
            status=FixStatus.LATENT,
            description="the notifiers flush before they release mmu_lock",
        ),
        Fix(
            slug="sync-drop-noflush",
            bug="B2",
            commit="a4ee1ca4a36e7857d90ae8c2b85f1bde9a042c10",
            title="KVM: MMU: delay flush all tlbs on sync_page path",
            years="2008-2010",
            status=FixStatus.MUTANT,
            description="the notifiers also flush when tlbs_dirty is not 0; without it they ignore tlbs_dirty",
        ),
        Fix(
            slug="stale-mmio-cache",
            bug="A12",
            commit="56f17dd3fbc44adcdbc3340fe3988ddb833a47a7",
            title="kvm: x86: fix stale mmio cache bug",
            years="2011-2014",
            status=FixStatus.LATENT,
            description="a vCPU's cache of the last frame without memory does not outlive a change of memory slots",
        ),
        Fix(
            slug="gpa-base-change",
            bug="A14",
            commit="KVM: perform an invalid memslot step for gpa base change",
            title="KVM: perform an invalid memslot step for gpa base change",
            years="2010-2012",
            status=FixStatus.LATENT,
            description="a slot that moves is made invalid, and the shadow flushed, before it is at its new place",
        ),
        Fix(
            slug="memslot-delete-flush",
            bug="B25",
            commit="34d4cb8fca1f2a31be152b74797e6cd160ec9de6",
            title="KVM: MMU: nuke shadowed pgtable pages and ptes on memslot destruction",
            years="2007-2008",
            status=FixStatus.MUTANT,
            description="the shadow is flushed before a slot is deleted; without it mappings of its frames stay",
        ),
    )
}
"""Every fix by slug."""

_IN_3_1: Final = frozenset(s for s, fix in FIXES.items() if fix.status is FixStatus.MUTANT)

BASE_PROFILES: Final[dict[str, frozenset[str]]] = {
    "linux-3.1": _IN_3_1,
    "fixed": frozenset(FIXES),
    "pre-patch": _IN_3_1,
}
"""The fixes that each base has on."""

ALL_FIXES: Final = "fixed"
"""The switch that stands for every fix."""


class Profile:
    """A kernel to simulate: a tree, a name and one boolean per fix.

    `Profile.parse("fixed-link-before-sync")`; equal if the tree is the same and the same fixes are on.
    """

    __slots__ = (
        "fixes",
        "gpa_base_change",
        "kernel",
        "link_before_sync",
        "memslot_delete_flush",
        "name",
        "notifier_flush_outside_lock",
        "stale_mmio_cache",
        "sync_drop_noflush",
        "tlbs_dirty_missed_wp",
    )

    def __init__(self, name: str, fixes: frozenset[str], kernel: KernelTree = KernelTree.LINUX_3_1) -> None:
        self.name = name
        self.kernel = kernel
        self.fixes = fixes
        self.tlbs_dirty_missed_wp = "tlbs-dirty-missed-wp" in fixes
        self.link_before_sync = "link-before-sync" in fixes
        self.notifier_flush_outside_lock = "notifier-flush-outside-lock" in fixes
        self.sync_drop_noflush = "sync-drop-noflush" in fixes
        self.stale_mmio_cache = "stale-mmio-cache" in fixes
        self.gpa_base_change = "gpa-base-change" in fixes
        self.memslot_delete_flush = "memslot-delete-flush" in fixes

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
            switched = FIXES if slug == ALL_FIXES else {slug}
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
