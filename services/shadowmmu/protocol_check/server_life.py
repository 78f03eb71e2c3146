"""Checks of a service: signs of life, and whether anybody is moved by what somebody else does."""

from __future__ import annotations

import time
from typing import Final

from shadowmmu.protocol import MISSED_LIMIT, TO_MMU, VERSION_FRAME, ErrorCode
from shadowmmu.protocol import messages as m
from shadowmmu.protocol_check.lab import DATA, SMALL_GFN, Lab, gva_of
from shadowmmu.protocol_check.peer import Peer
from shadowmmu.protocol_check.registry import checks, require

__all__: list[str] = []

_SECTION: Final = "Signs of life"
GENEROUS: Final = 2
"""Times as long as the specification says, before a service counts as late."""
ROUNDS: Final = 30


@checks("life.heartbeats", "The service sends heartbeats when it has nothing else to send", _SECTION)
def _heartbeats(lab: Lab) -> None:
    peers = [lab.probe(), lab.host(), lab.vcpu()]
    begin = time.monotonic()
    for peer in peers:
        for _ in range(2):
            body = peer.next("a Heartbeat", heartbeats=True, seconds=GENEROUS * lab.heartbeat + 1).body
            require(isinstance(body, m.Heartbeat), f"{body!r} instead of a Heartbeat")
    took = time.monotonic() - begin
    require(
        took > lab.heartbeat / 2, f"two heartbeats within {took:.2f} s; the interval is {lab.heartbeat:g} s"
    )


@checks("life.silence", "Who is silent is given up; who speaks, or sends heartbeats, is not", _SECTION)
def _silence(lab: Lab) -> None:
    begin = time.monotonic()
    host, quiet, beating = lab.host(), lab.guest(), lab.probe()
    gfn = SMALL_GFN + 60
    quiet.map(gva_of(gfn))
    quiet.answers = False
    quiet.silent = True
    number = quiet.session.vcpu
    garbler = lab.probe()
    garbler.silent = True
    host.silent = True
    # The quiet vCPU is in guest mode, holds the page, and does not answer: until it is given up.
    host.ask(m.Unmap(gfn))
    asked = begin
    silence = MISSED_LIMIT * lab.heartbeat
    ended: m.Ended | None = None
    while ended is None:
        took = time.monotonic() - begin
        require(took < GENEROUS * silence, f"a silent vCPU was not given up for {took:.1f} s")
        garbler.send_frames([VERSION_FRAME, b"\xc1"])  # a refused message is no sign of life
        if time.monotonic() - asked > lab.heartbeat / 2 and host.session.host_credits:
            asked = time.monotonic()
            host.ask(m.TestAge(100))  # any traffic is; whether it is answered is another matter
        host.drain()
        require(host.session.attached, "a host agent that spoke all the time was given up")
        quiet.socket.poll(round(lab.heartbeat * 250))
        quiet.drain()
        lab.look_after(quiet)
        ended = next((e.body for e in quiet.received if isinstance(e.body, m.Ended)), None)
    took = time.monotonic() - begin
    require(ended.code == ErrorCode.GIVEN_UP.value, f"{ended!r} instead of given-up")
    require(
        took > silence / 2,
        f"a vCPU was given up after {took:.1f} s; that is fewer than {MISSED_LIMIT} intervals",
    )
    while host.session.requests:
        host.next("the answer to a request that waited for the silent vCPU")
    _garble_until_given_up(garbler, begin + GENEROUS * silence)
    beating.send(m.Heartbeat())
    again = lab.guest(number)
    again.load(DATA)
    beating.drain()
    require(beating.session.attached, "a probe that sent heartbeats was given up")
    require(host.session.attached, "a host agent that spoke all the time was given up")


def _garble_until_given_up(peer: Peer, until: float) -> None:
    """Ended comes to somebody all of whose messages are refused."""
    while peer.session.attached:
        require(time.monotonic() < until, f"{peer.name} was not given up, and sent nothing but garbage")
        peer.send_frames([VERSION_FRAME, b"\xc1"])
        peer.lab.look_after(peer)
        peer.socket.poll(round(peer.lab.heartbeat * 250))
        peer.drain()
    last = peer.received[-1].body
    ended = next((e.body for e in peer.received if isinstance(e.body, m.Ended)), last)
    require(
        isinstance(ended, m.Ended) and ended.code == ErrorCode.GIVEN_UP.value,
        f"{ended!r} instead of given-up",
    )


@checks("others.unmoved", "Nobody is moved by the garbage of others", "Refused messages")
def _unmoved(lab: Lab) -> None:
    vcpu, host = lab.guest(), lab.host()
    strangers = [lab.stranger() for _ in range(4)]
    attached = lab.probe()
    random = lab.random
    for turn in range(ROUNDS):
        for stranger in strangers:
            stranger.send_frames([VERSION_FRAME, random.randbytes(random.randrange(300))])
            stranger.send_frames([random.randbytes(8), b"\x93\x00\x00\x80"])
            stranger.send_frames([random.randbytes(3)] * random.randrange(1, 9))
            stranger.send_frames([VERSION_FRAME, bytes(TO_MMU.soft_limit + 1)])
            # What would be legal for the vCPU, from somebody else.
            stranger.post(
                m.Exit(vcpu.session.entry, m.ExternalInterruptExit()),
                incarnation=vcpu.session.incarnation,
                number=vcpu.session.send_seq,
            )
        attached.post(m.Enter())
        _hear_refusal(strangers[-1], vcpu)  # by then it has had its effect, if it has one
        vcpu.store(DATA + 8 * turn, turn)
        value = vcpu.load(DATA + 8 * turn)
        require(value == turn, f"{value} instead of {turn}")
        host.request(m.TestAge(100))
        for peer in (*strangers, attached):
            peer.drain()
            accepted = [e.body for e in peer.received if not isinstance(e.body, m.ErrorReply | m.Heartbeat)]
            require(not accepted, f"{peer.name} got {accepted!r} for garbage")
            peer.received.clear()


def _hear_refusal(stranger: Peer, vcpu: Peer) -> None:
    """Hears of what it has said in the name of the vCPU."""
    wanted = (vcpu.session.incarnation, vcpu.session.send_seq)
    while True:
        envelope = stranger.next("a refusal")
        reply = envelope.body
        require(isinstance(reply, m.ErrorReply), f"{stranger.name} got {reply!r} for garbage")
        assert isinstance(reply, m.ErrorReply)
        if (envelope.incarnation, reply.seq) == wanted:
            return


@checks("others.gone", "Who disappears without a word makes room, and holds nobody up", _SECTION)
def _gone(lab: Lab) -> None:
    vcpu, host = lab.guest(), lab.host()
    number = vcpu.session.vcpu
    gfn = SMALL_GFN + 61
    vcpu.map(gva_of(gfn))
    vcpu.answers = False
    vcpu.vanish()
    host.ask(m.Unmap(gfn))
    host.expect(m.HostReply, seconds=GENEROUS * MISSED_LIMIT * lab.heartbeat)
    again = lab.stranger()
    again.attach(m.Role.VCPU, number)
