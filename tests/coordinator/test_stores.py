"""What a coordinator keeps in files, and what is left of it when it is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from shadowmmu.coordinator.event_store import EVENTS_NAME, INDEX_NAME, EventStore
from shadowmmu.coordinator.run_state import RunState
from shadowmmu.coordinator.run_store import STATE_NAME, OtherRunError, RunStore, RunStoreError
from shadowmmu.coordinator.run_types import Phase, RunSettings
from shadowmmu.coordinator.saved_run import save_run
from shadowmmu.protocol import messages as m

BATCHES = [m.EventBatch(0, 2, b"ab"), m.EventBatch(2, 1, b"cdefg"), m.EventBatch(3, 4, b"hijk")]


def fill(folder: Path) -> None:
    with EventStore(folder, fresh=True) as store:
        for batch in BATCHES:
            store.append(batch)


def read(folder: Path) -> list[m.EventBatch]:
    with EventStore(folder, fresh=False) as store:
        return list(store.batches())


class TestEvents:
    def test_what_was_stored_is_there_and_the_file_is_the_plain_stream(self, tmp_path: Path) -> None:
        fill(tmp_path)
        assert (tmp_path / EVENTS_NAME).read_bytes() == b"abcdefghijk"
        assert read(tmp_path) == BATCHES

    def test_a_new_run_forgets_the_old_one(self, tmp_path: Path) -> None:
        fill(tmp_path)
        fill(tmp_path)
        assert read(tmp_path) == BATCHES

    @pytest.mark.parametrize("name", [EVENTS_NAME, INDEX_NAME])
    def test_a_torn_tail_is_cut_and_the_stream_goes_on(self, tmp_path: Path, name: str) -> None:
        fill(tmp_path)
        whole = (tmp_path / name).read_bytes()
        for size in range(len(whole)):
            fill(tmp_path)
            (tmp_path / name).write_bytes(whole[:size])
            left = read(tmp_path)
            assert left == BATCHES[: len(left)]
            assert len(left) < len(BATCHES)
            with EventStore(tmp_path, fresh=False) as store:
                for batch in BATCHES[len(left) :]:
                    store.append(batch)
            assert read(tmp_path) == BATCHES

    def test_what_was_not_written_as_stored_is_cut(self, tmp_path: Path) -> None:
        fill(tmp_path)
        (tmp_path / EVENTS_NAME).write_bytes(b"abcdefghijX")
        assert read(tmp_path) == BATCHES[:2]


class TestTheState:
    settings = RunSettings(config=m.RunConfig(ops=10), vcpus=2)

    def stored(self, folder: Path, phase: Phase = Phase.RUNNING) -> RunStore:
        state = RunState(self.settings, 0.0, lambda: b"token")
        state.phase = phase
        store = RunStore(folder)
        store.save(save_run(state, "then", 1.0))
        return store

    def test_nothing_is_there_at_first(self, tmp_path: Path) -> None:
        assert RunStore(tmp_path).unfinished(self.settings) is None

    def test_an_unfinished_run_is_gone_on_with(self, tmp_path: Path) -> None:
        saved = self.stored(tmp_path).unfinished(self.settings)
        assert saved is not None
        assert (saved.phase, saved.settings) == (Phase.RUNNING, self.settings)

    def test_a_finished_run_is_not(self, tmp_path: Path) -> None:
        store = self.stored(tmp_path, Phase.FINISHED)
        assert store.unfinished(self.settings) is None
        assert store.holds_finished_run

    @pytest.mark.parametrize(
        "other, words",
        [
            (RunSettings(config=m.RunConfig(ops=11), vcpus=2), "ops was 10, and is 11"),
            (RunSettings(config=m.RunConfig(ops=10), vcpus=3), "vcpus was 2, and is 3"),
        ],
    )
    def test_another_configuration_is_refused(self, tmp_path: Path, other: RunSettings, words: str) -> None:
        with pytest.raises(OtherRunError, match=words):
            self.stored(tmp_path).unfinished(other)

    def test_a_file_that_is_none_is_told(self, tmp_path: Path) -> None:
        (tmp_path / STATE_NAME).write_bytes(b"\xc1")
        with pytest.raises(RunStoreError, match="is not readable"):
            RunStore(tmp_path).load()
