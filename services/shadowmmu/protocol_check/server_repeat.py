"""Checks of a service: what comes twice within a connection is answered again, and does not happen twice."""

from __future__ import annotations

from typing import Final

from shadowmmu.protocol import Envelope, ErrorCode
from shadowmmu.protocol import messages as m
from shadowmmu.protocol_check.lab import DATA, LOCKED, SMALL_GFN, WRITE, Lab, gva_of
from shadowmmu.protocol_check.peer import Peer
from shadowmmu.protocol_check.registry import checks, require

__all__: list[str] = []

_SECTION: Final = "Exactly once"
NO_SLOT: Final = 31
"""A memory slot that no service has."""


def _say_twice(peer: Peer, body: m.VcpuMessage, answer: type[m.Message]) -> m.Message:
    """Says it, hears the answer, says it again, and hears the answer again. Returns the answer."""
    sent = peer.send(body)
    while not isinstance((envelope := peer.next(answer.__name__)).body, answer):
        require(isinstance(envelope.body, m.Kick), f"{envelope.body!r} instead of {answer.__name__}")
    _repeat(peer, sent)
    peer.take_again(envelope)
    return envelope.body


def _repeat(peer: Peer, sent: Envelope) -> None:
    peer.post(sent.body, number=sent.seq)


@checks("numbers.zero", "A number of 0 is refused within a session", "Incarnations and numbers")
def _zero(lab: Lab) -> None:
    vcpu = lab.guest()
    for body in (m.Heartbeat(), m.Exit(vcpu.session.entry, m.ExternalInterruptExit())):
        vcpu.post(body, number=0)
        vcpu.refused(ErrorCode.BAD_ARGUMENT, number=0)
    vcpu.load(DATA)


@checks("repeat.value", "A locked operation that comes twice is executed once, and answered twice", _SECTION)
def _value(lab: Lab) -> None:
    vcpu = lab.guest()
    vcpu.store(DATA, 0)
    flags, gva, pfn, size, _ = vcpu.access(DATA, LOCKED)
    for turn in range(3):
        xadd = m.Locked(vcpu.session.entry, (flags, gva, pfn, size, 1), m.LockedOp.XADD)
        _say_twice(vcpu, xadd, m.Loaded)
        value = vcpu.load(DATA)
        require(value == turn + 1, f"an XADD that was sent twice was executed {value - turn} times")


@checks("repeat.exit", "An Exit that comes twice ends one entry", _SECTION)
def _exit(lab: Lab) -> None:
    vcpu = lab.vcpu()
    _say_twice(vcpu, m.Enter(), m.Entered)
    for _ in range(3):
        before = vcpu.session.entry
        _say_twice(vcpu, m.Exit(before, m.InvlpgExit(DATA)), m.Entered)
        lab.barrier()
        vcpu.drain()
        require(vcpu.session.entry == before + 1, f"entry {vcpu.session.entry} follows entry {before}")
        vcpu.load(DATA)


@checks("repeat.walk", "A Walk that comes twice is one walk", _SECTION)
def _walk(lab: Lab) -> None:
    vcpu = lab.guest()
    vcpu.map(DATA)
    for _ in range(3):
        _say_twice(vcpu, m.Walk(vcpu.session.entry, vcpu.session.walk + 1, DATA, 0), m.Walked)
    vcpu.load(DATA)


@checks("repeat.log", "A Log that comes twice is applied once, and gives one credit back", _SECTION)
def _log(lab: Lab) -> None:
    vcpu = lab.guest()
    for value in (1, 2, 3):
        access = vcpu.access(DATA, WRITE, value)
        sent = vcpu.send(m.Log(vcpu.session.entry, [access]))
        vcpu.store(DATA, value + 100)
        vcpu.all_applied()
        _repeat(vcpu, sent)
        found = vcpu.load(DATA)
        require(found == value + 100, f"a log that came twice stored {found} over what was stored after it")
    vcpu.all_applied()


@checks("repeat.host", "A host request that comes twice is carried out once, and answered twice", _SECTION)
def _host(lab: Lab) -> None:
    vcpu, host = lab.guest(), lab.host()
    host.request(m.SetDirtyLog(0, enable=True))
    try:
        gva = gva_of(SMALL_GFN + 40)
        vcpu.store(gva, 1)
        vcpu.all_applied()
        number = host.session.request + 1
        # Asked a second time for real, the log would be empty: reading it clears it.
        reply = _say_twice(host, m.HostRequest(number, m.GetDirtyLog(0)), m.HostReply)
        assert isinstance(reply, m.HostReply)
        require(SMALL_GFN + 40 in reply.gfns, "a page that was stored to is not in the dirty log")
        refused = m.HostRequest(number + 1, m.GetDirtyLog(NO_SLOT))
        _say_twice(host, refused, m.ErrorReply)
    finally:
        host.request(m.SetDirtyLog(0, enable=False))


@checks("repeat.pending", "What is not answered yet is not answered twice, nor refused", _SECTION)
def _pending(lab: Lab) -> None:
    vcpu = lab.guest()
    sent = vcpu.send(m.Exit(vcpu.session.entry, m.HaltExit()))  # nobody sends it an interrupt
    for _ in range(3):
        _repeat(vcpu, sent)
    lab.barrier()
    vcpu.drain()
    said = [envelope.body for envelope in vcpu.received if not isinstance(envelope.body, m.Heartbeat)]
    require(not said and not vcpu.again, f"{said!r} to an Exit that came again while it was handled")


@checks("repeat.contents", "Under a number that was taken nothing is looked at", _SECTION)
def _contents(lab: Lab) -> None:
    vcpu = lab.guest()
    vcpu.load(DATA)
    session = vcpu.session
    for number in (1, session.send_seq // 2, session.send_seq - 1):
        vcpu.post(m.Exit(session.entry + 7, m.ExternalInterruptExit()), number=number)
        vcpu.post(m.Load(session.entry, (8, DATA, 1 << 39, 8, 0)), number=number)
        vcpu.post(m.Detach(), number=number)
    vcpu.load(DATA)
    refusals = [e.body for e in vcpu.received if isinstance(e.body, m.ErrorReply)]
    require(not refusals, f"{refusals!r} for something under a number that was taken before")
