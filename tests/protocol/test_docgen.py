from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
from msgspec import inspect

from shadowmmu.protocol import CONVERSATIONS, FROM_MMU, MMU, REGISTRY, TO_MMU, Envelope, Session, Side, docgen
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.fields import NOTES, note
from shadowmmu.protocol.schemas import inner_structs
from shadowmmu.protocol.states import State
from shadowmmu.protocol.wire_example import dump
from tests.protocol.golden import VALID
from tests.protocol.strategies import MESSAGES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGE = DOCS / "PROTOCOL.md"


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with the generated documents."""
    shutil.copytree(DOCS / "protocol", tmp_path / "protocol")
    shutil.copy(PAGE, tmp_path)
    return tmp_path


def structs() -> list[inspect.StructType]:
    kinds = [*dict.fromkeys(MESSAGES), *inner_structs(MESSAGES)]
    return [info for kind in kinds if isinstance(info := inspect.type_info(kind), inspect.StructType)]


# --- drift --------------------------------------------------------------------------------------------------------


def test_the_documents_are_up_to_date() -> None:
    assert docgen.main(["--check"]) == 0


@pytest.mark.parametrize(
    "name, right, wrong",
    [
        ("PROTOCOL.md", "| `given-up` |", "| `given-out` |"),
        ("protocol/messages.schema.json", '"const": "walk"', '"const": "stroll"'),
        ("protocol/asyncapi.json", '"name": "walk"', '"name": "stroll"'),
    ],
)
def test_drift_is_found_and_mended(
    copy: Path, name: str, right: str, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = copy / name
    text = stale.read_text()
    assert right in text
    stale.write_text(text.replace(right, wrong))
    assert docgen.main(["--check", str(copy)]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"{stale} is not up to date: run python -m shadowmmu.protocol.docgen"
    ]
    assert docgen.main([str(copy)]) == 0
    assert stale.read_text() == text


@pytest.mark.parametrize("name", ["protocol/messages.schema.json", "protocol/asyncapi.json"])
def test_a_document_that_is_missing_is_made(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert docgen.main(["--check", str(copy)]) == 1
    assert docgen.main([str(copy)]) == 0
    assert docgen.main(["--check", str(copy)]) == 0


@pytest.mark.parametrize("page", ["", "<!-- generated: weather -->\n<!-- end -->"])
def test_a_page_without_its_sections(page: str) -> None:
    with pytest.raises(ValueError, match="section"):
        docgen.render(page)


# --- the page -----------------------------------------------------------------------------------------------------


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
    for state in State:
        assert f"\n| {state.value} | " in page
    assert (ROOT / "docs/examples/one_page_fault.py").read_text().count("\n") < 35


def test_every_link_within_the_page_leads_somewhere() -> None:
    page = PAGE.read_text()
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
    links = set(re.findall(r"\]\(#([^)]*)\)", page))
    assert links
    assert links <= anchors
    for path in re.findall(r"\]\(([^#)]+)\)", page):
        assert (DOCS / path).exists()


def test_every_error_code_that_the_page_names_is_registered() -> None:
    page = PAGE.read_text()
    named = set(re.findall(r"(?:refused with|refused as|as a|code|code is) `([a-z-]+)`", page))
    assert {"too-large", "duplicate", "detached"} <= named <= {code.value for code in REGISTRY}


# --- the example in bytes -----------------------------------------------------------------------------------------


def example_frames() -> Iterator[tuple[Side, list[bytes]]]:
    """The messages of the page's example, read back from the left half of its lines."""
    example = PAGE.read_text().partition("## One page fault in bytes")[2].partition("\n## ")[0]
    for sender, block in re.findall(r"\*\*, (vCPU|service) to .*?```text\n(.*?)```", example, re.DOTALL):
        version, *rest = [bytes.fromhex(re.split(r" {2,}", line.strip())[0]) for line in block.splitlines()]
        yield Side.PEER if sender == "vCPU" else Side.SERVICE, [version, b"".join(rest)]


def test_the_bytes_on_the_page_are_a_legal_exchange() -> None:
    ends = {side: Session(MMU, side) for side in Side}
    kinds = []
    for sender, parts in example_frames():
        envelope = (TO_MMU if sender is Side.PEER else FROM_MMU).decode(parts)
        assert ends[sender].send(envelope.body) == envelope
        assert ends[sender.other].receive(envelope)
        kinds.append(type(envelope.body))
    wanted = [
        m.Attach,
        m.Attached,
        m.Enter,
        m.Entered,
        m.Walk,
        m.WalkFault,
        m.Exit,
        m.Entered,
        m.Walk,
        m.Walked,
    ]
    assert kinds == [*wanted, m.Log, m.Applied]


def test_no_byte_is_left_out_of_a_dump() -> None:
    dumped = 0
    for vector in VALID:
        data = bytes.fromhex(vector["frames"][1])
        try:
            lines = dump(data)
        except ValueError:  # a form that our encoder does not make, or that the example does not have
            continue
        assert b"".join(bytes.fromhex(re.split(r" {2,}", line.strip())[0]) for line in lines) == data
        dumped += 1
    assert dumped > 60


def test_a_dump_says_what_the_values_are() -> None:
    lines = dump(TO_MMU.encode(Envelope(1, 300, m.Walk(2, 3, 1 << 63, 5)))[1])
    assert [re.split(r" {2,}", line.strip())[1] for line in lines] == [
        "frame 2: array of 3",
        "incarnation 1",
        "number 0x12c",
        "map of 5",
        '"t": "walk"',
        '"entry": 2',
        '"walk": 3',
        '"gva": 0x8000000000000000',
        '"flags": 5',
    ]
    with pytest.raises(ValueError, match="no form"):
        dump(msgpack.packb([1, 1, {"t": b"bytes"}]))
