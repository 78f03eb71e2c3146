"""Choices that were drawn are the choices that a replay gives; any other question is noticed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowmmu.machine.choices import Choices, ChoicesExhaustedError, RecordedChoices, SeededChoices

questions = st.lists(st.one_of(st.integers(2, 100), st.floats(0.0, 1.0)))


def ask(choices: Choices, question: float) -> int:
    if isinstance(question, int):
        return choices.below(question)
    return int(choices.chance(question))


@given(st.integers(0, 1 << 32), questions)
def test_a_replay_gives_the_choices_that_were_drawn(seed: int, asked: list[float]) -> None:
    drawn = SeededChoices(seed)
    answers = [ask(drawn, question) for question in asked]
    replayed = RecordedChoices()
    replayed.load(drawn.take())
    assert [ask(replayed, question) for question in asked] == answers
    replayed.load([])


def test_a_question_that_the_recorded_run_did_not_ask_is_an_error() -> None:
    replayed = RecordedChoices()
    with pytest.raises(ChoicesExhaustedError):
        replayed.below(2)


def test_a_choice_that_is_out_of_bounds_is_an_error() -> None:
    replayed = RecordedChoices()
    replayed.load([5])
    with pytest.raises(ChoicesExhaustedError, match="5 is not below 3"):
        replayed.below(3)


def test_choices_that_nobody_asked_for_are_an_error() -> None:
    replayed = RecordedChoices()
    replayed.load([1])
    with pytest.raises(ChoicesExhaustedError, match="1 recorded"):
        replayed.load([])
