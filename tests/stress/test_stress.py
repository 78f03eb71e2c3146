"""The command itself: real processes, real sockets, every workload, every detector."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shadowmmu.kvm import COUNTERS
from shadowmmu.protocol import messages as m

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]

COMMAND = [sys.executable, "-m", "shadowmmu.cli"]
PASS, VIOLATED, UNKNOWN = 0, 1, 2


def stress(directory: Path, **options: object) -> tuple[int, dict[str, Any]]:
    """Runs `shadowmmu stress` to its end; its exit status and its report. True and False switch an option."""
    arguments = [_option(name.replace("_", "-"), value) for name, value in options.items()]
    done = subprocess.run(
        [*COMMAND, "stress", f"--out={directory}", *arguments], capture_output=True, timeout=280, check=False
    )
    assert done.returncode in (PASS, VIOLATED, UNKNOWN), done.stderr.decode()[-2000:]
    return done.returncode, json.loads((directory / "report.json").read_text())


def _option(name: str, value: object) -> str:
    match value:
        case True:
            return f"--{name}"
        case False:
            return f"--no-{name}"
        case _:
            return f"--{name}={value}"


def replay(directory: Path) -> int:
    return subprocess.run(
        [*COMMAND, "replay", str(directory)], capture_output=True, timeout=280, check=False
    ).returncode


@pytest.mark.parametrize("vcpus, workload", [(1, "anon"), (2, "fork"), (8, "mixed"), (4, "sloppy")])
def test_a_run_passes_and_replays_to_its_digest(tmp_path: Path, vcpus: int, workload: str) -> None:
    status, report = stress(tmp_path, vcpus=vcpus, workload=workload, ops=12_000, seed=3)
    assert status == PASS, report["text"]
    assert report["vcpus"] == vcpus
    assert replay(tmp_path) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "pae"},
        {"mode": "paging32"},
        {"mode": "nonpaging"},
        {"mode": "mixed"},
        {"tdp": "ept"},
        {"tdp": "npt"},
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_every_paging_mode_passes_and_replays(tmp_path: Path, options: dict[str, str]) -> None:
    status, report = stress(tmp_path, vcpus=3, ops=12_000, seed=5, **options)
    assert status == PASS, report["text"]
    assert report["config"]["workload"] == "modes"
    assert report["counters"]["exits.page_fault"] > 0
    assert replay(tmp_path) == 0


@pytest.mark.parametrize("bypass", [True, False])
def test_the_kernel_before_the_patch_passes_with_and_without_bypassed_faults(
    tmp_path: Path, bypass: bool
) -> None:
    status, report = stress(
        tmp_path, vcpus=3, ops=12_000, seed=5, profile="pre-patch+fixed", bypass_guest_pf=bypass
    )
    assert status == PASS, report["text"]
    faults = report["page_faults"]
    assert faults["bypass_guest_pf"] is bypass
    assert (faults["bypassed"] > 0) is bypass
    assert (faults["notrap"]["prefetched"] > 0) is bypass
    assert faults["exits"]["page_fault"] > 0
    assert replay(tmp_path) == 0


def coverage(report: dict[str, Any]) -> tuple[int, set[str]]:
    """How many scheduling points were reached, and those at which no operation, or no store, of another vCPU fell."""
    points = [
        point for point in report["coverage"]["points"] if point["kind"] == "scheduling" and point["reached"]
    ]
    return len(points), {point["name"] for point in points if not (point["operations"] and point["stores"])}


def test_a_mixed_run_raises_every_counter_of_the_kernel(tmp_path: Path) -> None:
    status, report = stress(tmp_path, vcpus=4, workload="mixed", ops=200_000, seed=7)
    assert status == PASS, report["text"]
    counters = report["counters"]
    # lpages and mmu_unsync go up and down: their highest values count.
    raised = {name: counters.get(f"kvm.{name}", counters.get(f"kvm.{name}.highest", 0)) for name in COUNTERS}
    assert [name for name, value in raised.items() if not value] == []
    assert counters["tlbs_dirty.raised"] and counters["tlbs_dirty.cleared"]
    reached, missing = coverage(report)
    assert reached > 20
    assert missing == set()
    assert replay(tmp_path) == 0


def test_audits_after_every_operation_find_nothing(tmp_path: Path) -> None:
    status, report = stress(tmp_path, vcpus=2, workload="mixed", ops=4_000, seed=1, audit="always")
    assert status == PASS, report["text"]


# Where each defect shows soonest. One run may miss it: what matters is that it is found at all. The fourth defect takes
# many runs; tests/machine looks for it in process.
MUTANTS: dict[m.Mutant, dict[str, object]] = {
    m.Mutant.FLUSH_NOT_AWAITED: {"workload": "mixed"},
    m.Mutant.ENTRY_FLUSH_SKIPPED: {"workload": "mixed"},
    m.Mutant.ANSWER_BEFORE_LOG: {"workload": "mixed", "host_rate": 30, "park_rate": 0.2},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_mutant_ends_a_run_as_violated(tmp_path: Path, mutant: m.Mutant) -> None:
    statuses = []
    for seed in range(12):
        status, report = stress(
            tmp_path / str(seed), vcpus=4, ops=200_000, seed=seed, mutant=mutant.value, **MUTANTS[mutant]
        )
        statuses.append(status)
        if status == VIOLATED:
            assert report["violation"]["journal_record"] > 0
            return
    pytest.fail(f"not found: {statuses}")
