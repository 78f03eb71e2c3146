"""The life of a worker process, as a member of a run.

    join the coordinator -> attach to the MMU service -> ready -> start -> work -> drain -> detach -> report -> end

What the worker does at the MMU service is its *part*; this module gets it through the run. From everywhere there are
other ways out: a signal, the end of the run, a part that failed, a coordinator that could not be reached again for a
minute (until then it is waited for: the work goes on). All of them leave the MMU service
in order if that is still possible, tell the coordinator if it still listens, and are bounded in time. A worker that has
failed stays a member until the run is finished, so that whoever watches for processes that end (Compose) sees the
coordinator end first. The exit status says which way it was:

    0       the run is finished, or the coordinator was gone after we had reported
    2       something went wrong: the log and the report's `info["error"]` say what
    128+n   signal n
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, Final, Protocol, TypeVar

import msgspec
import structlog

from shadowmmu.client import MemberClient, Security, ServiceError, SessionEnded, key_role
from shadowmmu.protocol.errors import ErrorCode, ProtocolError
from shadowmmu.protocol.heartbeat import MISSED_LIMIT
from shadowmmu.protocol.messages import Joined, Role
from shadowmmu.protocol.states import COORDINATOR

__all__ = ["LifeOptions", "Part", "take_part"]

OK: Final = 0
FAILED: Final = 2
SIGNALLED: Final = 128

PROGRESS_SECONDS: Final = 0.25
LINGER_SECONDS: Final = 1.0
"""For the last messages to leave a socket."""
TEXT_LIMIT: Final = 1000

T = TypeVar("T")
_Stop = asyncio.Future[signal.Signals]


class LifeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker takes part in a run. Times in seconds.

    `coordinator`: its ZeroMQ address; `name`: for people and logs. `join_seconds`: longest wait for the coordinator's
    welcome (it comes when the MMU service is known); `attach_seconds`: for that of the MMU service; `leave_seconds`:
    for finishing what is under way and detaching at the end of a run; `stop_seconds`: the same once something else
    ended us (a signal, a lost coordinator); `finish_seconds`: for the end of the run, once we have failed and said so;
    `linger_seconds`: to stay after the end, for a supervisor that ends a run when its first process ends (Compose) and
    is to see the coordinator end first. `missed`: heartbeats in a row that others may leave out. `security`: the keys.
    `patience_seconds`: of silence of the MMU service, until it is given up.
    """

    coordinator: str
    name: str
    join_seconds: float = 90.0
    attach_seconds: float = 30.0
    leave_seconds: float = 20.0
    stop_seconds: float = 2.0
    finish_seconds: float = 60.0
    linger_seconds: float = 0.0
    missed: int = MISSED_LIMIT
    patience_seconds: float = 60.0
    security: Security = Security()


class Part(Protocol):
    """What a worker does at the MMU service. The events are set once and stay."""

    attached: asyncio.Event
    done: asyncio.Event  # our share of the run's work is done
    ended: asyncio.Event  # by `leave`, or by a failure

    @property
    def vcpu(self) -> int | None:
        """The vCPU's number, for those that are one."""
        ...

    @property
    def token(self) -> bytes:
        """What the MMU service gave a vCPU: who has it may go on with its program."""
        ...

    @property
    def failure(self) -> str | None:
        """Why it ended, if not in order."""
        ...

    def open(self) -> None:
        """Connects and attaches."""
        ...

    def start(self, vcpus: int) -> None:
        """The run begins."""
        ...

    def leave(self) -> None:
        """Finishes what is under way, and detaches. Also before the start."""
        ...

    def abandon(self, text: str) -> None:
        """Leaves at once; `text` says why."""
        ...

    async def close(self, linger: float) -> None:
        """Closes the connection; what waits in it has `linger` seconds to leave."""
        ...

    def counters(self) -> dict[str, int]: ...

    def histograms(self) -> dict[str, str]: ...


class _Over(Exception):  # noqa: N818 (no error: it is how the worker ended)
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


async def take_part(options: LifeOptions, role: Role, make_part: Callable[[Joined], Part]) -> int:
    """Takes part in one run; returns the exit status. Takes over SIGTERM and SIGINT meanwhile."""
    log = structlog.get_logger(__name__).bind(worker=options.name)
    with _stop_signals() as stop:
        try:
            member = await _join(options, role, stop)
            log.info("joined", member=member.joined.member, mmu=member.joined.mmu_endpoint)
            over = await _live(options, member, make_part, stop, log)
        except _Over as reason:
            over = reason
        if options.linger_seconds > 0.0 and not stop.done():
            await _first((stop,), options.linger_seconds)
    (log.error if over.status == FAILED else log.info)("ended", status=over.status, text=over.text)
    return over.status


async def _join(options: LifeOptions, role: Role, stop: _Stop) -> MemberClient:
    joining = MemberClient.join(
        options.coordinator,
        role,
        name=options.name,
        timeout=options.join_seconds,
        missed=options.missed,
        security=options.security.client(key_role(role), COORDINATOR),
    )
    try:
        return await _unless_stopped(joining, stop)
    except ServiceError as error:
        raise _Over(FAILED, f"could not join the run at {options.coordinator}: {error}") from error


async def _live(
    options: LifeOptions, member: MemberClient, make_part: Callable[[Joined], Part], stop: _Stop, log: Any
) -> _Over:
    """Everything after the join, to the end; says how it ended."""
    life: _Life | None = None
    try:
        try:
            life = _Life(options, member, make_part(member.joined), stop, log)
            await life.course()
        except _Over as reason:
            over = reason
        except (ServiceError, ProtocolError) as error:
            over = _Over(FAILED, f"lost the coordinator: {error}")
        except Exception as error:  # a defect; the coordinator is to hear of it all the same
            log.exception("the worker failed")
            over = _Over(FAILED, f"the worker failed: {error!r}")
        else:
            over = _Over(OK, "the run is finished")
        if life is not None:
            await life.leave_early(over)
    finally:
        if life is not None:
            await life.close()
        await member.close(LINGER_SECONDS)
    return over


