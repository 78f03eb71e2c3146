"""Checks of a service: host agents, and the kicks that they cause."""

from __future__ import annotations

from typing import Final

from shadowmmu.protocol import HOST_CREDITS, ErrorCode
from shadowmmu.protocol import messages as m
from shadowmmu.protocol_check.lab import DATA, SMALL_GFN, WRITE, Host, Lab, Vcpu, gva_of
from shadowmmu.protocol_check.registry import CheckFailed, checks, require

__all__: list[str] = []

_DATA_GFN: Final = 0xC00
_SECTION: Final = "A host agent"


def _holder(lab: Lab) -> Vcpu:
    """A vCPU in guest mode that answers kicks only when told to."""
    vcpu = lab.guest()
    vcpu.answers = False
    return vcpu


def _awaits_kick(vcpu: Vcpu, host: Host, what: str) -> None:
    """The vCPU is told to leave its entry, and the host's request is not answered before it does."""
    entry = vcpu.session.entry
    kick = vcpu.expect(m.Kick)
    require(kick.entry == entry, f"{kick!r} in entry {entry}")
    vcpu.lab.barrier()
    host.drain()
    early = [envelope.body for envelope in host.received if isinstance(envelope.body, m.HostReply)]
    require(not early, f"{what} was answered while a vCPU that was kicked had not left its entry")


@checks("host.operations", "Every operation is answered once, with its result", _SECTION)
def _operations(lab: Lab) -> None:
    host = lab.host()
    gfn = SMALL_GFN + 8
    guest = lab.guest()
    guest.map(gva_of(gfn))
    require(host.request(m.Unmap(gfn)).result == 1, "Unmap of a page that is there has result 1")
    require(host.request(m.Unmap(gfn)).result == 0, "Unmap of a page that is gone has result 0")
    guest.map(gva_of(gfn))
    require(host.request(m.Reclaim(gfn)).result == 1, "Reclaim of a page that is there has result 1")
    require(host.request(m.Reclaim(gfn)).result == 0, "Reclaim of a page that is gone has result 0")
    guest.map(gva_of(gfn))
    operations: tuple[m.HostOperation, ...] = (
        m.UnmapRange(gfn, 4),
        m.UnmapRange(_DATA_GFN, 512),
        m.ReclaimIdle([gfn, gfn + 1]),
        m.Move(gfn, writable=True),
        m.Age(gfn),
        m.TestAge(gfn),
        m.Shrink(1),
        m.SetMmuPages(128),
        m.ZapAll(),
        m.Migrate(0, 0),
        m.WritePhys([(_DATA_GFN << 12, 1)]),
    )
    for operation in operations:
        reply = host.request(operation)
        require(reply.result >= 0 and not reply.gfns, f"{reply!r} to {operation!r}")


@checks("host.pages-survive", "What a guest stored is there after the host took its page away", "Unmap")
def _pages_survive(lab: Lab) -> None:
    host, guest = lab.host(), lab.guest()
    gva = gva_of(SMALL_GFN + 1)
    for turn in range(3):
        for operation in (
            m.Unmap(SMALL_GFN + 1),
            m.Reclaim(SMALL_GFN + 1),
            m.Move(SMALL_GFN + 1, writable=True),
        ):
            old = guest.load(gva)
            guest.store(gva, old + 1)
            host.request(operation)
            value = guest.load(gva)
            require(
                value == old + 1, f"{value} instead of {old + 1} after {type(operation).__name__} ({turn})"
            )
            guest.store(gva, old)


@checks("host.write-phys", "WritePhys stores what guests load", "WritePhys")
def _write_phys(lab: Lab) -> None:
    host, guest = lab.host(), lab.guest()
    for value in (1, (1 << 64) - 1):
        host.request(m.WritePhys([((_DATA_GFN << 12) + 64, value), ((_DATA_GFN << 12) + 72, 2)]))
        loaded = guest.load(DATA + 64)
        require(loaded == value, f"{loaded:#x} instead of {value:#x}")


