"""A service that was killed goes on as if it had not been: state, answers, events, verdict."""

from __future__ import annotations

import io
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowmmu.checker import Checker
from shadowmmu.machine import (
    EmptyJournalError,
    Header,
    Input,
    JournalError,
    Note,
    Output,
    Record,
    Recovery,
    read_journal,
    replay_records,
)
from shadowmmu.machine.journal import End, JournalWriter, Recovered, Steps
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import Event
from shadowmmu.protocol.stream_digest import StreamDigest
from tests.machine.faults import FaultyRun, fingerprint


def config(**changes: Any) -> m.RunConfig:
    return msgspec.structs.replace(m.RunConfig(ops=2500, seed=3), **changes)


def digest_of(data: bytes | bytearray) -> str:
    digest = StreamDigest()
    digest.update(bytes(data))
    return digest.hexdigest()


NONPAGING = {"workload": m.Workload.MODES, "mode": m.GuestMode.NONPAGING}

KINDS: list[dict[str, Any]] = [
    *({"workload": workload} for workload in m.Workload),
    {"workload": m.Workload.MODES, "mode": m.GuestMode.MIXED},
    {**NONPAGING, "tdp": m.Tdp.EPT},
    {**NONPAGING, "tdp": m.Tdp.NPT},
    {"memory_model": m.MemoryModel.TSO, "host_rate": 40.0},
    {"profile": "pre-patch+fixed", "bypass_guest_pf": True},
    {"vpid": False, "park_rate": 0.5},
]


def name(changes: dict[str, Any]) -> str:
    return "-".join(str(getattr(value, "value", value)) for value in changes.values())


@pytest.mark.parametrize("snapshot_rounds", [None, 40], ids=["without snapshots", "with snapshots"])
@pytest.mark.parametrize("changes", KINDS, ids=name)
def test_a_run_that_is_killed_and_recovered_ends_clean(
    changes: dict[str, Any], snapshot_rounds: int | None
) -> None:
    run = FaultyRun(config(**changes), 3, kills=(20, 60, 61, 140), torn=7, snapshot_rounds=snapshot_rounds)
    digest = run.to_the_end()
    assert run.recoveries == 4
    assert bool(run.snapshots) == (snapshot_rounds is not None)
    assert digest == digest_of(run.stream.data)
    assert Checker().feed_all(run.stream.events) is None
    replayed = replay_records(read_journal(io.BytesIO(run.journal)), None)
    assert replayed.diverged_at is None, replayed.divergence
    assert replayed.digest == replayed.recorded_digest == digest
    recovered = [item for item in read_journal(io.BytesIO(run.journal)) if isinstance(item, Recovered)]
    assert len(recovered) == 4


@pytest.fixture(scope="module")
def whole() -> FaultyRun:
    """A run that nobody has killed, with some snapshots."""
    run = FaultyRun(config(workload=m.Workload.MIXED), 3, snapshot_rounds=50, moment_frames=7)
    run.to_the_end()
    assert len(run.snapshots) > 2
    return run


def recovered(data: bytes, snapshots: list[bytes]) -> tuple[Recovery, list[Input | Note], list[Output]]:
    inputs: list[Input | Note] = []
    outputs: list[Output] = []
    recovery = Recovery(io.BytesIO(data), snapshots, on_input=inputs.append, on_output=outputs.append)
    while recovery.advance(64):
        pass
    return recovery, inputs, outputs


