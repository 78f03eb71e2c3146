"""Judges what a client says, message by message. Pure: times are handed in, verdicts are collected.

The order, the numbers and the credits are `Session`'s business and the machine's; the judge sees messages that these
have accepted, and knows what they do not: translations, kicks, page faults, signs of life. `Verdicts` collects what
all scenes found; `Judge` follows one scene.
"""

from __future__ import annotations

from typing import Final

import msgspec

from shadowmmu.protocol import messages as m
from shadowmmu.protocol.events import AccessFlag
from shadowmmu.protocol.heartbeat import MISSED_LIMIT, HeartbeatTimer
from shadowmmu.protocol_check.checks import Outcome, Result
from shadowmmu.protocol_check.client_checks import ClientCheck
from shadowmmu.protocol_check.tlb_model import Dropped, TlbModel

__all__ = ["Judge", "Verdicts"]

_USED: Final = int(AccessFlag.USED)
_WRITE: Final = int(AccessFlag.WRITE)
_LOCKED: Final = int(AccessFlag.USED | AccessFlag.LOCKED | AccessFlag.WRITE)
_ACCESS: Final = 0x1F
_WALKED: Final = int(AccessFlag.WRITE | AccessFlag.FETCH | AccessFlag.USER)

_MISUSES: Final = {
    Dropped.FLUSH: ClientCheck.FLUSH,
    Dropped.NO_VPID: ClientCheck.NO_VPID,
    Dropped.INVLPG: ClientCheck.INVLPG,
    Dropped.FAULT: ClientCheck.FAULT,
    Dropped.INCARNATION: ClientCheck.GIVEN_UP,
    Dropped.PROCESSOR: ClientCheck.PROCESSOR,
}


class Verdicts:
    """What all scenes found out about a client."""

    def __init__(self) -> None:
        self.failures: dict[ClientCheck, list[str]] = {}
        self.exercised: set[ClientCheck] = set()

    def fail(self, check: ClientCheck, text: str) -> None:
        """The client did something wrong."""
        self.failures.setdefault(check, []).append(text)

    def results(self) -> list[Result]:
        """An outcome for each check: skipped if there was no occasion to see it."""
        return [self._result(check) for check in ClientCheck]

    def _result(self, check: ClientCheck) -> Result:
        failures = self.failures.get(check)
        if failures:
            more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
            return Result(check.check, Outcome.FAILED, failures[0] + more)
        if check in self.exercised:
            return Result(check.check, Outcome.PASSED)
        return Result(check.check, Outcome.SKIPPED, "nothing that the client did gave occasion to see it")


class _Fault(msgspec.Struct, frozen=True):
    """A walk's fault that the client knows of; `exits`: by Attached's mask and match."""

    gva: int
    flags: int
    error_code: int
    misconfig: bool
    exits: bool


