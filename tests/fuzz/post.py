"""The sockets of an MMU service, left out: what it sends lies in a queue per peer."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

from shadowmmu.client import User
from shadowmmu.client.access import ANYBODY

__all__ = ["Post"]


class Post:
    """Stands where the service's `Endpoint` stands."""

    sender: User | None = ANYBODY

    def __init__(self) -> None:
        self.boxes: defaultdict[bytes, deque[list[bytes]]] = defaultdict(deque)

    def send(self, address: bytes, frames: Sequence[bytes]) -> None:
        self.boxes[address].append(list(frames))

    def forget(self, address: bytes) -> int:
        """As of an Endpoint: drops what nobody has fetched."""
        return len(self.boxes.pop(address, ()))

    def pause(self) -> None:
        """Nothing comes by itself here."""

    def resume(self) -> None:
        """As `pause`."""

    def fetch(self, address: bytes) -> list[list[bytes]]:
        """What was sent there."""
        return list(self.boxes.pop(address, ()))
