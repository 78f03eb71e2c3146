"""Checks of a service: guest entries, walks, logs, values."""

from __future__ import annotations

from typing import Final

from shadowmmu.protocol import ErrorCode, State
from shadowmmu.protocol import messages as m
from shadowmmu.protocol_check.lab import DATA, USED, WRITE, Lab, Vcpu, gva_of
from shadowmmu.protocol_check.registry import CheckFailed, checks, require

__all__: list[str] = []

_U64: Final = (1 << 64) - 1
BURSTS: Final = 30
"""How often more logs are sent than there are credits for, until a service is too slow for them."""


def _expect_value(vcpu: Vcpu, gva: int, wanted: int, what: str) -> None:
    value = vcpu.load(gva)
    require(value == wanted, f"{what}: {value:#x} was loaded from {gva:#x} instead of {wanted:#x}")


# --- entries ------------------------------------------------------------------------------------------------------


@checks("entry.counted", "Guest entries are counted from 1 in each incarnation", "Guest entries")
def _entries_counted(lab: Lab) -> None:
    for _ in range(2):
        vcpu = lab.vcpu()
        entered = vcpu.enter()
        for entry in range(1, 6):
            require(entered.entry == entry, f"entry {entered.entry} instead of {entry}")
            entered = vcpu.exit(m.ExternalInterruptExit())
        lab.dismiss(vcpu)


@checks("entry.wrong", "Messages of entries that have ended, or not begun, are refused", "Legal order")
def _wrong_entries(lab: Lab) -> None:
    vcpu = lab.guest()
    for _ in range(3):
        vcpu.exit(m.ExternalInterruptExit())
    access = vcpu.access(DATA, USED)
    current = vcpu.session.entry
    for entry in (0, 1, current - 1, current + 1, _U64):
        code = ErrorCode.STALE_ENTRY if entry < current else ErrorCode.UNKNOWN_ENTRY
        for body in (
            m.Log(entry, [access]),
            m.Walk(entry, vcpu.session.walk + 1, DATA, 0),
            m.Load(entry, access),
            m.Locked(entry, access, m.LockedOp.XADD),
            m.Exit(entry, m.ExternalInterruptExit()),
        ):
            vcpu.post(body)
            vcpu.refused(code)
    vcpu.load(DATA)


@checks("entry.exits", "Every exit that needs no fault leads to the next entry", "Exits")
def _exits(lab: Lab) -> None:
    vcpu = lab.guest()
    reasons: tuple[m.ExitReason, ...] = (
        m.InvlpgExit(DATA),
        m.InvlpgExit(gva_of(100)),
        m.SendIpiExit([], 64),
        m.SendIpiExit([vcpu.session.vcpu or 0, 200], 64),
        m.ExternalInterruptExit(),
        m.RegisterWriteExit(m.ControlRegister.EFER, 0xD01),
    )
    for reason in reasons:
        entry = vcpu.session.entry
        entered = vcpu.exit(reason)
        require(entered.entry == entry + 1, f"entry {entered.entry} after entry {entry}")
    vcpu.load(DATA)


@checks(
    "entry.general-protection",
    "A register write that is not possible is refused to the guest",
    "Guest entries",
)
def _general_protection(lab: Lab) -> None:
    vcpu = lab.guest()
    entered = vcpu.exit(m.RegisterWriteExit(m.ControlRegister.CR4, 1 << 40))
    require(entered.general_protection, f"{entered!r} after a reserved bit of CR4 was set")
    entered = vcpu.exit(m.ExternalInterruptExit())
    require(not entered.general_protection, f"{entered!r}: #GP comes a second time")
    vcpu.load(DATA)


# --- walks --------------------------------------------------------------------------------------------------------


@checks("walk.fault", "A page fault is handled: in the end a walk finds a translation", "Walks")
def _faults(lab: Lab) -> None:
    vcpu = lab.guest()
    for gva in (DATA, DATA + 0x1234 * 8, gva_of(100), gva_of(3000)):
        for flags in (0, WRITE):
            vcpu.map(gva, flags)


@checks("walk.numbers", "A walk whose number is not the next is refused", "Walks")
def _walk_numbers(lab: Lab) -> None:
    vcpu = lab.guest()
    for _ in range(2):
        last = vcpu.session.walk
        for walk in (0, last, last + 2, _U64):
            if walk != last + 1:
                vcpu.post(m.Walk(vcpu.session.entry, walk, DATA, 0))
                vcpu.refused(ErrorCode.UNKNOWN_REQUEST)
        vcpu.walk(DATA)


