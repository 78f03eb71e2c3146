"""A sequence diagram for the terminal: plain text, at most `width` columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Final

from shadowmmu.explorer.diagram import Diagram, LaneKind, Row, RowKind

__all__ = ["DEFAULT_WIDTH", "render_text"]

DEFAULT_WIDTH: Final = 120
STEP_WIDTH: Final = 5
LOCK_WIDTH: Final = 10
LEAST_WIDTH: Final = 18

_MARKS: Final = {
    RowKind.INSTRUCTION: "> ",
    RowKind.POINT: ". ",
    RowKind.KICK: "<- ",
    RowKind.FLUSH: "! ",
    RowKind.VIOLATION: "*** ",
}


def render_text(diagram: Diagram, width: int = DEFAULT_WIDTH) -> str:
    """The diagram as text, ending with a line feed."""
    lines = [*_wrap(f"{diagram.title} [{diagram.profile}]", width)]
    lines += _block("tables", "; ".join(diagram.tables), width)
    for number, step in enumerate(diagram.setup):
        lines += _block("set-up" if number == 0 else "", step, width)
    for number, line in enumerate(diagram.begin):
        lines += _block("begin" if number == 0 else "", line, width)
    lines.append("")
    lines += _Columns(diagram, width).lines()
    lines.append("")
    for number, line in enumerate(diagram.end):
        lines += _block("end" if number == 0 else "", line, width)
    if diagram.rule:
        lines += _block("violated", diagram.rule, width)
        lines += _block("", diagram.text, width)
        for note in diagram.notes:
            lines += _block("", note, width)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 8)) or [""]


def _block(label: str, text: str, width: int) -> list[str]:
    """A text with a label before its first line."""
    if not text:
        return []
    return [
        f"{label if number == 0 else '':<10}{line}" for number, line in enumerate(_wrap(text, width - 10))
    ]


class _Columns:
    """The lanes side by side; where nothing is told a lane is a line, where mmu_lock is held a thick one."""

    def __init__(self, diagram: Diagram, width: int) -> None:
        self._diagram = diagram
        self._lanes = diagram.lanes
        others = sum(lane.kind is not LaneKind.LOCK for lane in self._lanes)
        room = width - STEP_WIDTH - LOCK_WIDTH - 1
        wide = max(room // max(others, 1), LEAST_WIDTH)
        self._widths = [LOCK_WIDTH if lane.kind is LaneKind.LOCK else wide for lane in self._lanes]
        self._starts = [STEP_WIDTH + sum(self._widths[:i]) for i in range(len(self._lanes))]
        self._holder = -1

    def lines(self) -> list[str]:
        lines = ["step".ljust(STEP_WIDTH) + self._cells(lane.name for lane in self._lanes)]
        step = -1
        for row in self._diagram.rows:
            texts = self._row(row)
            for number, text in enumerate(texts):
                label = str(row.step) if number == 0 and row.step != step else ""
                lines.append(label.ljust(STEP_WIDTH) + text)
            step = row.step
        return lines

    def _cells(self, texts: Iterable[str]) -> str:
        return "".join(text.ljust(width) for text, width in zip(texts, self._widths, strict=True))

    def _idle(self) -> list[str]:
        return ["┃" if lane.kind is LaneKind.LOCK and self._holder >= 0 else "│" for lane in self._lanes]

    def _row(self, row: Row) -> list[str]:
        self._holder = row.holder
        if row.kind in (RowKind.LOCK, RowKind.UNLOCK):
            cells = self._idle()
            cells[row.lane] = ("┏ " if row.kind is RowKind.LOCK else "┗ ") + row.text
            return [self._cells(cells)]
        mark = _MARKS.get(row.kind, "  ")
        room = self._widths[row.lane] - len(mark) - 2
        texts = []
        for number, part in enumerate(_wrap(row.text, room)):
            cells = self._idle()
            cells[row.lane] = (mark if number == 0 else " " * len(mark)) + part
            if row.kind is not RowKind.INSTRUCTION:
                cells[row.lane] = "│" + cells[row.lane]
            texts.append(self._cells(cells))
        texts += [self._arrow(row.lane, target) for target in row.targets]
        return texts

    def _arrow(self, source: int, target: int) -> str:
        """A line from one lane to another."""
        line = list(self._cells(self._idle()))
        begin, end = self._starts[source] - STEP_WIDTH, self._starts[target] - STEP_WIDTH
        low, high = sorted((begin, end))
        for column in range(low + 1, high):
            line[column] = "╌"
        line[end + 1 if end < begin else end - 1] = "◁" if end < begin else "▷"
        return "".join(line)