@checks("host.dirty-log", "The dirty log has what was stored to since it was read", "GetDirtyLog")
def _dirty_log(lab: Lab) -> None:
    host, guest = lab.host(), lab.guest()
    gfn = SMALL_GFN + 2
    host.request(m.SetDirtyLog(0, enable=True))
    try:
        host.request(m.GetDirtyLog(0))
        old = guest.load(gva_of(gfn))
        guest.store(gva_of(gfn), old)
        guest.all_applied()
        reply = host.request(m.GetDirtyLog(0))
        require(gfn in reply.gfns, f"gfn {gfn} was stored to and is not in the dirty log")
        require(reply.result == len(reply.gfns), f"result {reply.result} for {len(reply.gfns)} dirty pages")
        guest.answer_kick()
        reply = host.request(m.GetDirtyLog(0))
        require(gfn not in reply.gfns, f"gfn {gfn} is in the dirty log again, and was not stored to")
    finally:
        host.request(m.SetDirtyLog(0, enable=False))


@checks(
    "host.impossible", "Impossible arguments are answered with a number, and the session goes on", _SECTION
)
def _impossible(lab: Lab) -> None:
    host = lab.host()
    if lab.vcpus:
        lab.guest()  # so that one vCPU was entered
    operations: tuple[m.HostOperation, ...] = (
        m.Unmap(1 << 39),
        m.Reclaim((1 << 40) - 1),
        m.UnmapRange(_DATA_GFN, 1 << 20),
        m.UnmapRange(_DATA_GFN + 1, 1),
        m.GetDirtyLog(31),
        m.SetDirtyLog(0xFFFF_FFFF, enable=True),
        m.WritePhys([(3, 1)]),
        m.WritePhys([(1 << 60, 1)]),
        m.Migrate(255, 0) if lab.vcpus < 256 else m.Unmap(1 << 39),
        m.SetRegisters(0, 0x8001_0001, 0, 0xA0, 0xD01),
    )
    for operation in operations:
        number = host.session.request + 1
        sent = host.send(m.HostRequest(number, operation))
        envelope = host.next("the answer")
        reply = envelope.body
        require(
            isinstance(reply, m.ErrorReply) and reply.code == ErrorCode.BAD_ARGUMENT.value,
            f"{reply!r} instead of bad-argument, to {operation!r}",
        )
        assert isinstance(reply, m.ErrorReply)
        require(envelope.seq > 0, "the answer to a request that was accepted has a number")
        require(reply.seq == sent.seq, f"{reply!r} answers message {sent.seq}")
    host.request(m.TestAge(100))


@checks("host.numbers", "A request whose number is not the next is refused", "Legal order")
def _request_numbers(lab: Lab) -> None:
    host = lab.host()
    for _ in range(2):
        last = host.session.request
        for number in {0, last, last + 2, (1 << 64) - 1}:
            host.post(m.HostRequest(number, m.TestAge(100)))
            host.refused(ErrorCode.UNKNOWN_REQUEST)
        host.request(m.TestAge(100))


@checks("host.several", "Several requests may be under way, and each is answered once", _SECTION)
def _several(lab: Lab) -> None:
    host = lab.host()
    for _ in range(3):
        asked = {host.ask(m.TestAge(100 + n)) for n in range(HOST_CREDITS)}
        answered = {host.expect(m.HostReply).request for _ in asked}
        require(answered == asked, f"requests {sorted(asked)} got answers {sorted(answered)}")


@checks("host.credits", "A request beyond those that may be under way is refused", "Limits")
def _host_credits(lab: Lab) -> None:
    host, vcpu = lab.host(), _holder(lab)
    first = SMALL_GFN + 16
    for n in range(HOST_CREDITS):
        vcpu.map(gva_of(first + n))
    for n in range(HOST_CREDITS):
        host.ask(m.Unmap(first + n))
    vcpu.expect(m.Kick)
    # All are under way, or some were answered: those that were do not count.
    lab.barrier()
    host.drain()
    while host.session.host_credits:
        host.ask(m.Unmap(first))
        lab.barrier()
        host.drain()
        if host.session.request > 4 * HOST_CREDITS:
            raise CheckFailed("no request waits for a vCPU that has not left its entry")
    host.post(m.HostRequest(host.session.request + 1, m.TestAge(100)))
    envelope = host.next("the refusal")
    while isinstance(envelope.body, m.HostReply):
        envelope = host.next("the refusal")
    reply = envelope.body
    require(
        isinstance(reply, m.ErrorReply) and reply.code == ErrorCode.CREDIT_EXCEEDED.value,
        f"{reply!r} instead of credit-exceeded",
    )
    vcpu.answers = True
    while host.session.requests:
        host.expect(m.HostReply)
    host.request(m.TestAge(100))