class Judge:
    """Follows one client through one scene. `kick_seconds`: longest time for an answer to a kick."""

    def __init__(self, scene: str, verdicts: Verdicts, kick_seconds: float) -> None:
        self._scene = scene
        self._verdicts = verdicts
        self._kick_seconds = kick_seconds
        self.tlb = TlbModel()
        self._timer: HeartbeatTimer | None = None
        self._attached = m.Attached(0, 1, vpid=True, heartbeat=1.0)
        self._kicks: dict[int, float] = {}
        self._walk = (0, 0)  # gva and flags of the last one
        self._fault: _Fault | None = None
        self._unasked: int | None = None
        self._late: set[tuple[int, int]] = set()

    def fail(self, check: ClientCheck, text: str) -> None:
        """The client did something wrong in this scene."""
        self._verdicts.fail(check, f"scene {self._scene}: {text}")

    def exercise(self, *checks: ClientCheck) -> None:
        """There was an occasion to see these."""
        self._verdicts.exercised.update(checks)

    # --- what the service says -----------------------------------------------------------------------------------

    def sent(self, body: m.MmuMessage, now: float, *, late: bool = False) -> None:
        """A message to the client. `late`: an answer to a walk that it has abandoned."""
        match body:
            case m.Attached():
                self._begin(body, now)
            case m.Entered():
                self._entered(body)
            case m.Walked() if late:
                self._late.add((self._walk[0] >> 12, body.pfn))
                self.exercise(ClientCheck.LATE_WALK)
            case m.Walked():
                self.tlb.grant(self._walk[0], body.pfn, body.level, body.flags)
            case m.WalkFault() if not late:
                self._walk_fault(body)
            case m.Kick():
                self._kicks.setdefault(body.entry, now)
            case m.Ended():
                self._timer = None
                self._kicks.clear()
            case _:
                pass

    def _begin(self, attached: m.Attached, now: float) -> None:
        self._attached = attached
        if self.tlb.clear_all(Dropped.INCARNATION):
            self.exercise(ClientCheck.GIVEN_UP)
        self.tlb.processor = 0
        self._timer = HeartbeatTimer(attached.heartbeat, now, missed=MISSED_LIMIT)
        self._kicks.clear()
        self._fault = self._unasked = None

    def _entered(self, entered: m.Entered) -> None:
        if self.tlb.select(entered.processor):
            self.exercise(ClientCheck.PROCESSOR)
        if not self._attached.vpid:
            self.tlb.clear(Dropped.NO_VPID)
        if entered.flush and self.tlb.clear(Dropped.FLUSH):
            self.exercise(ClientCheck.FLUSH)
        if entered.inject is not None:
            self.tlb.drop(entered.inject.cr2, Dropped.FAULT)
        self._fault = None

    def _walk_fault(self, fault: m.WalkFault) -> None:
        gva, flags = self._walk
        exits = fault.misconfig or fault.error_code & self._attached.pfec_mask == self._attached.pfec_match
        self._fault = _Fault(gva, flags, fault.error_code, fault.misconfig, exits)
        if not exits and self.tlb.drop(gva, Dropped.FAULT):
            self.exercise(ClientCheck.FAULT)

    def resumed(self, now: float) -> None:
        """The client goes on over another connection; what was said before counts from now on."""
        if self._timer is not None:
            self._timer.heard(now)
        self._kicks = dict.fromkeys(self._kicks, now)

    # --- what the client says ------------------------------------------------------------------------------------

    def refused(self, now: float) -> None:
        """A message was refused: whether the client lives is no question of this."""
        if self._timer is not None:
            self._timer.heard(now)

    def heard(self, body: m.VcpuMessage, now: float) -> None:
        """A message that is legal in its order."""
        if self._timer is not None:
            self._timer.heard(now)
        if isinstance(body, m.Heartbeat):
            return
        self._settle_unasked(body)
        if self._fault is not None and not isinstance(body, m.Exit):
            if self._fault.exits:
                name = type(body).__name__
                self.fail(
                    ClientCheck.FAULT_EXIT, f"{name} after WalkFault for {self._fault.gva:#x}, which exits"
                )
            else:
                self.exercise(ClientCheck.BYPASS)
            self._fault = None
        match body:
            case m.Walk():
                self._walk = body.gva, body.flags
                self.exercise(ClientCheck.WALKS, ClientCheck.ENTRIES)
            case m.Log():
                self.exercise(ClientCheck.CREDITS)
                for access in body.accesses:
                    self._plain(access)
            case m.Load():
                self._value(body.access, _USED, "a Load has USED alone")
                if body.access[4]:
                    self.fail(ClientCheck.ACCESSES, f"the value of a Load is 0, not {body.access[4]:#x}")
            case m.Locked():
                self._value(body.access, _LOCKED, "a Locked has WRITE, USED and LOCKED")
                if body.op is not m.LockedOp.CMPXCHG and body.expected:
                    self.fail(
                        ClientCheck.ACCESSES, f"`expected` of {body.op.value} is 0, not {body.expected:#x}"
                    )
            case m.Exit():
                self._exit(body)
            case _:
                pass

    def _plain(self, access: m.LoggedAccess) -> None:
        flags, gva, _, _, value = access
        if flags & (_LOCKED & ~_WRITE):
            self.fail(ClientCheck.ACCESSES, f"a logged access has flags {flags:#x}")
        if value and not flags & _WRITE:
            self.fail(ClientCheck.ACCESSES, f"the value of a logged load of {gva:#x} is 0, not {value:#x}")
        self._translated(access)

    def _value(self, access: m.LoggedAccess, wanted: int, text: str) -> None:
        if access[0] & _LOCKED != wanted:
            self.fail(ClientCheck.ACCESSES, f"{text}; these are {access[0] & _ACCESS:#x}")
        self._translated(access)

    def _translated(self, access: m.LoggedAccess) -> None:
        flags, gva, pfn, _, _ = access
        self.exercise(ClientCheck.ACCESSES, ClientCheck.TRANSLATIONS, ClientCheck.RIGHTS)
        misuse = self.tlb.misuse(flags, gva, pfn)
        if misuse is None:
            return
        check = ClientCheck.TRANSLATIONS
        if misuse.dropped is not None:
            check = _MISUSES[misuse.dropped]
        elif misuse.rights:
            check = ClientCheck.RIGHTS
        elif (gva >> 12, pfn) in self._late:
            check = ClientCheck.LATE_WALK
        self.fail(check, misuse.text)

    # --- exits ---------------------------------------------------------------------------------------------------

    def _exit(self, body: m.Exit) -> None:
        fault, self._fault = self._fault, None
        match body.reason:
            case m.PageFaultExit():
                self._fault_exit(fault, body.reason)
            case m.EptMisconfigExit():
                if fault is None or not fault.misconfig or fault.gva != body.reason.gpa:
                    self.fail(ClientCheck.FAULT_EXIT, f"{body.reason!r} without such an answer to its walk")
                self._dropped_at(body.reason.gpa)
            case m.InvlpgExit():
                if self.tlb.drop(body.reason.gva, Dropped.INVLPG):
                    self.exercise(ClientCheck.INVLPG)
            case m.ExternalInterruptExit():
                self.exercise(ClientCheck.UNASKED)
                if body.entry not in self._kicks:
                    self._unasked = body.entry
            case _:
                pass
        if self._kicks.pop(body.entry, None) is not None:
            self.exercise(ClientCheck.KICK)
        if not self._attached.vpid and self.tlb.clear_all(Dropped.NO_VPID):
            self.exercise(ClientCheck.NO_VPID)

    def _fault_exit(self, fault: _Fault | None, reason: m.PageFaultExit) -> None:
        self.exercise(ClientCheck.FAULT_EXIT)
        if fault is not None and not fault.exits:
            self.fail(
                ClientCheck.BYPASS,
                f"exits for error code {fault.error_code} at {fault.gva:#x}, which does not exit",
            )
        elif (
            fault is None
            or fault.misconfig
            or (reason.gva, reason.error_code) != (fault.gva, fault.error_code)
        ):
            told = "no fault" if fault is None else f"error code {fault.error_code} at {fault.gva:#x}"
            self.fail(
                ClientCheck.FAULT_EXIT,
                f"exits for error code {reason.error_code} at {reason.gva:#x}; its walk was told: {told}",
            )
        elif (reason.instruction.flags ^ fault.flags) & _WALKED:
            self.fail(
                ClientCheck.FAULT_EXIT,
                f"instruction flags {reason.instruction.flags:#x} after a walk with {fault.flags:#x}",
            )
        self._dropped_at(reason.gva)

    def _dropped_at(self, gva: int) -> None:
        if self.tlb.drop(gva, Dropped.FAULT):
            self.exercise(ClientCheck.FAULT)

    def _settle_unasked(self, body: m.VcpuMessage) -> None:
        """An external interrupt that nobody caused: a vCPU that leaves may say that, too."""
        entry, self._unasked = self._unasked, None
        if entry is not None and not isinstance(body, m.Detach):
            self.fail(
                ClientCheck.UNASKED, f"entry {entry} ended by an external interrupt, and nobody had kicked it"
            )

    # --- time ----------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Looks for what should have come. Call several times per heartbeat interval."""
        for entry, since in list(self._kicks.items()):
            if now - since > self._kick_seconds:
                del self._kicks[entry]
                self.fail(
                    ClientCheck.KICK, f"the kick of entry {entry} was not answered for {now - since:.1f} s"
                )
        if self._timer is not None and self._timer.expired(now):
            self.fail(ClientCheck.HEARTBEAT, f"nothing was heard for {self._timer.silence:.1f} s")
            self._timer = None
