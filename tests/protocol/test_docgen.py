from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import inspect

from shadowmmu.protocol import CONVERSATIONS, REGISTRY, docgen
from shadowmmu.protocol.fields import NOTES, note
from tests.protocol.strategies import MESSAGES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "PROTOCOL.md"


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def structs() -> list[inspect.StructType]:
    kinds = [*dict.fromkeys(MESSAGES), *docgen._inner(MESSAGES)]
    return [info for kind in kinds if isinstance(info := inspect.type_info(kind), inspect.StructType)]


def test_the_page_is_up_to_date() -> None:
    assert docgen.main(["--check"]) == 0


def test_every_field_has_a_note_and_every_note_a_field() -> None:
    used = set()
    for info in structs():
        for field in info.fields:
            own = f"{info.cls.__name__}.{field.name}"
            used.add(own if own in NOTES else field.name)
            assert note(info.cls.__name__, field.name).endswith(".")
    assert used == set(NOTES)


def test_the_page_has_everything() -> None:
    page = PAGE.read_text()
    for info in structs():
        assert f"#### {info.cls.__name__}\n" in page
    for conversation in CONVERSATIONS:
        assert f"### {conversation.title}\n" in page
    for code in REGISTRY:
        assert f"| `{code}` |" in page
    assert (ROOT / "docs/examples/one_page_fault.py").read_text().count("\n") < 35


def test_drift_is_found_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "PROTOCOL.md"
    copy.write_text(PAGE.read_text().replace("| `malformed` |", "| `deformed` |"))
    assert docgen.main(["--check", str(copy)]) == 1
    assert "not up to date" in capsys.readouterr().err
    assert docgen.main([str(copy)]) == 0
    assert copy.read_text() == PAGE.read_text()


@pytest.mark.parametrize("page", ["", "<!-- generated: weather -->\n<!-- end -->"])
def test_a_page_without_its_sections(page: str) -> None:
    with pytest.raises(ValueError, match="section"):
        docgen.render(page)