class _Life:
    """The life of a worker that has joined a run."""

    def __init__(self, options: LifeOptions, member: MemberClient, part: Part, stop: _Stop, log: Any) -> None:
        self._options = options
        self._member = member
        self._part = part
        self._log = log
        self._reported = False
        # What is waited for, each true once and for ever.
        self._stop = stop
        self._attached = asyncio.create_task(part.attached.wait())
        self._done = asyncio.create_task(part.done.wait())
        self._ended = asyncio.create_task(part.ended.wait())
        self._started = asyncio.create_task(member.started())
        self._drained = asyncio.create_task(member.drain.wait())
        self._membership = asyncio.create_task(member.finished())

    async def close(self) -> None:
        tasks = (self._attached, self._done, self._ended, self._started, self._drained, self._membership)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._part.close(LINGER_SECONDS)

    # --- the usual course ----------------------------------------------------------------------------------------

    async def course(self) -> None:
        """From the attachment to the end of the run. Raises _Over if something else ends us."""
        await self._get_ready()
        await self._work()
        await self._leave()
        await self._until(self._membership)

    async def _get_ready(self) -> None:
        self._part.open()
        if not await self._until(self._attached, self._drained, timeout=self._options.attach_seconds):
            address, seconds = self._member.joined.mmu_endpoint, self._options.attach_seconds
            raise _Over(FAILED, f"the MMU service at {address} did not take us in within {seconds:g} s")
        if not self._drained.done():
            self._log.info("attached", vcpu=self._part.vcpu)
            self._member.ready(self._part.vcpu, self._part.token)

    async def _work(self) -> None:
        await self._until(self._started, self._drained)
        if self._member.start is None:
            return
        self._part.start(self._member.start.vcpus)
        told_done = False
        while not self._drained.done():
            if told_done:
                await self._until(self._drained, timeout=PROGRESS_SECONDS)
            else:
                await self._until(self._done, self._drained, timeout=PROGRESS_SECONDS)
            told_done = self._done.done()
            self._member.progress(self._part.counters(), done=told_done)

    async def _leave(self) -> None:
        self._part.leave()
        if not await self._until(self._ended, timeout=self._options.leave_seconds):
            seconds = self._options.leave_seconds
            raise _Over(FAILED, f"could not leave the MMU service in order within {seconds:g} s")
        self._report({})

    def _report(self, info: dict[str, str]) -> None:
        self._reported = True
        self._member.report(self._part.counters(), self._part.histograms(), info)

    # --- the other ways out --------------------------------------------------------------------------------------

    async def leave_early(self, over: _Over) -> None:
        """Leaves the MMU service and tells the coordinator, as far as that is still possible."""
        if not self._part.ended.is_set():
            self._part.leave()
            await _first((self._ended,), self._options.stop_seconds)
            self._part.abandon(over.text)
        if over.status == OK or self._reported or self._member.error is not None:
            return
        with contextlib.suppress(ServiceError, ProtocolError):
            self._report({"error": over.text[:TEXT_LIMIT]})
        if not self._stop.done():
            await _first((self._membership, self._stop), self._options.finish_seconds)

    async def _until(self, *wanted: asyncio.Task[Any], timeout: float | None = None) -> bool:
        """Waits until one of these is true; False after `timeout` seconds. Raises _Over if something ends us."""
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        while True:
            self._check()
            if any(task.done() for task in wanted):
                return True
            left = None if deadline is None else deadline - loop.time()
            if left is not None and left <= 0:
                return False
            enders: tuple[asyncio.Future[Any], ...] = (self._stop, self._ended, self._membership)
            await _first((*wanted, *(ender for ender in enders if not ender.done())), left)

    def _check(self) -> None:
        if self._stop.done():
            raise _signalled(self._stop)
        failure = self._part.failure
        if failure is not None:
            raise _Over(FAILED, failure)
        error = self._member.error
        if error is None:
            return
        if isinstance(error, SessionEnded) and error.code == ErrorCode.RUN_FINISHED:
            raise _Over(OK, f"the run is finished: {error.text}")
        if self._reported:
            raise _Over(OK, "the coordinator is gone; we had reported")
        raise _Over(FAILED, f"lost the coordinator: {error}")


async def _first(futures: Iterable[asyncio.Future[Any]], timeout: float | None = None) -> None:
    """Waits until one of them is done, for at most `timeout` seconds."""
    await asyncio.wait(futures, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)


# --- signals -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """A future that the first SIGTERM or SIGINT fulfils."""
    loop = asyncio.get_running_loop()
    stop: _Stop = loop.create_future()

    def stopped(signum: signal.Signals) -> None:
        if not stop.done():
            stop.set_result(signum)

    signals = (signal.SIGTERM, signal.SIGINT)
    for signum in signals:
        loop.add_signal_handler(signum, stopped, signum)
    try:
        yield stop
    finally:
        for signum in signals:
            loop.remove_signal_handler(signum)


def _signalled(stop: _Stop) -> _Over:
    signum = stop.result()
    return _Over(SIGNALLED + signum, f"stopped by {signum.name}")


async def _unless_stopped(work: Coroutine[Any, Any, T], stop: _Stop) -> T:
    task = asyncio.create_task(work)
    await _first((task, stop))
    if not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, ServiceError):
            await task
        raise _signalled(stop)
    return task.result()
