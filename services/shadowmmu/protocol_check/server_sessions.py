"""Checks of a service: opening, incarnations, numbers, order, ending."""

from __future__ import annotations

from typing import Final

from shadowmmu.protocol import ErrorCode, State
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.states import HOST, PROBE, VCPU, Conversation, Side
from shadowmmu.protocol_check.lab import DATA, WRITE, Lab, Vcpu
from shadowmmu.protocol_check.peer import Peer
from shadowmmu.protocol_check.registry import CheckSkipped, checks, require

__all__ = ["samples"]

_ACCESS: Final = (WRITE, DATA, 0x10_0C00, 8, 1)


def samples(entry: int, walk: int, request: int = 1) -> list[m.VcpuMessage]:
    """A message of each type that peers of the MMU service send, but Attach."""
    return [
        m.Enter(),
        m.Log(entry, [_ACCESS]),
        m.Walk(entry, walk, DATA, 0),
        m.Load(entry, (8, DATA, 0x10_0C00, 8, 0)),
        m.Locked(entry, _ACCESS, m.LockedOp.XADD),
        m.Exit(entry, m.ExternalInterruptExit()),
        m.Detach(),
        m.Heartbeat(),
        m.HostRequest(request, m.TestAge(100)),
    ]


# --- opening ------------------------------------------------------------------------------------------------------


@checks("opening.not-attached", "Without a session everything but Attach is refused", "Opening")
def _not_attached(lab: Lab) -> None:
    peer = lab.stranger()
    for body in samples(1, 1):
        for incarnation, number in ((0, 0), (0, 1), (1, 1), (1 << 40, 7)):
            peer.post(body, incarnation=incarnation, number=number)
            peer.refused(ErrorCode.NOT_ATTACHED, number=number, incarnation=incarnation)
    peer.attach(m.Role.PROBE)


@checks("opening.numbers", "Attach has incarnation and number 0", "Opening")
def _opening_numbers(lab: Lab) -> None:
    peer = lab.stranger()
    for incarnation, number in ((0, 1), (1, 0), (5, 5)):
        peer.post(m.Attach(m.Role.PROBE, "numbers"), incarnation=incarnation, number=number)
        peer.refused(ErrorCode.BAD_ARGUMENT, number=number, incarnation=incarnation)
    peer.attach(m.Role.PROBE)


@checks("opening.role", "Roles that are not for this service are refused, and Join is", "Opening")
def _role(lab: Lab) -> None:
    peer = lab.stranger()
    peer.post(m.Attach(m.Role.MMU, "role"))
    peer.refused(ErrorCode.BAD_ARGUMENT, number=0, incarnation=0)
    peer.post(m.Join(m.Role.VCPU, "join"), incarnation=0, number=0)
    peer.refused(ErrorCode.UNEXPECTED_MESSAGE, number=0, incarnation=0)
    peer.attach(m.Role.PROBE)


@checks("opening.welcome", "Attached gives a vCPU its number, and others none", "Attached")
def _welcome(lab: Lab) -> None:
    vcpu = lab.vcpu()
    number = vcpu.session.vcpu
    require(
        number is not None and number < lab.vcpus, f"a service with {lab.vcpus} vCPUs gave number {number}"
    )
    seen = {vcpu.session.incarnation}
    for role in (m.Role.HOST, m.Role.PROBE):
        attached = lab.stranger().attach(role)
        require(attached.vcpu is None, f"a {role.value} became vCPU {attached.vcpu}")
        require(attached.incarnation not in seen, f"incarnation {attached.incarnation} was given twice")
        seen.add(attached.incarnation)


@checks("opening.unknown-vcpu", "A vCPU that the machine has not is refused", "Opening")
def _unknown_vcpu(lab: Lab) -> None:
    if lab.vcpus > 255:
        raise CheckSkipped("the service has every vCPU that can be named")
    peer = lab.stranger()
    for number in {lab.vcpus, 255}:
        peer.send(m.Attach(m.Role.VCPU, peer.name, number))
        peer.refused(ErrorCode.UNKNOWN_VCPU, number=0, incarnation=0)
    peer.attach(m.Role.PROBE)


@checks("opening.vcpu-taken", "A vCPU that is attached is refused to others", "Opening")
def _vcpu_taken(lab: Lab) -> None:
    vcpu = lab.vcpu()
    number = vcpu.session.vcpu
    peer = lab.stranger()
    peer.send(m.Attach(m.Role.VCPU, peer.name, number))
    peer.refused(ErrorCode.VCPU_TAKEN, number=0, incarnation=0)
    lab.dismiss(vcpu)
    attached = peer.attach(m.Role.VCPU, number)
    require(attached.vcpu == number, f"asked to be vCPU {number}, became {attached.vcpu}")


