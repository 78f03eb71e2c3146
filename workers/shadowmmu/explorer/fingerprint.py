"""Recognising a state that a search has been in before.

The state of an execution is that of the machine, the processors, the programs, the checker, and of every host operation
under way. An operation is a generator, whose local state cannot be copied but can be looked at: the chain of its
frames, each with the instruction at which it stands and the values of its local variables. Objects with an identity of
their own (shadow pages, slots, vCPUs) count as such there, since their contents are compared once, with the machine's.

What no behaviour depends on is left out: statistics, serial numbers of operations and guest entries, the text of
events. Two states with the same fingerprint may still differ in where an iterator of a suspended loop stands; loop
variables tell these apart in all loops of the model, and `tests/explorer` compares searches with and without this.

Fingerprints are the same in every process: texts go in by their checksum, never by Python's own hash.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from enum import Enum
from functools import cache
from types import GeneratorType
from typing import TYPE_CHECKING, Any, Final
from zlib import adler32, crc32

import msgspec

from shadowmmu.cpu import Tlb, VcpuCore
from shadowmmu.kvm import Kvm, ShadowPage, Vcpu
from shadowmmu.kvm.host_memory import HostMemory
from shadowmmu.kvm.memslots import KvmMemorySlot
from shadowmmu.kvm.user_memory import UserMemory
from shadowmmu.kvm.vcpu import Mmu
from shadowmmu.machine import Machine, Task
from shadowmmu.machine.lane import VcpuLane

if TYPE_CHECKING:
    from shadowmmu.explorer.world import World

__all__ = ["fingerprint"]

_ATOMS: Final = frozenset({bool, float})
_SMALL_BITS: Final = 60
_SMALL: Final = (1 << _SMALL_BITS) - 1
"""Up to here Python's hashes of two numbers differ; that of an entry with NX is that of another with U."""
_NONE: Final = -0x6E6F6E65


@cache
def _text(text: str) -> int:
    return crc32(text.encode())


_KVM_LEFT_OUT: Final = frozenset(
    {
        "_last_slot", "_last_visible_slot", "_memory_points", "_visible_memslots", "config", "host", "memory",
        "notrap", "page_header", "point_gpte_read", "point_read_guest_memory", "point_spte_update", "profile",
        "spte_format", "stat", "trace", "tracepoints", "vcpus", "work",
    }
)  # fmt: skip
_HOST_LEFT_OUT: Final = frozenset({"_kvm", "_memories", "_bases", "_last"})
_CORE_PARTS: Final = ("_state", "_wait", "_walk_for", "_faulted", "_kicked", "_credits", "_log")


def fingerprint(world: World) -> int:
    """A number that is the same for states in which the same can happen from now on."""
    machine = world.machine
    kvm = machine.kvm
    return hash(
        (
            _fields(kvm, _KVM_LEFT_OUT),
            tuple(_page(sp) for sp in kvm.page_header.values()),
            tuple(_fields(slot, frozenset()) for slot in kvm.memslots),
            tuple(
                (_fields(vcpu, frozenset({"kvm", "mmu"})), _fields(vcpu.mmu, frozenset()))
                for vcpu in kvm.vcpus
            ),
            _fields(kvm.host, _HOST_LEFT_OUT),
            _contents(world),
            _operations(machine),
            tuple(map(_lane, machine.lanes)),
            tuple(map(_core, world.cores)),
            tuple(_freeze(program.key()) for program in world.programs),
            tuple(kick is not None for kick in world.kicks),
            world.host_progress(),
            _freeze(world.turns.key()),
            _freeze(world.checker.fingerprint()),
        )
    )


def _fields(thing: object, left_out: frozenset[str]) -> Hashable:
    return tuple(_freeze(getattr(thing, name)) for name in _slots(type(thing)) if name not in left_out)


_slot_names: dict[type, tuple[str, ...]] = {}


def _slots(kind: type) -> tuple[str, ...]:
    names = _slot_names.get(kind)
    if names is None:
        found = (name for base in kind.__mro__ for name in getattr(base, "__slots__", ()))
        names = _slot_names[kind] = tuple(dict.fromkeys(found))
    return names


def _page(sp: ShadowPage) -> Hashable:
    return _fields(sp, frozenset())


