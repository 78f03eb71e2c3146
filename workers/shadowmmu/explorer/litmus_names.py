"""What the names in a litmus file stand for: frames, addresses, entries of tables, and the memory that these fill."""

from __future__ import annotations

import keyword
import re
from typing import Final

from shadowmmu.cpu import x86
from shadowmmu.explorer.litmus_machine import FRAMES, LitmusMachine
from shadowmmu.explorer.litmus_table import NAME, LitmusError, Table, parse_number

__all__ = ["Names"]

FIRST_FRAME: Final = 16
"""The first frame that a name gets which asks for none."""
FRAME_STEP: Final = 8
"""Names are far enough apart that prefetching maps none of them in the linear map because of another."""
LINEAR_FRAMES: Final = range(8, FIRST_FRAME)
"""Frames kept for the tables of the linear map."""

_FLAGS: Final = {
    "w": x86.PT_WRITABLE_MASK,
    "u": x86.PT_USER_MASK,
    "a": x86.PT_ACCESSED_MASK,
    "d": x86.PT_DIRTY_MASK,
    "l": x86.PT_PAGE_SIZE_MASK,
    "g": x86.PT_GLOBAL_MASK,
    "n": x86.PT64_NX_MASK,
    "r": 1 << 51,  # reserved: above the guest's physical addresses
}
_PLACE: Final = re.compile(r"(?P<name>\w+)\[(?P<index>\w+)\]", re.ASCII)
_ADDRESS: Final = re.compile(
    r"(?P<at>@?)(?P<name>\w+)(?:\[(?P<index>\w+)\])?(?:\+(?P<offset>\w+))?", re.ASCII
)
_RESERVED_NAMES: Final = re.compile(r"fault|[rv]\d+(_r\d+)?", re.ASCII)


