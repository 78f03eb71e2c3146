"""A diagram tells what each actor did, with the scenario's names, and what came of it."""

import xml.etree.ElementTree as ET

import msgspec
import pytest

from shadowmmu.explorer.actors import parse_schedule, vcpu
from shadowmmu.explorer.diagram import Diagram, LaneKind, RowKind, draw
from shadowmmu.explorer.diagram_names import Names
from shadowmmu.explorer.diagram_svg import render_svg
from shadowmmu.explorer.diagram_text import DEFAULT_WIDTH, render_text
from shadowmmu.explorer.litmus import LINEAR, parse_litmus
from shadowmmu.explorer.trail import follow_schedule
from tests.explorer.failing import failing
from tests.explorer.guests import ONE_PAGE

SVG = "{http://www.w3.org/2000/svg}"


KICKED = f"""
title = "the host takes a page away that a vCPU has in its TLB"
setup = "v0: load x"
[machine]
vcpus = 1
{ONE_PAGE}
[[vcpu]]
program = "load x"
[[host]]
program = "unmap G"
"""

LARGE = """
[machine]
frames = 2048
[frames]
block = 1024
[tables]
root = {0 = "block wuadl"}
[[vcpu]]
program = "load @root[0]"
"""


@pytest.fixture(scope="module")
def missed_flush() -> Diagram:
    return draw(failing().scenario, "linux-3.1", parse_schedule("v0*110 v1"))


@pytest.fixture(scope="module")
def with_a_kick() -> Diagram:
    return draw(parse_litmus(KICKED, "kicked"), "fixed", parse_schedule("h0*99 k0 h0*99 v0*99"))


def told(diagram: Diagram, lane: str) -> list[str]:
    """What happens in a lane, in order."""
    (number,) = (i for i, known in enumerate(diagram.lanes) if known.name == lane)
    return [row.text for row in diagram.rows if row.lane == number]


def in_order(texts: list[str], *wanted: str) -> bool:
    rest = iter(texts)
    return all(any(text.startswith(want) for text in rest) for want in wanted)


def test_the_lanes_are_vcpus_the_lock_and_host_threads(with_a_kick: Diagram) -> None:
    assert [lane.name for lane in with_a_kick.lanes] == ["v0", "mmu_lock", "h0"]
    assert [lane.kind for lane in with_a_kick.lanes] == [LaneKind.VCPU, LaneKind.LOCK, LaneKind.HOST]
    assert in_order(told(with_a_kick, "h0"), "unmap G", "G: host frame 0x")


def test_a_vcpus_lane_has_its_instructions_and_what_they_did(missed_flush: Diagram) -> None:
    assert in_order(
        told(missed_flush, "v0"),
        "store @T[9] = 0",
        "T[9] := 0",
        "load y",
        "exit: page fault at y (not present)",
        "tlbs_dirty := 1",
        "shadow T[9]: dropped",
        "enters guest mode, TLB emptied",
        "TLB: y -> other (wux)",
        "store @L2[2] = G wua",
        "emulated: L2[2] := G wua",
        "load z",
        "shadow of G made (level 1)",
    )


def test_each_instruction_is_told_once(missed_flush: Diagram) -> None:
    instructions = [row.text for row in missed_flush.rows if row.kind is RowKind.INSTRUCTION]
    assert instructions == ["store @T[9] = 0", "load y", "store @L2[2] = G wua", "load z", "store x[5] = 0"]


def test_it_ends_with_the_rule_and_the_tlbs(missed_flush: Diagram) -> None:
    assert missed_flush.rows[-1].kind is RowKind.VIOLATION
    assert missed_flush.rows[-1].lane == 1
    assert missed_flush.rule == "rule 4 (write-protection breach)"
    assert "TLB of v1: x -> G (wuxd)" in missed_flush.end
    assert "guest frame G" in missed_flush.text
    assert "x[5]" in missed_flush.text


def test_set_up_is_listed_and_not_drawn(missed_flush: Diagram) -> None:
    assert missed_flush.setup[0] == "v1: store x = 1"
    assert "TLB of v1: x -> G (wuxd)" in missed_flush.begin
    assert "unsync: T" in missed_flush.begin
    assert "T[9] = G wuad" in missed_flush.tables
    assert min(row.step for row in missed_flush.rows) == 1


def test_levels_of_walks_and_points_without_a_switch_leave_no_row(missed_flush: Diagram) -> None:
    assert len(missed_flush.rows) < 40 < missed_flush.rows[-1].step
    assert not any(row.kind is RowKind.POINT for row in missed_flush.rows)


def test_where_an_operation_stands_when_another_goes_on_is_told() -> None:
    found = failing()
    trail = follow_schedule(found.scenario, found.profile, found.schedule).trail
    steps = next(step for step, place in enumerate(trail) if place.name == "BEFORE_LOCK")
    diagram = draw(found.scenario, found.profile, (*found.schedule[:steps], vcpu(1)))
    (point,) = (row for row in diagram.rows if row.kind is RowKind.POINT)
    assert point.text == "stops at BEFORE_LOCK (page_fault: frame found, lock not taken yet)"


