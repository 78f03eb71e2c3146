"""Scenes about guest entries: kicks, and all that an Entered may say. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from shadowmmu.kvm import Kvm
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import AccessFlag
from shadowmmu.protocol_check.client_checks import ClientCheck
from shadowmmu.protocol_check.scene import HELD_SECONDS, Hand, Scene

__all__ = ["Bypass", "Completed", "Injected", "Interrupted", "Kicked", "RefusedRegister"]

SHOOTDOWN_VECTOR: Final = 0xFD
"""An interrupt that the guest's kernel knows (docs/PROTOCOL.md, The guest beside it). Nothing is requested by it."""
DIRECT_MAP: Final = 0xFFFF_8000_0000_0000
SAME_INSTRUCTION: Final = 16
"""An instruction that was completed so often in a row is being executed again, and not an endless loop's."""


class Kicked(Scene):
    """Kicks at all times: right behind Entered, during walks, logs, values; and kicks that come too late."""

    name = "kicked"
    blame = ClientCheck.KICK

    def __init__(self) -> None:
        self._entries = 0
        self._held: m.Walked | m.WalkFault | None = None
        self._held_since = 0.0

    def _kick(self, hand: Hand) -> None:
        hand.send(m.Kick(hand.session.entry))

    def after(self, hand: Hand, body: m.MmuMessage) -> None:
        if isinstance(body, m.Entered):
            self._entries += 1
            if self._entries % 4 == 1 and self._entries < 200:
                self._kick(hand)

    def heard(self, hand: Hand, body: m.VcpuMessage) -> bool:
        turn = self._entries % 4 if self._entries < 200 else -1
        match body:
            case m.Walk() if turn == 2:
                self._kick(hand)
                self._held_since = hand.now
            case m.Log() if turn == 3:
                self._kick(hand)
            case m.Load() | m.Locked() if turn == 0:
                self._kick(hand)
            case m.Exit():
                self._abandoned(hand)
                if self._entries % 3 == 0:
                    hand.exercise(ClientCheck.KICK_STALE)
                    hand.send_crossing(m.Kick(body.entry))
            case _:
                pass
        return False

    def _abandoned(self, hand: Hand) -> None:
        """The walk whose answer is held was abandoned: the answer comes, late and wrong."""
        self._held_since = 0.0
        held, self._held = self._held, None
        if held is None:
            return
        hand.exercise(ClientCheck.KICK_WALK)
        if isinstance(held, m.Walked):
            held = msgspec.structs.replace(held, pfn=held.pfn + 1)
        hand.send(held, late=True)

    def outgoing(self, hand: Hand, body: m.MmuMessage) -> Sequence[m.MmuMessage]:  # noqa: ARG002
        if self._held_since and isinstance(body, m.Walked | m.WalkFault):
            self._held = body
            return ()
        return (body,)

    def tick(self, hand: Hand) -> None:
        if self._held is not None and hand.now - self._held_since > HELD_SECONDS:
            # It waits for the answer first, which is its right.
            held, self._held, self._held_since = self._held, None, 0.0
            hand.exercise(ClientCheck.KICK_WALK)
            hand.send(held)


class Interrupted(Scene):
    """Interrupts come with entries."""

    name = "interrupted"
    blame = ClientCheck.INTERRUPT

    def __init__(self) -> None:
        self._entries = 0

    def outgoing(self, hand: Hand, body: m.MmuMessage) -> Sequence[m.MmuMessage]:
        if isinstance(body, m.Entered):
            self._entries += 1
            if self._entries % 2 == 0 and self._entries < 40:
                hand.exercise(ClientCheck.INTERRUPT)
                vectors = sorted({*body.interrupts, SHOOTDOWN_VECTOR})
                return (msgspec.structs.replace(body, interrupts=vectors),)
        return (body,)


class Injected(Scene):
    """Some page faults are the guest's own."""

    name = "injected"
    blame = ClientCheck.INJECT

    def __init__(self) -> None:
        self._faults = 0
        self._inject: m.InjectedFault | None = None

    def heard(self, hand: Hand, body: m.VcpuMessage) -> bool:
        match body:
            case m.Exit(entry, m.PageFaultExit(gva, error_code, _)):
                self._faults += 1
                if self._faults % 3 == 1 and self._faults < 40:
                    self._inject = m.InjectedFault(error_code & ~8, gva)
                    hand.submit(m.Exit(entry, m.ExternalInterruptExit()))
                    return True
            case _:
                pass
        return False

    def outgoing(self, hand: Hand, body: m.MmuMessage) -> Sequence[m.MmuMessage]:
        inject = self._inject
        if inject is None or not isinstance(body, m.Entered):
            return (body,)
        self._inject = None
        hand.exercise(ClientCheck.INJECT)
        return (msgspec.structs.replace(body, inject=inject),)


