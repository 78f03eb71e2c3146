"""The tables of a random guest, as they are drawn and as its programs change them.

The picture is that of a guest whose instructions are executed in the order in which they were drawn. It only serves to
choose operands that have to do with one another; what really happens depends on the schedule. Names and entries are
written as in litmus tests (`litmus`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

__all__ = ["DATA_INDICES", "Address", "Entry", "GuestTables", "Place", "Shape", "draw_tables"]

UPPER_INDICES: Final = (0, 1, 2)
"""Entries of upper tables that are used: few, so that things collide."""
DATA_INDICES: Final = (0, 1, 3, 9, 17)
"""The same for last-level tables, and for words of data pages: 0, 1 and 3 are among the 8 neighbours that prefetching
maps, 9 and 17 are among others."""
LARGE_FRAMES: Final = 2048
"""Where the second slot begins; its tables and data are out of the linear map's reach."""


class Shape(NamedTuple):
    """What the paging mode decides: `levels` of tables, bytes per `entry`, whether there is a no-execute bit."""

    mode: str
    levels: int
    entry: int

    @property
    def has_nx(self) -> bool:
        """Whether entries have a no-execute bit."""
        return self.entry == 8

    @property
    def large_pages(self) -> int:
        """Small pages of a large one."""
        return 512 if self.entry == 8 else 1024


class Entry(NamedTuple):
    """A present entry: the name of a frame and its flags."""

    frame: str
    flags: str

    def __str__(self) -> str:
        return f"{self.frame} {self.flags}" if self.flags else f"{self.frame}+0"


class Place(NamedTuple):
    """Entry `number` of a table; `level` is that at which an address uses it."""

    table: str
    number: int
    level: int


class Address(NamedTuple):
    """A guest virtual address by its indices, from the top table down."""

    name: str
    indices: tuple[int, ...]


class GuestTables:
    """The tables and addresses.

    `tables`: those that the guest begins with, by level, top first; `data`: frames that may become tables too; `far`:
    frames of the second slot; `large`: first frames of large pages. `entries` is what they hold now. `focus` is how
    often (0 to 1) what is done is done to the `favourite` address, or to the data that it is mapped to at the start
    ("" for none).
    """

    def __init__(self, shape: Shape, focus: float) -> None:
        self.shape = shape
        self.tables: dict[int, list[str]] = {level: [] for level in range(shape.levels, 0, -1)}
        self.data: list[str] = []
        self.far: list[str] = []
        self.large: list[str] = []
        self.devices: list[str] = []
        self.addresses: list[Address] = []
        self.focus = focus
        self.favourite = Address("", ())
        self.favourite_frame = ""
        self.entries: dict[tuple[str, int], Entry | None] = {}

    @property
    def near(self) -> list[str]:
        """Every frame of the linear map that has a name: tables, then data."""
        return [*(name for names in self.tables.values() for name in names), *self.data]

    def path(self, address: Address) -> Iterator[tuple[Place, Entry | None]]:
        """The entries that a walk for the address meets, as far as it gets."""
        table = "root"
        for level, index in zip(range(self.shape.levels, 0, -1), address.indices, strict=True):
            entry = self.entries.get((table, index))
            yield Place(table, index, level), entry
            if entry is None or "l" in entry.flags:
                return
            table = entry.frame

    def leaf(self, address: Address) -> Entry | None:
        """The entry that maps the address, None if it is not mapped."""
        found = list(self.path(address))
        place, entry = found[-1]
        return entry if entry is not None and (place.level == 1 or "l" in entry.flags) else None

    def places(self, lowest: int, highest: int) -> list[Place]:
        """The entries of some levels, in the linear map, that addresses use now."""
        near = set(self.near)
        found = {
            place: None
            for address in self.addresses
            for place, _ in self.path(address)
            if lowest <= place.level <= highest and place.table in near
        }
        return list(found)

    def is_large(self, place: Place) -> bool:
        """Whether the entry maps a large page now."""
        entry = self.entries.get((place.table, place.number))
        return entry is not None and "l" in entry.flags

    def through(self, place: Place) -> list[Address]:
        """The addresses whose walks use an entry."""
        return [
            address
            for address in self.addresses
            if any((used.table, used.number) == (place.table, place.number) for used, _ in self.path(address))
        ]

    def alias(self, address: Address, place: Place) -> Address:
        """The address that differs from `address` in the index at the level of `place`; a new one gets a name."""
        at = self.shape.levels - place.level
        return self.named((*address.indices[:at], place.number, *address.indices[at + 1 :]))

    def named(self, indices: tuple[int, ...]) -> Address:
        """The address of these indices; a new one gets a name."""
        known = next((other for other in self.addresses if other.indices == indices), None)
        if known is not None:
            return known
        self.addresses.append(Address(f"a{len(self.addresses)}", indices))
        return self.addresses[-1]

    def mapping(self, frame: str) -> list[Address]:
        """The addresses that are mapped to a frame."""
        return [
            address
            for address in self.addresses
            if (leaf := self.leaf(address)) is not None and leaf.frame == frame and "l" not in leaf.flags
        ]


def _drop(draw: random.Random, flags: str, rates: dict[str, float]) -> str:
    return "".join(flag for flag in flags if draw.random() >= rates.get(flag, 0.0))


def upper_flags(draw: random.Random, shape: Shape, level: int) -> str:
    """Flags of an entry that names a table: mostly all rights."""
    if shape.mode == "pae" and level == 3:
        return ""
    flags = _drop(draw, "wua", {"w": 0.08, "u": 0.05, "a": 0.04})
    return flags + ("n" if shape.has_nx and draw.random() < 0.04 else "")


