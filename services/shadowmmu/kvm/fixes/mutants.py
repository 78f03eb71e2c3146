"""Fixes that Linux 3.1 has; taking one out puts an older bug back: part B of the catalogue, in its order."""

from __future__ import annotations

from typing import Final

from shadowmmu.kvm.fixes.fix import Fix, FixStatus

__all__ = ["MUTANT_FIXES"]

MUTANT_FIXES: Final[tuple[Fix, ...]] = (
    Fix(
        slug="sync-drop-noflush",
        bug="B2",
        commit="a4ee1ca4a36e7857d90ae8c2b85f1bde9a042c10",
        title="KVM: MMU: delay flush all tlbs on sync_page path",
        years="2008-2010",
        status=FixStatus.MUTANT,
        rules=(3,),
        description="the notifiers also flush when tlbs_dirty is not 0; without it they ignore tlbs_dirty",
    ),
    Fix(
        slug="memslot-delete-flush",
        bug="B25",
        commit="34d4cb8fca1f2a31be152b74797e6cd160ec9de6",
        title="KVM: MMU: nuke shadowed pgtable pages and ptes on memslot destruction",
        years="2007-2008",
        status=FixStatus.MUTANT,
        rules=(3, 7),
        description="the shadow is flushed before a slot is deleted; without it mappings of its frames stay",
    ),
)
