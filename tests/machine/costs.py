"""Costs for tests: small numbers, all different, so that one taken for another is noticed."""

from __future__ import annotations

import msgspec

from shadowmmu.cpu.loads import WORK
from shadowmmu.machine.costs import Costs

__all__ = ["COSTS", "FREE", "multiplied"]

_NAMES = [name for name in Costs.__struct_fields__ if name != "guest"]
COSTS = Costs(
    **{name: 101 + 13 * number for number, name in enumerate(_NAMES) if name != "tlb_hit"},
    tlb_hit=2,
    guest={name: 1009 + 17 * number for number, name in enumerate(sorted(WORK))},
)
FREE = Costs(**dict.fromkeys(_NAMES, 0), guest=dict.fromkeys(WORK, 0))


def multiplied(costs: Costs, factor: int) -> Costs:
    """Every cost so many times as much."""
    return msgspec.structs.replace(
        costs,
        **{name: getattr(costs, name) * factor for name in _NAMES},
        guest={name: cycles * factor for name, cycles in costs.guest.items()},
    )
