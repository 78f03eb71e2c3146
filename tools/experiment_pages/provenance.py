"""provenance.json in a sweep's folder: which commit made the sweep, when, and on what.

The folder's own sweep.json has the program's version; between two releases that is not enough.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Final

import msgspec

from tools.revision import digest, revision

__all__ = ["PROVENANCE_NAME", "Provenance", "provenance_now", "read_provenance"]

PROVENANCE_NAME: Final = "provenance.json"
_ROOT: Final = Path(__file__).parents[2]
_SOURCES: Final = (
    "protocol",
    "workers",
    "services/shadowmmu/kvm",
    "services/shadowmmu/machine",
    "services/shadowmmu/experiments/cost_models",
    "services/shadowmmu/experiments/kinds",
)
"""What the results of a run depend on."""


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """`revision`: date and commit; `sources`: a hash of the files that results depend on, committed or not.

    `python`: its version; `cores`: that could be used.
    """

    revision: str
    sources: str
    python: str
    cores: int


def provenance_now() -> Provenance:
    """Of a sweep that begins now, from the sources of this repository."""
    return Provenance(
        revision=revision(_ROOT / "services"),
        sources=digest(_ROOT / name for name in _SOURCES),
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)),
    )


def read_provenance(folder: Path) -> Provenance | None:
    """None if the folder has none. Raises msgspec.DecodeError if it is damaged."""
    path = folder / PROVENANCE_NAME
    return msgspec.json.decode(path.read_bytes(), type=Provenance) if path.exists() else None