@checks("opening.run-full", "When all vCPUs are attached, another one is refused", "Opening")
def _run_full(lab: Lab) -> None:
    for _ in range(lab.vcpus):
        lab.vcpu()
    peer = lab.stranger()
    peer.send(m.Attach(m.Role.VCPU, peer.name))
    peer.refused(ErrorCode.RUN_FULL, number=0, incarnation=0)
    peer.attach(m.Role.PROBE)


@checks("opening.already-attached", "A second Attach is refused, and the session goes on", "Opening")
def _already_attached(lab: Lab) -> None:
    for peer in (lab.guest(), lab.host(), lab.probe()):
        peer.post(m.Attach(m.Role.PROBE, "again"), incarnation=0, number=0)
        peer.refused(ErrorCode.ALREADY_ATTACHED, number=0, incarnation=0)
        lab.dismiss(peer)


# --- incarnations -------------------------------------------------------------------------------------------------


@checks(
    "incarnation.anew",
    "A peer may attach anew on the same connection, and counts from 1",
    "Incarnations and numbers",
)
def _anew(lab: Lab) -> None:
    peer = lab.stranger()
    seen: set[int] = set()
    for role in (m.Role.VCPU, m.Role.VCPU, m.Role.HOST, m.Role.PROBE, m.Role.VCPU):
        attached = peer.attach(role)
        require(attached.incarnation >= 1, f"incarnation {attached.incarnation}")
        require(attached.incarnation not in seen, f"incarnation {attached.incarnation} was given before")
        seen.add(attached.incarnation)
        if role is m.Role.VCPU:
            for reason in (None, m.ExternalInterruptExit()):
                peer.send(m.Enter() if reason is None else m.Exit(peer.session.entry, reason))
                peer.expect(m.Entered)
            peer.send(m.Walk(peer.session.entry, 1, DATA, 0))
            require(
                isinstance(peer.next("the answer to a walk").body, m.Walked | m.WalkFault),
                "no answer to a walk",
            )
        peer.detach()


@checks(
    "incarnation.stale", "A message of an incarnation that has ended is refused", "Incarnations and numbers"
)
def _stale_incarnation(lab: Lab) -> None:
    peer = lab.stranger()
    first = peer.attach(m.Role.VCPU).incarnation
    peer.send(m.Enter())
    peer.expect(m.Entered)
    number = peer.session.send_seq
    peer.detach()
    peer.post(m.Heartbeat(), incarnation=first, number=number + 2)
    peer.refused(ErrorCode.NOT_ATTACHED, number=number + 2, incarnation=first)
    peer.attach(m.Role.VCPU)
    foreign = lab.probe().session.incarnation
    for incarnation in (first, foreign, 0, peer.session.incarnation + 1000):
        peer.post(m.Enter(), incarnation=incarnation)
        peer.refused(ErrorCode.STALE_INCARNATION, incarnation=incarnation)
    peer.send(m.Enter())
    peer.expect(m.Entered)


# --- numbers ------------------------------------------------------------------------------------------------------


@checks("numbers.gap", "A gap is refused, and ends the incarnation", "Incarnations and numbers")
def _gap(lab: Lab) -> None:
    for skipped in (1, 1000):
        peer = lab.stranger()
        peer.attach(m.Role.VCPU)
        number = peer.session.send_seq + skipped
        peer.post(m.Enter(), number=number)
        peer.refused(ErrorCode.SEQUENCE_GAP, number=number)
        peer.ended(ErrorCode.SEQUENCE_GAP)
        peer.attach(m.Role.VCPU)
        peer.send(m.Enter())
        peer.expect(m.Entered)
        lab.dismiss(peer)


@checks("numbers.heartbeat", "Heartbeats are counted as all messages are", "Incarnations and numbers")
def _heartbeats_counted(lab: Lab) -> None:
    for peer in (lab.probe(), lab.host(), lab.vcpu()):
        sent = peer.send(m.Heartbeat())
        peer.post(m.Heartbeat(), number=sent.seq)
        number = peer.session.send_seq + 1
        peer.post(m.Heartbeat(), number=number)
        peer.refused(ErrorCode.SEQUENCE_GAP, number=number)
        peer.ended(ErrorCode.SEQUENCE_GAP)


@checks("numbers.refused", "The number of a message that is refused is not used", "Refused messages")
def _number_not_used(lab: Lab) -> None:
    vcpu = lab.guest()
    entry = vcpu.session.entry
    wrong: tuple[tuple[m.VcpuMessage, ErrorCode], ...] = (
        (m.Enter(), ErrorCode.UNEXPECTED_MESSAGE),
        (m.Walk(entry + 1, 1, DATA, 0), ErrorCode.UNKNOWN_ENTRY),
        (m.Walk(entry, 7, DATA, 0), ErrorCode.UNKNOWN_REQUEST),
        (m.Load(entry, (8, DATA, 1 << 39, 8, 0)), ErrorCode.UNKNOWN_FRAME),
    )
    for body, code in wrong:
        vcpu.post(body)
        vcpu.refused(code)
        vcpu.load(DATA)  # begins with a walk, under the same number


