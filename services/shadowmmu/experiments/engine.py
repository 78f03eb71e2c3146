"""The sweep engine: runs that are pending go to an executor, their rows to the folder as they come.

The executor is anybody's: a pool of threads here, each with a child process (`local_workplace`), or a Dask cluster
(`dask_workplace`). Who runs what when is their affair.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from shadowmmu.experiments.design import Run
from shadowmmu.experiments.folder import SweepWriter
from shadowmmu.experiments.isolation import COMMAND, Children, execute
from shadowmmu.experiments.point import Job, Outcome
from shadowmmu.experiments.table import Status, row_of

if TYPE_CHECKING:
    from distributed.security import Security

__all__ = [
    "ClusterError",
    "Execute",
    "Progress",
    "SweepResult",
    "Workplace",
    "dask_workplace",
    "local_workplace",
    "run_sweep",
]

LOOK_EVERY: Final = 0.2
"""Seconds between two looks at whether to stop."""
CONNECT_SECONDS: Final = 15
QUEUED: Final = 512
"""Runs that a cluster has in its queue, so that one that grows with its queue does."""

Execute = Callable[[Job], Outcome]


class ClusterError(RuntimeError):
    """The cluster cannot be reached, or is gone, or no process can be started here. What had come is kept."""


class Workplace(NamedTuple):
    """Where runs are made: an executor, how many it is given at a time, and what it calls for each."""

    executor: Executor
    window: int
    execute: Execute


class Progress(NamedTuple):
    """How far a sweep is. `done` of `total` runs have ended, `failed` of them badly, also in earlier goes."""

    total: int
    done: int
    failed: int


class SweepResult(NamedTuple):
    """What a go at a sweep has come to.

    `ran`: runs that were made now, `failed`: all that have failed, `left`: those that have not ended. `digest`: of the
    table.
    """

    ran: int
    failed: int
    left: int
    digest: str


@contextlib.contextmanager
def local_workplace(jobs: int, command: tuple[str, ...] = COMMAND) -> Iterator[Workplace]:
    """`jobs` processes on this machine, started by `command`. What is under way at the end is killed."""
    children = Children(command)
    executor = ThreadPoolExecutor(jobs, thread_name_prefix="sweep")
    try:
        yield Workplace(executor, 2 * jobs, children.execute)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        children.close()
        executor.shutdown(wait=True)


@contextlib.contextmanager
def dask_workplace(address: str) -> Iterator[Workplace]:
    """The cluster of the Dask scheduler at an address. Raises ClusterError if there is none."""
    from distributed import Client  # noqa: PLC0415 - loads a lot, for this alone
    from distributed.security import Security  # noqa: PLC0415 - as above

    security = Security()  # type: ignore[no-untyped-call] # certificates are in Dask's configuration
    try:
        asyncio.run(_reach(address, security))  # a client that cannot connect does not let go for a long time
        client: Any = Client(address, security=security, timeout=CONNECT_SECONDS, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, TypeError, ImportError) as error:
        # TypeError is for no certificates, ImportError for a transport that is not installed.
        raise ClusterError(f"there is no Dask scheduler at {address}: {str(error) or 'no answer'}") from error
    with client:
        executor = client.get_executor(pure=False)
        try:
            yield Workplace(executor, QUEUED, execute)
        finally:
            executor.shutdown(wait=False)


async def _reach(address: str, security: Security) -> None:
    """Connects with what must be a Dask scheduler. Raises OSError, ValueError, TypeError or ImportError."""
    from distributed.comm.core import connect  # noqa: PLC0415 - as above

    tls: Any = security.get_connection_args("client")  # type: ignore[no-untyped-call]
    comm: Any = await asyncio.wait_for(connect(address, timeout=CONNECT_SECONDS, **tls), CONNECT_SECONDS)  # type: ignore[no-untyped-call]
    comm.abort()


def run_sweep(
    writer: SweepWriter,
    workplace: Workplace,
    *,
    retry_failed: bool = False,
    limit: int | None = None,
    progress: Callable[[Progress], None] = lambda _progress: None,
    stopped: Callable[[], bool] = lambda: False,
) -> SweepResult:
    """Makes the pending runs of a sweep (at most `limit`), and puts all that is known into its table.

    `progress` is called when something has ended, `stopped` now and then: if it says True, what is under way is given
    up. Raises ClusterError when the cluster is gone; then the rows so far are on disk, but not in the table.
    """
    runs = writer.pending(retry_failed=retry_failed)
    total = writer.sweep.runs
    failed_before = 0 if retry_failed else writer.sweep.failures().height
    going = _Going(writer, workplace, runs[:limit])
    progress(Progress(total, total - len(runs), failed_before))
    try:
        while going.goes_on() and not stopped():
            if going.collect():
                progress(Progress(total, total - len(runs) + going.ran, failed_before + going.failed))
    finally:
        going.give_up()
        writer.flush()
    digest = writer.compact()
    table = writer.sweep.table()
    failed = sum(status == Status.FAILED.value for status in table["status"])
    return SweepResult(going.ran, failed, total - table.height, digest)


class _Going:
    """Runs that are under way, and those that wait."""

    def __init__(self, writer: SweepWriter, workplace: Workplace, runs: list[Run]) -> None:
        self._writer = writer
        self._workplace = workplace
        self._waiting = iter(runs)
        self._under_way: dict[Future[Outcome], Run] = {}
        self.ran = 0
        self.failed = 0
        self._fill()

    def _fill(self) -> None:
        spec, code = self._writer.sweep.spec, self._writer.sweep.code
        while len(self._under_way) < self._workplace.window:
            run = next(self._waiting, None)
            if run is None:
                return
            job = Job(spec.kind, run.point.parameters, run.seed, spec.timeout, code)
            self._under_way[self._workplace.executor.submit(self._workplace.execute, job)] = run

    def goes_on(self) -> bool:
        return bool(self._under_way)

    def collect(self) -> bool:
        """Waits a while, and takes what has ended; False if nothing has. Raises ClusterError."""
        done, _ = wait(self._under_way, LOOK_EVERY, FIRST_COMPLETED)
        for future in done:
            row = row_of(self._under_way.pop(future), self._kept(_outcome(future)))
            self.ran += 1
            self.failed += row["status"] == Status.FAILED.value
            self._writer.add(row)
        self._writer.flush_now_and_then()
        self._fill()
        return bool(done)

    def _kept(self, outcome: Outcome) -> Outcome:
        if outcome.metrics is None:
            return outcome
        keeps = self._writer.sweep.spec.keeps
        return Outcome({name: value for name, value in outcome.metrics.items() if keeps(name)})

    def give_up(self) -> None:
        for future in self._under_way:
            future.cancel()


def _outcome(future: Future[Outcome]) -> Outcome:
    try:
        return future.result()
    except CancelledError as error:
        raise ClusterError("the cluster has gone, or has cancelled what it was asked for") from error
    except Exception as error:
        if type(error).__name__ == "KilledWorker":  # distributed's, which may not be installed
            return Outcome(error=f"the Dask workers that had this run died: {error}")
        raise ClusterError(f"runs cannot be made: {type(error).__name__}: {error}") from error