@given(at=st.integers(0, 1 << 30), torn=st.integers(0, 1 << 30), with_snapshots=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_journal_cut_anywhere_gives_the_state_inputs_and_outputs_of_its_last_whole_frame(
    whole: FaultyRun, at: int, torn: int, with_snapshots: bool
) -> None:
    moment = whole.moments[at % len(whole.moments)]
    following = whole.journal[moment.offset : moment.offset + 11]
    torn %= 11 + int.from_bytes(following[7:]) if following else 1
    data = bytes(whole.journal[: moment.offset + torn])
    recovery, inputs, outputs = recovered(data, whole.snapshots if with_snapshots else [])
    assert (recovery.position.offset, recovery.torn) == (moment.offset, torn)
    assert inputs == whole.consumed[moment.consumed - len(inputs) : moment.consumed]
    assert outputs == whole.produced[moment.produced - len(outputs) : moment.produced]
    if recovery.service is None:
        assert (len(inputs), len(outputs)) == (moment.consumed, moment.produced)
    written: list[bytes] = []
    runner = recovery.runner(written.append)
    assert fingerprint(runner.machine) == moment.fingerprint
    runner.take_outputs()
    *_, record = read_journal(io.BytesIO(data[: moment.offset] + b"".join(written)))
    assert isinstance(record, End if recovery.ended else Recovered)
    assert record.events_digest == runner.events.digest()


def test_the_newest_snapshot_that_can_be_used_is(whole: FaultyRun) -> None:
    data = bytes(whole.journal)
    newest, older, *_ = whole.snapshots
    assert recovered(data, [newest, older])[0].skipped == []
    damaged = bytearray(newest)
    damaged[len(damaged) // 2] ^= 1
    recovery, *_ = recovered(data, [bytes(damaged), b"", older])
    assert recovery.service is not None
    assert len(recovery.skipped) == 2 and "checksum" in recovery.skipped[0]
    assert recovery.first_record < recovered(data, [newest])[0].first_record
    recovery, *_ = recovered(data, [bytes(damaged)])
    assert recovery.service is None and recovery.first_record == 1


def test_a_snapshot_of_another_journal_is_left_out(whole: FaultyRun) -> None:
    other = FaultyRun(config(seed=9), 3, snapshot_rounds=100)
    other.to_the_end()
    recovery, *_ = recovered(bytes(whole.journal), other.snapshots)
    assert recovery.service is None
    assert all("another journal" in text for text in recovery.skipped) and recovery.skipped


class Heard:
    """The number of the first event that was heard."""

    first = -1

    def listen(self, first: int, _events: list[Event], _data: bytes) -> None:
        if self.first < 0:
            self.first = first


def test_no_snapshot_is_used_that_lies_behind_an_event_that_somebody_wants(whole: FaultyRun) -> None:
    journal = io.BytesIO(whole.journal)
    taken_at = [int(Recovery(journal, [s]).service or b"") for s in whole.snapshots]
    for wanted in (0, taken_at[-1] - 1, taken_at[-1], taken_at[0] - 1, taken_at[0], 1 << 40):
        heard = Heard()
        recovery = Recovery(journal, whole.snapshots, heard.listen, events_from=wanted)
        while recovery.advance(1000):
            pass
        usable = [events for events in taken_at if events <= wanted]
        assert (recovery.service is None) == (not usable)
        assert heard.first == max(usable, default=0)


def test_a_recovery_is_done_a_few_records_at_a_time(whole: FaultyRun) -> None:
    recovery = Recovery(io.BytesIO(whole.journal))
    begun = recovery.records
    assert recovery.advance(5)
    assert recovery.records == begun + 5
    with pytest.raises(ValueError, match="not at its end"):
        recovery.runner(lambda _frame: None)
    longest = max(r.count for r in read_journal(io.BytesIO(whole.journal)) if isinstance(r, Steps))
    assert longest < 4096


def test_a_run_that_has_ended_says_so_and_journals_nothing_more(whole: FaultyRun) -> None:
    recovery, *_ = recovered(bytes(whole.journal), whole.snapshots)
    assert recovery.ended
    written: list[bytes] = []
    runner = recovery.runner(written.append)
    runner.take_outputs()
    assert not written
    assert runner.events.digest() == digest_of(whole.stream.data)
    cut = whole.moments[-2].offset
    assert not recovered(bytes(whole.journal[:cut]), [])[0].ended


def test_a_journal_in_which_nothing_had_happened_yet_is_empty(whole: FaultyRun) -> None:
    for data in (b"", bytes(whole.journal[:20])):
        with pytest.raises(EmptyJournalError):
            Recovery(io.BytesIO(data))


def altered(whole: FaultyRun, change: int) -> bytes:
    """The journal with other choices in the `change`-th record that has some."""
    written: list[bytes] = []
    writer = JournalWriter(written.append)
    for record in read_journal(io.BytesIO(whole.journal)):
        item: Record = record
        if isinstance(item, Steps) and item.choices:
            change -= 1
            if change == 0:
                item = Steps(item.count, item.choices[:-1])
        writer.append(item)
        writer.flush()
    return b"".join(written)


def test_a_replay_that_takes_another_course_is_no_recovery(whole: FaultyRun) -> None:
    with pytest.raises(JournalError, match="diverged"):
        recovered(altered(whole, 30), [])
    header, *rest = read_journal(io.BytesIO(whole.journal))
    assert isinstance(header, Header)
    written: list[bytes] = []
    writer = JournalWriter(written.append)
    for item in (Header(header.schema, header.code_version, config(vpid=False)), *rest):
        writer.append(item)
    writer.flush()
    with pytest.raises(JournalError, match="diverged"):
        recovered(written[0], [])
