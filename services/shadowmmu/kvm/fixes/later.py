"""Guards against bugs that later kernels had and 3.1 cannot have; taking one out injects the bug: part C.

`ALTERNATIVES` are other ways to fix a bug of part A: off in every base profile.
"""

from __future__ import annotations

from typing import Final

from shadowmmu.kvm.fixes.fix import Finding, Fix, FixStatus

__all__ = ["ALTERNATIVES", "LATER_FIXES"]

LATER_FIXES: Final[tuple[Fix, ...]] = (
    Fix(
        slug="wp-race-dirty-log",
        bug="C1",
        commit="6dbf79e7164e9a86c1e466062c48498142ae6128",
        title="KVM: MMU: Fix write protection race during dirty logging",
        years="2012",
        status=FixStatus.LATER,
        rules=(4,),
        description="get_dirty_log flushes before it releases mmu_lock; without it after",
    ),
    Fix(
        slug="lockless-sync-roots",
        bug="C2",
        commit="264d3dc1d3dc",
        title="KVM: X86: pair smp_wmb() of mmu_try_to_unsync_pages() with smp_rmb()",
        years="2018-2021",
        status=FixStatus.LATER,
        rules=(4, 1),
        description="a table is unsync before an entry maps it writable, and roots are synchronised under mmu_lock; "
        "without it the entry is first, and a look without the lock decides",
    ),
    Fix(
        slug="ro-large-spte-dirty-log",
        bug="C8",
        commit="404381c5839d67aa0c275ad1da96ef3d3928ca2c",
        title="KVM: MMU: drop read-only large sptes when creating lower level sptes",
        years="?-2014",
        status=FixStatus.LATER,
        rules=(8,),
        description="dirty logging drops every large entry; without it read-only ones stay, and a direct map never "
        "gets below them",
        finding=Finding.NOT_OBSERVABLE,
    ),
)

ALTERNATIVES: Final[tuple[Fix, ...]] = (
    Fix(
        slug="sync-flush-now",
        bug="A1",
        commit="6bc6db000295332bae2c1e8815d7450b72923d23",
        title="KVM: Remove tlbs_dirty",
        years="2010-2021",
        status=FixStatus.ALTERNATIVE,
        rules=(4,),
        description="sync_page flushes all TLBs for what it drops, so that nothing is put off and tlbs_dirty stays 0",
    ),
)