# --- order --------------------------------------------------------------------------------------------------------


def _illegal_in(peer: Peer, conversation: Conversation, state: State) -> None:
    """Sends everything that is not legal in this state."""
    legal = conversation.receives(Side.SERVICE)[state]
    session = peer.session
    for body in samples(session.entry, session.walk + 1, session.request + 1):
        if type(body) not in legal:
            peer.post(body)
            peer.refused(ErrorCode.UNEXPECTED_MESSAGE)


@checks(
    "order.outside",
    "A vCPU that was never entered: what is not legal is refused",
    "A vCPU and the MMU service",
)
def _order_outside(lab: Lab) -> None:
    vcpu = lab.vcpu()
    _illegal_in(vcpu, VCPU, State.OUTSIDE)
    vcpu.enter()


@checks("order.in-guest", "In guest mode: what is not legal is refused", "A vCPU and the MMU service")
def _order_in_guest(lab: Lab) -> None:
    vcpu = lab.guest()
    _illegal_in(vcpu, VCPU, State.IN_GUEST)
    vcpu.load(DATA)


@checks(
    "order.handling", "While an exit is handled: what is not legal is refused", "A vCPU and the MMU service"
)
def _order_handling(lab: Lab) -> None:
    vcpu = lab.guest()
    # Nobody sends it an interrupt: it stays in this state.
    vcpu.send(m.Exit(vcpu.session.entry, m.HaltExit()))
    _illegal_in(vcpu, VCPU, State.HANDLING)


@checks(
    "order.waiting", "While an answer is awaited: what is not legal is refused", "A vCPU and the MMU service"
)
def _order_waiting(lab: Lab) -> None:
    vcpu = lab.guest()
    for turn in range(16):
        access = vcpu.access(DATA, WRITE)
        entry = vcpu.session.entry
        load = m.Load(entry, (access[0] & ~WRITE | 8, *access[1:4], 0))
        _speaks_out_of_turn(vcpu, load if turn % 2 else m.Walk(entry, vcpu.session.walk + 1, DATA, 0), access)
    vcpu.load(DATA)


def _speaks_out_of_turn(vcpu: Vcpu, question: m.Load | m.Walk, access: m.LoggedAccess) -> None:
    """Sends a log without waiting for the answer. If that was on its way, the log is legal, for the service."""
    session = vcpu.session
    vcpu.send(question)
    session.logs += 1
    refusal = vcpu.post_doubtful(m.Log(session.entry, [access]))
    answer = vcpu.next("the answer").body
    require(isinstance(answer, m.Loaded | m.Walked), f"{answer!r} to {question!r}")
    if refusal is None:
        vcpu.all_applied()
        return
    session.logs -= 1
    code = refusal.code
    require(code == ErrorCode.UNEXPECTED_MESSAGE.value, f"{refusal!r} instead of unexpected-message")


@checks("order.host", "A host agent: what is not legal is refused", "A host agent and the MMU service")
def _order_host(lab: Lab) -> None:
    host = lab.host()
    _illegal_in(host, HOST, State.SERVING)
    host.request(m.TestAge(100))


@checks("order.probe", "A probe: what is not legal is refused", "A probe and the MMU service")
def _order_probe(lab: Lab) -> None:
    _illegal_in(lab.probe(), PROBE, State.SERVING)


# --- ending -------------------------------------------------------------------------------------------------------


@checks("ending.detach", "Detach is answered by Ended; then nothing is taken any more", "Ending")
def _detach(lab: Lab) -> None:
    outside, halted = lab.vcpu(), lab.guest() if lab.vcpus > 1 else None
    peers: list[Peer] = [outside, lab.host(), lab.probe()]
    if halted is not None:
        halted.send(m.Exit(halted.session.entry, m.HaltExit()))
        peers.append(halted)
    for peer in peers:
        incarnation, number = peer.session.incarnation, peer.session.send_seq + 1
        peer.detach()
        peer.post(m.Heartbeat(), incarnation=incarnation, number=number)
        peer.refused(ErrorCode.NOT_ATTACHED, number=number, incarnation=incarnation)


@checks("ending.place", "Who has left makes room", "Ending")
def _place(lab: Lab) -> None:
    for _ in range(3):
        vcpus = [lab.vcpu() for _ in range(lab.vcpus)]
        for vcpu in vcpus:
            lab.dismiss(vcpu)
