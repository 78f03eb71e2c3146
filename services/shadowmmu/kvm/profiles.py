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
    pte_write_fastexit_barrier: bool
    stale_mmio_cache: bool
    gpa_base_change: bool
    inherited_perms: bool
    emulated_write_race: bool
    pf_injection_no_sync: bool
    sync_wrong_role: bool
    unexpected_gfn: bool
    unexpected_role: bool
    tlbs_dirty_truncation: bool
    change_pte_order: bool
    wp0_dirty_missed: bool
    pae_root_leak: bool
    emulated_store_window: bool
    pdpte_reread: bool
    # part B
    sync_drop_noflush: bool
    ad_bit_loss: bool
    ad_bit_loss_update: bool
    ad_bit_loss_carry: bool
    ad_bit_loss_write_access: bool
    mode_request_barrier: bool
    request_mode_barrier: bool
    memslot_delete_flush: bool
    wr_ro_noflush: bool
    sync_drop_noflush_count: bool
    sync_drop_noflush_clear: bool
    writable_sync_sp: bool
    selfref_sync: bool
    fetch_revalidate_all: bool
    fetch_revalidate_leaf: bool
    fetch_revalidate_leaf_existing: bool
    read_before_wp: bool
    invlpg_prefault_race: bool
    invlpg_noremote: bool
    large_to_normal: bool
    small_to_large: bool
    pfn_overwrite: bool
    pfn_overwrite_drop: bool
    direct_sp_access: bool
    direct_sp_access_leaf: bool
    direct_gfn: bool
    role_bits_wp: bool
    role_bits_nxe: bool
    role_bits_user: bool
    role_bits_smep: bool
    wp_huge_iteration: bool
    dirty_log_flush: bool
    dirty_log_flush_early: bool
    dirty_log_large_maps: bool
    notifier_huge_index: bool
    notifier_retry: bool
    notifier_retry_late_seq: bool
    notifier_retry_count: bool
    notifier_retry_seq: bool
    notifier_retry_raise_late: bool
    second_flusher_returns_early: bool
    second_flusher_exiting: bool
    mode_vs_request_order: bool
    locked_op_emulation: bool
    sync_on_cr3_reload: bool
    sync_on_load: bool
    memslot_delete_flush_early: bool
    unreachable_child: bool
    prefetch_reserved_bits: bool
    prefetch_present: bool
    prefetch_accessed: bool
    inherited_in_pte_write: bool
    inherited_in_prefetch: bool
    inherited_in_sync: bool
    quadrant: bool
    quadrant_sync: bool
    quadrant_invlpg: bool
    stale_on_old_pcpu: bool
    # part C, and alternatives
    wp_race_dirty_log: bool
    lockless_sync_roots: bool
    ro_large_spte_dirty_log: bool
    sync_flush_now: bool

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
