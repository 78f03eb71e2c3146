"""Fuzz target `journal`: what a reader makes of a damaged journal.

The first byte chooses: the rest is a journal; or a frame around it, so that the checksum is right; or a real journal, in
which the rest says what to damage: bytes that change, or are missing at the end, are cut out or repeated. Promised: records or JournalError,
nothing else; and where bytes have changed or the end is missing, only records that were there.
"""

from __future__ import annotations

import functools
import io
from contextlib import suppress

from shadowmmu.machine import JournalError, Record, read_journal, run_in_process
from shadowmmu.machine.journal import JournalWriter
from shadowmmu.protocol import messages as m
from tests.fuzz.steering import Steering

__all__ = ["real_journal", "run"]

MOST_DAMAGE = 8
KEPT = 1 << 14


@functools.cache
def real_journal() -> bytes:
    """The journal of a small run, up to some kilobytes."""
    pieces: list[bytes] = []
    run_in_process(
        m.RunConfig(ops=300, memory_pages=1024, mmu_pages=64, audit=m.Audit.NEVER, seed=5), 2, pieces.append
    )
    return b"".join(pieces)[:KEPT]


@functools.cache
def _real_records() -> list[Record]:
    return list(read_journal(io.BytesIO(real_journal())))


def run(data: bytes) -> None:
    """One input; raises AssertionError, or whatever escaped, on a finding."""
    steering = Steering(data)
    kind = steering.byte()
    original: list[Record] | None = None
    if kind < 64:
        journal = data[1:]
    elif kind < 128:
        journal = _frame(data[1:])
    else:
        damaged, shifted = _damaged(steering)
        journal = bytes(damaged)
        original = None if shifted else _real_records()
    records: list[Record] = []
    with suppress(JournalError):
        records.extend(read_journal(io.BytesIO(journal)))
    if original is not None:
        assert records == original[: len(records)], "a damaged journal tells of what never happened"


def _frame(payload: bytes) -> bytes:
    pieces: list[bytes] = []
    writer = JournalWriter(pieces.append)
    writer._pending.append(payload)
    writer.flush()
    return b"".join(pieces)


def _damaged(steering: Steering) -> tuple[bytearray, bool]:
    """The real journal with some damage, and whether anything in it was moved."""
    journal = bytearray(real_journal())
    shifted = False
    for _ in range(MOST_DAMAGE):
        if steering.done:
            break
        what = steering.byte()
        at = int.from_bytes(steering.take(2), "little") % (len(journal) or 1)
        match what % 4:
            case 0:
                journal[at : at + 1] = steering.take(1)
                shifted |= steering.done  # nothing was left to put there
            case 1:
                del journal[at : at + 1 + steering.byte()]
                shifted = True
            case 2:
                journal[at:at] = journal[at : at + 1 + steering.byte()]
                shifted = True
            case _:
                del journal[at:]
    return journal, shifted
