"""How a service comes by its machine: a new one, or that of a process that was killed, from its journal.

A run has an identity, which the coordinator gives and the journal's header keeps. An unfinished journal of the same
run is what a killed service left: it is gone on with. Any other is of an earlier run, and is replaced.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Final

import msgspec
import structlog

from shadowmmu.machine import JOURNAL_NAME, EmptyJournalError, Header, JournalError, Recovery, Runner
from shadowmmu.machine.event_stream import EventListener
from shadowmmu.machine.journal import JournalReader
from shadowmmu.mmu.journal_file import FSYNC_NEVER, FsyncPolicy, JournalFile
from shadowmmu.mmu.recovered import RecoveredSessions
from shadowmmu.mmu.snapshot_files import SnapshotFiles
from shadowmmu.protocol.messages import RunConfig

__all__ = ["ALONE", "Prepared", "Startup", "prepare"]

RECORDS_AT_ONCE: Final = 64
"""Between two looks at the loop: heartbeats go on while a run is recovered."""

ALONE: Final = b"alone"
"""The run of a service that is in none, and recovers all the same."""

log = structlog.get_logger(__name__)


class Prepared(msgspec.Struct, frozen=True):
    """A machine, and where its records go.

    `recovered`: the sessions that an earlier process had. `ended`: the run was over; the machine is for reports only.
    `snapshots`: where they are kept, if anything is.
    """

    runner: Runner
    journal: JournalFile
    recovered: RecoveredSessions | None = None
    ended: bool = False
    snapshots: SnapshotFiles | None = None


class Startup(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be run, and where its journal goes.

    `out`: the folder of journal and snapshots; None: nothing is kept. `run`: which run it is; b"": one that nobody
    goes on with. `heartbeat`: of the peers, in seconds. `next_event`: the first event that the listeners lack.
    `fsync`: when the disk has to have the journal.
    """

    out: Path | None
    config: RunConfig
    run: bytes = b""
    heartbeat: float = 1.0
    next_event: int = 0
    fsync: FsyncPolicy = FSYNC_NEVER


async def prepare(startup: Startup, *listeners: EventListener) -> Prepared:
    """A machine for the run: a new one, or that of its unfinished journal.

    Raises JournalError if there is a journal of this run that cannot be gone on with, and OSError.
    """
    if startup.out is None:
        journal = JournalFile(None)
        return Prepared(Runner(startup.config, journal.write, *listeners), journal)
    path = startup.out / JOURNAL_NAME
    snapshots = SnapshotFiles(startup.out)
    header = _header(path, expected=startup.run == ALONE or startup.next_event > 0)
    if header is not None and startup.run and (header.run, header.config) == (startup.run, startup.config):
        return await _recover(startup, path, snapshots, listeners)
    journal = JournalFile(path, fsync=startup.fsync)
    snapshots.clear()
    runner = Runner(startup.config, journal.write, *listeners, run=startup.run)
    return Prepared(runner, journal, snapshots=snapshots)


def _header(path: Path, *, expected: bool) -> Header | None:
    """That of the journal there, if it is one. One that is `expected` but damaged is an error: JournalError."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            first = next(iter(JournalReader(file)), None)
    except EmptyJournalError:
        return None
    except JournalError as error:
        if expected:
            raise
        log.warning("what is there is replaced", journal=str(path), reason=str(error))
        return None
    return first if isinstance(first, Header) else None


async def _recover(
    startup: Startup, path: Path, snapshots: SnapshotFiles, listeners: tuple[EventListener, ...]
) -> Prepared:
    began = time.monotonic()
    sessions = RecoveredSessions(startup.config, startup.heartbeat, began)
    with path.open("rb") as file:
        recovery = Recovery(
            file,
            snapshots.newest_first(),
            *listeners,
            events_from=startup.next_event if listeners else None,
            on_input=sessions.on_input,
            on_output=sessions.on_output,
        )
        if recovery.service is not None:
            sessions.thaw(recovery.service)
        first = recovery.records
        log.info("recovering", journal=str(path), record=first)
        while recovery.advance(RECORDS_AT_ONCE):  # noqa: ASYNC110 - nothing is waited for: others have their turn
            await asyncio.sleep(0)
    journal = JournalFile(path, cut_at=recovery.position.offset, fsync=startup.fsync)
    runner = recovery.runner(journal.write)
    sessions.wake(time.monotonic())
    log.info(
        "recovered",
        records=recovery.records,
        replayed=recovery.records - first,
        torn_bytes=recovery.torn,
        ended=recovery.ended,
        peers=len(list(sessions.peers)),
        seconds=round(time.monotonic() - began, 3),
    )
    return Prepared(runner, journal, sessions, recovery.ended, snapshots)
