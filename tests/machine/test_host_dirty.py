"""Swapping out what the host thinks clean: invisible in whole runs, unless KVM loses a dirty bit (B20)."""

from __future__ import annotations

import msgspec
import pytest

from shadowmmu.checker import Rule
from shadowmmu.kvm.host_memory import HostMemory
from shadowmmu.kvm.memslots import KvmMemorySlot
from shadowmmu.protocol import messages as m
from tests.machine.test_inprocess import Run, config

SWAPPING = config(ops=20_000, host_rate=60.0, park_rate=0.2, seed=5, audit=m.Audit.NEVER)


def config_with(**changes: object) -> m.RunConfig:
    return msgspec.structs.replace(SWAPPING, **changes)


@pytest.mark.parametrize("memory_model", m.MemoryModel)
def test_a_run_with_much_swapping_is_clean(
    memory_model: m.MemoryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed = 0
    page_out = HostMemory.page_out

    def counted(self: HostMemory, slot: KvmMemorySlot, page: int, pfn: int) -> None:
        nonlocal freed
        freed += page in self.swapped and page in self.swap_space and not self.is_dirty(slot, page, pfn)
        page_out(self, slot, page, pfn)

    monkeypatch.setattr(HostMemory, "page_out", counted)
    run = Run(config_with(memory_model=memory_model), 3)
    assert run.violation is None
    assert freed > 50


def test_a_dirty_bit_that_is_not_carried_over_loses_stores() -> None:
    violation = Run(config_with(profile="fixed-ad-bit-loss-carry"), 3).violation
    assert violation is not None
    assert violation.rule is Rule.LOST_STORE
