"""A run's state as a file, replaced as a whole: what a coordinator that is started again goes on from.

`run-state` in the run's folder is a MessagePack map (`SavedRun`). A supervisor reads it too: it says how far the run is
and who is missed, and its age whether the coordinator is alive.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from shadowmmu.coordinator.run_types import Phase, RunSettings
from shadowmmu.coordinator.saved_run import SavedRun

__all__ = ["STATE_NAME", "OtherRunError", "RunStore", "RunStoreError"]

STATE_NAME: Final = "run-state"

_decoder = msgspec.msgpack.Decoder(SavedRun)
_encoder = msgspec.msgpack.Encoder()


class RunStoreError(Exception):
    """What is stored cannot be gone on from; the message says why."""


class OtherRunError(RunStoreError):
    """The folder has an unfinished run with another configuration."""


class RunStore:
    """The state file of a run's folder."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / STATE_NAME
        self._scratch = directory / f".{STATE_NAME}.new"

    def save(self, saved: SavedRun) -> None:
        """Replaces what was stored. Raises OSError."""
        self._scratch.write_bytes(_encoder.encode(saved))
        self._scratch.replace(self._path)

    def load(self) -> SavedRun | None:
        """What is stored, if anything is. Raises RunStoreError if it is not readable."""
        try:
            return _decoder.decode(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise RunStoreError(f"{self._path} is not readable: {error}") from None

    def unfinished(self, settings: RunSettings) -> SavedRun | None:
        """The run to go on with. Raises RunStoreError, OtherRunError if it was configured otherwise."""
        saved = self.load()
        if saved is None or saved.phase is Phase.FINISHED:
            return None
        for name in ("config", "vcpus", "hosts"):
            was, is_ = getattr(saved.settings, name), getattr(settings, name)
            if was != is_:
                raise OtherRunError(
                    f"{self._path.parent} has an unfinished run with another configuration "
                    f"({_difference(was, is_, name)}): go on with the same options, or take another folder"
                )
        return saved

    @property
    def holds_finished_run(self) -> bool:
        """Whether what is stored is the end of an earlier run."""
        saved = self.load()
        return saved is not None and saved.phase is Phase.FINISHED


def _difference(was: object, now: object, name: str) -> str:
    """The first field in which they differ, in words."""
    if isinstance(was, msgspec.Struct) and isinstance(now, msgspec.Struct):
        for field in was.__struct_fields__:
            old, new = getattr(was, field), getattr(now, field)
            if old != new:
                return f"{field} was {old}, and is {new}"
    return f"{name} was {was}, and is {now}"