class Completed(Scene):
    """Page faults in the last quarter of memory, which holds data only, are emulated."""

    name = "completed"
    blame = ClientCheck.COMPLETED

    def __init__(self) -> None:
        self._completed: m.Completed | None = None
        self._last: tuple[int, m.Instruction] | None = None
        self._times = 0

    def heard(self, hand: Hand, body: m.VcpuMessage) -> bool:
        match body:
            case m.Exit(entry, m.PageFaultExit(gva, _, instruction)):
                first = self.config.memory_pages * 3 // 4 << 12
                gpa = gva - DIRECT_MAP
                if not first <= gpa < self.config.memory_pages << 12 or self._times > SAME_INSTRUCTION:
                    return False
                self._times = self._times + 1 if self._last == (gva, instruction) else 1
                self._last = gva, instruction
                if self._times > SAME_INSTRUCTION:
                    hand.fail(
                        ClientCheck.COMPLETED,
                        f"the instruction at {gva:#x} was completed {self._times - 1} times in a row, and comes again",
                    )
                    return False
                self._completed = m.Completed(_emulate(hand.kvm, gpa, instruction))
                hand.submit(m.Exit(entry, m.ExternalInterruptExit()))
                return True
            case _:
                return False

    def outgoing(self, hand: Hand, body: m.MmuMessage) -> Sequence[m.MmuMessage]:
        completed = self._completed
        if completed is None or not isinstance(body, m.Entered):
            return (body,)
        self._completed = None
        hand.exercise(ClientCheck.COMPLETED)
        return (msgspec.structs.replace(body, completed=completed),)


def _emulate(kvm: Kvm, gpa: int, instruction: m.Instruction) -> int:
    """Executes an instruction on guest memory. What it loaded, or the old value; 0 for a store."""
    size, value = instruction.size, instruction.value
    if instruction.op is None and instruction.flags & AccessFlag.WRITE:
        kvm.memory.write(gpa, size, value)
        return 0
    old = kvm.memory.read(gpa, size)
    match instruction.op:
        case m.LockedOp.XCHG:
            kvm.memory.write(gpa, size, value)
        case m.LockedOp.XADD:
            kvm.memory.write(gpa, size, (old + value) & ((1 << 8 * size) - 1))
        case m.LockedOp.CMPXCHG if old == instruction.expected:
            kvm.memory.write(gpa, size, value)
        case _:
            pass
    return old


class RefusedRegister(Scene):
    """The first register write gets #GP."""

    name = "refused register"
    blame = ClientCheck.GENERAL_PROTECTION

    def __init__(self) -> None:
        self._writes = 0
        self._refuse = False

    def heard(self, hand: Hand, body: m.VcpuMessage) -> bool:
        match body:
            case m.Exit(entry, m.RegisterWriteExit()):
                self._writes += 1
                if self._writes == 1:
                    self._refuse = True
                    hand.submit(m.Exit(entry, m.ExternalInterruptExit()))
                    return True
            case _:
                pass
        return False

    def outgoing(self, hand: Hand, body: m.MmuMessage) -> Sequence[m.MmuMessage]:
        if not self._refuse or not isinstance(body, m.Entered):
            return (body,)
        self._refuse = False
        hand.exercise(ClientCheck.GENERAL_PROTECTION)
        return (msgspec.structs.replace(body, general_protection=True),)


class Bypass(Scene):
    """Only faults on present entries exit; now and then one comes that does not."""

    name = "faults without an exit"
    blame = ClientCheck.BYPASS
    config = msgspec.structs.replace(Scene.config, profile="pre-patch", bypass_guest_pf=True)

    def __init__(self) -> None:
        self._walks = 0

    def heard(self, hand: Hand, body: m.VcpuMessage) -> bool:
        if not isinstance(body, m.Walk):
            return False
        self._walks += 1
        if self._walks % 3 != 1 or self._walks > 40:
            return False
        flags = AccessFlag(body.flags)
        error_code = 2 * (AccessFlag.WRITE in flags) | 4 * (AccessFlag.USER in flags)
        hand.send(m.WalkFault(body.entry, body.walk, error_code | 16 * (AccessFlag.FETCH in flags)))
        return True
