"""Random interleavings: with all fixes the shadow of a table in sync follows from the table, whenever all is quiet."""

import pytest

from shadowmmu.kvm import mmu_audit
from tests.kvm.bugs.kit_latent import audit_failures, stale_entries
from tests.kvm.interleaver import Interleaver


@pytest.mark.parametrize("memslots", [False, True], ids=["", "memslots come and go"])
@pytest.mark.parametrize("seed", range(6))
def test_no_shadow_of_a_table_in_sync_is_stale(seed: int, memslots: bool) -> None:
    interleaver = Interleaver(seed, "fixed", memslots=memslots)
    for _ in range(12):
        interleaver.run_unaudited(400)  # all operations have ended then
        assert stale_entries(interleaver.world) == []
        assert audit_failures(interleaver.world) == []
        assert mmu_audit(interleaver.kvm) == []
