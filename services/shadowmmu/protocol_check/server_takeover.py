"""Checks of a service: the place of a vCPU is taken over, and its program goes on; intervals; who knows 1.0 only."""

from __future__ import annotations

from typing import Final

from shadowmmu.protocol import ErrorCode
from shadowmmu.protocol import messages as m
from shadowmmu.protocol_check.lab import DATA, LOCKED, USED, WRITE, Lab, Vcpu
from shadowmmu.protocol_check.registry import checks, require

__all__: list[str] = []

_SECTION: Final = "A program that goes on"
SHORTEST: Final = 0.1
LONGEST: Final = 30.0
"""Intervals that a service has to grant, in seconds."""
NO_SLOT: Final = 31


def _take_over(lab: Lab, vcpu: Vcpu) -> Vcpu:
    """Somebody else is this vCPU from now on, in guest mode."""
    number = vcpu.session.vcpu
    after = lab.newcomer()
    attached = after.attach(m.Role.VCPU, number, resumable=True, token=vcpu.session.token)
    require(attached.vcpu == number, f"asked to be vCPU {number}, became {attached.vcpu}")
    require(attached.incarnation > vcpu.session.incarnation, "the new incarnation is no new one")
    require(attached.token not in (b"", vcpu.session.token), "the new incarnation has no token of its own")
    return after


@checks("takeover.replaced", "Who attaches with the token of a vCPU that is attached replaces it", _SECTION)
def _replaced(lab: Lab) -> None:
    vcpu = lab.guest(resumable=True)
    after = _take_over(lab, vcpu)
    vcpu.ended(ErrorCode.REPLACED)
    entered = after.enter()
    require(entered.entry == 1, f"the first entry of an incarnation is 1, not {entered.entry}")
    after.load(DATA)
    after.resume()
    after.load(DATA)


@checks("takeover.token", "A place is not taken over with a wrong token, or an earlier one", _SECTION)
def _token(lab: Lab) -> None:
    vcpu = lab.guest(resumable=True)
    number, first = vcpu.session.vcpu, vcpu.session.token
    vcpu = _take_over(lab, vcpu)
    vcpu.enter()
    thief = lab.newcomer()
    token = vcpu.session.token
    for wrong in (first, token[:-1], token + b"\0", b"x" * len(token)):
        thief.send(m.Attach(m.Role.VCPU, thief.name, number, resumable=True, token=wrong))
        thief.refused(ErrorCode.NOT_RESUMABLE, number=0, incarnation=0)
    vcpu.load(DATA)
    require(vcpu.session.attached, "a wrong token ended somebody else's session")


@checks("takeover.place", "The token of a vCPU that has left, or was lost, still is its program's", _SECTION)
def _place(lab: Lab) -> None:
    vcpu = lab.guest(resumable=True)
    vcpu.exit(m.InvlpgExit(DATA))
    vcpu.detach()
    after = _take_over(lab, vcpu)
    resume = after.enter().resume
    require(resume is not None, "the first Entered says nothing of the program that goes on")
    assert resume is not None
    asked = [step.asked for step in resume.trail]
    require(m.Asked.INVLPG in asked, f"the trail has {asked}, and not the INVLPG")


@checks("takeover.trail", "The first Entered has the program's state, and what it was told since", _SECTION)
def _trail(lab: Lab) -> None:
    vcpu = lab.guest(resumable=True)
    session = vcpu.session
    vcpu.store(DATA, 5)
    stored = vcpu.access(DATA, WRITE, 7)
    flags, gva, pfn, size, _ = vcpu.access(DATA, LOCKED)
    vcpu.send(m.Exit(session.entry, m.InvlpgExit(DATA + 0x1000), state=b"not the last"))
    vcpu.expect(m.Entered)
    vcpu.send(m.Exit(session.entry, m.InvlpgExit(DATA + 0x1000), state=b"a state"))
    entered = vcpu.expect(m.Entered)
    vcpu.log(stored, stored)
    vcpu.send(m.Locked(session.entry, (flags, gva, pfn, size, 1), m.LockedOp.XADD))
    old = vcpu.expect(m.Loaded)
    vcpu.log(stored)
    used = (flags & ~(WRITE | LOCKED) | USED, gva, pfn, size, 0)
    vcpu.send(m.Load(session.entry, used))
    value = vcpu.expect(m.Loaded)
    vcpu.log(stored, stored, stored, stored)
    vcpu.all_applied()
    vcpu.lose(m.Log(session.entry, [stored]))  # has not happened
    after = _take_over(lab, vcpu)
    resume = after.enter().resume
    wanted = m.Resumption(
        b"a state",
        [
            m.TrailStep(0, m.Asked.INVLPG, entered),
            m.TrailStep(2, m.Asked.LOCKED, old),
            m.TrailStep(1, m.Asked.LOAD, value),
        ],
        4,
    )
    require(resume == wanted, f"{resume!r} instead of {wanted!r}")
    require((old.value, value.value) == (7, 7), "the kit's program is not the one that it thinks")
    found = after.load(DATA)
    require(found == 7, f"memory has {found} after the takeover, and had 7 before")


