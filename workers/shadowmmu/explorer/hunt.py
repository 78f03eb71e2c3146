"""A hunt: random small guests one after another, until time is up, and every failure told apart by its cause.

Scenario `n` is drawn from the hunt's seed and `n`. What is known when it is executed (the pairs of points that were
seen, and the bugs that were found so often that their fixes are switched in, for every other scenario, so that others
show) is what came of the scenarios up to `n - LAG`, whoever executed them and how fast: so a hunt over so many
scenarios finds the same with any number of processes, and after any number of interruptions.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Final

import msgspec

from shadowmmu.checker import Rule
from shadowmmu.explorer.hunt_look import (
    Caught,
    Cause,
    CauseKind,
    Look,
    Looked,
    Quarry,
    Smaller,
    look_at,
    make_smaller,
)
from shadowmmu.explorer.repro import Repro, ReproError, make_repro

__all__ = ["Finding", "Hunt", "HuntLimit", "HuntState", "HuntStateError"]

LAG: Final = 24
"""Scenarios that are executed before anything is known of the first of them; enough to keep processes busy."""
OFTEN: Final = 3
"""Times that a bug is found before its fix is switched in, or that is passed over which no fix explains."""
FORMAT: Final = 1


class HuntStateError(ValueError):
    """What was kept is of another hunt; the message says in what they differ."""


class HuntLimit(msgspec.Struct, frozen=True):
    """When to stop: after so many seconds, or when so many scenarios were executed in all."""

    seconds: float | None = None
    scenarios: int | None = None


class Finding(msgspec.Struct):
    """Failures of one rule with one cause: how many, and the first of them.

    `scenario` is its number in the hunt, `seconds` when it was found; `size` counts its operations after shrinking,
    None before.
    """

    rule: Rule | None
    cause: Cause
    scenario: int
    seed: int
    seconds: float
    first: Caught
    times: int = 1
    size: int | None = None


class HuntState(msgspec.Struct):
    """Everything that is needed to go on. `waiting`: the scenarios that have begun and are not done, in order."""

    profile: str
    seed: int
    format: int = FORMAT
    scenarios: int = 0
    executions: int = 0
    seconds: float = 0.0
    known: str = "0"
    digest: str = ""
    findings: list[Finding] = []
    waiting: list[Look] = []

    def encode(self) -> bytes:
        """As a file keeps it."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1)

    @classmethod
    def decode(cls, data: bytes, profile: str, seed: int) -> HuntState:
        """What `encode` wrote. Raises HuntStateError."""
        try:
            state = msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, ValueError) as error:
            raise HuntStateError(f"this is no hunt of this version: {error}") from error
        if (state.format, state.profile, state.seed) != (FORMAT, profile, seed):
            raise HuntStateError(
                f"the hunt there is of profile {state.profile}, seed {state.seed} (format {state.format})"
            )
        return state