@checks("walk.abandoned", "An Exit abandons a walk that is under way; the next one is answered", "Kicks")
def _abandoned(lab: Lab) -> None:
    vcpu = lab.guest()
    for _ in range(10):
        vcpu.send(m.Walk(vcpu.session.entry, vcpu.session.walk + 1, DATA, 0))
        vcpu.send(m.Exit(vcpu.session.entry, m.ExternalInterruptExit()))
        while not isinstance(body := vcpu.next("Entered").body, m.Entered):
            require(isinstance(body, m.Walked | m.WalkFault), f"{body!r} instead of Entered")
        vcpu.map(DATA)


# --- logs and values ----------------------------------------------------------------------------------------------


@checks("log.before-value", "A log takes effect before the Load behind it", "Logs")
def _log_before_load(lab: Lab) -> None:
    vcpu = lab.guest()
    flags, gva, pfn, size, _ = vcpu.access(DATA, WRITE)
    for turn in range(40):
        while not vcpu.session.log_credits:
            vcpu.await_applied()
        first = 1000 * (turn + 1)
        items = [(flags, gva, pfn, size, first + n) for n in range(m.LOG_LIMIT)]
        vcpu.send(m.Log(vcpu.session.entry, items))
        vcpu.send(m.Load(vcpu.session.entry, (flags ^ WRITE | USED, gva, pfn, size, 0)))
        value = vcpu.expect(m.Loaded).value
        wanted = first + m.LOG_LIMIT - 1
        require(value == wanted, f"a Load behind a log found {value} instead of {wanted}")


@checks("log.before-locked", "A log takes effect before the Locked behind it", "Logs")
def _log_before_locked(lab: Lab) -> None:
    vcpu = lab.guest()
    flags, gva, pfn, size, _ = vcpu.access(DATA, 1 | 8 | 16)
    plain = flags & ~24
    for turn in range(20):
        while not vcpu.session.log_credits:
            vcpu.await_applied()
        vcpu.send(m.Log(vcpu.session.entry, [(plain, gva, pfn, size, 7 * turn + n) for n in range(40)]))
        vcpu.send(m.Locked(vcpu.session.entry, (flags, gva, pfn, size, 5), m.LockedOp.XADD))
        old = vcpu.expect(m.Loaded).value
        require(old == 7 * turn + 39, f"a Locked behind a log found {old} instead of {7 * turn + 39}")


@checks(
    "log.before-exit", "A log takes effect, and is answered, although the Exit comes right behind it", "Logs"
)
def _log_before_exit(lab: Lab) -> None:
    vcpu = lab.guest()
    for turn in range(20):
        flags, gva, pfn, size, _ = vcpu.access(DATA + 0x1000, WRITE)
        vcpu.log(*[(flags, gva, pfn, size, 100 * turn + n) for n in range(m.LOG_LIMIT)])
        vcpu.exit(m.InvlpgExit(gva))
        vcpu.all_applied()
        _expect_value(vcpu, gva, 100 * turn + m.LOG_LIMIT - 1, "after a log and an exit")


@checks("log.before-detach", "What was sent before Detach takes effect", "Ending")
def _log_before_detach(lab: Lab) -> None:
    for turn in range(5):
        vcpu = lab.guest()
        flags, gva, pfn, size, _ = vcpu.access(DATA + 0x2000, WRITE)
        vcpu.send(m.Log(vcpu.session.entry, [(flags, gva, pfn, size, turn + n) for n in range(m.LOG_LIMIT)]))
        vcpu.send(m.Exit(vcpu.session.entry, m.ExternalInterruptExit()))
        vcpu.send(m.Detach())
        vcpu.ended(ErrorCode.DETACHED)
        lab.dismiss(vcpu)
        again = lab.guest()
        _expect_value(again, gva, turn + m.LOG_LIMIT - 1, "after a log, an exit and Detach")
        lab.dismiss(again)


@checks("log.applied", "Every log is answered by Applied, and gives its credit back", "Logs")
def _applied(lab: Lab) -> None:
    vcpu = lab.guest()
    access = vcpu.access(DATA, WRITE)
    for _ in range(30):
        vcpu.log(access)
    vcpu.all_applied()


@checks("log.credits", "A log without credit is refused", "Limits")
def _log_credits(lab: Lab) -> None:
    vcpu = lab.guest()
    access = vcpu.access(DATA, WRITE)
    for _ in range(BURSTS):
        log = m.Log(vcpu.session.entry, [access] * m.LOG_LIMIT)
        for _ in range(m.LOG_CREDITS):
            vcpu.send(log)
        vcpu.session.logs += 1
        refusal = vcpu.post_doubtful(log)
        if refusal is not None:
            code = refusal.code
            require(code == ErrorCode.CREDIT_EXCEEDED.value, f"{refusal!r} instead of credit-exceeded")
            vcpu.session.logs -= 1
            vcpu.all_applied()
            vcpu.load(DATA)
            return
        # It was quick: its Applied was on its way.
        vcpu.all_applied()
    raise CheckFailed(f"a log beyond the {m.LOG_CREDITS} that may be on their way was taken {BURSTS} times")


