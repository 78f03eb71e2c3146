"""Snapshots: a machine's state at a record of its journal, so that a recovery need not begin with the first.

A snapshot belongs to one version of the code: the state is pickled, objects and all. It carries a checksum, and is read
only by the service that wrote it, from its own folder: whoever can write there can run code in it.
"""

from __future__ import annotations

import hashlib
import pickle
from typing import Final

import msgspec

from shadowmmu.machine.choices import SeededChoices
from shadowmmu.machine.journal import JournalPosition
from shadowmmu.machine.machine import Machine
from shadowmmu.machine.version import code_version
from shadowmmu.protocol.stream_digest import StreamDigest

__all__ = ["RunnerState", "Snapshot", "SnapshotError"]

SCHEMA: Final = 1
CHECKSUM_BYTES: Final = 16


class SnapshotError(Exception):
    """A snapshot cannot be used; the text says why."""


class RunnerState(msgspec.Struct, frozen=True):
    """A runner between two turns: the machine, where its choices come from, and its journal's and stream's ends.

    The machine is quiet if this is to be copied. `events` were emitted so far, with the digest
    `stream_digest`; the next digest is due at record `digest_due`.
    """

    machine: Machine
    choices: SeededChoices
    events: int
    stream_digest: StreamDigest
    position: JournalPosition
    digest_due: int


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """A snapshot at `position`, when `events` events had been emitted.

    `state` is a RunnerState, pickled; `service` what the service has added.
    """

    schema: int
    code_version: str
    position: JournalPosition
    events: int
    service: bytes
    state: bytes

    @classmethod
    def take(cls, state: RunnerState, service: bytes) -> Snapshot:
        """A copy of the state."""
        pickled = pickle.dumps(state, pickle.HIGHEST_PROTOCOL)
        return cls(SCHEMA, code_version(), state.position, state.events, service, pickled)

    def encode(self) -> bytes:
        """As a file: a BLAKE2b-128 checksum, and what it is of."""
        body = msgspec.msgpack.encode(self)
        return _checksum(body) + body

    @classmethod
    def decode(cls, data: bytes) -> Snapshot:
        """The snapshot in a file. Raises SnapshotError if it is damaged, or another version's."""
        body = memoryview(data)[CHECKSUM_BYTES:]
        if _checksum(body) != data[:CHECKSUM_BYTES]:
            raise SnapshotError("its checksum is wrong")
        try:
            snapshot = msgspec.msgpack.decode(body, type=cls)
        except msgspec.MsgspecError as error:
            raise SnapshotError(f"it is of another version: {error}") from error
        if (snapshot.schema, snapshot.code_version) != (SCHEMA, code_version()):
            raise SnapshotError(f"it was made by version {snapshot.code_version}, this is {code_version()}")
        return snapshot

    def restore(self) -> RunnerState:
        """A new copy of the state."""
        state = pickle.loads(self.state)  # noqa: S301 - our own, see above
        assert isinstance(state, RunnerState)
        return state


def _checksum(body: bytes | memoryview) -> bytes:
    return hashlib.blake2b(body, digest_size=CHECKSUM_BYTES).digest()
