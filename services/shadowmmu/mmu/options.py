"""How an MMU service is started."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from shadowmmu.client import Security
from shadowmmu.mmu.journal_file import FSYNC_NEVER, FsyncPolicy
from shadowmmu.protocol.messages import RunConfig

__all__ = ["SNAPSHOT_RECORDS", "MmuOptions"]

SNAPSHOT_RECORDS: Final = 50_000
"""It takes some seconds to replay so many."""


class MmuOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `shadowmmu serve mmu`.

    `bind`: ZeroMQ address to listen at (port `*`: any). `advertise`: where peers reach it, if that is another address.
    `coordinator`: address of the run's coordinator; None: no run, the service is for protocol clients alone, with
    `config` and `vcpus` vCPUs. `out`: folder for the journal; None: no journal is kept. `linger_seconds`: to stay
    after the end of a run, so that a supervisor sees the coordinator end first. `security`: the keys. `fsync`: when
    the disk has to have the journal. `recover`: without a coordinator, go on with an unfinished journal in `out`.
    `snapshot_records`: journal records from one snapshot to the next.
    """

    bind: str
    advertise: str | None = None
    coordinator: str | None = None
    name: str = "mmu"
    config: RunConfig | None = None
    vcpus: int = 1
    out: Path | None = None
    heartbeat: float = 1.0
    linger_seconds: float = 0.0
    security: Security = Security()
    fsync: FsyncPolicy = FSYNC_NEVER
    recover: bool = False
    snapshot_records: int = SNAPSHOT_RECORDS
