"""How an MMU service is started."""

from __future__ import annotations

from pathlib import Path

import msgspec

from shadowmmu.protocol.messages import RunConfig

__all__ = ["MmuOptions"]


class MmuOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `shadowmmu serve mmu`.

    `bind`: ZeroMQ address to listen at (port `*`: any). `advertise`: where peers reach it, if that is another
    address. `coordinator`: address of the run's coordinator; None: no run, the service is for protocol clients
    alone, with `config` and `vcpus` vCPUs. `out`: folder for the journal; None: no journal is kept.
    """

    bind: str
    advertise: str | None = None
    coordinator: str | None = None
    name: str = "mmu"
    config: RunConfig | None = None
    vcpus: int = 1
    out: Path | None = None
    heartbeat: float = 1.0