def leaf_flags(draw: random.Random, shape: Shape) -> str:
    """Flags of an entry that maps a page: mostly all rights."""
    flags = _drop(draw, "wuad", {"w": 0.15, "u": 0.1, "a": 0.05, "d": 0.1})
    flags += "n" if shape.has_nx and draw.random() < 0.06 else ""
    return flags + ("g" if draw.random() < 0.04 else "")


def draw_entry(draw: random.Random, guest: GuestTables, level: int) -> Entry:
    """Something for an entry of that level to name, with flags."""
    shape = guest.shape
    if level == 1:
        kind = draw.random()
        if kind < 0.12:
            frame = draw.choice(guest.near)
        elif kind < 0.18 and guest.devices:
            frame = draw.choice(guest.devices)
        elif kind < 0.3 and guest.far:
            frame = draw.choice(guest.far)
        else:
            frame = draw.choice(guest.data)
        return Entry(frame, leaf_flags(draw, shape))
    flags = upper_flags(draw, shape, level)
    kind = draw.random()
    if level == 2 and guest.large and kind < 0.25:
        return Entry(draw.choice(guest.large), leaf_flags(draw, shape) + "l")
    if kind < 0.35:
        return Entry(draw.choice([*guest.data, *guest.far]), flags)
    if kind < 0.47:
        return Entry(draw.choice(guest.near), flags)
    return Entry(draw.choice(guest.tables[level - 1]), flags)


def draw_tables(draw: random.Random, shape: Shape, *, large: bool, focus: float) -> GuestTables:
    """A guest's tables and addresses. `large`: with a second slot for large pages; `focus` as in GuestTables."""
    guest = GuestTables(shape, focus)
    guest.tables[shape.levels] = ["root"]
    for level in range(shape.levels - 1, 0, -1):
        most = 3 if level == 1 else 2
        guest.tables[level] = [f"L{level}{letter}" for letter in "abc"[: draw.randint(1, most)]]
    guest.data = [f"G{number}" for number in range(draw.randint(2, 6))]
    guest.devices = ["device"] if draw.random() < 0.15 else []
    if large:
        guest.large = ["B0", "B1"][: draw.choice((1, 2, 2))]
        guest.far = ["S0", "S1"][: draw.randint(1, 2)]
    for level in range(shape.levels, 0, -1):
        for table in guest.tables[level]:
            _fill(draw, guest, table, level)
    for frame in (*guest.data, *guest.far):
        # What would be in them if they became tables.
        for index in DATA_INDICES:
            if draw.random() < 0.7:
                guest.entries[frame, index] = Entry(draw.choice(guest.data), leaf_flags(draw, shape))
    if large and draw.random() < 0.6:
        table = guest.tables[2][0]
        guest.entries[table, draw.choice(UPPER_INDICES[1:])] = Entry(
            draw.choice(guest.large), leaf_flags(draw, guest.shape) + "l"
        )
    if draw.random() < 0.35:
        _link_to_itself(draw, guest)
    _draw_addresses(draw, guest)
    return guest


def _fill(draw: random.Random, guest: GuestTables, table: str, level: int) -> None:
    indices: Sequence[int] = DATA_INDICES if level == 1 else UPPER_INDICES
    first = indices[0] if level > 1 else draw.choice(indices)
    for index in indices:
        if index == first and level > 1:
            below = draw.choice(guest.tables[level - 1])
            guest.entries[table, index] = Entry(below, upper_flags(draw, guest.shape, level))
        elif index == first or draw.random() < 0.4:
            guest.entries[table, index] = draw_entry(draw, guest, level)


def _link_to_itself(draw: random.Random, guest: GuestTables) -> None:
    """Some table is used at a second level: by itself, or by one above its parent."""
    level = draw.randint(2, max(guest.shape.levels - 1, 2))
    table = draw.choice(guest.tables[level])
    target = table if draw.random() < 0.5 else draw.choice(guest.tables[draw.randint(1, level)])
    guest.entries[table, draw.choice(UPPER_INDICES[1:])] = Entry(
        target, upper_flags(draw, guest.shape, level)
    )


def _draw_addresses(draw: random.Random, guest: GuestTables) -> None:
    """Most are mapped at the start, the others perhaps when something was linked; many are neighbours."""
    count = draw.randint(3, 6)
    seen: set[tuple[int, ...]] = set()
    for _ in range(20 * count):
        indices = tuple(
            draw.choice(DATA_INDICES) if level == 1 else draw.choice((0, 0, 0, *UPPER_INDICES))
            for level in range(guest.shape.levels, 0, -1)
        )
        if guest.addresses and draw.random() < 0.5:
            # The same entries by another way, or another entry of the same table.
            like = draw.choice(guest.addresses).indices
            changed = draw.randrange(guest.shape.levels)
            indices = (*like[:changed], indices[changed], *like[changed + 1 :])
        address = Address(f"a{len(seen)}", indices)
        if indices in seen or (guest.leaf(address) is None and draw.random() < 0.8):
            continue
        seen.add(indices)
        guest.addresses.append(address)
        if len(seen) == count:
            break
    mapped = [address for address in guest.addresses if guest.leaf(address) is not None]
    guest.favourite = draw.choice(mapped or guest.addresses)
    leaf = guest.leaf(guest.favourite)
    if leaf is not None and leaf.frame in guest.data:
        guest.favourite_frame = leaf.frame
