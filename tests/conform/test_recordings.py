"""Every recording of the real code agrees in every field of every operation, and the audit is clean after each."""

from pathlib import Path
from typing import Any

import pytest

from shadowmmu.conform import render, run_trace
from shadowmmu.kvm import Kvm, mmu_audit

RECORDINGS = sorted((Path(__file__).parents[1] / "data" / "conformance").rglob("*.jsonl.gz"))


def test_the_recordings_are_there() -> None:
    assert len(RECORDINGS) == 152


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.name.removesuffix(".jsonl.gz"))
def test_recording(path: Path) -> None:
    def audit(line: dict[str, Any], kvm: Kvm) -> None:
        assert mmu_audit(kvm) == [], f"after operation {line['seq']}"

    report = run_trace(path, after_operation=audit)
    assert report.passed, render(report)
    assert report.operations > 0