@checks("takeover.chain", "A trail goes on over incarnations", _SECTION)
def _chain(lab: Lab) -> None:
    vcpu = lab.guest(resumable=True)
    vcpu.store(DATA, 0)
    count = 3
    for turn in range(count):
        flags, gva, pfn, size, _ = vcpu.access(DATA, LOCKED)
        vcpu.send(m.Locked(vcpu.session.entry, (flags, gva, pfn, size, 1), m.LockedOp.XADD))
        vcpu.expect(m.Loaded)
        vcpu = _take_over(lab, vcpu)
        resume = vcpu.enter().resume
        require(resume is not None, "the first Entered says nothing of the program that goes on")
        assert resume is not None
        told = [step.answer.value for step in resume.trail if isinstance(step.answer, m.Loaded)]
        require(told == list(range(turn + 1)), f"the trail has the values {told}")
    value = vcpu.load(DATA)
    require(value == count, f"{count} XADDs of {count} incarnations made {value} of 0")


@checks("takeover.anew", "Who attaches without a token begins a program anew", _SECTION)
def _anew(lab: Lab) -> None:
    vcpu = lab.guest(resumable=True)
    number = vcpu.session.vcpu
    vcpu.send(m.Exit(vcpu.session.entry, m.InvlpgExit(DATA), state=b"a state"))
    vcpu.expect(m.Entered)
    vcpu.detach()
    for resumable in (False, True):
        after = lab.newcomer()
        after.attach(m.Role.VCPU, number, resumable=resumable)
        resume = after.enter().resume
        require(resume is None, f"{resume!r} for who attached without a token")
        lab.dismiss(after)


@checks("life.interval", "A wish for an interval is granted if it is within the bounds", "Signs of life")
def _interval(lab: Lab) -> None:
    for wish in (SHORTEST, 0.5, 7.25, LONGEST, SHORTEST / 2, 1e-9, LONGEST + 0.5, 1e300, None):
        peer = lab.stranger()
        granted = peer.attach(m.Role.PROBE, heartbeat=wish).heartbeat
        takes = wish is not None and SHORTEST <= wish <= LONGEST
        wanted = wish if takes else lab.heartbeat
        require(granted == wanted, f"a wish for {wish} s was answered by {granted:g} s, not {wanted:g} s")
        lab.dismiss(peer)
    quick = lab.stranger()
    quick.attach(m.Role.PROBE, heartbeat=SHORTEST)
    quick.next("a Heartbeat", heartbeats=True, seconds=max(lab.patience, 10 * SHORTEST))


@checks("version.additions", "Who speaks 1.0 is sent nothing that 1.1 has added", "Versions")
def _additions(lab: Lab) -> None:
    for role in (m.Role.VCPU, m.Role.HOST, m.Role.PROBE):
        peer = lab.stranger()
        peer.version = b"SMMU/1.0"
        attached = peer.attach(role)
        require(not attached.token, f"{attached!r} to somebody who speaks 1.0")
        if role is m.Role.HOST:
            peer.send(m.HostRequest(1, m.GetDirtyLog(NO_SLOT)))
            error = peer.expect(m.ErrorReply)
            require(not error.request, f"{error!r} to somebody who speaks 1.0")
        lab.dismiss(peer)