def test_the_lock_is_held_from_where_it_is_taken(with_a_kick: Diagram) -> None:
    holders = [row.holder for row in with_a_kick.rows]
    for number, row in enumerate(with_a_kick.rows):
        if row.kind is RowKind.LOCK:
            assert with_a_kick.lanes[row.holder].name == row.text
        if row.kind is RowKind.UNLOCK:
            assert row.holder == -1
            assert with_a_kick.lanes[holders[number - 1]].name == row.text


def test_a_kick_is_asked_for_arrives_and_is_answered(with_a_kick: Diagram) -> None:
    (asked,) = (row for row in with_a_kick.rows if row.targets)
    assert asked.text == "remote TLB flush: kicks v0"
    assert asked.targets == (0,)
    after = with_a_kick.rows[with_a_kick.rows.index(asked) :]
    texts = [row.text for row in after]
    assert in_order(texts, "waits for v0", "the kick arrives", "remote TLB flush: all have answered")


def test_an_entry_is_dropped_before_the_flush_for_it(with_a_kick: Diagram) -> None:
    assert in_order(told(with_a_kick, "h0"), "shadow T[9]: dropped", "remote TLB flush: kicks v0")


def test_a_schedule_that_does_not_fail_is_drawn_too() -> None:
    found = failing()
    diagram = draw(found.scenario, "fixed", found.schedule)
    assert diagram.rule == ""
    assert not any(row.kind is RowKind.VIOLATION for row in diagram.rows)


# --- names -----------------------------------------------------------------------------------------------------------


def test_entries_addresses_and_places_are_written_as_in_the_scenario() -> None:
    names = Names(failing().scenario)
    frames = dict(failing().scenario.frames)
    assert names.value(frames["G"] << 12 | 0x67) == "G wuad"
    assert names.value(0) == "0"
    assert names.value(0x1234567890) == "0x1234567890"
    assert names.place((frames["T"] << 12) + 72) == "T[9]"
    assert names.address(LINEAR["64"] + (frames["T"] << 12) + 72) == "@T[9]"
    assert names.address(0x9028) == "x[5]"
    assert names.page(0x7000_0000) == "0x70000000"


def test_frames_of_a_large_page_are_counted_from_its_first() -> None:
    assert Names(parse_litmus(LARGE, "large")).frame(1024 + 9) == "block+9"


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [DEFAULT_WIDTH, 80])
def test_the_text_is_as_wide_as_asked_for(with_a_kick: Diagram, width: int) -> None:
    lines = render_text(with_a_kick, width).splitlines()
    assert max(map(len, lines)) <= width


def test_the_text_has_every_row_and_what_came_of_it(missed_flush: Diagram) -> None:
    text = render_text(missed_flush)
    for words in ("> store x[5] = 0", "*** violates rule 4", "┏ v0", "┗ v0", "TLB of v1: x -> G (wuxd)"):
        assert words in text


def test_an_arrow_leads_to_the_lane_that_is_kicked(with_a_kick: Diagram) -> None:
    lines = render_text(with_a_kick).splitlines()
    (heading,) = (line for line in lines if line.startswith("step"))
    (arrow,) = (line for line in lines if "╌" in line)
    assert heading.index("v0") < arrow.index("◁") < arrow.index("╌") < heading.index("h0")


# --- svg -------------------------------------------------------------------------------------------------------------


def test_the_svg_is_one_document_without_scripts_or_references(with_a_kick: Diagram) -> None:
    svg = render_svg(with_a_kick)
    root = ET.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert not root.findall(f".//{SVG}script")
    assert not root.findall(f".//{SVG}image")
    assert "href" not in svg
    assert "prefers-color-scheme: dark" in svg


def test_the_svg_has_every_row_and_an_arrow_for_the_kick(with_a_kick: Diagram) -> None:
    root = ET.fromstring(render_svg(with_a_kick))
    texts = {text.text for text in root.iter(f"{SVG}text")}
    assert {"load x", "the kick arrives: exit", "unmap G", "enters guest mode, TLB emptied"} <= texts
    assert len(root.findall(f".//{SVG}path[@class='arrow']")) == 1
    assert len(root.findall(f".//{SVG}rect[@class='held']")) == sum(
        row.kind is RowKind.LOCK for row in with_a_kick.rows
    )


def test_everything_in_the_svg_is_escaped(missed_flush: Diagram) -> None:
    hostile = msgspec.structs.replace(
        missed_flush, title='<script>alert("1")</script> & more', text="a < b & c", rule="<b>"
    )
    root = ET.fromstring(render_svg(hostile))
    assert root.find(f"{SVG}title") is not None
    assert not root.findall(f".//{SVG}script")
    assert "a < b & c" in {text.text for text in root.iter(f"{SVG}text")}


def test_nothing_in_the_svg_lies_outside_of_it(with_a_kick: Diagram) -> None:
    root = ET.fromstring(render_svg(with_a_kick))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for text in root.iter(f"{SVG}text"):
        assert 0 <= float(text.attrib["x"]) < width
        assert 0 < float(text.attrib["y"]) <= height
