"""A stretch of a run's journal is a scenario in which the same is executed."""

from __future__ import annotations

import io

import pytest

from shadowmmu.explorer.choosers import FollowChooser
from shadowmmu.explorer.execution import execute
from shadowmmu.explorer.journal_window import journal_window
from shadowmmu.machine import Attached, JournalError, Record, read_journal, run_in_process
from shadowmmu.protocol import messages as m

VCPUS = 3


@pytest.fixture(scope="module")
def records() -> list[Record]:
    journal = io.BytesIO()
    config = m.RunConfig(workload=m.Workload.MIXED, seed=5, ops=600, host_rate=20.0, profile="fixed")
    run_in_process(config, VCPUS, journal.write)
    journal.seek(0)
    return list(read_journal(journal))


def _ready(records: list[Record]) -> int:
    return max(number for number, record in enumerate(records) if isinstance(record, Attached))


@pytest.mark.parametrize("messages", [1, 20, 100_000])
def test_every_stretch_has_all_vcpus_and_can_be_executed(records: list[Record], messages: int) -> None:
    for end in range(_ready(records) + 1, len(records), 97):
        window = journal_window(records, end, messages)
        assert window.scenario.vcpus == len(window.scenario.programs) == VCPUS
        assert len(window.order) == sum(map(len, (*window.scenario.programs, *window.scenario.hosts)))
        if messages == 20:
            assert execute(window.scenario, "fixed", FollowChooser(())).failure is None


def test_a_longer_stretch_has_more_of_what_was_executed(records: list[Record]) -> None:
    end = len(records) - 1
    sizes = [journal_window(records, end, messages).scenario.size for messages in (5, 50, 500)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_what_has_no_header_is_no_journal(records: list[Record]) -> None:
    with pytest.raises(JournalError, match="a header is expected"):
        journal_window(records[1:], 5, 10)