def _contents(world: World) -> Hashable:
    """The guest frames that the scenario names."""
    host = world.machine.host
    out: list[tuple[int, int]] = []
    for memory in host.memories:
        if memory.mapped:
            for frame in world.frames_in_use:
                offset = frame - memory.base_gfn << 12
                if 0 <= offset < len(memory.data):
                    page = memory.data[offset : offset + 4096]
                    out.append((crc32(page), adler32(page)))
        else:
            out.append((0, 0))
    return tuple(out)


def _operations(machine: Machine) -> Hashable:
    tasks = machine.tasks()
    names = {task.number: (task.vcpu, task.ticket) for task in tasks}
    return frozenset(
        (
            task.vcpu,
            task.ticket,
            _text(task.stop.name),
            task.fresh,
            _freeze(task.answer),
            frozenset(vcpu for vcpu, _ in task.kick),
            frozenset(names[reader] for reader in task.readers if reader in names),
            machine.owns_mmu_lock(task),
            _generator(task.operation),
        )
        for task in tasks
    )


def _generator(generator: Any) -> Hashable:
    """The frames of a suspended generator, outermost first."""
    frames = []
    while isinstance(generator, GeneratorType):
        frame = generator.gi_frame
        if frame is None:
            break
        values = tuple((_text(name), _freeze(value)) for name, value in frame.f_locals.items())
        frames.append((_text(frame.f_code.co_qualname), frame.f_lasti, values))
        generator = generator.gi_yieldfrom
    return tuple(frames)


def _lane(lane: VcpuLane) -> Hashable:
    return (
        lane.incarnation != 0,
        lane.halted,
        frozenset(lane.interrupts),
        tuple(_text(type(item).__name__) for item in lane.queue),
        _generator(lane.pending_walk),
    )


def _core(core: VcpuCore) -> Hashable:
    return (*(_freeze(getattr(core, name)) for name in _CORE_PARTS), _freeze(core.tlb))


def _tlb(tlb: Tlb) -> Hashable:
    return tuple(
        (tag, frozenset((page, entry.pfn, entry.flags) for array in arrays for page, entry in array.items()))
        for tag, arrays in tlb.held()
    )


def _same(thing: Any) -> Hashable:
    return _text(type(thing).__name__)


_BY_TYPE: Final[dict[type, Callable[[Any], Hashable]]] = {
    type(None): lambda _: _NONE,
    str: _text,
    bytes: crc32,
    range: lambda r: (r.start, r.stop, r.step),
    ShadowPage: lambda sp: (1, sp.serial),
    Vcpu: lambda vcpu: (2, vcpu.vcpu_id),
    KvmMemorySlot: lambda slot: (3, slot.id, slot.base_gfn, slot.invalid),
    UserMemory: lambda memory: (4, memory.base, memory.mapped),
    Tlb: _tlb,
    Task: lambda task: (5, task.vcpu, task.ticket),
    Kvm: _same,
    Machine: _same,
    Mmu: _same,
    HostMemory: _same,
    VcpuLane: _same,
    memoryview: _same,
    GeneratorType: lambda generator: _text(generator.__qualname__),
    OrderedDict: lambda d: tuple(map(_freeze, d)),
    deque: lambda items: tuple(map(_freeze, items)),
    list: lambda items: tuple(map(_freeze, items)),
    tuple: lambda items: tuple(map(_freeze, items)),
    set: lambda items: frozenset(map(_freeze, items)),
    frozenset: lambda items: frozenset(map(_freeze, items)),
    dict: lambda d: frozenset((_freeze(key), _freeze(value)) for key, value in d.items()),
}


def _freeze(thing: Any) -> Hashable:
    kind = type(thing)
    if kind is int:
        return thing if 0 <= thing <= _SMALL else (thing >> _SMALL_BITS, thing & _SMALL)
    if kind in _ATOMS:
        atom: Hashable = thing
        return atom
    known = _BY_TYPE.get(kind)
    if known is not None:
        return known(thing)
    if isinstance(thing, Enum):
        return _text(thing.name)
    if isinstance(thing, int):
        return (_text(kind.__name__), int(thing))
    if isinstance(thing, msgspec.Struct):
        return (_text(kind.__name__), *(_freeze(getattr(thing, name)) for name in thing.__struct_fields__))
    if isinstance(thing, dict | list | tuple | set):
        return _BY_TYPE[next(base for base in (dict, list, tuple, set) if isinstance(thing, base))](thing)
    names = _slots(kind)
    if names and kind.__module__.startswith("shadowmmu."):
        return (_text(kind.__name__), *(_freeze(getattr(thing, name, None)) for name in names))
    return _text(getattr(thing, "__qualname__", kind.__name__))
