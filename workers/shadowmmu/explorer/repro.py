"""A `.repro` file: a failing execution, kept so that it can be executed again for ever.

Readable JSON: the versions of format and code, the profile, the failure, the schedule by counts and as a trail (by
names, for code that has changed since), a digest of the execution's events, and the whole scenario. Numbers of the
scenario's memory are in hexadecimal.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from shadowmmu.checker import Rule
from shadowmmu.explorer.actors import KIND, Actor, format_schedule, number, parse_schedule
from shadowmmu.explorer.execution import Failure
from shadowmmu.explorer.scenario import Scenario
from shadowmmu.explorer.trail import (
    Divergence,
    Followed,
    Trail,
    follow_schedule,
    follow_trail,
    format_trail,
    parse_trail,
)
from shadowmmu.explorer.world import ScenarioError
from shadowmmu.kvm import KvmError, Profile
from shadowmmu.machine.version import code_version
from shadowmmu.protocol.events import Event, encode_events

__all__ = [
    "FORMAT",
    "REPRO_SUFFIX",
    "Replayed",
    "Repro",
    "ReproError",
    "Sameness",
    "load_repro",
    "make_repro",
    "replay_repro",
    "save_repro",
]

FORMAT: Final = 1
REPRO_SUFFIX: Final = ".repro"


class ReproError(ValueError):
    """A `.repro` file cannot be used; the message says which and what is wrong."""


class Repro(msgspec.Struct, frozen=True):
    """What a file has. `rule` is the broken rule's number, None for the scenario's own condition."""

    scenario: Scenario
    profile: str
    schedule: tuple[Actor, ...]
    trail: Trail
    rule: Rule | None
    text: str
    digest: str
    code: str

    @property
    def failure(self) -> Failure:
        """The recorded failure, without the violation's details."""
        return Failure(self.rule, self.text)


class _Failure(msgspec.Struct, frozen=True):
    rule: int | None
    kind: str
    text: str


class _File(msgspec.Struct, frozen=True):
    """The file's layout; the scenario's words stand in `memory`."""

    format: int
    code_version: str
    profile: str
    failure: _Failure
    schedule: str
    trail: list[str]
    events_digest: str
    memory: dict[str, str]
    scenario: Scenario


class _Version(msgspec.Struct, frozen=True):
    format: int


def make_repro(scenario: Scenario, profile: str, schedule: Sequence[Actor]) -> Repro:
    """Executes the schedule and records it. Raises ReproError if nothing fails."""
    digest = _Digest()
    followed = follow_schedule(scenario, profile, schedule, digest)
    ending = followed.ending
    if ending.failure is None:
        raise ReproError(f"{scenario.name}: nothing fails along the schedule")
    return Repro(
        scenario=scenario,
        profile=profile,
        schedule=ending.schedule,
        trail=followed.trail,
        rule=ending.failure.rule,
        text=ending.failure.text,
        digest=digest.hexdigest(),
        code=code_version(),
    )


class _Digest:
    """Listens to an execution."""

    def __init__(self, listener: Callable[[Actor, list[Event]], None] | None = None) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._listener = listener

    def __call__(self, actor: Actor, events: list[Event]) -> None:
        self._hash.update(encode_events(events))
        if self._listener is not None:
            self._listener(actor, events)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def save_repro(repro: Repro, path: Path) -> None:
    """Writes the file. Raises OSError."""
    path.write_bytes(encode_repro(repro))


def encode_repro(repro: Repro) -> bytes:
    """The file's contents."""
    file = _File(
        format=FORMAT,
        code_version=repro.code,
        profile=repro.profile,
        failure=_Failure(repro.rule, repro.failure.kind, repro.text),
        schedule=format_schedule(repro.schedule),
        trail=format_trail(repro.trail),
        events_digest=repro.digest,
        memory={hex(gpa): hex(value) for gpa, value in repro.scenario.words},
        scenario=msgspec.structs.replace(repro.scenario, words=()),
    )
    return msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n"


