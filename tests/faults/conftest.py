"""Runs of real processes into which the tests put faults."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from shadowmmu.cli.chaos import proofs
from shadowmmu.client import Security
from shadowmmu.coordinator import Coordinator, RunReport, RunSettings
from shadowmmu.coordinator.chaos import Fault
from shadowmmu.coordinator.chaos_run import ChaosResult, run_chaos
from shadowmmu.coordinator.commands import Commands, free_port, loopback
from shadowmmu.coordinator.processes import Child, Children
from shadowmmu.coordinator.report import RecoveryReport
from shadowmmu.protocol.messages import RunConfig, Verdict

OPS = 20_000
SLOW_OPS = 5_000
LIMIT_SECONDS = 240.0

Faulty = Callable[..., Awaitable[ChaosResult]]


def settings(**config: object) -> RunSettings:
    return RunSettings(config=RunConfig(**{"ops": OPS, "seed": 3, **config}), vcpus=2, hosts=1)  # type: ignore[arg-type]


@pytest.fixture
def faulty(tmp_path: Path) -> Faulty:
    """Runs with these faults to the end, and demands that nothing was lost and nothing done twice."""

    async def run(*faults: Fault) -> ChaosResult:
        with (tmp_path / "children.log").open("ab", buffering=0) as log:
            result = await run_chaos(settings(), tmp_path, log, faults, limit_seconds=LIMIT_SECONDS)
        assert [one.fault for one in result.happened if one.seconds is None] == [], "not due in time"
        assert proofs(result, tmp_path) == (0, 0, [])
        return result

    return run


def recovery_of(result: ChaosResult, name: str) -> RecoveryReport:
    """How the process of that name was missed, and came back."""
    assert result.report is not None
    return next(one for one in result.report.recoveries if one.name == name and one.back is not None)


async def run_through(
    folder: Path,
    coordinator_between: Callable[[str], str],
    mmu_between: Callable[[str], str],
) -> tuple[RunReport, list[str]]:
    """A run without restarts, whose members reach the services through what stands in between.

    The callables take a service's address and give the one to connect to. Returns the report, and how children ended that
    did not end in order.
    """
    wanted = settings(ops=SLOW_OPS)
    ended: list[str] = []

    def on_end(child: Child) -> None:
        if child.process.returncode != 0 and not coordinator.finished:
            ended.append(child.describe_end())
            coordinator.fail(child.describe_end())

    coordinator = Coordinator(wanted)
    with (folder / "children.log").open("ab", buffering=0) as log:
        async with coordinator, Children(log, on_end) as children:
            mmu = loopback(free_port())
            commands = Commands(
                coordinator=coordinator_between(coordinator.bind("tcp://127.0.0.1:*")),
                mmu_bind=mmu,
                mmu_advertise=mmu_between(mmu),
                directory=folder,
                log_format="console",
                security=Security(),
            )
            await children.start("mmu", commands.mmu())
            await children.start("host-0", commands.host("host-0"))
            for name in ("worker-0", "worker-1"):
                await children.start(name, commands.vcpu(name))
            report = await coordinator.run()
            await children.wait(5.0)
    return report, ended


def assert_whole(report: RunReport, folder: Path) -> None:
    """The run passed, and its journal proves that nothing was lost and nothing done twice."""
    assert report.verdict is Verdict.PASS, report.text
    result = ChaosResult(
        began=0.0, report=report, happened=[], restarts=[], seconds=0.0, hung=False, given_up=[]
    )
    assert proofs(result, folder) == (0, 0, [])
