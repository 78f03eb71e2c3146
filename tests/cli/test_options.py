"""Options that follow from others: workload, paging mode, two-dimensional paging, bypass_guest_pf."""

from __future__ import annotations

from typing import Any

import pytest

from shadowmmu.cli.options import make_config
from shadowmmu.protocol.messages import GuestMode, RunConfig, Tdp, Workload


def config(**values: Any) -> RunConfig:
    return make_config(2, **{"profile": "fixed", **values})


def test_without_options_it_is_the_default_run() -> None:
    assert config() == RunConfig()


@pytest.mark.parametrize("mode", [GuestMode.PAE, GuestMode.PAGING32, GuestMode.NONPAGING, GuestMode.MIXED])
def test_another_mode_means_workload_modes(mode: GuestMode) -> None:
    made = config(mode=mode)
    assert (made.workload, made.mode) == (Workload.MODES, mode)
    assert config(mode=mode, workload=Workload.MODES) == made


def test_64_bit_paging_goes_with_every_workload() -> None:
    assert config(mode=GuestMode.PAGING64).workload is Workload.MIXED
    assert config(mode=GuestMode.PAGING64, workload=Workload.MODES).workload is Workload.MODES


@pytest.mark.parametrize("tdp", Tdp)
def test_with_two_dimensional_paging_guests_run_with_paging_off(tdp: Tdp) -> None:
    made = config(tdp=tdp)
    assert (made.workload, made.mode, made.tdp) == (Workload.MODES, GuestMode.NONPAGING, tdp)


@pytest.mark.parametrize(
    "values, bypass",
    [
        ({"profile": "pre-patch"}, True),
        ({"profile": "pre-patch+fixed"}, True),
        ({"profile": "pre-patch", "bypass_guest_pf": False}, False),
        ({"profile": "pre-patch", "tdp": Tdp.EPT}, False),
        ({"profile": "linux-3.1"}, False),
        ({"profile": "fixed", "bypass_guest_pf": False}, False),
    ],
)
def test_bypass_guest_pf_is_on_where_the_kernel_has_it(values: dict[str, Any], bypass: bool) -> None:
    assert config(**values).bypass_guest_pf is bypass
