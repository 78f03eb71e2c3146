"""What the kernels of random guests do to their tables: short sequences of instructions, as in any operating system.

Each idiom is drawn with operands from the guest's tables (`generate_tables`), which it changes. None is made for a
particular bug, and a guest may be sloppy: whether it invalidates what it has to is drawn as well, and the checker knows
what the architecture allows to whoever does not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final

from shadowmmu.explorer.generate_subset import some_of
from shadowmmu.explorer.generate_tables import (
    DATA_INDICES,
    UPPER_INDICES,
    Address,
    Entry,
    GuestTables,
    Place,
    draw_entry,
    leaf_flags,
    upper_flags,
)

__all__ = ["IdiomWriter"]

Lines = list[str]


class IdiomWriter:
    """Draws idioms for one guest of `vcpus` vCPUs.

    An idiom is lines of a litmus test's program by vCPU: what one of them does, and what others do because of it.
    """

    def __init__(self, draw: random.Random, guest: GuestTables, vcpus: int) -> None:
        self._draw = draw
        self._guest = guest
        self._vcpus = vcpus
        self._vcpu = 0
        self._elsewhere: dict[int, Lines] = {}
        self._registers = 0
        self._user_rate = draw.choice((0.1, 0.35, 0.6))
        self._store_rate = draw.choice((0.3, 0.5, 0.7))
        self._tidy_rate = draw.choice((0.2, 0.5, 0.8))
        weights: dict[Callable[[], Lines], float] = {
            self._change_page: 22,
            self._change_rights: 15,
            self._link: 12,
            self._relink: 9,
            self._share: 6,
            self._replace: 11,
            self._recycle: 11,
            self._resize: 6 if guest.large else 0,
            self._move_page: 4,
            self._contend: 7 if vcpus > 1 else 0,
            self._invalidate: 8,
            self._toggle: 1.5,
        }
        self._weights: dict[Callable[[], Lines], float] = {self.touch: 20.0, **some_of(draw, weights)}

    def idiom(self, vcpu: int) -> dict[int, Lines]:
        """The next idiom, of that vCPU."""
        self._vcpu = vcpu
        self._elsewhere = {}
        idiom = self._draw.choices(list(self._weights), list(self._weights.values()))[0]
        return {vcpu: idiom(), **self._elsewhere}

    def _other(self) -> int:
        return self._draw.choice([vcpu for vcpu in range(self._vcpus) if vcpu != self._vcpu])

    # --- accesses ------------------------------------------------------------------------------------------------

    def touch(self, address: Address | None = None, *, store_rate: float | None = None) -> Lines:
        """An access, by the kernel or by a user; a store as often as guests store, or as `store_rate` (0 to 1) says."""
        draw = self._draw
        if address is None:
            address = self._address()
        user = "u" if draw.random() < self._user_rate else ""
        word = draw.choice(DATA_INDICES)
        place = f"{address.name}+{word * self._guest.shape.entry:#x}"
        kind = draw.random()
        if kind < (self._store_rate if store_rate is None else store_rate):
            if draw.random() < 0.12:
                return [f"{user}xadd {place} = 1"]
            entry = draw_entry(draw, self._guest, 1)
            return [f"{user}store {place} = {draw.choice((0, 1, entry, entry))}"]
        if kind > 0.95:
            return [f"{user}fetch {place}"]
        if draw.random() < 0.4:
            self._registers += 1
            return [f"r{self._registers} = {user}load {place}"]
        return [f"{user}load {place}"]

    def _address(self) -> Address:
        return (
            self._guest.favourite
            if self._draw.random() < self._guest.focus
            else self._draw.choice(self._guest.addresses)
        )

    def _touch_through(self, place: Place) -> Lines:
        through = self._guest.through(place)
        return self.touch(self._draw.choice(through)) if through else []

    # --- entries -------------------------------------------------------------------------------------------------

    def _place(self, lowest: int, highest: int) -> Place:
        """An entry that some address uses, or now and then any."""
        places = self._guest.places(lowest, highest)
        favourite = [place for place, _ in self._guest.path(self._guest.favourite) if place in places]
        if favourite and self._draw.random() < self._guest.focus:
            return self._draw.choice(favourite)
        if places and self._draw.random() < 0.9:
            return self._draw.choice(places)
        level = self._draw.randint(lowest, highest)
        table = self._draw.choice(self._guest.tables[level])
        return Place(table, self._draw.choice(DATA_INDICES if level == 1 else UPPER_INDICES), level)

    def set_entry(self, place: Place, entry: Entry | None) -> Lines:
        """A store to an entry: by the linear map, or by an address that maps the table; sometimes a locked one."""
        draw, guest = self._draw, self._guest
        old = guest.entries.get((place.table, place.number))
        where = f"@{place.table}[{place.number}]"
        aliases = guest.mapping(place.table)
        if aliases and draw.random() < 0.4:
            where = f"{draw.choice(aliases).name}+{place.number * guest.shape.entry:#x}"
        value = "0" if entry is None else str(entry)
        guest.entries[place.table, place.number] = entry
        kind = draw.random()
        if kind < 0.08:
            return [f"xchg {where} = {value}"]
        if kind < 0.16:
            return [f"cmpxchg {where} = {'0' if old is None else old} -> {value}"]
        return [f"store {where} = {value}"]

    def _after(self, place: Place, through: list[Address]) -> Lines:
        """What a guest does after a change: it invalidates, or does not, and uses the page, or does not."""
        draw = self._draw
        if self._vcpus > 1 and not self._elsewhere and draw.random() < 0.3:
            # Others hear of it, or just come along.
            self._elsewhere[self._other()] = [*self._flush(through), *self._touch_through(place)]
        lines = self._flush(through)
        if draw.random() < 0.5:
            lines += self._touch_through(place)
        return lines

    def _flush(self, through: list[Address]) -> Lines:
        """An invalidation of what was mapped, by who does such things."""
        draw = self._draw
        if draw.random() >= self._tidy_rate:
            return []
        if through and draw.random() < 0.7:
            return [f"invlpg {draw.choice(through).name}"]
        return ["cr3"]

    def _change(self, place: Place, entry: Entry | None) -> Lines:
        through = self._guest.through(place)
        return [*self.set_entry(place, entry), *self._after(place, through)]

    def _change_page(self) -> Lines:
        """Maps, unmaps or remaps a page."""
        place = self._place(1, 1)
        present = self._guest.entries.get((place.table, place.number)) is not None
        entry = None if present and self._draw.random() < 0.5 else draw_entry(self._draw, self._guest, 1)
        return self._change(place, entry)

    def _change_rights(self) -> Lines:
        """Narrows or widens the rights of an entry, or clears its accessed or dirty bit."""
        draw, guest = self._draw, self._guest
        place = self._place(1, 1 if draw.random() < 0.6 else guest.shape.levels - 1)
        old = guest.entries.get((place.table, place.number))
        if old is None:
            return self._change(place, draw_entry(draw, guest, place.level))
        if place.level == 1 or "l" in old.flags:
            flags = leaf_flags(draw, guest.shape) + ("l" if "l" in old.flags else "")
        else:
            flags = upper_flags(draw, guest.shape, place.level)
        if flags == old.flags and flags:
            # Every one is a change: without the right it has, or with it again.
            flags = flags.replace("w", "") if "w" in flags else f"w{flags}"
        return self._change(place, Entry(old.frame, flags))

    def _link(self) -> Lines:
        """Links or unlinks a table."""
        draw, guest = self._draw, self._guest
        place = self._place(2, guest.shape.levels)
        present = guest.entries.get((place.table, place.number)) is not None
        entry = None if present and draw.random() < 0.4 else draw_entry(draw, guest, place.level)
        return self._change(place, entry)

    def _relink(self) -> Lines:
        """Takes a table out, changes an entry in it or below it, and links it again, perhaps elsewhere."""
        draw, guest = self._draw, self._guest
        place = self._place(2, guest.shape.levels)
        old = guest.entries.get((place.table, place.number))
        if old is None or "l" in old.flags:
            return self._link()
        below = [
            used
            for address in guest.through(place)
            for used, _ in guest.path(address)
            if used.level < place.level and used.table in guest.near
        ]
        lines = [*self.set_entry(place, None), *self._flush([])]
        changed = draw.choice(below) if below and draw.random() < 0.8 else place
        if changed is not place:
            lines += self.set_entry(changed, draw_entry(draw, guest, changed.level))
        again = place
        if draw.random() < 0.5:
            again = Place(place.table, draw.choice(UPPER_INDICES), place.level)
        lines += self._change(again, old)
        if self._vcpus > 1 and draw.random() < 0.4:
            self._elsewhere[self._other()] = [*self._flush([]), *self._touch_through(changed)]
        return lines

    def _share(self) -> Lines:
        """Links a table at a second place (page-table sharing), where somebody uses what is below it."""
        draw, guest = self._draw, self._guest
        place = self._place(2, guest.shape.levels)
        old = guest.entries.get((place.table, place.number))
        if old is None or "l" in old.flags:
            return self._link()
        used = guest.through(place)
        below = [
            lower
            for address in used
            for lower, _ in guest.path(address)
            if lower.level == 1 and lower.table in guest.near
        ]
        lines: Lines = []
        for lower in below[: draw.randint(0, 2)]:
            lines += self.set_entry(lower, draw_entry(draw, guest, 1))
        again = Place(place.table, draw.choice(UPPER_INDICES), place.level)
        lines += self.set_entry(again, old)
        aliases = [guest.alias(address, again) for address in used]
        users = [self.touch(draw.choice(aliases)) for _ in range(2)] if aliases else [[], []]
        if self._vcpus > 1:
            self._elsewhere[self._other()] = users[1]
        return lines + users[0]

    def _replace(self) -> Lines:
        """Another table, or large page, takes the place of one that is in use; perhaps for a while only (a window).

        Somebody uses what is below meanwhile, also pages that nobody has used yet, and the same when it is as before.
        """
        draw, guest = self._draw, self._guest
        place = self._place(2, guest.shape.levels if draw.random() < 0.3 else 2)
        large = [used for used in guest.places(2, 2) if guest.is_large(used)]
        if len(guest.large) > 1 and large and draw.random() < 0.5:
            place = draw.choice(large)
        old = guest.entries.get((place.table, place.number))
        used = guest.through(place)
        new = self._another(old, place.level)
        if new is None or not used:
            return self._link()
        ours = self._touch_through(place) if draw.random() < 0.6 else []
        ours += self.set_entry(place, new)
        meanwhile = self._neighbours(used, draw.randint(1, 2))
        users = [line for address in meanwhile for line in self.touch(address)]
        if draw.random() < 0.6:
            users += self.set_entry(place, old)
            users += ["cr3"] if draw.random() < 0.5 else self._flush(meanwhile or used)
        users += [line for address in (draw.choice(used), *meanwhile) for line in self.touch(address)]
        if self._vcpus > 1 and draw.random() < 0.85:
            self._elsewhere[self._other()] = users
            return ours + self._flush(used)
        return ours + users

    def _another(self, old: Entry | None, level: int) -> Entry | None:
        """An entry of that level like `old`, for another table or large page; None if there is none."""
        if old is None:
            return None
        guest = self._guest
        below = [*guest.tables[level - 1], *(guest.data if level == 2 else ())]
        others = [frame for frame in (guest.large if "l" in old.flags else below) if frame != old.frame]
        return Entry(self._draw.choice(others), old.flags) if others else None

    def _neighbours(self, addresses: Sequence[Address], most: int) -> list[Address]:
        """Some that are mapped, and differ from one of `addresses` in the last index at most."""
        guest = self._guest
        found = dict.fromkeys(
            (*address.indices[:-1], index) for address in addresses for index in DATA_INDICES
        )
        mapped = [indices for indices in found if guest.leaf(Address("", indices)) is not None]
        return [guest.named(indices) for indices in self._draw.sample(mapped, min(most, len(mapped)))]

    def _recycle(self) -> Lines:
        """A data page becomes a page table: unmapped or not, it is linked and used."""
        draw, guest = self._draw, self._guest
        mapped = [leaf.frame for address in guest.addresses if (leaf := guest.leaf(address)) is not None]
        candidates = [frame for frame in mapped if frame in guest.data or frame in guest.far]
        favourite = guest.favourite_frame
        frame = (
            favourite if favourite and draw.random() < guest.focus else draw.choice(candidates or guest.data)
        )
        lines: Lines = []
        users = guest.mapping(frame)
        if draw.random() < 0.4:
            for address in users[:1]:
                *_, (place, _) = guest.path(address)
                if place.table in guest.near:
                    lines += self._change(place, None)
        if frame not in guest.far and draw.random() < 0.3:
            word = Place(frame, draw.choice(DATA_INDICES), 1)
            lines += self.set_entry(word, draw_entry(draw, guest, 1))
        used = self._place(2, 2)
        place = used if draw.random() < 0.4 else Place(used.table, draw.choice(UPPER_INDICES), 2)
        lines += self.set_entry(place, Entry(frame, upper_flags(draw, guest.shape, 2)))
        if users and self._vcpus > 1 and draw.random() < 0.6:
            # Somebody has not heard of it, and goes on writing the page.
            self._elsewhere[self._other()] = self.touch(draw.choice(users), store_rate=0.8)
        through = guest.through(used)
        if through:
            lines += self.touch(guest.alias(draw.choice(through), place))
        return lines

    def _resize(self) -> Lines:
        """Splits a large page into a table, or makes a large page where a table was."""
        draw, guest = self._draw, self._guest
        place = self._place(2, 2)
        old = guest.entries.get((place.table, place.number))
        if old is not None and "l" in old.flags:
            entry = Entry(draw.choice(guest.tables[1]), upper_flags(draw, guest.shape, 2))
        else:
            entry = Entry(draw.choice(guest.large), leaf_flags(draw, guest.shape) + "l")
        return self._change(place, entry)

    def _move_page(self) -> Lines:
        """Takes a page from one entry and maps it by another (mremap)."""
        place, target = self._place(1, 1), self._place(1, 1)
        old = self._guest.entries.get((place.table, place.number))
        if old is None:
            return self._change_page()
        return [*self.set_entry(place, None), *self._change(target, old)]

    def _contend(self) -> Lines:
        """Two vCPUs change the same entry."""
        draw, guest = self._draw, self._guest
        place = self._place(1, 1 if draw.random() < 0.7 else guest.shape.levels)
        other = self._other()
        theirs = self._change(place, draw_entry(draw, guest, place.level))
        self._elsewhere = {other: theirs}
        ours = self.set_entry(place, draw_entry(draw, guest, place.level))
        return [*ours, *self._flush(guest.through(place)), *self._touch_through(place)]

    # --- the processor -------------------------------------------------------------------------------------------

    def _invalidate(self) -> Lines:
        if self._draw.random() < 0.55:
            return [f"invlpg {self._address().name}"]
        return ["cr3"]

    def _toggle(self) -> Lines:
        """Control bits that decide what entries mean."""
        name, bit = self._draw.choice(TOGGLES if self._guest.shape.has_nx else TOGGLES[:2])
        lines = [f"{name} -{bit}", *self.touch(), f"{name} +{bit}"]
        return lines if self._draw.random() < 0.6 else lines[:2]


TOGGLES: Final = (("cr0", "wp"), ("cr4", "pge"), ("cr4", "smep"), ("efer", "nxe"))
