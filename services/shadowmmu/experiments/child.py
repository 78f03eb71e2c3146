"""The process in which the runs of a sweep are made: `python -m shadowmmu.experiments.child`, of `isolation`.

Its standard input is a socket, from which it takes jobs and to which it writes outcomes; it makes one run at a time.
When its parent is gone, it ends at once, with whatever the run has started.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, Final

import msgspec

from shadowmmu.experiments.point import Job, Outcome, run_point
from shadowmmu.experiments.values import Metric
from shadowmmu.machine.version import code_version

__all__ = ["READY", "serve"]

READY: Final = b"ready"
ERROR_LENGTH: Final = 2000
TRACEBACK_LENGTH: Final = 4000
LARGEST: Final = (1 << 63) - 1


def serve(run: Callable[[Job], Mapping[str, Metric]]) -> None:
    """Makes runs until the parent is gone. Does not return."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    parent = _parent()
    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
    threading.Thread(target=_read_jobs, args=(parent, jobs), daemon=True).start()
    try:
        parent.send_bytes(READY)
        while True:
            parent.send_bytes(msgspec.msgpack.encode(_outcome(run, jobs.get())))
    except OSError:
        _end()


def _parent() -> Connection[Any, Any]:
    """The connection, which no run can read from, and no process that a run starts keeps open."""
    parent: Connection[Any, Any] = Connection(os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return parent


def _read_jobs(parent: Connection[Any, Any], jobs: queue.SimpleQueue[Job]) -> None:
    decoder = msgspec.msgpack.Decoder(Job)
    try:
        while True:
            jobs.put(decoder.decode(parent.recv_bytes()))
    finally:
        _end()


def _end() -> None:
    """Ends this process and, if it leads a group of its own as `isolation` has it, all of that group."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def _outcome(run: Callable[[Job], Mapping[str, Metric]], job: Job) -> Outcome:
    try:
        here = code_version()
        if job.code != here:
            raise RuntimeError(
                f"the version of the program is {here} here, {job.code} where the sweep was begun"
            )
        metrics = dict(run(job))
        for name, value in metrics.items():
            if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
                raise OverflowError(f"metric {name} = {value} needs more than 64 bits")
        return Outcome(metrics)
    except Exception as error:  # noqa: BLE001 - a failure of the run, whatever it is
        text = "".join(traceback.format_exception_only(error)).strip()
        return Outcome(None, text[:ERROR_LENGTH], traceback.format_exc()[-TRACEBACK_LENGTH:])


if __name__ == "__main__":
    serve(run_point)
