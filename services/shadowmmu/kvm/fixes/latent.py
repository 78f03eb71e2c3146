"""Fixes that Linux 3.1 lacks: part A of the catalogue, in its order."""

from __future__ import annotations

from typing import Final

from shadowmmu.kvm.fixes.fix import Fix, FixStatus

__all__ = ["LATENT_FIXES"]

LATENT_FIXES: Final[tuple[Fix, ...]] = (
    Fix(
        slug="tlbs-dirty-missed-wp",
        bug="A1",
        commit="f81602958c115fc7c87b985f71574042a20ff858",
        title="KVM: X86: Fix missed remote tlb flush in rmap_write_protect()",
        years="2010-2021",
        status=FixStatus.LATENT,
        rules=(4,),
        description="write protection of a table also flushes when tlbs_dirty is not 0 (the deferral is kept)",
    ),
    Fix(
        slug="link-before-sync",
        bug="A2",
        commit="65855ed8b03437e79e42f2a89a993206981ac6cb",
        title="KVM: X86: Synchronize the shadow pagetable before link it",
        years="2008-2021",
        status=FixStatus.LATENT,
        rules=(1,),
        description="an upper-level shadow page that is found is synchronised before it is linked",
    ),
    Fix(
        slug="notifier-flush-outside-lock",
        bug="A10",
        commit="KVM: mmu_notifier: Flush TLBs before releasing mmu_lock",
        title="KVM: mmu_notifier: Flush TLBs before releasing mmu_lock",
        years="2008-2012",
        status=FixStatus.LATENT,
        rules=(4,),
        description="the notifiers flush before they release mmu_lock",
    ),
    Fix(
        slug="stale-mmio-cache",
        bug="A12",
        commit="56f17dd3fbc44adcdbc3340fe3988ddb833a47a7",
        title="kvm: x86: fix stale mmio cache bug",
        years="2011-2014",
        status=FixStatus.LATENT,
        rules=(9,),
        description="a vCPU's cache of the last frame without memory does not outlive a change of memory slots",
    ),
    Fix(
        slug="gpa-base-change",
        bug="A14",
        commit="KVM: perform an invalid memslot step for gpa base change",
        title="KVM: perform an invalid memslot step for gpa base change",
        years="2010-2012",
        status=FixStatus.LATENT,
        rules=(3, 7),
        description="a slot that moves is made invalid, and the shadow flushed, before it is at its new place",
    ),
)
