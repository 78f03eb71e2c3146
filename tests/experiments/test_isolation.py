"""A run that fails, dies or hangs is an outcome, and the next run is made all the same."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import msgspec
import pytest

from shadowmmu.experiments.isolation import Children, _Child
from shadowmmu.experiments.kinds.kind import Kind
from shadowmmu.experiments.point import Job, Outcome
from shadowmmu.experiments.values import Metric
from tests.experiments.conftest import STUB

pytestmark = pytest.mark.processes


@pytest.fixture
def children() -> Iterator[Children]:
    started = Children(STUB)
    yield started
    started.close()


def job(test: str, timeout: float = 60.0, code: str = "0.1.0") -> Job:
    return Job(Kind.EXPLORE, {"test": test}, 11, timeout, code)


GOOD: dict[str, Metric] = {"seed_again": 11, "process": "child", "length": 4}


def test_an_exception_is_an_outcome_with_the_end_of_its_traceback(children: Children) -> None:
    outcome = children.execute(job("raise"))
    assert (outcome.metrics, outcome.error) == (None, "ValueError: this point is no good")
    assert outcome.traceback is not None and "stub_child.py" in outcome.traceback
    assert children.execute(job("good")) == Outcome(GOOD)


def test_a_process_that_is_killed_is_an_outcome_with_its_last_words(children: Children) -> None:
    assert children.execute(job("die")) == Outcome(None, "the process was killed by SIGKILL", "last words\n")
    assert children.execute(job("leave")) == Outcome(None, "the process ended with status 3", None)
    assert children.execute(job("good")) == Outcome(GOOD)


def test_a_run_that_does_not_end_is_given_up(children: Children) -> None:
    assert children.execute(job("hang", timeout=0.01)).error == "no result within 0.01 seconds"
    assert children.execute(job("good")) == Outcome(GOOD)


def test_what_a_run_prints_is_no_result(children: Children) -> None:
    assert children.execute(job("print")).metrics == GOOD | {"length": 5}


def test_a_run_that_reads_its_input_takes_no_jobs_from_it(children: Children) -> None:
    assert children.execute(job("read")).metrics == GOOD
    assert children.execute(job("good")) == Outcome(GOOD)


@pytest.mark.parametrize("test", ["good", "hang"])
def test_a_child_whose_parent_is_gone_ends_with_all_its_group(test: str) -> None:
    child = _Child(STUB)
    assert child.ask(job("good")) == Outcome(GOOD)
    child._connection.send_bytes(msgspec.msgpack.encode(job(test)))
    child._connection.close()
    assert child._process.wait(60) == -signal.SIGKILL
    child.close()


def test_an_outcome_may_be_larger_than_what_a_socket_holds(children: Children) -> None:
    assert children.execute(job("many")).metrics == {f"metric {n}": n for n in range(20_000)}


def test_numbers_that_no_column_can_have_are_failures(children: Children) -> None:
    error = children.execute(job("large")).error
    assert error == "OverflowError: metric count = 9223372036854775808 needs more than 64 bits"


def test_another_version_of_the_program_makes_no_runs(children: Children) -> None:
    error = children.execute(job("good", code="9.9.9")).error
    assert error == "RuntimeError: the version of the program is 0.1.0 here, 9.9.9 where the sweep was begun"


def test_nothing_runs_after_the_end(children: Children) -> None:
    children.close()
    assert children.execute(job("good")) == Outcome(error="given up")
