"""Guards against bugs that later kernels had and 3.1 cannot have; taking one out injects the bug: part C.

`ALTERNATIVES` are other ways to fix a bug of part A: off in every base profile.
"""

from __future__ import annotations

from typing import Final

from shadowmmu.kvm.fixes.fix import Fix

__all__ = ["ALTERNATIVES", "LATER_FIXES"]

LATER_FIXES: Final[tuple[Fix, ...]] = ()

ALTERNATIVES: Final[tuple[Fix, ...]] = ()
