"""What a vCPU knows of its paging structures, of all formats, and how it finds an address in them.

The records say what was written; memory may hold something else, since the program is sloppy about invalidation and
shares its tables without locks. The tables of the window never change and are not recorded but computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from shadowmmu.cpu import x86
from shadowmmu.cpu.guest.layout import BLOCK_PAGES
from shadowmmu.cpu.guest.memory import NX, A, D, P, U, W
from shadowmmu.cpu.guest.modes.formats import FORMATS
from shadowmmu.cpu.guest.modes.layout import (
    ALIAS,
    FOREIGN,
    HUGE,
    LEAF_PAGES,
    MALFORMED_PDPT,
    MODE_BLOCK,
    OTHER_FORMAT,
    PDPT_OFFSET,
    SELF,
    SELF_ROOT,
    USER_DIRECTORY,
    Frames,
    ModesLayout,
)
from shadowmmu.protocol.messages import GuestMode

__all__ = [
    "LARGE",
    "LINK",
    "PAGE",
    "Entry",
    "Table",
    "Tables",
    "initial_tables",
    "pdpt_base",
    "window_tables",
    "words_of",
]

LARGE: Final = x86.PT_PAGE_SIZE_MASK
GLOBAL: Final = x86.PT_GLOBAL_MASK
LINK: Final = P | W | U | A
"""An entry that names a table."""
PAGE: Final = P | W | U | A | D
KERNEL_LINK: Final = P | W | A
KERNEL_PAGE: Final = P | W | A | GLOBAL


class Entry(msgspec.Struct, frozen=True):
    """A paging entry on the way to an address: where, what was written there, and whether the walk ends with it."""

    gpa: int
    size: int
    value: int
    leaf: bool = False


class Table(msgspec.Struct):
    """A paging structure in `frame` with entries of `size` bytes; `entries`: what was written, absent means 0."""

    frame: int
    size: int
    entries: dict[int, int] = {}

    def gpa(self, index: int) -> int:
        """Where an entry is; the window shows it at the same address."""
        return (self.frame << 12) + self.size * index

    def stores(self) -> Iterator[tuple[int, int, int]]:
        """(gpa, size, value) of every entry that was written."""
        for index, value in self.entries.items():
            yield self.gpa(index), self.size, value


class Tables(msgspec.Struct):
    """The paging structures of one vCPU; pairs are those of its two address spaces.

    `small8`, `small4`: tables of pages, with entries of 8 and of 4 bytes. `data`: frames in use as data. `pdpts`: the
    PAE roots; the first one lies in the page of the first 32-bit directory.
    """

    root64: list[Table]
    l3: list[Table]
    l2: list[Table]
    root32: list[Table]
    pdpts: list[Table]
    small8: list[Table]
    small4: list[Table]
    data: list[int]

    def all(self) -> Iterator[Table]:
        """Every structure."""
        for group in (self.root64, self.l3, self.l2, self.root32, self.pdpts, self.small8, self.small4):
            yield from group

    def small(self, mode: GuestMode) -> list[Table]:
        """The tables of pages that the mode's spaces are made of."""
        return self.small4 if mode is GuestMode.PAGING32 else self.small8

    def is_table(self, frame: int) -> bool:
        """Whether the frame holds one of the recorded structures."""
        return any(table.frame == frame for table in self.all())

    def path(self, own: Frames, mode: GuestMode, space: int, gva: int) -> list[Entry]:
        """The entries that the processor reads for `gva` in the own address space `space`, from the root down.

        Ends with the leaf, an entry that is not present, or where the records know no more.
        """
        format_ = FORMATS[mode]
        path: list[Entry] = []
        frame = (self.root64 if mode is GuestMode.PAGING64 else self.root32)[space].frame
        for depth, (shift, mask) in enumerate(format_.levels):
            index = gva >> shift & mask
            last = depth == len(format_.levels) - 1
            if mode is GuestMode.PAE and depth == 0:
                index += pdpt_base(space)
                gpa = self.pdpts[space].gpa(index)
                value: int | None = self.pdpts[space].entries.get(index, 0)
            else:
                gpa = (frame << 12) + format_.size * index
                value = self._value(own, frame, index, format_.size)
            if value is None:
                break
            large = bool(value & LARGE) and shift == format_.large
            path.append(Entry(gpa, format_.size, value, bool(value & P) and (last or large)))
            if not value & P or large:
                break
            frame = (value & x86.PT64_BASE_ADDR_MASK) >> 12
        return path

    def _value(self, own: Frames, frame: int, index: int, size: int) -> int | None:
        fixed = _window_value(own, frame, index)
        if fixed is not None:
            return fixed
        for group in (self.root64, self.l3, self.l2, self.root32, self.small8, self.small4):
            for table in group:
                if table.frame == frame:
                    if table.size != size:
                        return None
                    return table.entries.get(index, 0)
        return None


def pdpt_base(space: int) -> int:
    """The index of an address space's first PDPTE in its page."""
    return 0 if space else PDPT_OFFSET >> 3


def _window_value(own: Frames, frame: int, index: int) -> int | None:
    """An entry of the own tables of the window; None for another frame."""
    if frame == own.window_l1:
        page = own.root64[0] // BLOCK_PAGES * BLOCK_PAGES + index
        return page << 12 | KERNEL_PAGE | (0 if index % 8 == 3 else D)
    if frame == own.window_l1_32:
        page = own.root64[0] // MODE_BLOCK * MODE_BLOCK + index
        return page << 12 | KERNEL_PAGE | (0 if index % 8 == 5 else D)
    if frame == own.window_l2:
        if index == own.root64[0] // BLOCK_PAGES:
            return own.window_l1 << 12 | KERNEL_LINK
        return index * BLOCK_PAGES << 12 | KERNEL_PAGE | LARGE | (0 if index % 4 == 1 else D)
    return None


