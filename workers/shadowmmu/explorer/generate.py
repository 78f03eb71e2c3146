"""Random small guests as scenarios: what `shadowmmu hunt` looks for races in.

`generate(seed)` is written as a litmus test first (`draw_test`), so that everything that a person can do with a litmus
test can be done with it: read it, change it, shrink it, keep it. It has one to three vCPUs on one small graph of
tables, a set-up that fills TLBs and puts tables out of sync, a few idioms of guest kernels per vCPU
(`generate_idioms`), and a few host operations. Operands are drawn so that things collide: few tables, frames and
addresses, and each guest has only some of the idioms and operations (`generate_subset`). Nothing here knows the
catalogue of bugs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final, NamedTuple

from shadowmmu.explorer.generate_idioms import IdiomWriter
from shadowmmu.explorer.generate_subset import some_of
from shadowmmu.explorer.generate_tables import (
    LARGE_FRAMES,
    Entry,
    GuestTables,
    Shape,
    draw_entry,
    draw_tables,
)
from shadowmmu.explorer.litmus import LitmusError, parse_litmus
from shadowmmu.explorer.scenario import Scenario

__all__ = ["draw_test", "generate"]

SHAPES: Final = (Shape("64", 4, 8), Shape("pae", 3, 8), Shape("32", 2, 4))
SHAPE_WEIGHTS: Final = (75, 6, 19)


class Size(NamedTuple):
    """How much happens in a guest: lines of a vCPU's program (longer by the rest of an idiom), of the set-up beside
    those that fill TLBs, how often a vCPU has the favourite in its TLB, at most how many host operations, and how often
    what is done is done to the favourite (`GuestTables.focus`).
    """

    lines: tuple[int, int]
    setup: int
    warm: float
    host_operations: int
    focus: tuple[float, ...]


SIZES: Final = (Size((1, 2), 2, 0.8, 1, (0.5, 0.9)), Size((2, 6), 7, 0.5, 4, (0.25, 0.5, 0.8)))
"""Half of the guests have only an idiom or two: what can go wrong in them goes wrong in few executions."""
ALONE: Final = 5
"""Lines by which the program of an only vCPU is longer."""
LARGE_SLOT_PAGES: Final = 2048
FIRST_FRAME: Final = 16
DEVICE_FRAME: Final = 8192
"""A frame in no slot."""


def generate(seed: int) -> Scenario:
    """The scenario of a seed: always the same."""
    try:
        return parse_litmus(draw_test(seed), f"random-{seed}")
    except LitmusError as error:
        raise RuntimeError(f"the guest of seed {seed} is no litmus test: {error}") from None


def draw_test(seed: int) -> str:
    """The litmus test of a seed."""
    draw = random.Random(f"guest {seed}")
    shape = draw.choices(SHAPES, SHAPE_WEIGHTS)[0]
    vcpus = draw.choices((1, 2, 3), (20, 68, 12))[0]
    size = draw.choice(SIZES)
    guest = draw_tables(draw, shape, large=draw.random() < 0.45, focus=draw.choice(size.focus))
    backing = draw.choice(("4k", "4k", "2m", "thp"))
    machine = _machine(draw, guest, vcpus, backing)
    begin = dict(guest.entries)
    writer = IdiomWriter(draw, guest, vcpus)
    setup = _setup(draw, guest, writer, vcpus, size)
    programs: list[list[str]] = [[] for _ in range(vcpus)]
    wanted = [draw.randint(*size.lines) + (ALONE if vcpus == 1 else 0) for _ in range(vcpus)]
    while any(len(program) < most for program, most in zip(programs, wanted, strict=True)):
        vcpu = draw.choice([n for n in range(vcpus) if len(programs[n]) < wanted[n]])
        for who, lines in writer.idiom(vcpu).items():
            programs[who] += lines
    hosts = _hosts(draw, guest, backing, vcpus, size.host_operations)
    parts = [
        f'title = "a random guest, seed {seed}"',
        _lines("setup", setup),
        machine,
        *(_table(name, begin) for name in dict.fromkeys(table for table, _ in begin)),
        "[addresses]",
        *(f'{address.name} = "{"/".join(map(str, address.indices))}"' for address in guest.addresses),
        *(f"[[vcpu]]\n{_lines('program', program)}" for program in programs),
        *(f"[[host]]\n{_lines('program', program)}" for program in hosts),
    ]
    return "\n".join(parts) + "\n"


def _lines(key: str, lines: Sequence[str]) -> str:
    return "\n".join((f'{key} = """', *lines, '"""'))


def _machine(draw: random.Random, guest: GuestTables, vcpus: int, backing: str) -> str:
    """The machine, and the numbers of frames: apart, or side by side, where one access prefetches several."""
    step = draw.choice((8, 8, 1))
    names = guest.near
    frames = FIRST_FRAME + step * len(names) + 8
    text = [
        "[machine]",
        f"vcpus = {vcpus}",
        f'mode = "{guest.shape.mode}"',
        f"frames = {frames}",
        *(['memory_model = "tso"'] if draw.random() < 0.06 else []),
        *(["vpid = false"] if draw.random() < 0.05 else []),
    ]
    if guest.large:
        slot = f'{{gfn = {LARGE_FRAMES}, pages = {LARGE_SLOT_PAGES}, backing = "{backing}"}}'
        text.append(f"slots = [{slot}]")
    text.append("[frames]")
    text += [f"{name} = {FIRST_FRAME + step * number}" for number, name in enumerate(names)]
    for number, name in enumerate(guest.large):
        text.append(f"{name} = {LARGE_FRAMES + guest.shape.large_pages * number}")
    for number, name in enumerate(guest.far):
        # The page that an address with last index 3 or 9 has in the large page.
        text.append(f"{name} = {LARGE_FRAMES + guest.shape.large_pages * number + (3, 9)[number]}")
    if guest.devices:
        text.append(f"{guest.devices[0]} = {DEVICE_FRAME}")
    return "\n".join(text)


def _table(name: str, entries: dict[tuple[str, int], Entry | None]) -> str:
    lines = [
        f'{index} = "{entry}"'
        for (table, index), entry in entries.items()
        if table == name and entry is not None
    ]
    return "\n".join((f"[tables.{name}]", *lines))


def _setup(draw: random.Random, guest: GuestTables, writer: IdiomWriter, vcpus: int, size: Size) -> list[str]:
    """Accesses that fill TLBs, and stores that put tables out of sync."""
    lines = []
    for vcpu in range(vcpus):
        if draw.random() < size.warm:
            lines += [f"v{vcpu}: {step}" for step in writer.touch(guest.favourite, store_rate=0.7)]
    for _ in range(draw.randint(0, size.setup)):
        vcpu = draw.randrange(vcpus)
        if draw.random() < 0.65:
            steps = writer.touch()
        else:
            places = guest.places(1, 1) or guest.places(1, 2)
            if not places:
                continue
            place = draw.choice(places)
            old = guest.entries.get((place.table, place.number))
            steps = writer.set_entry(
                place, draw_entry(draw, guest, 1) if old is None or draw.random() < 0.5 else old
            )
        lines += [f"v{vcpu}: {step}" for step in steps]
    return lines


# --- the host ----------------------------------------------------------------------------------------------------


HOST_OPERATIONS: Final = {
    "unmap": 6.0,
    "reclaim": 6.0,
    "unmap_range": 4.0,
    "move": 5.0,
    "age": 3.0,
    "reclaim_idle": 2.0,
    "shrink": 3.0,
    "zap_all": 2.0,
    "mmu_pages": 0.5,
    "migrate": 1.0,
    "get_dirty_log": 2.0,
}
"""What the host does to small pages, with how often."""


def _hosts(draw: random.Random, guest: GuestTables, backing: str, vcpus: int, most: int) -> list[list[str]]:
    threads = min(draw.choices((0, 1, 2), (30, 55, 15))[0], most)
    operations = draw.randint(threads, most) if threads else 0
    writes = draw.random() < 0.15  # a device that stores where tables are
    kinds = some_of(draw, HOST_OPERATIONS)
    programs: list[list[str]] = [[] for _ in range(threads)]
    for number in range(operations):
        program = programs[number % threads]
        if writes and draw.random() < 0.6:
            program.append(_device_store(draw, guest))
        else:
            program += _host_operation(draw, guest, backing, vcpus, kinds)
    return [program for program in programs if program]


def _host_operation(
    draw: random.Random, guest: GuestTables, backing: str, vcpus: int, kinds: dict[str, float]
) -> list[str]:
    slot = draw.randrange(2) if guest.large else 0
    if draw.random() < 0.2:
        return [f"dirty_log {slot} on", f"get_dirty_log {slot}"]
    if guest.devices and draw.random() < 0.4:
        return [draw.choice(("set_slot 2 device 8", "delete_slot 2"))]
    if guest.large and draw.random() < 0.3:
        first = draw.choice(guest.large)
        large = {
            f"unmap_range {first} {guest.shape.large_pages}": 3.0,
            "dirty_log 1 on": 2.0,
            "dirty_log 1 off": 2.0,
            "delete_slot 1": 1.0,
            f"set_slot 1 {LARGE_FRAMES + LARGE_SLOT_PAGES} {LARGE_SLOT_PAGES}": 1.0,
        }
        return draw.choices(list(large), list(large.values()))
    small = [*guest.data, *guest.data, *guest.near]
    if backing != "2m":
        small += guest.far
    frame = draw.choice(small)
    if guest.favourite_frame and draw.random() < guest.focus:
        frame = guest.favourite_frame
    operands = {
        "unmap_range": f"{frame} 1",
        "move": f"{frame} {draw.choice(('rw', 'ro'))}",
        "shrink": draw.choice(("1", "4")),
        "zap_all": "",
        "mmu_pages": "64",
        "migrate": f"v{draw.randrange(vcpus)} {draw.randrange(2)}",
        "get_dirty_log": str(slot),
    }
    kind = draw.choices(list(kinds), list(kinds.values()))[0]
    return [f"{kind} {operands.get(kind, frame)}".rstrip()]


def _device_store(draw: random.Random, guest: GuestTables) -> str:
    """A store of a device, or of user space: to an entry that addresses use, or to data."""
    places = [place for place in guest.places(1, guest.shape.levels) if guest.shape.entry == 8]
    if not places or draw.random() < 0.3:
        return f"write {draw.choice(guest.data)}[{draw.randrange(4)}] = {draw.randrange(3)}"
    place = draw.choice(places)
    if draw.random() < 0.4:
        place = draw.choice([upper for upper in places if upper.level == 2] or places)
    old = guest.entries.get((place.table, place.number))
    if old is not None and "l" in old.flags and draw.random() < 0.6:
        return f"write {place.table}[{place.number}] = {draw.choice(guest.large)} {old.flags}"
    return f"write {place.table}[{place.number}] = {draw_entry(draw, guest, place.level)}"
