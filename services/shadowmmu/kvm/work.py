"""How much work the model has done, in units that have a price in virtual time (`shadowmmu.machine.costs`).

Whoever wants to know looks at the counts before and after some steps. What the kernel's own counters (`stats`) tell is
not counted again here.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Work"]


@dataclass(slots=True)
class Work:
    """Counts since the machine was made."""

    guest_walk_levels: int = 0
    """Guest entries that walk_addr has read."""
    frame_lookups: int = 0
    """gfn_to_pfn."""
    emulations: int = 0
    """Instructions that were decoded and emulated."""
    sptes_set: int = 0
    """Leaf entries written: set_spte."""
    sptes_dropped: int = 0
    """Leaf entries removed: drop_spte."""
    sptes_synced: int = 0
    """Entries that sync_page has looked at."""
    rmap_entries: int = 0
    """Entries of reverse maps and of lists of parents that were added, removed, or looked at."""
    page_lookups: int = 0
    """kvm_mmu_get_page."""
    pages_unsynced: int = 0
    """Shadow pages that went out of sync."""
    root_loads: int = 0
    """kvm_mmu_load."""