@checks(
    "access.unknown-frame",
    "An access by a frame that is not there is refused, with all of its log",
    "Legal order",
)
def _unknown_frame(lab: Lab) -> None:
    vcpu = lab.guest()
    vcpu.store(DATA, 11)
    good = vcpu.access(DATA, WRITE, 12)
    bad = (*good[:2], (1 << 40) - 1, *good[3:])
    for body in (
        m.Log(vcpu.session.entry, [good, bad]),
        m.Load(vcpu.session.entry, (USED, *bad[1:4], 0)),
        m.Locked(vcpu.session.entry, bad, m.LockedOp.XCHG),
    ):
        vcpu.post(body)
        vcpu.refused(ErrorCode.UNKNOWN_FRAME)
    _expect_value(vcpu, DATA, 11, "after refused accesses")


@checks("access.shape", "Accesses of impossible sizes, or across pages, are refused", "Legal order")
def _shapes(lab: Lab) -> None:
    vcpu = lab.guest()
    flags, gva, pfn, _, _ = vcpu.access(DATA, WRITE)
    entry = vcpu.session.entry
    for size, offset in ((3, 0), (5, 0), (6, 0), (7, 0), (8, 0xFF9), (4, 0xFFD), (2, 0xFFF)):
        access = (flags, gva + offset, pfn, size, 0)
        fault = m.PageFaultExit(gva + offset, 2, m.Instruction(WRITE, size=size))
        for body in (
            m.Log(entry, [access]),
            m.Load(entry, access),
            m.Locked(entry, access, m.LockedOp.XCHG),
            m.Exit(entry, fault),
        ):
            vcpu.post(body)
            vcpu.refused(ErrorCode.MALFORMED)
    vcpu.load(DATA)


@checks("access.sizes", "Loads and stores of 1, 2, 4 and 8 bytes do what they should", "Values")
def _sizes(lab: Lab) -> None:
    vcpu = lab.guest()
    for size in (1, 2, 4, 8):
        mask = (1 << 8 * size) - 1
        vcpu.store(DATA, _U64)
        vcpu.store(DATA, 0x1122_3344_5566_7788, size)
        wanted = _U64 & ~mask | 0x1122_3344_5566_7788 & mask
        _expect_value(vcpu, DATA, wanted, f"a store of {size} bytes")
        part = vcpu.load(DATA, size)
        require(
            part == wanted & mask, f"a load of {size} bytes found {part:#x} instead of {wanted & mask:#x}"
        )


@checks("access.locked", "Locked operations do what they should", "Values")
def _locked(lab: Lab) -> None:
    vcpu = lab.guest()
    op = m.LockedOp
    vcpu.store(DATA, 5)
    steps: tuple[tuple[m.LockedOp, int, int, int, int], ...] = (
        # operation, operand, expected, old value, value afterwards
        (op.XADD, 3, 0, 5, 8),
        (op.XCHG, 100, 0, 8, 100),
        (op.CMPXCHG, 7, 99, 100, 100),
        (op.CMPXCHG, 7, 100, 100, 7),
        (op.XADD, _U64, 0, 7, 6),
        (op.XADD, _U64 - 5, 0, 6, 0),
    )
    for operation, operand, expected, old, new in steps:
        value = vcpu.locked(DATA, operation, operand, expected)
        require(value == old, f"{operation.value} returned {value} instead of {old}")
        _expect_value(vcpu, DATA, new, f"after {operation.value}")
    vcpu.store(DATA, 0xFFFF)
    value = vcpu.locked(DATA, op.XADD, 1, size=1)
    require(value == 0xFF, f"xadd of one byte returned {value:#x}")
    _expect_value(vcpu, DATA, 0xFF00, "xadd of one byte wraps")


@checks("order.unasked", "Nothing is answered that was not asked for", "Legal order")
def _nothing_unasked(lab: Lab) -> None:
    vcpu = lab.guest()
    vcpu.map(DATA)
    lab.barrier()
    vcpu.drain()
    require(vcpu.session.state is State.IN_GUEST, f"the session is in state {vcpu.session.state.value}")
    unasked = [e.body for e in vcpu.received if not isinstance(e.body, m.Heartbeat | m.Kick)]
    require(not unasked, f"nobody asked for {unasked!r}")
