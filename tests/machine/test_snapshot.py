"""A machine that was copied goes on as the original does, to the byte."""

from __future__ import annotations

import io
from typing import Any

import pytest

from shadowmmu.machine import Admission, Attached, GivenUp, HostAsked, Runner, VcpuSent, read_journal
from shadowmmu.machine.journal import Digest, End, Steps
from shadowmmu.machine.snapshot import Snapshot, SnapshotError
from shadowmmu.protocol import messages as m
from tests.machine.faults import FaultyRun, fingerprint
from tests.machine.guest import Driven
from tests.machine.test_recovery import KINDS, config, name


def go_on(snapshot: bytes, journal: bytes) -> Runner:
    """A copy, after it has got the inputs that the original got, and has made as many steps.

    It has journalled the same records, so drawn the same choices.
    """
    state = Snapshot.decode(snapshot).restore()
    at = state.position
    frames: list[bytes] = []
    runner = Runner(state, frames.append)
    records = list(read_journal(io.BytesIO(journal)))[at.record :]
    for record in records:
        match record:
            case Attached() | GivenUp() | VcpuSent() | HostAsked() | Admission():
                runner.submit(record)
            case Steps():
                assert runner.step(record.count)
                runner.take_outputs()
            case End():
                runner.finish()
            case Digest():
                pass
            case _:
                raise AssertionError(f"not expected: {record}")
    again = read_journal(io.BytesIO(journal[: at.offset] + b"".join(frames)))
    assert list(again)[at.record :] == records
    return runner


@pytest.mark.parametrize("changes", KINDS, ids=name)
def test_a_copy_does_what_the_original_does(changes: dict[str, Any]) -> None:
    run = FaultyRun(config(**changes), 3, snapshot_rounds=60)
    digest = run.to_the_end()
    assert len(run.snapshots) > 2
    for snapshot in run.snapshots[1 :: len(run.snapshots) // 2]:
        runner = go_on(snapshot, bytes(run.journal))
        assert runner.events.digest() == digest
        assert fingerprint(runner.machine) == fingerprint(run.runner.machine)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("profile", ["linux-3.1", "fixed"])
def test_a_copy_does_what_the_original_does_whatever_the_seed(seed: int, profile: str) -> None:
    changes = {"workload": m.Workload.SLOPPY, "host_rate": 30.0, "audit": m.Audit.SAMPLED}
    run = FaultyRun(config(seed=seed, profile=profile, **changes), 4, snapshot_rounds=25)
    digest = run.to_the_end()
    for snapshot in run.snapshots[:: 1 + len(run.snapshots) // 3]:
        assert go_on(snapshot, bytes(run.journal)).events.digest() == digest


def closed() -> Driven:
    """A machine with a mapped page, whose admission is closed."""
    driven = Driven()
    driven.enter(0)
    driven.map_page(0, 7)
    driven.submit(Admission(open=False))
    driven.settle()
    return driven


def test_a_copy_has_nothing_in_common_with_the_original() -> None:
    driven = closed()
    driven.send(0, driven.log(0, 7, 1))
    snapshot = Snapshot.decode(driven.runner.snapshot())
    copy = snapshot.restore().machine
    driven.send(0, driven.log(0, 7, 2))
    assert copy.memory.read(7 << 12, 8) == 1
    assert driven.word(7) == 2
    copy.memory.write(7 << 12, 8, 3)
    assert driven.word(7) == 2
    assert snapshot.restore().machine.memory.read(7 << 12, 8) == 1


def test_a_snapshot_is_taken_only_when_nothing_is_under_way_and_nothing_may_begin() -> None:
    driven = Driven()
    with pytest.raises(ValueError, match="closed admission"):
        driven.runner.snapshot()
    driven.submit(VcpuSent(0, m.Enter()))
    driven.submit(Admission(open=False))
    with pytest.raises(ValueError, match="nothing under way"):
        driven.runner.snapshot()
    while driven.runner.step(1):
        pass
    with pytest.raises(ValueError, match="not taken"):
        driven.runner.snapshot()
    driven.settle()
    assert Snapshot.decode(driven.runner.snapshot(b"mine")).service == b"mine"


def test_a_damaged_snapshot_and_one_of_another_version_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = closed().runner.snapshot()
    for place in range(0, len(data), len(data) // 50):
        damaged = bytearray(data)
        damaged[place] ^= 0x10
        with pytest.raises(SnapshotError, match="checksum"):
            Snapshot.decode(bytes(damaged))
    for cut in (0, 1, 16, len(data) - 1):
        with pytest.raises(SnapshotError):
            Snapshot.decode(data[:cut])
    monkeypatch.setattr("shadowmmu.machine.snapshot.code_version", lambda: "another")
    with pytest.raises(SnapshotError, match="this is another"):
        Snapshot.decode(data)
