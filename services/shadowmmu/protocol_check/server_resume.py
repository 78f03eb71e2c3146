"""Checks of a service: an incarnation survives its connection. Connections are lost with messages on their way.

What was lost on its way to the service is known for sure if it was never sent, and what was lost on its way back if
the service had time to answer (`Lab.barrier`): both are tried with everything that a peer asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import zmq

from shadowmmu.protocol import FROM_MMU, Envelope, ErrorCode
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.continuity import KEPT
from shadowmmu.protocol_check.lab import DATA, LOCKED, SMALL_GFN, WRITE, Host, Lab, Vcpu, gva_of
from shadowmmu.protocol_check.peer import Peer
from shadowmmu.protocol_check.registry import checks, require

__all__: list[str] = []

_SECTION: Final = "Resuming on a new connection"
NO_SLOT: Final = 31
"""A memory slot that no service has."""

Loss = Callable[[Lab, Peer, m.VcpuMessage], m.Resumed]


def _lost_on_its_way(_lab: Lab, peer: Peer, body: m.VcpuMessage) -> m.Resumed:
    """The service never gets it."""
    before = peer.session.continuity.sent
    peer.lose(body)
    resumed = peer.resume()
    require(
        resumed.received == before,
        f"{peer.name}: the service says that it has {resumed.received} messages of {before}",
    )
    return resumed


def _answer_lost(lab: Lab, peer: Peer, body: m.VcpuMessage) -> m.Resumed:
    """The service gets it, and its answer is lost: unread, in the socket that is closed."""
    peer.send(body)
    peer.socket.poll(round(lab.patience * 1000))
    lab.barrier()
    resumed = peer.resume()
    sent = peer.session.continuity.sent
    require(
        resumed.received == sent,
        f"{peer.name}: the service says that it has {resumed.received} messages of {sent}",
    )
    return resumed


LOSSES: Final[tuple[Loss, ...]] = (_lost_on_its_way, _answer_lost)


def _ask_to_resume(peer: Peer, token: bytes, received: int, incarnation: int | None = None) -> None:
    """Asks over another connection; the session hears nothing of it."""
    peer.post(m.Resume(token, received), number=0, incarnation=incarnation)


# --- nothing is lost ---------------------------------------------------------------------------------------------


@checks("resume.idle", "An incarnation goes on over a new connection, where it was", _SECTION)
def _idle(lab: Lab) -> None:
    vcpu, host, outside = lab.guest(resumable=True), lab.host(resumable=True), None
    if lab.vcpus > 1:
        outside = lab.vcpu(resumable=True)
    for turn in range(3):
        vcpu.store(DATA, turn)
        vcpu.all_applied()
        entry = vcpu.session.entry
        resumed = vcpu.resume()
        sent = vcpu.session.continuity.sent
        require(resumed.received == sent, f"{resumed!r}; {sent} messages that count were taken in")
        value = vcpu.load(DATA)
        require(value == turn, f"{value} after a new connection, instead of {turn}")
        require(vcpu.session.entry == entry, "a new connection is no new guest entry")
        host.resume()
        host.request(m.TestAge(100))
        if outside is not None:
            outside.resume()
    if outside is not None:
        outside.enter()
        outside.load(DATA)


@checks("resume.value", "A locked operation is executed once, however often its connection is lost", _SECTION)
def _value(lab: Lab) -> None:
    vcpu = lab.guest(resumable=True)
    vcpu.store(DATA, 0)
    flags, gva, pfn, size, _ = vcpu.access(DATA, LOCKED)
    count = 0
    for lose in LOSSES * 2:
        xadd = m.Locked(vcpu.session.entry, (flags, gva, pfn, size, 1), m.LockedOp.XADD)
        lose(lab, vcpu, xadd)
        vcpu.resume()  # and once more, whether or not the answer has come
        old = vcpu.expect(m.Loaded).value
        require(old == count, f"an XADD gave {old} instead of {count}")
        count += 1
    value = vcpu.load(DATA)
    require(value == count, f"{count} XADDs made {value} of 0")


@checks("resume.walk", "A connection may be lost in the middle of a walk", _SECTION)
def _walk(lab: Lab) -> None:
    vcpu = lab.guest(resumable=True)
    vcpu.map(DATA)
    for lose in LOSSES:
        lose(lab, vcpu, m.Walk(vcpu.session.entry, vcpu.session.walk + 1, DATA, 0))
        vcpu.expect(m.Walked)
    # An abandoned walk counts, and so does its answer, if there is one.
    vcpu.lose(m.Walk(vcpu.session.entry, vcpu.session.walk + 1, DATA, 0))
    _lost_exit(lab, vcpu, m.ExternalInterruptExit())
    vcpu.load(DATA)


def _lost_exit(_lab: Lab, vcpu: Vcpu, reason: m.ExitReason) -> None:
    vcpu.lose(m.Exit(vcpu.session.entry, reason))
    vcpu.resume()
    vcpu.expect(m.Entered)


@checks("resume.exit", "A connection may be lost in the middle of an exit, or of the first entry", _SECTION)
def _exit(lab: Lab) -> None:
    for lose in LOSSES:
        vcpu = lab.vcpu(resumable=True)
        lose(lab, vcpu, m.Enter())
        require(vcpu.expect(m.Entered).entry == 1, "the first entry is number 1")
        for number in (2, 3):
            lose(lab, vcpu, m.Exit(vcpu.session.entry, m.InvlpgExit(DATA)))
            entry = vcpu.expect(m.Entered).entry
            require(entry == number, f"entry {entry} instead of {number}")
        vcpu.load(DATA)
        lab.dismiss(vcpu)


@checks("resume.logs", "Logs are applied once and in order, and every credit comes back", _SECTION)
def _logs(lab: Lab) -> None:
    vcpu = lab.guest(resumable=True)
    for turn in range(4):
        flags, gva, pfn, size, _ = vcpu.access(DATA, WRITE)
        for value in range(m.LOG_CREDITS):
            log = m.Log(vcpu.session.entry, [(flags, gva, pfn, size, 10 * turn + value)])
            if value < turn:
                vcpu.send(log)
            else:
                vcpu.lose(log)
        lab.barrier()
        vcpu.resume()
        vcpu.all_applied()
        value = vcpu.load(DATA)
        wanted = 10 * turn + m.LOG_CREDITS - 1
        require(value == wanted, f"{value} after logs of which the last stores {wanted}")


@checks("resume.kick", "A kick that was lost with its connection comes again", _SECTION)
def _kick(lab: Lab) -> None:
    vcpu, host = lab.guest(resumable=True), lab.host()
    gfn = SMALL_GFN + 41
    vcpu.map(gva_of(gfn))
    vcpu.answers = False
    entry = vcpu.session.entry
    asked = host.ask(m.Unmap(gfn))
    lab.barrier()
    vcpu.resume()
    kick = vcpu.next("the kick").body
    require(isinstance(kick, m.Kick) and kick.entry == entry, f"{kick!r} instead of a kick of entry {entry}")
    require(host.session.requests, "the page was unmapped before the vCPU had answered")
    _lost_exit(lab, vcpu, m.ExternalInterruptExit())
    reply = host.expect(m.HostReply)
    require(reply.request == asked, f"{reply!r} answers request {asked}")
    vcpu.load(DATA)


@checks("resume.host", "A host request is carried out and answered once over connections", "A host agent")
def _host(lab: Lab) -> None:
    host = lab.host(resumable=True)
    for lose in LOSSES * 2:
        number = host.session.request + 1
        lose(lab, host, m.HostRequest(number, m.TestAge(100)))
        require(host.expect(m.HostReply).request == number, f"no answer to request {number}")
    _several(lab, host)
    number = host.session.request + 1
    host.send(m.HostRequest(number, m.GetDirtyLog(NO_SLOT)))
    lab.barrier()
    host.resume()
    error = host.expect(m.ErrorReply)
    require(
        error.request == number and error.code == ErrorCode.BAD_ARGUMENT.value,
        f"{error!r} to request {number}, which is not possible",
    )


def _several(lab: Lab, host: Host) -> None:
    """Some of many are answered, some are taken, some lost."""
    first = host.session.request + 1
    for number in range(first, first + 12):
        request = m.HostRequest(number, m.TestAge(100))
        if number < first + 8:
            host.send(request)
        else:
            host.lose(request)
    lab.barrier()
    host.resume()
    answered = {host.expect(m.HostReply).request for _ in range(12)}
    require(answered == set(range(first, first + 12)), f"{sorted(answered)} were answered, from {first} on")


@checks("resume.detach", "A Detach that was lost is taken when it comes again", _SECTION)
def _detach(lab: Lab) -> None:
    for peer in (lab.vcpu(resumable=True), lab.host(resumable=True)):
        peer.lose(m.Detach())
        peer.resume()
        # `lacking` of the session has sent Detach again.
        peer.ended(ErrorCode.DETACHED)


@checks("resume.kept", "So many messages as are to be kept are said again, and in order", _SECTION)
def _kept(lab: Lab) -> None:
    host = lab.host(resumable=True)
    for _ in range(KEPT + 6):
        host.request(m.TestAge(100))
    _ask_too_much(lab, host)
    wanted = [heard.envelope.body for heard in host.heard if isinstance(heard.envelope.body, m.HostReply)]
    received = host.session.continuity.received
    host.cut().close(linger=0)
    _ask_to_resume(host, host.session.token, received - KEPT)
    said = _read(host, 1 + KEPT)
    numbers = [envelope.seq for envelope in said]
    require(numbers == list(range(1, KEPT + 2)), f"what is said again has numbers {numbers}")
    require(isinstance(said[0].body, m.Resumed), f"{said[0]!r} instead of Resumed")
    require(
        [envelope.body for envelope in said[1:]] == wanted[-KEPT:],
        f"what was said again is not what {KEPT} messages were",
    )
    host.vanish()  # the session does not know what was said again


def _ask_too_much(lab: Lab, host: Host) -> None:
    """One more than is kept is too much, and changes nothing."""
    stranger = lab.stranger()
    received = host.session.continuity.received
    for count in (0, received - KEPT - 1):
        _ask_to_resume(stranger, host.session.token, count, host.session.incarnation)
        stranger.refused(ErrorCode.NOT_RESUMABLE, number=0, incarnation=host.session.incarnation)
    host.request(m.TestAge(100))


def _read(peer: Peer, count: int) -> list[Envelope]:
    """So many messages, heartbeats left out, past the session."""
    found: list[Envelope] = []
    while len(found) < count:
        require(
            peer.socket.poll(round(peer.lab.patience * 1000)),
            f"{peer.name}: {len(found)} messages on the new connection instead of {count}",
        )
        envelope = FROM_MMU.decode(peer.socket.recv_multipart(zmq.DONTWAIT))
        if not isinstance(envelope.body, m.Heartbeat):
            found.append(envelope)
    return found


# --- what is refused ---------------------------------------------------------------------------------------------


@checks("resume.token", "Without its token no incarnation is resumed, and it does not notice", _SECTION)
def _token(lab: Lab) -> None:
    vcpu, host = lab.guest(resumable=True), lab.host(resumable=True)
    token = vcpu.session.token
    require(token, "who asked for it got no token")
    require(token != host.session.token, "two incarnations have the same token")
    stranger = lab.stranger()
    incarnation = vcpu.session.incarnation
    received = vcpu.session.continuity.received
    for wrong in (b"", token[:-1], token + b"\0", token[::-1] + b"x", host.session.token):
        _ask_to_resume(stranger, wrong, received, incarnation)
        stranger.refused(ErrorCode.NOT_RESUMABLE, number=0, incarnation=incarnation)
    vcpu.load(DATA)
    vcpu.resume()
    vcpu.load(DATA)


@checks("resume.counts", "A count that cannot be is refused, and changes nothing", _SECTION)
def _counts(lab: Lab) -> None:
    vcpu, stranger = lab.guest(resumable=True), lab.stranger()
    vcpu.load(DATA)
    received = vcpu.session.continuity.received
    incarnation = vcpu.session.incarnation
    for wrong in (received + 1, received + KEPT, 1 << 63, (1 << 64) - 1):
        _ask_to_resume(stranger, vcpu.session.token, wrong, incarnation)
        stranger.refused(ErrorCode.NOT_RESUMABLE, number=0, incarnation=incarnation)
    vcpu.load(DATA)


@checks("resume.unasked", "Who did not say that it can resume gets no token, and none is taken", "Versions")
def _unasked(lab: Lab) -> None:
    for peer in (lab.vcpu(), lab.host(), lab.probe()):
        require(not peer.session.token, f"{peer.name} got a token, and did not say that it can resume")
        stranger = lab.stranger()
        incarnation = peer.session.incarnation
        _ask_to_resume(stranger, b"", 0, incarnation)
        stranger.refused(ErrorCode.NOT_RESUMABLE, number=0, incarnation=incarnation)
        lab.dismiss(peer)


@checks("resume.stale", "An incarnation that is over, or never was, is not resumed", _SECTION)
def _stale(lab: Lab) -> None:
    host = lab.host(resumable=True)
    token, incarnation = host.session.token, host.session.incarnation
    host.detach()
    stranger = lab.stranger()
    for number in (incarnation, incarnation + (1 << 40), 0):
        _ask_to_resume(stranger, token, 0, number)
        stranger.refused(ErrorCode.STALE_INCARNATION, number=0, incarnation=number)
    stranger.attach(m.Role.PROBE)


@checks("resume.number", "Resume has number 0", _SECTION)
def _number(lab: Lab) -> None:
    vcpu, stranger = lab.guest(resumable=True), lab.stranger()
    session = vcpu.session
    for number in (1, session.send_seq, 1 << 40):
        stranger.post(
            m.Resume(session.token, session.continuity.received),
            incarnation=session.incarnation,
            number=number,
        )
        stranger.refused(ErrorCode.BAD_ARGUMENT, number=number, incarnation=session.incarnation)
    vcpu.load(DATA)


@checks("resume.old", "What still comes over the old connection is refused", _SECTION)
def _old(lab: Lab) -> None:
    vcpu = lab.guest(resumable=True)
    vcpu.load(DATA)
    session = vcpu.session
    old = lab.stranger()
    old.socket.close(linger=0)
    old.socket = vcpu.cut()
    old.session.token = session.token
    vcpu.send(m.Resume(session.token, session.continuity.received))
    while session.resuming:
        lab.look_after(vcpu)
        require(vcpu.socket.poll(round(lab.patience * 1000)), f"{vcpu.name}: Resumed did not come")
        vcpu.drain()
    old.post(m.Exit(session.entry, m.HaltExit()), incarnation=session.incarnation, number=1)
    old.refused(ErrorCode.NOT_ATTACHED, number=1, incarnation=session.incarnation)
    vcpu.load(DATA)


@checks("resume.twice", "A Resume that comes twice over the same connection is one", _SECTION)
def _twice(lab: Lab) -> None:
    vcpu = lab.guest(resumable=True)
    for turn in range(3):
        vcpu.resume()
        vcpu.post(m.Resume(vcpu.session.token, vcpu.session.continuity.received), number=0)
        vcpu.store(DATA, turn)
        vcpu.post(m.Resume(vcpu.session.token, vcpu.session.continuity.received), number=0)
        value = vcpu.load(DATA)
        require(value == turn, f"{value} instead of {turn}")