@checks("host.detach", "A host agent may leave while requests are under way: Ended comes at once", _SECTION)
def _detach_under_way(lab: Lab) -> None:
    host, vcpu = lab.host(), _holder(lab)
    vcpu.map(gva_of(SMALL_GFN + 3))
    host.ask(m.Unmap(SMALL_GFN + 3))
    vcpu.expect(m.Kick)
    host.send(m.Detach())
    host.ended(ErrorCode.DETACHED)
    vcpu.exit(m.ExternalInterruptExit())
    vcpu.map(gva_of(SMALL_GFN + 3))


# --- kicks --------------------------------------------------------------------------------------------------------


@checks("kick.awaited", "Who takes a page away waits until a vCPU that uses it has left its entry", "Kicks")
def _kick_awaited(lab: Lab) -> None:
    host, vcpu = lab.host(), _holder(lab)
    operations: tuple[m.Unmap | m.Reclaim, ...] = (
        m.Unmap(SMALL_GFN + 40),
        m.Reclaim(SMALL_GFN + 41),
        m.Unmap(SMALL_GFN + 42),
    )
    for operation in operations:
        vcpu.map(gva_of(operation.gfn))
        host.ask(operation)
        _awaits_kick(vcpu, host, type(operation).__name__)
        entered = vcpu.exit(m.ExternalInterruptExit())
        require(entered.flush, f"{entered!r} does not empty the TLB")
        host.expect(m.HostReply)


@checks("kick.any-exit", "Any exit of the entry answers its kicks", "Kicks")
def _any_exit(lab: Lab) -> None:
    host, vcpu = lab.host(), _holder(lab)
    reasons: tuple[m.ExitReason, ...] = (
        m.InvlpgExit(DATA),
        m.SendIpiExit([], 64),
        m.ExternalInterruptExit(),
    )
    for n, reason in enumerate(reasons):
        gfn = SMALL_GFN + 44 + n
        vcpu.map(gva_of(gfn))
        host.ask(m.Unmap(gfn))
        _awaits_kick(vcpu, host, "Unmap")
        vcpu.exit(reason)
        host.expect(m.HostReply)


@checks(
    "kick.log-first", "What a vCPU did before it answered a kick takes effect before the answer does", "Kicks"
)
def _log_before_answer(lab: Lab) -> None:
    host, vcpu = lab.host(), _holder(lab)
    gva = gva_of(SMALL_GFN + 48)
    old = vcpu.load(gva)
    for turn in range(1, 9):
        access = vcpu.access(gva, WRITE, turn)
        host.ask(m.Reclaim(SMALL_GFN + 48))
        _awaits_kick(vcpu, host, "Reclaim")
        vcpu.log(*[access] * m.LOG_LIMIT)
        vcpu.exit(m.ExternalInterruptExit())
        host.expect(m.HostReply)
        value = vcpu.load(gva)
        require(value == turn, f"{value} instead of {turn}, which was stored before the kick was answered")
    vcpu.store(gva, old)


@checks("kick.walking", "A kick is answered while a walk is under way", "Kicks")
def _kick_walking(lab: Lab) -> None:
    host, vcpu = lab.host(), _holder(lab)
    gva = gva_of(SMALL_GFN + 49)
    for _ in range(4):
        vcpu.map(gva)
        host.ask(m.Unmap(SMALL_GFN + 49))
        _awaits_kick(vcpu, host, "Unmap")
        vcpu.send(m.Walk(vcpu.session.entry, vcpu.session.walk + 1, gva_of(SMALL_GFN + 50), 0))
        vcpu.send(m.Exit(vcpu.session.entry, m.ExternalInterruptExit()))
        while not isinstance(body := vcpu.next("Entered").body, m.Entered):
            require(isinstance(body, m.Walked | m.WalkFault | m.Kick), f"{body!r} instead of Entered")
        host.expect(m.HostReply)


