"""The audit notices each kind of damage that it is there for, and names the check."""

from collections.abc import Callable

import pytest

from shadowmmu.cpu.x86 import PT_PRESENT_MASK
from shadowmmu.kvm import Kvm, ShadowPage, host, mmu_audit
from tests.kvm.kit import TABLE, World

DATA = 256


@pytest.fixture
def world() -> World:
    """A vCPU that has written to page 0, and read page 1, a table of higher level that stays in sync."""
    world = World(1, "pre-patch+fixed", bypass_guest_pf=True, npages=1024)
    for table in (16, 17, 18):
        world.set_gpte(table, 0, table + 1, TABLE)
    world.set_gpte(19, 0, DATA)
    world.set_gpte(19, 1, 17)
    world.boot()
    world.access(world.vcpus[0], 0, write=True, value=1)
    world.access(world.vcpus[0], 0x1000)
    assert mmu_audit(world.kvm) == []
    return world


def page(kvm: Kvm, level: int) -> ShadowPage:
    return next(sp for sp in kvm.active_mmu_pages.values() if sp.level == level)


def unsync_above_level_1(kvm: Kvm) -> None:
    page(kvm, 2).unsync = True


def leaf_of_no_slot(kvm: Kvm) -> None:
    page(kvm, 1).gfns[0] = 5000


def leaf_of_another_host_frame(kvm: Kvm) -> None:
    page(kvm, 1).spt[0] += 1 << 12


def leaf_not_in_its_reverse_map(kvm: Kvm) -> None:
    del kvm.memslots[0].rmap[1][DATA]


def reverse_map_of_a_page_that_is_gone(kvm: Kvm) -> None:
    kvm.memslots[0].rmap[1][300] = 1 << 30


def reverse_map_of_an_empty_entry(kvm: Kvm) -> None:
    kvm.memslots[0].rmap[1][300] = page(kvm, 1).hpa + 8 * 5


def reverse_map_of_another_frame(kvm: Kvm) -> None:
    rmap = kvm.memslots[0].rmap[1]
    rmap[300] = rmap.pop(DATA)


def writable_table(kvm: Kvm) -> None:
    page(kvm, 1).spt[1] |= 2


def link_to_a_page_that_is_gone(kvm: Kvm) -> None:
    page(kvm, 2).spt[7] = 1 << 30 | PT_PRESENT_MASK


def parent_that_does_not_lead_there(kvm: Kvm) -> None:
    page(kvm, 1).parent_ptes = page(kvm, 2).hpa + 8 * 3


def unsync_children_miscounted(kvm: Kvm) -> None:
    page(kvm, 3).unsync_children += 1


def unsync_page_not_marked_above(kvm: Kvm) -> None:
    page(kvm, 1).unsync = True
    kvm.stat.mmu_unsync += 1
    page(kvm, 1).spt = {i: spte for i, spte in page(kvm, 1).spt.items() if spte}


def unsync_pages_miscounted(kvm: Kvm) -> None:
    kvm.stat.mmu_unsync += 1


def root_miscounted(kvm: Kvm) -> None:
    page(kvm, 4).root_count += 1


def root_that_is_gone(kvm: Kvm) -> None:
    del kvm.active_mmu_pages[page(kvm, 4).hpa]


def notrap_in_an_unsync_page(kvm: Kvm) -> None:
    page(kvm, 1).unsync = True
    assert 0 in page(kvm, 1).spt.values()


def notrap_in_a_direct_page(kvm: Kvm) -> None:
    page(kvm, 1).direct = True


def notrap_without_the_parameter(kvm: Kvm) -> None:
    kvm.bypass_guest_pf = False


def indirect_pages_miscounted(kvm: Kvm) -> None:
    kvm.indirect_shadow_pages += 1


def write_count_off_by_one(kvm: Kvm) -> None:
    kvm.memslots[0].write_count[2][0] += 1


def used_pages_miscounted(kvm: Kvm) -> None:
    kvm.n_used_mmu_pages += 1


def page_not_found_by_address(kvm: Kvm) -> None:
    kvm.page_header[1 << 30] = page(kvm, 1)


def page_not_in_the_hash(kvm: Kvm) -> None:
    del kvm.mmu_page_hash[page(kvm, 1).gfn]


DAMAGE: dict[Callable[[Kvm], None], tuple[str, str]] = {
    unsync_above_level_1: ("mappings", "unsync, but not of level 1"),
    leaf_of_no_slot: ("mappings", "in no slot"),
    leaf_of_another_host_frame: ("mappings", "to host frame"),
    leaf_not_in_its_reverse_map: ("sptes_have_rmaps", "0 times in the reverse map"),
    reverse_map_of_a_page_that_is_gone: ("rmap_entries", "a page that is gone"),
    reverse_map_of_an_empty_entry: ("rmap_entries", "maps nothing"),
    reverse_map_of_another_frame: ("rmap_entries", f"which maps {DATA}"),
    writable_table: ("write_protection", "in sync, writable"),
    link_to_a_page_that_is_gone: ("parents", "leads to a page that is gone"),
    parent_that_does_not_lead_there: ("parents", "are not the entries that lead to it"),
    unsync_children_miscounted: ("unsync", "counts 1 unsync children, with 0 bits set"),
    unsync_page_not_marked_above: ("unsync", "is not marked"),
    unsync_pages_miscounted: ("unsync", "mmu_unsync says 1"),
    root_miscounted: ("roots", "is the root of 1 vCPUs"),
    root_that_is_gone: ("roots", "is gone"),
    notrap_in_an_unsync_page: ("notrap", "in an unsync page"),
    notrap_in_a_direct_page: ("notrap", "in a direct page"),
    notrap_without_the_parameter: ("notrap", "without bypass_guest_pf"),
    indirect_pages_miscounted: ("write_count", "indirect_shadow_pages says"),
    write_count_off_by_one: ("write_count", "do not match"),
    used_pages_miscounted: ("page_lists", "n_used_mmu_pages says"),
    page_not_found_by_address: ("page_lists", "look-up by address"),
    page_not_in_the_hash: ("page_lists", "the hash"),
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_noticed(world: World, damage: Callable[[Kvm], None]) -> None:
    check, text = DAMAGE[damage]
    damage(world.kvm)
    assert any(check == error.check and text in error.text for error in mmu_audit(world.kvm))


def test_a_page_in_change_is_not_judged(world: World) -> None:
    moving = world.start(host.move(world.kvm, DATA, 0x500000, True))
    while not world.kvm.host.in_change:
        moving.step()
    assert mmu_audit(world.kvm) == []
    moving.finish()
    assert mmu_audit(world.kvm) == []


def test_a_table_in_no_slot_is_mapped_by_nobody(world: World) -> None:
    page(world.kvm, 1).gfn = 1 << 20
    assert "write_protection" not in {error.check for error in mmu_audit(world.kvm)}
