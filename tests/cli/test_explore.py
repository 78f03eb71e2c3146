"""`shadowmmu explore`: exit statuses, and what is said about bad input."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shadowmmu.cli.exploration import SearchProgress
from shadowmmu.explorer.library import find_test
from shadowmmu.explorer.litmus import parse_litmus
from shadowmmu.explorer.search import Budget, Search
from shadowmmu.explorer.strategy import Strategy
from shadowmmu.explorer.world import World

pytestmark = pytest.mark.processes

COMMAND = [sys.executable, "-m", "shadowmmu.cli", "explore"]


def explore(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize("profile, status", [("fixed", 0), ("fixed-notifier-retry", 1)])
def test_the_exit_status_says_whether_something_was_found(profile: str, status: int) -> None:
    done = explore("notifier-retry", "--profile", profile, "--strategy", "exhaustive", "--budget", "60")
    assert done.returncode == status, done.stderr
    assert "complete" in done.stdout


def test_an_exhaustive_search_that_is_cut_off_says_that_it_does_not_know() -> None:
    done = explore("notifier-retry", "--profile", "fixed", "--strategy", "exhaustive", "--executions", "2")
    assert done.returncode == 2
    assert "cut off" in done.stdout


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["no-such-test"], "no-such-test"),
        (["notifier-retry", "--profile", "linux-9"], "linux-9"),
        ([], "name a litmus test"),
        (["--all-bugs", "notifier-retry"], "takes no tests"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_a_usage_error(arguments: list[str], said: str) -> None:
    done = explore(*arguments)
    assert done.returncode == 64
    assert said in done.stderr


@pytest.mark.parametrize("content", [b"", b"junk", b"\x80"])
def test_a_state_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    state = tmp_path / "state"
    state.write_bytes(content)
    done = explore("notifier-retry", "--executions", "5", "--state", str(state))
    assert done.returncode == 2
    assert "state" in done.stderr and "Traceback" not in done.stderr
    assert state.read_bytes() == content


def test_ctrl_c_ends_the_search_and_not_the_command() -> None:
    before = signal.getsignal(signal.SIGINT)
    search = Search(find_test("notifier-retry"), "fixed", Strategy.RANDOM, 0, lambda: 0.0)
    with SearchProgress(Budget()) as progress:
        os.kill(os.getpid(), signal.SIGINT)
        search.run(Budget(executions=50), progress)
    assert progress.interrupted
    assert search.executions == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_a_word_whose_slot_is_gone_reads_as_0() -> None:
    scenario = parse_litmus(SLOT_GOES, "gone")
    world = World(scenario, "fixed")
    assert world.values() == {"G[0]": 7}
    while enabled := world.enabled():
        world.step(enabled[-1])
    assert world.violation is None
    assert world.values() == {"G[0]": 0}


SLOT_GOES = """
title = "a slot is deleted"
forbidden = "G[0] == 5"
[machine]
vcpus = 1
slots = [{ gfn = 1024, pages = 64 }]
[frames]
G = 1024
[tables.root]
[memory]
"G[0]" = 7
[[host]]
program = "delete_slot 1"
"""


def test_a_state_goes_on_where_it_stood() -> None:
    scenario = find_test("notifier-retry")
    search = Search(scenario, "fixed", Strategy.PCT, 0, lambda: 0.0)
    again = Search(scenario, "fixed", Strategy.PCT, 0, lambda: 0.0)
    again.restore(search.state())
    with pytest.raises(ValueError, match="of the search"):
        Search(scenario, "fixed", Strategy.RANDOM, 0, lambda: 0.0).restore(search.state())
