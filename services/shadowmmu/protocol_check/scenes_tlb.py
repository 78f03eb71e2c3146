"""Scenes about translations: what the client may hold, and has to drop. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from shadowmmu.kvm import HostMemory
from shadowmmu.protocol import messages as m
from shadowmmu.protocol_check.client_checks import ClientCheck
from shadowmmu.protocol_check.scene import Hand, Scene

__all__ = ["Moved", "NewProcessors", "NoVpid", "PreciseInvlpg"]

LAST_PROCESSOR: Final = 255


class Moved(Scene):
    """The host takes away, and moves, the pages that the client has translations for; and moves the client."""

    name = "moved pages"
    blame = ClientCheck.FLUSH

    def __init__(self) -> None:
        self._walks = 0

    def after(self, hand: Hand, body: m.MmuMessage) -> None:
        if not isinstance(body, m.Walked):
            return
        self._walks += 1
        if self._walks % 2 or self._walks > 400:
            return
        turn = self._walks // 2
        if turn % 9 == 4:
            hand.host(m.ZapAll())
        elif turn % 5 == 2:
            hand.host(m.Migrate(0, turn // 5 % 2))
        else:
            _move_away(hand, body.pfn, turn)


def _move_away(hand: Hand, pfn: int, turn: int) -> None:
    host: HostMemory = hand.kvm.host
    gfn = host.gfn_of(pfn)
    if gfn is None:
        return
    slot = hand.kvm.gfn_to_memslot(gfn)
    if slot is not None and slot.backing.level > 1:
        hand.host(m.UnmapRange(gfn & ~511, 512))
        return
    operations = (m.Move(gfn, writable=True), m.Reclaim(gfn), m.Unmap(gfn))
    hand.host(operations[turn % len(operations)])


class PreciseInvlpg(Scene):
    """INVLPG is all that it is: the next Entered does not empty the TLB besides."""

    name = "precise INVLPG"
    blame = ClientCheck.INVLPG

    def __init__(self) -> None:
        self._invlpg = False

    def heard(self, hand: Hand, body: m.VcpuMessage) -> bool:  # noqa: ARG002
        if isinstance(body, m.Exit):
            self._invlpg = isinstance(body.reason, m.InvlpgExit)
        return False

    def outgoing(self, hand: Hand, body: m.MmuMessage) -> Sequence[m.MmuMessage]:  # noqa: ARG002
        if self._invlpg and isinstance(body, m.Entered):
            return (msgspec.structs.replace(body, flush=False),)
        return (body,)


class NewProcessors(Scene):
    """Now and then the vCPU moves to a processor on which it never was: the TLB there is empty without being told."""

    name = "new processors"
    blame = ClientCheck.PROCESSOR

    def __init__(self) -> None:
        self._said = 0
        self._processor = 0
        self._move = False

    def heard(self, hand: Hand, body: m.VcpuMessage) -> bool:
        """In the middle of accesses that hit the TLB."""
        if isinstance(body, m.Log):
            self._said += 1
            if self._said % 3 == 2 and self._processor < LAST_PROCESSOR:
                self._move = True
                hand.send(m.Kick(hand.session.entry))
        return False

    def outgoing(self, hand: Hand, body: m.MmuMessage) -> Sequence[m.MmuMessage]:  # noqa: ARG002
        if not isinstance(body, m.Entered):
            return (body,)
        flush = body.flush
        if self._move:
            self._move = flush = False
            self._processor += 1
        return (msgspec.structs.replace(body, processor=self._processor, flush=flush),)


class NoVpid(Moved):
    """The TLB survives no entry."""

    name = "no VPID"
    blame = ClientCheck.NO_VPID
    config = msgspec.structs.replace(Scene.config, vpid=False)

    def after(self, hand: Hand, body: m.MmuMessage) -> None:
        if isinstance(body, m.Walked):
            self._walks += 1
            if self._walks % 3 == 0:
                hand.send(m.Kick(hand.session.entry))
