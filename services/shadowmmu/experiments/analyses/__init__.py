"""The analyses of the shipped experiments, a module each: `analyse(table) -> Findings`.

A module `fork_scaling` is the analysis `fork-scaling`. `shadowmmu.experiments.findings` has the protocol.
"""

from __future__ import annotations

import pkgutil

__all__ = ["analysis_names", "module_name"]


def analysis_names() -> list[str]:
    """What `analysis` in an experiment's file can be."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def module_name(analysis: str) -> str:
    """The module of an analysis."""
    return f"{__name__}.{analysis.replace('-', '_')}"
