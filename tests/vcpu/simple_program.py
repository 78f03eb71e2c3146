"""A guest program that needs no memory of its own: for tests of the worker around the processor.

As a script it is a worker process whose vCPU executes this program: `python simple_program.py ADDRESS [OPTIONS]`,
options of the worker as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys

from shadowmmu.cpu.program import Halt, Invlpg, Op, Touch, Touches, UsedLoad
from shadowmmu.protocol.messages import RunConfig
from shadowmmu.vcpu import WorkerOptions, run_worker, worker

BASE = 0x400000
PAGES = 24


class SimpleProgram:
    """Stores and loads on a few pages, now and then a load whose value is used and an INVLPG; halts when idle."""

    def __init__(self) -> None:
        self._round = 0
        self._idle = False
        self._op: Op | None = None

    def fetch(self) -> Op:
        op = self._op
        if op is None or (isinstance(op, Touches) and op.position == len(op.items)):
            self._op = op = self._next()
        return op

    def _next(self) -> Op:
        if self._idle:
            return Halt()
        self._round += 1
        match self._round % 8:
            case 0:
                return Invlpg(BASE + 0x1000 * (self._round // 8 % PAGES))
            case 4:
                return UsedLoad(BASE + 0x1000 * (self._round % PAGES))
            case _:
                items: list[Touch] = [
                    (n & 1, BASE + 0x1000 * ((self._round + n) % PAGES) + 8 * n, 8, n & 1 and self._round)
                    for n in range(40)
                ]
                return Touches(items)

    def retire(self, value: int) -> None:
        self._op = None

    def interrupt(self, vector: int) -> None:
        pass

    def page_fault(self, error_code: int, cr2: int) -> None:
        raise AssertionError("nobody injects faults here")

    def general_protection(self) -> None:
        raise AssertionError("no register is written here")

    def idle(self) -> None:
        self._idle = True
        self._op = None

    def state(self) -> bytes:
        return b""

    def restore(self, data: bytes) -> None:
        pass

    def counters(self) -> dict[str, int]:
        return {"rounds": self._round}


def install() -> None:
    """Makes the worker's processors execute this program."""

    def make_program(config: RunConfig, vcpu: int, vcpus: int) -> SimpleProgram:
        return SimpleProgram()

    worker.make_program = make_program  # type: ignore[attr-defined]


if __name__ == "__main__":
    install()
    address, *more = sys.argv[1:]
    options = WorkerOptions(coordinator=address, **(json.loads(more[0]) if more else {}))
    sys.exit(asyncio.run(run_worker(options)))
