"""Recordings of the real shadow MMU: reading them, and saying what is wrong with a file that is none.

The format is described in conformance/FORMAT.md (format 1): gzip-compressed JSON Lines, a header and then one line per
operation.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from shadowmmu.kvm import Backing, ConfigError, KvmConfig, MemorySlot, Profile
from shadowmmu.protocol.messages import Tdp

__all__ = ["FORMAT", "BadRecordingError", "Header", "Line", "Recording", "canonical_json", "read_recording"]

FORMAT = "shadow-mmu-conformance/1"
PROFILES = {"3.1.10": "linux-3.1", "3.1-rc0": "pre-patch"}
"""The profile for what `kernel` begins with."""

Line = dict[str, Any]
"""One operation line, as JSON gives it."""


class BadRecordingError(ValueError):
    """A file that is not a recording, or a broken one. Says which file (or `<lines>`), which line and what is wrong."""


class _Slot(msgspec.Struct, frozen=True):
    id: int
    base_gfn: int
    npages: int
    backing: Backing


class Header(msgspec.Struct, frozen=True):
    """The first line of a recording."""

    format: str
    name: str
    ops: int
    kernel: str
    vcpus: int
    memslots: tuple[_Slot, ...]
    max_mmu_pages: int
    tdp: Literal[False] | Tdp
    bypass_guest_pf: bool
    host_phys_bits: int
    guest_maxphyaddr: int

    def profile(self) -> Profile | None:
        """The kernel that was recorded; None if it is none that the model has."""
        words = self.kernel.split()
        name = PROFILES.get(words[0]) if words else None
        return None if name is None else Profile.parse(name)

    def config(self, profile: Profile) -> KvmConfig:
        """The virtual machine that the recording was made with, and that kernel."""
        return KvmConfig(
            memslots=tuple(MemorySlot(s.id, s.base_gfn, s.npages, s.backing) for s in self.memslots),
            n_max_mmu_pages=self.max_mmu_pages,
            host_phys_bits=self.host_phys_bits,
            guest_maxphyaddr=self.guest_maxphyaddr,
            profile=profile,
            tdp=self.tdp or None,
            bypass_guest_pf=self.bypass_guest_pf,
        )


class Recording(msgspec.Struct):
    """A header, and the operation lines in order."""

    source: str
    header: Header
    lines: Iterator[Line]


def canonical_json(value: object) -> str:
    """The canonical form that recordings hash: sorted members, no white space."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _texts(path: Path) -> Iterator[str]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield from file
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise BadRecordingError(f"{path}: not a complete gzip file: {error}") from error
    except UnicodeDecodeError as error:
        raise BadRecordingError(f"{path}: not text in UTF-8: {error}") from error
    except OSError as error:
        raise BadRecordingError(f"{path}: cannot be read: {error.strerror or error}") from error


def _operations(source: str, header: Header, texts: Iterator[str]) -> Iterator[Line]:
    count = 0
    for count, text in enumerate(texts, 1):
        where = f"{source}: line {count + 1}"
        try:
            line = json.loads(text)
        except ValueError as error:
            raise BadRecordingError(f"{where}: not JSON: {error}") from error
        if not isinstance(line, dict) or not isinstance(line.get("op"), str):
            raise BadRecordingError(f"{where}: not an operation: it has no member 'op'")
        if line.get("seq") != count - 1:
            raise BadRecordingError(f"{where}: operation number {line.get('seq')!r}, expected {count - 1}")
        yield line
    if count != header.ops:
        raise BadRecordingError(f"{source}: {count} operations, its header says {header.ops}")


def read_recording(source: str | Path | Iterable[str]) -> Recording:
    """Open a recording: a path, or its lines.

    Raises BadRecordingError at once for a bad header, and while `lines` is read for what comes later.
    """
    if isinstance(source, str | Path):
        name, texts = str(source), _texts(Path(source))
    else:
        name, texts = "<lines>", iter(source)
    first = next(texts, None)
    if first is None:
        raise BadRecordingError(f"{name}: empty")
    try:
        raw = json.loads(first)
    except ValueError as error:
        raise BadRecordingError(f"{name}: line 1: not JSON: {error}") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != FORMAT:
        raise BadRecordingError(f"{name}: line 1: format {found!r}, expected {FORMAT!r}")
    try:
        header = msgspec.convert(raw, Header)
    except msgspec.ValidationError as error:
        raise BadRecordingError(f"{name}: line 1: bad header: {error}") from error
    try:
        header.config(header.profile() or Profile.parse("linux-3.1")).check()
    except ConfigError as error:
        raise BadRecordingError(f"{name}: line 1: bad header: {error}") from error
    return Recording(name, header, _operations(name, header, texts))
