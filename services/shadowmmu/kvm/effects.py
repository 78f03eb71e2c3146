"""What the model of KVM's MMU asks of whoever drives it.

The model does no I/O and knows no time. A host operation (a page fault, an INVLPG, a notifier call) is a generator
that runs until something else may happen and there yields an *effect*; the driver does what the effect says, lets
others run as it likes, and resumes the generator. Drivers are the service's scheduler, the replayer, the search for
races, and the recordings' runner, which lets nothing else happen at all.

| effect | the driver | is resumed with |
| --- | --- | --- |
| `MmuLock.ACQUIRE` | resumes the operation when it owns mmu_lock | ignored |
| `MmuLock.RELEASE` | frees mmu_lock | ignored |
| a `Point` | may run other things, by the point's kind | ignored |
| `HostPageLock.BUSY`, `SlotsLock.BUSY`, `EmulatedStores.BUSY` | resumes it after another one has advanced | ignored |
| `Srcu.SYNCHRONIZE` | resumes the operation when no vCPU's operation is in flight that is so now | ignored |
| `Kick` | interrupts each vCPU named and waits until each has left that guest entry | bool: was anybody kicked |
"""

from __future__ import annotations

import enum
from collections.abc import Generator
from typing import TypeAlias, TypeVar

import msgspec

from shadowmmu.kvm.points import Point

__all__ = ["Effect", "EmulatedStores", "HostPageLock", "Kick", "MmuLock", "Operation", "SlotsLock", "Srcu"]


class MmuLock(enum.Enum):
    """kvm->mmu_lock. Waiting for it is a scheduling point; releasing it is none by itself."""

    ACQUIRE = "acquire"
    RELEASE = "release"


class HostPageLock(enum.Enum):
    """The host's page-table lock: one operation at a time changes a page, and KVM knows of it before the next."""

    BUSY = "busy"  # another operation has the pages; this one looks again when it is resumed


class SlotsLock(enum.Enum):
    """kvm->slots_lock: one operation at a time changes memory slots or reads a dirty log."""

    BUSY = "slots_lock is held"  # by another operation; this one looks again when it is resumed


class EmulatedStores(enum.Enum):
    """Emulated stores that the shadow does not know of yet (`emulated_stores`)."""

    BUSY = "an emulated store is unsettled"  # this one looks again when it is resumed


class Srcu(enum.Enum):
    """kvm->srcu, under which slots are looked up.

    A vCPU holds it for reading from each exit to the next guest entry, so operations of vCPUs are its readers. The
    notifiers are too, but they look at slots under mmu_lock only, which whoever waits takes next.
    """

    SYNCHRONIZE = "synchronize_srcu"  # wait for the readers of this moment; a scheduling point like any wait


class Kick(msgspec.Struct, frozen=True):
    """Interrupt these vCPUs and wait for their answers (make_all_cpus_request, smp_call_function_many with wait).

    The model has set the request bits and moved the vCPUs from IN_GUEST_MODE to EXITING_GUEST_MODE already; `vcpus`
    are those that were not OUTSIDE_GUEST_MODE, in order of number; it may be empty (nothing to wait for).
    """

    vcpus: tuple[int, ...]


Effect: TypeAlias = MmuLock | HostPageLock | SlotsLock | EmulatedStores | Srcu | Point | Kick

T = TypeVar("T")
Operation: TypeAlias = Generator[Effect, bool | None, T]
"""A host operation that returns T in the end."""