@checks(
    "kick.several", "Several operations may wait for the same kicked entry: one exit answers all", "Kicks"
)
def _several_kicks(lab: Lab) -> None:
    host, vcpu = lab.host(), _holder(lab)
    gfns = [SMALL_GFN + 56 + n for n in range(4)]
    for gfn in gfns:
        vcpu.map(gva_of(gfn))
    for gfn in gfns:
        host.ask(m.Unmap(gfn))
    _awaits_kick(vcpu, host, "Unmap")
    vcpu.answers = True
    answered = {host.expect(m.HostReply).request for _ in gfns}
    require(len(answered) == len(gfns), f"answers to {sorted(answered)}")


@checks("kick.two-vcpus", "An operation waits for every vCPU that it has kicked", "Kicks")
def _two_vcpus(lab: Lab) -> None:
    host, first, second = lab.host(), lab.guest(), lab.guest()
    gfn = SMALL_GFN + 52
    for turn in range(3):
        for vcpu in (first, second):
            vcpu.map(gva_of(gfn))
        for vcpu in (first, second):
            vcpu.answer_kick()
            vcpu.answers = False
        host.ask(m.Reclaim(gfn))
        _awaits_kick(first, host, "Reclaim")
        second.expect(m.Kick)
        early, late = (first, second) if turn % 2 else (second, first)
        early.exit(m.ExternalInterruptExit())
        lab.barrier()
        host.drain()
        require(
            not host.received, "an operation that waits for two vCPUs was answered after the first had left"
        )
        late.exit(m.ExternalInterruptExit())
        host.expect(m.HostReply)
        first.answers = second.answers = True


@checks(
    "kick.interrupt", "An interrupt makes its target leave guest mode, and comes with its next entry", "Kicks"
)
def _interrupt(lab: Lab) -> None:
    first, second = _holder(lab), _holder(lab)
    assert second.session.vcpu is not None
    for vector in (32, 255):
        first.exit(m.SendIpiExit([second.session.vcpu], vector))
        second.expect(m.Kick)
        entered = second.exit(m.ExternalInterruptExit())
        require(vector in entered.interrupts, f"{entered!r} does not deliver interrupt {vector}")
    second.send(m.Exit(second.session.entry, m.HaltExit()))
    lab.barrier()
    second.drain()
    require(not second.received, f"a halted vCPU got {list(second.received)!r}")
    first.exit(m.SendIpiExit([second.session.vcpu], 77))
    entered = second.expect(m.Entered)
    require(entered.interrupts == [77], f"{entered!r} does not deliver interrupt 77 alone")


@checks(
    "kick.invlpg",
    "While a vCPU executes INVLPG, others may be kicked, and it is entered all the same",
    "Kicks",
)
def _invlpg(lab: Lab) -> None:
    first, second = lab.guest(), lab.guest()
    gva = gva_of(SMALL_GFN + 53)
    for _ in range(4):
        first.map(gva, WRITE)
        second.map(gva, WRITE)
        second.exit(m.InvlpgExit(gva))
        first.answer_kick()


@checks(
    "kick.migrate", "Migrate makes a vCPU leave guest mode and enter it on the other processor", "Migrate"
)
def _migrate(lab: Lab) -> None:
    host, vcpu = lab.host(), lab.guest()
    assert vcpu.session.vcpu is not None
    for processor in (1, 0, 255, 0):
        host.request(m.Migrate(vcpu.session.vcpu, processor))
        vcpu.answer_kick()
        entered = vcpu.exit(m.ExternalInterruptExit())
        require(entered.processor == processor, f"{entered!r} after it was moved to processor {processor}")
    vcpu.load(DATA)
