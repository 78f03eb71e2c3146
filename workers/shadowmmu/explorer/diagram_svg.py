"""A sequence diagram as SVG: self-contained, without scripts, readable on a light and on a dark ground.

Sizes are in the SVG's user units (CSS pixels). Every text is escaped.
"""

from __future__ import annotations

import textwrap
from html import escape
from typing import Final

from shadowmmu.explorer.diagram import Diagram, LaneKind, Row, RowKind

__all__ = ["render_svg"]

LINE: Final = 16
"""Height of a line of text."""
GLYPH: Final = 6.7
"""Width of a letter of the font, which has a fixed one."""
MARGIN: Final = 16
STEP_WIDTH: Final = 36
LANE_WIDTH: Final = 300
LOCK_WIDTH: Final = 84
LEAST_WIDTH: Final = 640

_STYLE: Final = """
svg { --ground: #ffffff; --ink: #1f2328; --dim: #656d76; --line: #c3c9d0; --box: #f0f3f6; --store: #0550ae;
  --tlb: #6639ba; --shadow: #116329; --point: #8a4600; --bad: #b91c1c; --held: #d4a72c; }
@media (prefers-color-scheme: dark) { svg { --ground: #0d1117; --ink: #e6edf3; --dim: #8d96a0; --line: #444c56;
  --box: #21262d; --store: #79c0ff; --tlb: #d2a8ff; --shadow: #7ee787; --point: #ffa657; --bad: #ff7b72;
  --held: #9e6a03; } }
text { font: 11px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: var(--ink); white-space: pre;
  paint-order: stroke; stroke: var(--ground); stroke-width: 3px; }
.title { font-size: 14px; font-weight: bold; } .head, .instruction { font-weight: bold; }
.dim, .mode { fill: var(--dim); } .effect { fill: var(--store); } .tlb { fill: var(--tlb); }
.shadow { fill: var(--shadow); } .point { fill: var(--point); font-style: italic; }
.flush, .kick { fill: var(--point); font-weight: bold; } .violation { fill: var(--bad); font-weight: bold; }
.ground { fill: var(--ground); } .box { fill: var(--box); stroke: var(--line); }
.lane { stroke: var(--line); } .held { fill: var(--held); }
.arrow { stroke: var(--point); stroke-width: 1.5; stroke-dasharray: 4 3; fill: none; marker-end: url(#tip); }
.tip { fill: var(--point); } .wrong { fill: none; stroke: var(--bad); stroke-width: 1.5; }
""".strip()


_MARKER: Final = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>'
)


def render_svg(diagram: Diagram) -> str:
    """The diagram as an SVG document."""
    return _Canvas(diagram).document()


