"""The catalogue of fixes: every real bug that the model can have or lack, as a switch.

A *bug* is an entry of the catalogue (A1 to A16: in Linux 3.1; B1 to B30: fixed before it; C: of later kernels;
N: found here); a *fix*
is a switch, and a bug with variants has several. `profiles` makes kernels of them; `shadowmmu bugs` lists them.
"""

from __future__ import annotations

from typing import Final

from shadowmmu.kvm.fixes.fix import Finding, Fix, FixStatus
from shadowmmu.kvm.fixes.latent import LATENT_FIXES
from shadowmmu.kvm.fixes.later import ALTERNATIVES, LATER_FIXES
from shadowmmu.kvm.fixes.mutants import MUTANT_FIXES

__all__ = ["FIXES", "Finding", "Fix", "FixStatus"]

FIXES: Final[dict[str, Fix]] = {
    fix.slug: fix for fix in (*LATENT_FIXES, *MUTANT_FIXES, *LATER_FIXES, *ALTERNATIVES)
}
"""Every fix by slug, in the catalogue's order."""
