"""check-client passes clients that are right, and finds what is wrong with those that are not."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from shadowmmu.protocol_check import ClientCheck, ClientLimits, Outcome, check_client
from shadowmmu.protocol_check.scene import Scene
from shadowmmu.protocol_check.scenes import SCENES
from tests.protocol_check.tiny_client import BROKEN

TINY = Path(__file__).with_name("tiny_client.py")
LIMITS = ClientLimits(attach=1.2, scene=1.0, kick=0.5, leave=1.0)
BY_NAME = {scene.name: scene for scene in SCENES}

FOUND: dict[str, tuple[str, str]] = {
    # broken how: by which check, in which scene besides the ordinary one
    "no-numbers": ("client.numbers", ""),
    "skips-a-number": ("client.numbers", ""),
    "wrong-version-frame": ("client.framing", ""),
    "three-frames": ("client.framing", ""),
    "heartbeat-before-welcome": ("client.attach", ""),
    "entry-from-zero": ("client.entries", ""),
    "walks-not-numbered": ("client.walks", ""),
    "acts-on-repetitions": ("client.repeated", "everything twice"),
    "does-not-resume": ("client.resume", "lost connections"),
    "resumes-with-a-wrong-count": ("client.resume", "lost connections"),
    "forgets-what-was-lost": ("client.resume", "lost connections"),
    "repeats-what-was-not-lost": ("client.resume", "lost connections"),
    "two-walks": ("client.order", "slow service"),
    "ignores-flush": ("client.tlb.flush", ""),
    "ignores-no-vpid": ("client.tlb.no-vpid", "no VPID"),
    "invlpg-keeps": ("client.tlb.invlpg", "precise INVLPG"),
    "ignores-rights": ("client.rights", ""),
    "ignores-processor": ("client.tlb.processor", "new processors"),
    "ignores-kicks": ("client.kick", "kicked"),
    "answers-stale-kicks": ("client.unasked-exit", "kicked"),
    "uses-late-walks": ("client.late-walk", "kicked"),
    "no-heartbeats": ("client.heartbeat", "slow service"),
    "ignores-credits": ("client.credits", "few credits"),
    "executes-completed-again": ("client.completed", "completed"),
    "exits-for-guest-faults": ("client.bypass", "faults without an exit"),
    "goes-on-after-ended": ("client.ended", ""),
    "keeps-tlb-when-given-up": ("client.given-up", "given up"),
    "dies-of-unknown-codes": ("client.unknown-code", "refused with an unknown code"),
    "exact-version-only": ("client.minor", "newer minor version"),
    "fixmaps-only": ("client.encoding", "other encodings"),
    "no-detach": ("client.leave", ""),
    "leaves-at-once": ("client.leave", "slow service"),
    "used-in-log": ("client.accesses", ""),
    "wrong-fault": ("client.fault-exit", ""),
    "unasked-exit": ("client.unasked-exit", ""),
}


def run_kit(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shadowmmu.cli", "protocol", "check-client", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture(scope="module")
def judged() -> dict[str, Future[subprocess.CompletedProcess[str]]]:
    """The kit on clients that are right, both at once: by name."""
    worker = [sys.executable, "-m", "shadowmmu.cli", "worker", "vcpu", "--coordinator", "{coordinator}"]
    with ThreadPoolExecutor() as pool:
        return {
            "tiny": pool.submit(run_kit, "--format", "junit", "--", sys.executable, str(TINY), "{address}"),
            "worker": pool.submit(run_kit, "--format", "tap", "--", *worker),
        }


@pytest.mark.processes
@pytest.mark.slow
def test_a_client_by_hand_passes_every_check(
    judged: dict[str, Future[subprocess.CompletedProcess[str]]],
) -> None:
    done = judged["tiny"].result()
    assert done.returncode == 0, done.stdout
    suite = ET.fromstring(done.stdout)
    assert suite.get("failures") == suite.get("skipped") == "0"
    assert int(suite.get("tests", 0)) == len(suite.findall("testcase")) == len(ClientCheck)


@pytest.mark.processes
@pytest.mark.slow
def test_our_own_worker_passes(judged: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    done = judged["worker"].result()
    assert done.returncode == 0, done.stdout
    skipped = [line.split()[3] for line in done.stdout.splitlines() if "# SKIP" in line]
    assert len(skipped) <= 2, skipped


def test_every_kind_of_broken_client_is_tried() -> None:
    assert set(FOUND) == set(BROKEN)
    assert {scene for _, scene in FOUND.values() if scene} <= set(BY_NAME)


@pytest.mark.processes
@pytest.mark.parametrize("broken", FOUND)
async def test_a_broken_client_is_found_out(broken: str) -> None:
    check, scene = FOUND[broken]
    scenes: list[type[Scene]] = [BY_NAME["ordinary"], *([BY_NAME[scene]] if scene else [])]
    report = await check_client([sys.executable, str(TINY), "{address}", broken], LIMITS, scenes)
    failed = {result.check.id: result.text for result in report.results if result.outcome is Outcome.FAILED}
    assert check in failed
    assert f"scene {scene or 'ordinary'}: " in failed[check]
    assert not report.passed


@pytest.mark.processes
async def test_a_client_that_never_attaches(tmp_path: Path) -> None:
    report = await check_client(["true"], LIMITS)
    (failed,) = [result for result in report.results if result.outcome is Outcome.FAILED]
    assert failed.check.id == "client.attach"
    assert "ended with status 0 before it had attached" in failed.text


@pytest.mark.processes
async def test_a_client_that_does_nothing_but_stay() -> None:
    limits = ClientLimits(attach=0.2, scene=0.2, leave=1.0)
    report = await check_client(["sleep", "1000"], limits, [Scene])
    (failed,) = [result for result in report.results if result.outcome is Outcome.FAILED]
    assert "did not attach within 0.2 s" in failed.text


def test_a_command_that_is_none_is_status_2() -> None:
    done = run_kit("--", "/nowhere/no-client")
    assert done.returncode == 2
    assert "cannot start" in done.stderr