def _window_directory(own: Frames, index: int) -> int:
    """An entry of the window in a 32-bit directory."""
    if index == own.root64[0] // MODE_BLOCK:
        return own.window_l1_32 << 12 | KERNEL_LINK
    return index * MODE_BLOCK << 12 | KERNEL_PAGE | LARGE | (0 if index % 4 == 1 else D)


def words_of(tables: Iterator[Table]) -> dict[int, int]:
    """The tables as aligned 8-byte words, by gpa; entries that are not recorded are 0 where a word has another one."""
    words: dict[int, int] = {}
    for table in tables:
        for gpa, _, value in table.stores():
            words[gpa & ~7] = words.get(gpa & ~7, 0) | value << 8 * (gpa & 4)
    return words


def window_tables(layout: ModesLayout, vcpu: int) -> list[Table]:
    """The tables of the window, as they always are."""
    own = layout.frames(vcpu)
    sizes = {own.window_l1: (8, BLOCK_PAGES), own.window_l1_32: (4, MODE_BLOCK)}
    sizes[own.window_l2] = 8, -(-layout.window_end // BLOCK_PAGES)
    return [
        Table(frame, size, {index: _window_value(own, frame, index) or 0 for index in range(count)})
        for frame, (size, count) in sizes.items()
    ]


def _leaf_flags(table: int, page: int, wide: bool) -> int:
    """Mostly as a kernel leaves pages in use; some without D or A, some read-only, not executable, or the kernel's."""
    flags = P | W | U
    if (table + page) % 4 != 3:
        flags |= A
    if page % 2 == 0:
        flags |= D
    if page % 7 == 5:
        flags &= ~W
    if page % 5 == 4:
        flags &= ~U
    if wide and page % 4 == 1:
        flags |= NX
    return flags


def _pages(layout: ModesLayout, vcpu: int, tables: list[Table]) -> None:
    """What the tables of pages map first: own data, a neighbour's, frames with large host pages, devices, tables."""
    own, other = layout.frames(vcpu), layout.frames(layout.neighbour(vcpu))
    device = layout.device_frame(vcpu)
    for number, table in enumerate(tables):
        for page in range(LEAF_PAGES):
            frame = own.data[-1 - (number * 5 + page) % len(own.data)]
            if page in (9, 10):
                frame = other.data[-1 - page]
            elif page in (11, 12):
                frame = layout.data_blocks[page % len(layout.data_blocks)] + 8 * vcpu + number
            elif page == 13 and device is not None:
                frame = device
            elif page == 15:
                frame = tables[(number + 1) % len(tables)].frame
            table.entries[page] = frame << 12 | _leaf_flags(number, page, table.size == 8)


def initial_tables(layout: ModesLayout, vcpu: int) -> Tables:
    """What `vcpu` owns when a run begins; the boot image is written from the same records."""
    own, other = layout.frames(vcpu), layout.frames(layout.neighbour(vcpu))
    number = layout.small_tables

    def make(frames: tuple[int, int], size: int = 8) -> list[Table]:
        return [Table(frame, size) for frame in frames]

    tables = Tables(
        root64=make(own.root64),
        l3=make(own.l3),
        l2=make(own.l2),
        root32=make(own.root32, 4),
        pdpts=[Table(own.root32[0], 8), Table(own.pdpt, 8)],
        small8=[Table(frame, 8) for frame in own.small8],
        small4=[Table(frame, 4) for frame in own.small4],
        data=list(own.data),
    )
    _pages(layout, vcpu, tables.small8)
    _pages(layout, vcpu, tables.small4)
    for space in range(2):
        l2, root32 = tables.l2[space].entries, tables.root32[space].entries
        for index in range(-(-layout.window_end // MODE_BLOCK)):
            root32[index] = _window_directory(own, index)
        for index in range(number):
            wide, narrow = own.small8[(index + space) % number], own.small4[(index + space) % number]
            for at, l2_frame, directory_frame in (
                (index, wide, narrow),
                (ALIAS + index, own.small8[index], own.small4[index]),
                (FOREIGN + index, other.small8[index], other.small4[index]),
                (OTHER_FORMAT + index, narrow, wide),
            ):
                l2[at] = l2_frame << 12 | (LINK if at % 4 else LINK & ~A)
                root32[USER_DIRECTORY + at] = directory_frame << 12 | (LINK if at % 4 else LINK & ~A)
        for index, block in enumerate(layout.data_blocks[:4]):
            l2[HUGE + index] = block << 12 | PAGE | LARGE
            root32[USER_DIRECTORY + HUGE + index] = block // MODE_BLOCK * MODE_BLOCK << 12 | LINK | LARGE
        l2[SELF] = own.l2[space] << 12 | KERNEL_LINK
        root32[USER_DIRECTORY + SELF] = own.root32[space] << 12 | KERNEL_LINK
        _roots(tables, own, other, space)
    return tables


def _roots(tables: Tables, own: Frames, other: Frames, space: int) -> None:
    user = [own.window_l2, own.l2[space], own.l2[1 - space], other.l2[0]]
    base = pdpt_base(space)
    for slot, frame in enumerate(user):
        tables.l3[space].entries[slot] = frame << 12 | LINK
        tables.pdpts[space].entries[base + slot] = frame << 12 | P
    tables.root64[space].entries = {
        0: own.l3[space] << 12 | LINK,
        1: own.l3[space] << 12 | LINK & ~A,
        2: other.l3[0] << 12 | LINK,
        SELF_ROOT: own.root64[space] << 12 | KERNEL_LINK,
    }
    if space:
        tables.pdpts[1].entries[MALFORMED_PDPT >> 3] = own.window_l2 << 12 | P | W