def load_repro(path: Path) -> Repro:
    """Reads a file. Raises ReproError, which says what is wrong, or OSError."""
    return decode_repro(path.read_bytes(), str(path))


def decode_repro(data: bytes, name: str) -> Repro:
    """The recording in a file's contents; `name` is for errors."""
    try:
        version = msgspec.json.decode(data, type=_Version).format
        if version != FORMAT:
            raise ReproError(f"{name}: format {version}; this version reads format {FORMAT}")
        file = msgspec.json.decode(data, type=_File)
        words = tuple((int(gpa, 0), int(value, 0)) for gpa, value in file.memory.items())
        scenario = msgspec.structs.replace(file.scenario, words=words)
        Profile.parse(file.profile)
        repro = Repro(
            scenario=scenario,
            profile=file.profile,
            schedule=tuple(parse_schedule(file.schedule)),
            trail=parse_trail(file.trail),
            rule=None if file.failure.rule is None else Rule(file.failure.rule),
            text=file.failure.text,
            digest=file.events_digest,
            code=file.code_version,
        )
    except (msgspec.DecodeError, KvmError, ValueError) as error:
        if isinstance(error, ReproError):
            raise
        raise ReproError(f"{name}: {error}") from error
    _check(repro, name)
    return repro


def _check(repro: Repro, name: str) -> None:
    """What the types do not say."""
    scenario = repro.scenario
    vcpus, hosts = scenario.vcpus, len(scenario.hosts)
    if len(scenario.programs) != vcpus:
        raise ReproError(f"{name}: {len(scenario.programs)} programs for {vcpus} vCPUs")
    for setup in scenario.setup:
        if not -1 <= setup.vcpu < vcpus:
            raise ReproError(f"{name}: the set-up names vCPU {setup.vcpu}, there are {vcpus}")
    for actor in {*repro.schedule, *(place.actor for place in repro.trail)}:
        if number(actor) >= (hosts if actor // KIND == 2 else vcpus):
            raise ReproError(f"{name}: the schedule names {format_schedule([actor])}, which does not exist")


class Sameness(enum.Enum):
    """How an execution compares with the recorded one."""

    IDENTICAL = "fails as recorded, event for event"
    SAME_FAILURE = "fails as recorded, by other events"
    OTHER_FAILURE = "fails in another way than recorded"
    NO_FAILURE = "does not fail any more"
    NOT_FOLLOWED = "the recorded schedule cannot be followed"


class Replayed(msgspec.Struct, frozen=True):
    """What came of executing a recording again. `divergence`: the first step that was not as recorded."""

    sameness: Sameness
    followed: Followed
    divergence: Divergence | None

    @property
    def failure(self) -> Failure | None:
        """The failure that there is now."""
        return self.followed.ending.failure


def replay_repro(repro: Repro, profile: str | None = None) -> Replayed:
    """Executes a recording again, by counts if that gives the recorded events, otherwise by names.

    `profile`: another one than the recorded. Raises ReproError if the scenario cannot be set up any more.
    """
    profile = profile or repro.profile
    digest = _Digest()
    try:
        followed = follow_schedule(repro.scenario, profile, repro.schedule, digest)
        if digest.hexdigest() == repro.digest:
            return Replayed(Sameness.IDENTICAL, followed, None)
        followed = follow_trail(repro.scenario, profile, repro.trail)
    except ScenarioError as error:
        raise ReproError(str(error)) from error
    return Replayed(_compare(repro, followed), followed, followed.divergence)


def _compare(repro: Repro, followed: Followed) -> Sameness:
    failure = followed.ending.failure
    if failure is not None:
        return Sameness.SAME_FAILURE if repro.failure.same_kind(failure) else Sameness.OTHER_FAILURE
    if 2 * followed.skipped > len(repro.trail):
        return Sameness.NOT_FOLLOWED  # so much has changed that no failure says nothing
    return Sameness.NO_FAILURE
