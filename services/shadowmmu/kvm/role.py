"""The role of a shadow page: which guest tables it may stand for (union kvm_mmu_page_role).

A role is one word, as in the kernel, so that comparing two is comparing two integers.
"""

from __future__ import annotations

from typing import Final

ROLE_LEVEL_MASK: Final = 0xF
ROLE_CR4_PAE: Final = 1 << 4
ROLE_QUADRANT_SHIFT: Final = 5
ROLE_QUADRANT_MASK: Final = 3 << ROLE_QUADRANT_SHIFT
ROLE_DIRECT: Final = 1 << 13
ROLE_ACCESS_SHIFT: Final = 14
ROLE_ACCESS_MASK: Final = 7 << ROLE_ACCESS_SHIFT
ROLE_INVALID: Final = 1 << 17
ROLE_NXE: Final = 1 << 18
ROLE_CR0_WP: Final = 1 << 19
ROLE_SMEP_ANDNOT_WP: Final = 1 << 20

ROLE_PTE_WRITE_MASK: Final = ROLE_CR0_WP | ROLE_CR4_PAE | ROLE_NXE
"""kvm_mmu_pte_write updates the pages that agree with the writing vCPU in these."""

ROLE_BASE_MASK: Final = ROLE_CR4_PAE | ROLE_NXE | ROLE_CR0_WP | ROLE_SMEP_ANDNOT_WP
"""What a page inherits from the base role of the vCPU that makes it."""


def page_role(base_role: int, level: int, quadrant: int, direct: bool, access: int) -> int:
    """The role of a page made by a vCPU with `base_role`: see kvm_mmu_get_page.

    A direct page stands for no guest table, so CR4.PAE of its maker does not matter.
    """
    role = base_role & ROLE_BASE_MASK | level | quadrant << ROLE_QUADRANT_SHIFT | access << ROLE_ACCESS_SHIFT
    if direct:
        role = role & ~ROLE_CR4_PAE | ROLE_DIRECT
    return role


def role_text(role: int) -> str:
    """The role as people read it: level:quadrant:direct:access:cr4_pae:nxe:cr0_wp:smep_andnot_wp:invalid."""
    return ":".join(
        str(int(value))
        for value in (
            role & ROLE_LEVEL_MASK,
            (role & ROLE_QUADRANT_MASK) >> ROLE_QUADRANT_SHIFT,
            role & ROLE_DIRECT != 0,
            (role & ROLE_ACCESS_MASK) >> ROLE_ACCESS_SHIFT,
            role & ROLE_CR4_PAE != 0,
            role & ROLE_NXE != 0,
            role & ROLE_CR0_WP != 0,
            role & ROLE_SMEP_ANDNOT_WP != 0,
            role & ROLE_INVALID != 0,
        )
    )
