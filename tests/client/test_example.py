from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from shadowmmu.protocol import messages as m
from tests.client.fakes import FakeMmu

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "one_page_fault.py"


async def test_the_example_of_the_documentation(mmu: FakeMmu, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLE))

    def walk(_peer: bytes, envelope: m.Envelope) -> m.Message:
        body = envelope.body
        assert isinstance(body, m.Walk)
        if body.gva >> 12 not in mmu.mapped:
            return m.WalkFault(body.entry, body.walk, error_code=0)
        return m.Walked(body.entry, body.walk, 0x2A5, 1, 0x700)

    mmu.answers[m.Walk] = walk
    answer = await example["main"](mmu.address)
    assert answer.pfn == 0x2A5
    assert capsys.readouterr().out.splitlines() == [
        "guest entry 1: page fault, error code 0",
        "guest entry 2: 0xffff800000800000 is in host frame 0x2a5, level 1",
    ]
