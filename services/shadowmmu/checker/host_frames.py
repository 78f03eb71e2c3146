"""Rule 3: host frame use after revoke.

Once the notifier call that takes a host frame away has returned, no access of any kind may reach that frame, until
the host backs guest memory by it again. Here every TLB counts: the licence to be stale that the guest has does not
extend to the host's memory (TLB_RULES R12).

A run may revoke millions of frames, each for ever. So the rule keeps one bit per frame that was ever revoked, the
whole story of the newest ones, and, for speed, the set of frames in use that it knows to be fine.
"""

from __future__ import annotations

from shadowmmu.checker.history import History
from shadowmmu.checker.violation import RelatedEvent, Rule, Violation
from shadowmmu.protocol.events import Accesses, FrameBacked, FrameRevoked

__all__ = ["HostFrames"]

CHUNK_BITS = 15  # frames per chunk of the bit map: 2**15, that is 4 KiB of bits
STORIES_LIMIT = 1 << 14
"""Revoked frames of which the checker can still say when and by whom."""
FINE_LIMIT = 1 << 20
"""Frames known to be fine; emptied when it gets larger (it is only a cache)."""


class FrameSet:
    """A set of frame numbers, one bit each, in chunks that exist only where a bit was set."""

    def __init__(self) -> None:
        self._chunks: dict[int, bytearray] = {}

    def add(self, pfn: int) -> None:
        chunk = self._chunks.setdefault(pfn >> CHUNK_BITS, bytearray(1 << (CHUNK_BITS - 3)))
        chunk[(pfn >> 3) & ((1 << (CHUNK_BITS - 3)) - 1)] |= 1 << (pfn & 7)

    def discard(self, pfn: int) -> None:
        chunk = self._chunks.get(pfn >> CHUNK_BITS)
        if chunk is not None:
            chunk[(pfn >> 3) & ((1 << (CHUNK_BITS - 3)) - 1)] &= ~(1 << (pfn & 7))

    def __contains__(self, pfn: int) -> bool:
        chunk = self._chunks.get(pfn >> CHUNK_BITS)
        if chunk is None:
            return False
        return bool(chunk[(pfn >> 3) & ((1 << (CHUNK_BITS - 3)) - 1)] & (1 << (pfn & 7)))

    def snapshot(self) -> object:
        """The frames, canonically."""
        return tuple((number, bytes(chunk)) for number, chunk in sorted(self._chunks.items()) if any(chunk))


class HostFrames:
    """The state of rule 3. `fine`: host frames used before and not revoked since; `accesses` looks there first."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._revoked = FrameSet()
        self.fine: set[int] = set()
        self._stories: dict[int, tuple[int, FrameRevoked, str]] = {}  # by pfn: index, event, who

    def frame_revoked(self, event: FrameRevoked) -> None:
        self._revoked.add(event.pfn)
        self.fine.discard(event.pfn)
        self._stories.pop(event.pfn, None)  # so that the new one is the newest
        if len(self._stories) >= STORIES_LIMIT:
            del self._stories[next(iter(self._stories))]
        who = self._history.describe_host_operations() or "the operation that revoked it"
        self._stories[event.pfn] = (self._history.index, event, who)

    def frame_backed(self, event: FrameBacked) -> None:
        self._revoked.discard(event.pfn)
        self._stories.pop(event.pfn, None)

    def look_closely(self, event: Accesses, number: int) -> Violation | None:
        """Item `number` reached a frame that is not in `fine`."""
        pfn = event.items[number][3]
        if pfn in self._revoked:
            return self._violation(event, number, pfn)
        if len(self.fine) >= FINE_LIMIT:
            self.fine.clear()
        self.fine.add(pfn)
        return None

    def _violation(self, event: Accesses, number: int, pfn: int) -> Violation:
        story = self._stories.get(pfn)
        if story is None:
            since = "long ago"
            who = "the operation that revoked it"
            related = []
        else:
            index, revoked, who = story
            since = f"at event {index}"
            related = [RelatedEvent(index, revoked, "the notifier call returned: the frame is the host's")]
        return self._history.access_violation(
            Rule.HOST_FRAME_USE_AFTER_REVOKE,
            event,
            number,
            why=f"reached a host frame that was revoked {since} and not backed since",
            blame=f"{who} returned while vCPU {event.vcpu} could still use the frame: whoever removed the "
            f"translation had to make vCPU {event.vcpu} leave guest mode first, and flush when it next entered",
            related=related,
        )

    def snapshot(self) -> object:
        """What future verdicts depend on, canonically."""
        return self._revoked.snapshot()