class Hunt:
    """Goes on with a hunt from `state`; `clock` tells the seconds.

    `executor` runs things in processes; without one everything is done here. `keep` is called with each new finding's
    number, repro and shrunk scenario.
    """

    def __init__(
        self,
        state: HuntState,
        executor: Executor | None,
        clock: Callable[[], float],
        keep: Callable[[int, Repro], None],
    ) -> None:
        self.state = state
        self._executor = executor
        self._clock = clock
        self._keep = keep
        self._pending: deque[tuple[Look, Future[Looked] | None]] = deque()
        self._shrinking: list[Future[Smaller]] = []
        self._index = {(f.rule, f.cause): n for n, f in enumerate(state.findings)}
        self._bugs: Counter[tuple[str, ...]] = Counter()
        for finding in state.findings:
            self._bugs[finding.cause.fixes] += finding.times

    # --- drawing scenarios ---------------------------------------------------------------------------------------

    def _look(self, number: int) -> Look:
        """Scenario `number`, with what is known now."""
        draw = random.Random(f"hunt {self.state.seed} {number}")
        seed = draw.randrange(1 << 40)
        profile = self.state.profile
        if draw.random() < 0.5:
            often = {slug for fixes, times in self._bugs.items() if times >= OFTEN for slug in fixes}
            profile += "".join(f"+{slug}" for slug in sorted(often))
        unexplained = tuple(
            finding.cause
            for finding in self.state.findings
            if finding.cause.kind is CauseKind.UNKNOWN and finding.times >= OFTEN
        )
        return Look(number, seed, profile, self.state.known, unexplained)

    def _begin(self, look: Look) -> None:
        self._pending.append((look, None if self._executor is None else self._executor.submit(look_at, look)))

    # --- going on ------------------------------------------------------------------------------------------------

    def run(self, limit: HuntLimit, progress: Callable[[Hunt], bool]) -> None:
        """Goes on until the limit; or until `progress`, called after each scenario, says False."""
        state = self.state
        for look in state.waiting or [self._look(number) for number in range(LAG)]:
            self._begin(look)
        state.waiting = [look for look, _ in self._pending]
        for number, finding in enumerate(state.findings):
            if finding.size is None:
                self._shrink(number)
        begin = self._clock() - state.seconds
        end = None if limit.seconds is None else self._clock() + limit.seconds
        while limit.scenarios is None or state.scenarios < limit.scenarios:
            looked = self._next(end)
            if looked is None:
                break
            state.seconds = self._clock() - begin
            self._note(looked)
            self._collect_shrunk()
            if not progress(self):
                break
        for _, future in self._pending:
            if future is not None:
                future.cancel()

    def finish(self) -> None:
        """Waits for what is being shrunk."""
        self._collect_shrunk(wait=True)

    def _next(self, end: float | None) -> Looked | None:
        """What came of the next scenario; None if time is up before."""
        left = None if end is None else end - self._clock()
        if left is not None and left <= 0:
            return None
        look, future = self._pending[0]
        try:
            looked = look_at(look) if future is None else future.result(left)
        except FutureTimeoutError:
            return None
        self._pending.popleft()
        return looked

    def _note(self, looked: Looked) -> None:
        state = self.state
        state.scenarios += 1
        state.executions += looked.executions
        state.known = f"{int(state.known, 16) | int(looked.pairs, 16):x}"
        caught = looked.caught
        if caught is not None:
            self._found(looked, caught)
        state.digest = hashlib.blake2b(
            state.digest.encode() + msgspec.json.encode(looked), digest_size=16
        ).hexdigest()
        self._begin(self._look(looked.number + LAG))
        state.waiting = [look for look, _ in self._pending]

    def _found(self, looked: Looked, caught: Caught) -> None:
        findings = self.state.findings
        self._bugs[caught.cause.fixes] += 1
        number = self._index.setdefault((caught.rule, caught.cause), len(findings))
        if number < len(findings):
            findings[number].times += 1
            return
        findings.append(
            Finding(caught.rule, caught.cause, looked.number, looked.seed, self.state.seconds, caught)
        )
        self._shrink(number)

    # --- making findings smaller ---------------------------------------------------------------------------------

    def _shrink(self, number: int) -> None:
        finding = self.state.findings[number]
        if finding.cause.kind is CauseKind.CRASH:
            return
        quarry = Quarry(number, finding.first)
        if self._executor is None:
            self._shrunk(make_smaller(quarry))
        else:
            self._shrinking.append(self._executor.submit(make_smaller, quarry))

    def _collect_shrunk(self, *, wait: bool = False) -> None:
        done = [future for future in self._shrinking if wait or future.done()]
        for future in done:
            self._shrinking.remove(future)
            self._shrunk(future.result())

    def _shrunk(self, smaller: Smaller) -> None:
        self.state.findings[smaller.number].size = smaller.scenario.size
        try:
            repro = make_repro(smaller.scenario, smaller.profile, smaller.schedule)
        except ReproError:
            return
        self._keep(smaller.number, repro)