class Names:
    """The frames and addresses of a file, and what its memory holds.

    As long as the file's tables are read, a name that is new gets a frame; after `complete` it is an error.
    `memory`: by gpa, 8-byte words.
    """

    def __init__(self, machine: LitmusMachine) -> None:
        self._machine = machine
        self._mode = machine.mode
        self._complete = False
        self._addresses: dict[str, int] = {}
        self.frames: dict[str, int] = {}
        self.memory: dict[int, int] = {}

    def complete(self) -> None:
        """Every frame has been named."""
        self._complete = True

    # --- frames --------------------------------------------------------------------------------------------------

    def read_frames(self, table: Table) -> None:
        """The [frames] table."""
        for name in table.names():
            _check_name(name, table.where)
            frame = table.number(name, None, 0, FRAMES - 1)
            if self._mode is not None and frame in LINEAR_FRAMES:
                raise LitmusError(table.place(name), f"the tables of the linear map are in frame {frame}")
            self.frames[name] = frame

    def frame(self, name: str, where: str) -> int:
        """The frame of a name."""
        if name not in self.frames:
            if self._complete:
                raise LitmusError(where, f"unknown frame {name!r}; known are {', '.join(self.frames)}")
            _check_name(name, where)
            taken = set(self.frames.values())
            frame = FIRST_FRAME
            while frame in taken:
                frame += FRAME_STEP
            if frame >= self._machine.small_frames:
                raise LitmusError(where, f"no frame left for {name!r}: machine.frames is too small")
            self.frames[name] = frame
        return self.frames[name]

    def frame_argument(self, text: str, where: str) -> int:
        """A frame by name (perhaps +n) or number."""
        name, plus, more = text.partition("+")
        frame = self.frame(name, where) if NAME.fullmatch(name) else parse_number(name, where)
        frame += parse_number(more, where) if plus else 0
        if frame >= FRAMES:
            raise LitmusError(where, f"frame {frame} is beyond the guest's physical addresses")
        return frame

    # --- memory --------------------------------------------------------------------------------------------------

    @property
    def entry_size(self) -> int:
        """Bytes of an entry of the guest's tables."""
        return 8 if self._mode is None else self._mode.entry

    def place(self, text: str, where: str) -> tuple[int, int]:
        """The frame and index of `NAME[index]`."""
        match = _PLACE.fullmatch(text)
        if match is None:
            raise LitmusError(where, f"{text!r} is not NAME[index]")
        return self.frame(match["name"], where), parse_number(match["index"], where)

    def poke(self, frame: int, index: int, value: int, where: str) -> None:
        """Entry `index` of the frame's memory at the start."""
        size = self.entry_size
        if index >= 4096 // size:
            raise LitmusError(where, f"index {index} is beyond the frame's {4096 // size} entries")
        if not self._machine.has_memory(frame):
            raise LitmusError(where, f"frame {frame} is in no memory slot")
        if value >> 8 * size:
            raise LitmusError(where, f"{value:#x} does not fit into an entry of {size} bytes")
        gpa = (frame << 12) + index * size
        if size == 8:
            self.memory[gpa] = value
        else:
            shift = (gpa & 4) * 8
            old = self.memory.get(gpa & ~7, 0) & ~(0xFFFF_FFFF << shift)
            self.memory[gpa & ~7] = old | value << shift

    def read_tables(self, tables: Table) -> None:
        """The [tables.NAME] tables."""
        if self._mode is None and tables.names():
            raise LitmusError(tables.where, "there are no tables with paging off; [memory] fills frames")
        for name in tables.names():
            self.frame(name, tables.where)
        for name, entries in tables.items():
            table = Table(entries, tables.place(name))
            for index, text in table.items():
                where = table.place(index)
                self.poke(self.frame(name, where), parse_number(index, where), self.value(text, where), where)

    def read_memory(self, table: Table) -> None:
        """The [memory] table."""
        for text, value in table.items():
            where = table.place(text)
            frame, index = self.place(text, where)
            self.poke(frame, index, self.value(value, where), where)

    def map_linearly(self, where: str) -> None:
        """Every named frame at its place in the linear map, writable for the supervisor; paging is on."""
        mode = self._mode
        assert mode is not None
        free = iter(LINEAR_FRAMES)
        tables: dict[tuple[int, int], int] = {}  # by level, and the address bits above what a table maps
        flags = x86.PT_PRESENT_MASK | x86.PT_WRITABLE_MASK | x86.PT_ACCESSED_MASK
        for name, frame in list(self.frames.items()):
            if not self._machine.has_memory(frame):
                continue
            address = mode.linear + (frame << 12)
            table = self.frame("root", where)
            for level in range(mode.levels, 1, -1):
                shift = 12 + mode.bits * (level - 1)
                pdpte = level == mode.levels == 3
                child = tables.get((level, address >> shift))
                if child is None:
                    child = next(free, None)
                    if child is None:
                        raise LitmusError(
                            where, f"frame {name} is too far off: no table of the linear map is left"
                        )
                    index = address >> shift & (3 if pdpte else mode.entries - 1)
                    if (table << 12) + index * mode.entry in self.memory:
                        raise LitmusError(where, f"entry {index} of root is the linear map's")
                    self.poke(table, index, child << 12 | (x86.PT_PRESENT_MASK if pdpte else flags), where)
                    tables[level, address >> shift] = child
                table = child
            self.poke(
                table, address >> 12 & (mode.entries - 1), frame << 12 | flags | x86.PT_DIRTY_MASK, where
            )

    # --- addresses -----------------------------------------------------------------------------------------------

    def read_addresses(self, table: Table) -> None:
        """The [addresses] table."""
        for name, path in table.items():
            where = table.place(name)
            _check_name(name, where)
            self._addresses[name] = self._path(path, where)

    def _path(self, path: object, where: str) -> int:
        mode = self._mode
        if isinstance(path, bool) or not isinstance(path, str | int):
            raise LitmusError(where, f"must be an address or indices like '0/0/0/9', not {path!r}")
        text = str(path)
        if "/" not in text or mode is None:
            return parse_number(text, where)
        indices = [parse_number(part, where) for part in text.split("/")]
        if len(indices) != mode.levels:
            raise LitmusError(where, f"{len(indices)} indices for {mode.levels} levels")
        address = 0
        for level, index in zip(range(mode.levels, 0, -1), indices, strict=True):
            entries = 4 if level == 3 and mode.levels == 3 else mode.entries
            if index >= entries:
                raise LitmusError(where, f"index {index} is beyond the {entries} entries of its table")
            address = address << mode.bits | index
        return mode.sign_extend(address << 12)

    def address(self, text: str, size: int, where: str) -> tuple[int, int]:
        """Where an access of `size` bytes goes: guest virtual address, and gpa, or -1 if it is not by frame."""
        match = _ADDRESS.fullmatch(text)
        if match is None:
            raise LitmusError(where, f"{text!r} is no address")
        name, mode = match["name"], self._mode
        index = parse_number(match["index"] or "0", where)
        offset = parse_number(match["offset"] or "0", where)
        gpa = -1
        if match["at"] or (mode is None and NAME.fullmatch(name) and name not in self._addresses):
            offset += index * self.entry_size
            if offset >= 4096:
                raise LitmusError(where, f"{text!r} is not within the frame")
            frame = self.frame(name, where)
            gpa = (frame << 12) + offset
            if mode is not None and not self._machine.has_memory(frame):
                raise LitmusError(where, f"frame {frame} is in no memory slot, so the linear map has it not")
            gva = gpa + (0 if mode is None else mode.linear)
        elif not NAME.fullmatch(name):
            gva = parse_number(name, where) + 8 * index + offset
        elif name in self._addresses:
            gva = self._addresses[name] + 8 * index + offset
        else:
            known = ", ".join(self._addresses) or "none"
            raise LitmusError(where, f"unknown address {name!r}; known are {known}; frames are @NAME")
        self._check_address(gva, size, where)
        return gva, gpa

    def _check_address(self, gva: int, size: int, where: str) -> None:
        bits = 32 if self._mode is None else self._mode.address_bits
        if gva >> bits or (bits == 64 and gva >> 47 not in (0, (1 << 17) - 1)):
            raise LitmusError(where, f"{gva:#x} is no address in this mode")
        if (gva & 0xFFF) + size > 4096:
            raise LitmusError(where, f"{size} bytes at {gva:#x} cross the end of the page")

    # --- values --------------------------------------------------------------------------------------------------

    def value(self, text: object, where: str) -> int:
        """A number, or an entry: a frame (by name, perhaps +n frames, or number) and its flags; P is understood."""
        if isinstance(text, bool) or not isinstance(text, int | str):
            raise LitmusError(where, f"{text!r} is neither a number nor an entry like 'T wua'")
        words = str(text).split()
        if len(words) == 1 and not NAME.match(words[0]) and "+" not in words[0]:
            return parse_number(words[0], where)
        if not words or len(words) > 2:
            raise LitmusError(where, f"{text!r} is neither a number nor an entry like 'T wua'")
        value = self.frame_argument(words[0], where) << 12 | x86.PT_PRESENT_MASK
        for flag in words[1] if len(words) == 2 else "":
            if flag not in _FLAGS:
                raise LitmusError(where, f"unknown flag {flag!r} in {text!r}; known are {' '.join(_FLAGS)}")
            value |= _FLAGS[flag]
        return value


def _check_name(name: str, where: str) -> None:
    if not NAME.fullmatch(name) or keyword.iskeyword(name) or _RESERVED_NAMES.fullmatch(name):
        raise LitmusError(where, f"{name!r} cannot be a name")
