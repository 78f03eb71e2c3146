"""Every rule is needed: mutants that one rule finds alone, and that all others together miss in the same events."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from shadowmmu.checker import Checker, Rule, Violation
from shadowmmu.machine import run_in_process
from shadowmmu.protocol.events import Event
from shadowmmu.protocol.messages import RunConfig
from tests.checker.mutants import MUTANTS, Defect

SEEDS = 12
VCPUS = 2
PATIENCE = 300
"""So often a run is asked for its progress, and has none, before it is given up: mutants may hang."""


class Ablation:
    """Two checkers on one run: with one rule alone, and with all but that one."""

    def __init__(self, rule: Rule) -> None:
        self._alone = Checker({rule})
        self._without = Checker(set(Rule) - {rule})
        self.found: Violation | None = None
        self.missed_by_others = True
        self._instructions = -1
        self._idle = 0

    def listen(self, _first: int, events: list[Event], _data: bytes) -> None:
        if self.found is None and self.missed_by_others:
            self.missed_by_others = self._without.feed_all(events) is None
            self.found = self._alone.feed_all(events)

    def goes_on(self, counters: dict[str, int]) -> bool:
        instructions = counters.get("vcpu.instructions", 0)
        self._idle = self._idle + 1 if instructions == self._instructions else 0
        self._instructions = instructions
        return self.found is None and self.missed_by_others and self._idle < PATIENCE


def run(defect: Defect, seed: int) -> Ablation:
    ablation = Ablation(defect.rule)
    config = RunConfig(**{"ops": 6000, "seed": seed, **defect.config})
    run_in_process(config, VCPUS, lambda _data: None, ablation.listen, progress=ablation.goes_on)
    return ablation


@pytest.mark.parametrize("defect", MUTANTS, ids=lambda defect: defect.name)
def test_a_mutant_is_found_by_its_rule_alone_and_missed_by_all_others(
    defect: Defect, monkeypatch: pytest.MonkeyPatch
) -> None:
    defect.patch(monkeypatch)
    for seed in range(SEEDS):
        ablation = run(defect, seed)
        if ablation.found is not None and ablation.missed_by_others:
            assert ablation.found.rule is defect.rule
            return
    pytest.fail(f"{defect.name}: rule {defect.rule.value} alone never found it in {SEEDS} runs")


def test_every_rule_has_two_mutants_at_least() -> None:
    counts = Counter(defect.rule for defect in MUTANTS)
    assert {rule for rule in Rule if counts[rule] >= 2} == set(Rule)


def test_the_documented_table_is_this_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "COHERENCE.md").read_text(encoding="utf-8")
    for defect in MUTANTS:
        assert f"| {defect.rule.value} | {defect.name} |" in text
