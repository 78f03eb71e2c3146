"""What stands in TLBs, shadow tables and guest tables between two steps, in words, for diagrams."""

from __future__ import annotations

from shadowmmu.cpu import x86
from shadowmmu.explorer.diagram_names import Names, rights
from shadowmmu.explorer.scenario import Scenario
from shadowmmu.explorer.world import World
from shadowmmu.protocol.events import AccessFlag

__all__ = ["describe_entry", "differ", "shadow_entries", "state_lines", "table_lines", "translation"]


def translation(world: World, names: Names, pfn: int, flags: int, level: int = 1) -> str:
    """What a translation leads to and allows: `G (wuxd)`; flags as in the event stream."""
    gfn = world.machine.host.gfn_of(pfn)
    large = AccessFlag.LARGE if level > 1 else 0
    frame = f"host frame {pfn:#x}" if gfn is None else names.frame(gfn)
    return f"{frame} ({rights(flags | large)})"


def state_lines(world: World, names: Names) -> tuple[str, ...]:
    """What each TLB holds, and which tables are unsync."""
    lines = []
    for core in world.cores:
        held = []
        for tag, (small, large) in core.tlb.held():
            other = "" if tag == core.tlb.tag else f" on processor {tag.processor}"
            for shift, entries in ((12, small), (21, large)):
                for page, entry in sorted(entries.items()):
                    name = names.page(page << shift, 1 << shift)
                    held.append(f"{name} -> {translation(world, names, entry.pfn, entry.flags)}{other}")
        lines.append(f"TLB of v{core.vcpu}: {', '.join(held) or 'empty'}")
    unsync = {sp.gfn for sp in world.machine.kvm.page_header.values() if sp.unsync}
    if unsync:
        lines.append("unsync: " + ", ".join(names.table(gfn) for gfn in sorted(unsync)))
    return tuple(lines)


def shadow_entries(world: World) -> dict[int, tuple[int, dict[int, int]]]:
    """By address of each shadow page that stands for a guest table: that table's frame, and its entries."""
    return {hpa: (sp.gfn, dict(sp.spt)) for hpa, sp in world.machine.kvm.page_header.items() if not sp.direct}


def differ(before: int, after: int) -> bool:
    """Whether a shadow entry was changed otherwise than by the hardware, which sets A and D by itself."""
    return bool((before ^ after) & ~(x86.PT_ACCESSED_MASK | x86.PT_DIRTY_MASK))


def describe_entry(world: World, names: Names, spte: int) -> str:
    """A shadow entry: the table that it leads to, or the frame that it maps and what it allows."""
    if not spte & x86.PT_PRESENT_MASK:
        return "not present" if spte else "dropped"
    child = world.machine.kvm.page_header.get(spte & x86.PT64_BASE_ADDR_MASK)
    if child is not None:
        return f"-> shadow of {names.table(child.gfn)}"
    gfn = world.machine.host.gfn_of((spte & x86.PT64_BASE_ADDR_MASK) >> 12)
    letters = ("w", x86.PT_WRITABLE_MASK), ("u", x86.PT_USER_MASK)
    allowed = "".join(letter for letter, mask in letters if spte & mask)
    return f"maps {'?' if gfn is None else names.frame(gfn)} ({allowed})"


def table_lines(scenario: Scenario, names: Names) -> list[str]:
    """The words of named frames at the start, as entries: `T[9] = G wuad`; the linear map's are left out."""
    size = names.entry_size
    lines = []
    for gpa, word in scenario.words:
        if not names.is_named(gpa >> 12):
            continue
        for offset in range(0, 8, size):
            value = word >> 8 * offset & ((1 << 8 * size) - 1)
            if value and not names.is_linear_table(value):
                lines.append(f"{names.place(gpa + offset)} = {names.value(value)}")
    return lines
