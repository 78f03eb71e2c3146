"""A program whose processor was lost goes on in another one: what is saved of it, and how its trail is followed.

The service keeps the last `SavedState` that took effect and the trail since (`messages.Resumption`): how many
accesses were applied, and what the vCPU was told. `resume` restores a program from the one and walks it along the
other, without a TLB and without executing anything: what the trail has in it has happened. Relies on `execution`.
"""

from __future__ import annotations

from typing import Final

import msgspec

from shadowmmu.cpu.execution import EXECUTED_BY_EXIT, FAULTS, Execution, address_of
from shadowmmu.cpu.program import (
    Halt,
    Invlpg,
    LockedAccess,
    SendIpi,
    Touches,
    UsedLoad,
    WriteRegister,
)
from shadowmmu.protocol.errors import ErrorCode, RemoteProtocolError
from shadowmmu.protocol.messages import Asked, Entered, Loaded, Resumption, TrailStep, WalkFault

__all__ = ["SavedState", "follow", "load_state", "resume", "save_state"]


class SavedState(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A processor's state between two instructions, but for its TLB. It is always saved with the next one fetched.

    `program`: the program's own state; `counts`: the processor's counters, and `logged` accesses.
    """

    instructions: int
    done: bool
    program: bytes
    counts: dict[str, int] = {}
    logged: int = 0


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(SavedState).decode

_ACCESS: Final = (Touches, UsedLoad, LockedAccess)
_INSTRUCTIONS: Final[dict[Asked, tuple[type[object], ...]]] = {
    Asked.WALK: _ACCESS,
    Asked.LOAD: (UsedLoad,),
    Asked.LOCKED: (LockedAccess,),
    Asked.PAGE_FAULT: _ACCESS,
    Asked.EPT_MISCONFIG: _ACCESS,
    Asked.INVLPG: (Invlpg,),
    Asked.REGISTER_WRITE: (WriteRegister,),
    Asked.SEND_IPI: (SendIpi,),
    Asked.HALT: (Halt,),
}
"""Which instructions ask for something; entries and interrupts are asked for between any two."""


def save_state(execution: Execution, counts: dict[str, int], logged: int) -> bytes:
    """The state to be sent with what the processor asks for next: before the instruction that asks."""
    execution.fetch()
    return _encode(
        SavedState(execution.instructions, execution.done, execution.program.state(), counts, logged)
    )


def load_state(data: bytes) -> SavedState:
    """What `save_state` returned. Raises RemoteProtocolError if it is something else."""
    try:
        return _decode(data)
    except (msgspec.MsgspecError, ValueError) as error:
        raise _unfit(f"the state is none of this program's: {error}") from error


def resume(execution: Execution, resumption: Resumption) -> SavedState | None:
    """Brings a fresh execution to where the lost processor's accesses end; the state it began from, if any.

    Raises RemoteProtocolError if state or trail do not fit the program.
    """
    saved = None
    if resumption.state is not None:
        saved = load_state(resumption.state)
        try:
            execution.program.restore(saved.program)
        except (msgspec.MsgspecError, ValueError) as error:
            raise _unfit(f"the state is none of this program's: {error}") from error
        execution.instructions, execution.done = saved.instructions, saved.done
    for step in resumption.trail:
        follow(execution, step)
    _follow_accesses(execution, resumption.accesses)
    return saved


def follow(execution: Execution, step: TrailStep) -> None:
    """One step of a trail. Raises RemoteProtocolError if it does not fit the program."""
    _follow_accesses(execution, step.accesses)
    asked, answer = step.asked, step.answer
    op = execution.fetch()
    kinds = _INSTRUCTIONS.get(asked)
    if kinds is not None and not isinstance(op, kinds):
        raise _unfit(f"{asked.value} is answered, and the program is at {type(op).__name__}", execution)
    match answer:
        case Loaded() if asked in (Asked.LOAD, Asked.LOCKED):
            execution.loaded(answer.value)
        case WalkFault() if asked is Asked.WALK:
            execution.fault_bypassed(answer.error_code, address_of(op))
        case Entered() if asked not in (Asked.LOAD, Asked.LOCKED, Asked.WALK) and (
            answer.inject is None or asked in FAULTS
        ):
            if asked in EXECUTED_BY_EXIT:
                execution.retire(op, 0)
            execution.entered(asked, answer)
        case _:
            raise _unfit(f"{asked.value} is answered by {type(answer).__name__}", execution)


def _follow_accesses(execution: Execution, accesses: int) -> None:
    while accesses:
        op = execution.fetch()
        if not isinstance(op, Touches):
            raise _unfit(f"{accesses} accesses follow, and the program is at {type(op).__name__}", execution)
        count = min(accesses, execution.accesses_left(op))
        execution.advance(op, count)
        accesses -= count


def _unfit(text: str, execution: Execution | None = None) -> RemoteProtocolError:
    where = "" if execution is None else f" after {execution.instructions} instructions"
    return RemoteProtocolError(ErrorCode.MALFORMED, f"the trail does not fit the program{where}: {text}")