class _Canvas:
    def __init__(self, diagram: Diagram) -> None:
        self._diagram = diagram
        self._under: list[str] = []  # lane lines and bars, which texts stand over
        self._over: list[str] = []
        self._y = MARGIN
        widths = [LOCK_WIDTH if lane.kind is LaneKind.LOCK else LANE_WIDTH for lane in diagram.lanes]
        self._x = [MARGIN + STEP_WIDTH + sum(widths[:i]) for i in range(len(widths))]
        self._width = max(MARGIN * 2 + STEP_WIDTH + sum(widths), LEAST_WIDTH)

    def document(self) -> str:
        diagram = self._diagram
        self._paragraph(diagram.title, "title", glyph=GLYPH * 14 / 11)
        self._paragraph(f"profile {diagram.profile}", "dim")
        self._section("tables", ["; ".join(diagram.tables)] if diagram.tables else [])
        self._section("set-up", diagram.setup)
        self._section("begin", diagram.begin)
        self._y += LINE // 2
        self._lanes()
        self._section("end", diagram.end)
        if diagram.rule:
            self._paragraph(f"violated: {diagram.rule}", "violation")
            for text in (diagram.text, *diagram.notes):
                self._paragraph(text, "")
        width, height = self._width, self._y + MARGIN
        title = escape(diagram.title)
        size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        return "\n".join(
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{title}">',
                f"<title>{title}</title>",
                f"<style>{_STYLE}</style>",
                _MARKER,
                f'<rect class="ground" width="{width}" height="{height}"/>',
                *self._under,
                *self._over,
                "</svg>\n",
            )
        )

    def _text(self, x: float, text: str, style: str) -> None:
        """A line whose foot is at the current height."""
        kind = f' class="{style}"' if style else ""
        self._over.append(f'<text x="{x:g}" y="{self._y:g}"{kind}>{escape(text)}</text>')

    def _paragraph(self, text: str, style: str, *, x: int = MARGIN, glyph: float = GLYPH) -> None:
        for line in textwrap.wrap(text, int((self._width - x - MARGIN) / glyph)):
            self._y += LINE
            self._text(x, line, style)

    def _section(self, label: str, lines: list[str] | tuple[str, ...]) -> None:
        for number, line in enumerate(lines):
            top = self._y
            self._paragraph(line, "", x=MARGIN + 60)
            if number == 0:
                bottom, self._y = self._y, top + LINE
                self._text(MARGIN, label, "head")
                self._y = bottom

    # --- lanes -------------------------------------------------------------------------------------------------------

    def _lanes(self) -> None:
        diagram = self._diagram
        for lane, x in zip(diagram.lanes, self._x, strict=True):
            width = len(lane.name) * GLYPH + 12
            self._over.append(
                f'<rect class="box" x="{x - 6:g}" y="{self._y:g}" width="{width:g}" height="{LINE + 4}" rx="3"/>'
            )
        self._y += LINE - 1
        for lane, x in zip(diagram.lanes, self._x, strict=True):
            self._text(x, lane.name, "head")
        self._y += 5
        top = self._y
        self._rows()
        self._y += LINE // 2
        self._under = [
            *(f'<path class="lane" d="M{x:g} {top:g}V{self._y:g}"/>' for x in self._x),
            *self._under,
        ]

    def _rows(self) -> None:
        taken = -1.0
        asked: dict[int, list[tuple[float, float]]] = {}  # by target lane: where arrows begin
        step = -1
        lock = next(
            x for lane, x in zip(self._diagram.lanes, self._x, strict=True) if lane.kind is LaneKind.LOCK
        )
        for row in self._diagram.rows:
            top = self._y
            if row.kind is RowKind.LOCK:
                taken = top + 4
            elif row.kind is RowKind.UNLOCK and taken >= 0:
                self._held(lock, taken, top + LINE - 2)
                taken = -1.0
            self._row(row)
            if row.step != step:
                bottom, self._y = self._y, top + LINE
                self._text(MARGIN, str(row.step), "dim")
                self._y = bottom
                step = row.step
            middle = top + LINE - 4
            for target in row.targets:
                begin: float = self._x[row.lane]
                if target > row.lane:
                    begin += min(20 + len(row.text) * GLYPH, LANE_WIDTH - 20)
                asked.setdefault(target, []).append((begin, middle))
            if row.kind in (RowKind.KICK, RowKind.MODE) and "exit" in row.text:
                for x, y in asked.pop(row.lane, []):
                    self._arrow(x, y, self._x[row.lane], middle)
        for target, begins in asked.items():
            for x, y in begins:
                self._arrow(x, y, self._x[target], y + LINE)  # never arrives
        if taken >= 0:
            self._held(lock, taken, self._y)

    def _held(self, x: float, top: float, bottom: float) -> None:
        self._under.append(
            f'<rect class="held" x="{x - 3:g}" y="{top:g}" width="6" height="{bottom - top:g}"/>'
        )

    def _arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        self._under.append(f'<path class="arrow" d="M{x:g} {y:g}L{to_x:g} {to_y:g}"/>')

    def _row(self, row: Row) -> None:
        x = self._x[row.lane] + 8
        top = self._y
        text = row.text
        if row.kind in (RowKind.LOCK, RowKind.UNLOCK):
            text = f"{row.text} {'takes' if row.kind is RowKind.LOCK else 'releases'}"
        indent = 0 if row.kind is RowKind.INSTRUCTION else 8
        room = int((LANE_WIDTH - 20 - indent) / GLYPH)
        lines = textwrap.wrap(text, room) or [""]
        for line in lines:
            self._y += LINE
            self._text(x + indent, line, row.kind.value)
        if row.kind is RowKind.VIOLATION:
            width = max(map(len, lines)) * GLYPH + 12
            self._under.append(
                f'<rect class="wrong" x="{x + indent - 6:g}" y="{top + 3:g}" width="{width:g}" '
                f'height="{len(lines) * LINE + 1:g}" rx="3"/>'
            )
