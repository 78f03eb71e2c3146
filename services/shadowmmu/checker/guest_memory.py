"""Guest memory as the stream tells it: what every store so far has made of it.

Memory belongs to the guest's frames, wherever the host keeps them (an access's `gfn` is of that kind): swapping out,
moving and copying on write keep contents, and a memory slot that moves takes its contents along. Frames of slots that
the stream has published begin as zeros. Of any others nothing is known until it is stored or loaded: a checker may
come late, or be fed a piece of a stream. Memory used is that of the frames that were touched.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, MutableSequence
from typing import Final, cast

from shadowmmu.protocol.events import SlotsPublished

__all__ = ["UNKNOWN", "WORDS", "GuestMemory"]

WORDS: Final = 512
"""Aligned 8-byte words in a frame."""
UNKNOWN: Final = -1
"""What a word was of which nothing is known."""
_ZEROS: Final = bytes(WORDS * 8)


class GuestMemory:
    """Contents by guest frame; `frames` is read, and written for aligned words, by the hot loop of `accesses`.

    `slots`: (first frame, frames, going) by number. `store` answers with what it changed, for those who follow tables.
    """

    def __init__(self) -> None:
        self.frames: dict[int, MutableSequence[int | None]] = {}
        self.slots: dict[int, tuple[int, int, bool]] = {}

    def is_memory(self, gfn: int) -> bool:
        """Whether a slot holds the frame that is not going."""
        return any(base <= gfn < base + npages for base, npages, going in self.slots.values() if not going)

    def frame(self, gfn: int) -> MutableSequence[int | None]:
        """The words of a frame."""
        frame = self.frames.get(gfn)
        if frame is None:
            # An array of machine words: a hundredth of what a list of integers would take.
            fresh = array("Q", _ZEROS) if self._is_known(gfn) else [None] * WORDS
            self.frames[gfn] = frame = cast("MutableSequence[int | None]", fresh)
        return frame

    def _is_known(self, gfn: int) -> bool:
        return any(base <= gfn < base + npages for base, npages, _ in self.slots.values())

    def word(self, gpa: int) -> int | None:
        """The aligned 8-byte word that holds the address; None if it is not known."""
        frame = self.frames.get(gpa >> 12)
        if frame is None:
            return 0 if self._is_known(gpa >> 12) else None
        return frame[gpa >> 3 & 511]

    def load(self, gpa: int, size: int) -> int | None:
        """`size` bytes, within one frame; None if they are not all known."""
        word = self.word(gpa)
        shift = (gpa & 7) * 8
        if word is None:
            return None
        if (gpa & 7) + size > 8:
            rest = self.word((gpa | 7) + 1)
            if rest is None:
                return None
            word |= rest << 64
        return word >> shift & ((1 << 8 * size) - 1)

    def store(self, gpa: int, size: int, value: int) -> list[tuple[int, int, int]]:
        """Store `size` bytes, within one frame; (address of the word, old, new) for each word that changed."""
        frame = self.frame(gpa >> 12)
        changed = []
        begin = gpa
        end = gpa + size
        while begin < end:
            index = begin >> 3 & 511
            length = min(8 - (begin & 7), end - begin)
            bits = ((1 << 8 * length) - 1) << 8 * (begin & 7)
            piece = (value >> 8 * (begin - gpa) << 8 * (begin & 7)) & bits
            old = frame[index]
            if old is not None:
                new = old & ~bits | piece
                if new != old:
                    frame[index] = new
                    changed.append((begin & ~7, old, new))
            elif length == 8:
                frame[index] = piece
                changed.append((begin, UNKNOWN, piece))
            begin += length
        return changed

    def learn(self, gpa: int, size: int, value: int) -> None:
        """Somebody loaded this: what was not known is known now."""
        if size == 8 and not gpa & 7 and self.word(gpa) is None:
            self.frame(gpa >> 12)[gpa >> 3 & 511] = value

    def publish(self, event: SlotsPublished) -> set[int]:
        """The slots are these now. Returns the touched frames whose contents came, went or moved."""
        now = {slot: (base, npages, going) for slot, base, npages, going in event.slots}
        before = self.slots
        self.slots = now
        touched: set[int] = set()
        moved: dict[int, MutableSequence[int | None]] = {}
        for slot, (base, npages, _) in before.items():
            there = now.get(slot)
            if there is not None and there[0] == base:
                continue
            for gfn in self._in(base, npages):
                frame = self.frames.pop(gfn)
                touched.add(gfn)
                if there is not None:
                    moved[gfn - base + there[0]] = frame
        for slot, (base, npages, _) in now.items():
            if slot not in before:
                for gfn in self._in(base, npages):
                    touched.add(gfn)
                    del self.frames[gfn]
        self.frames.update(moved)
        return touched | set(moved)

    def _in(self, base: int, npages: int) -> Iterable[int]:
        return [gfn for gfn in self.frames if base <= gfn < base + npages]

    def snapshot(self) -> object:
        """What there is, canonically: frames of zeros are as if they had not been touched."""
        frames: list[tuple[int, object]] = []
        for gfn in sorted(self.frames):
            frame = self.frames[gfn]
            if isinstance(frame, array):
                data = frame.tobytes()
                if data != _ZEROS:
                    frames.append((gfn, hashlib.blake2b(data, digest_size=16).digest()))
            elif any(word is not None for word in frame):
                frames.append((gfn, tuple(frame)))
        return tuple(frames), tuple(sorted(self.slots.items()))
