"""What a report page consists of, before it is HTML: sections of tables, charts, facts and texts. Pure.

Nothing here is markup: every string is plain text, from wherever it came, and `shadowmmu.reports.render` escapes all of
it. Pages are built by `run_page`, `simulation_page` and `sweep_page`.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, ClassVar, Final

import msgspec

__all__ = [
    "Absent",
    "Cell",
    "Column",
    "Commands",
    "Drawing",
    "Facts",
    "Figure",
    "Markdown",
    "Page",
    "Paragraph",
    "Part",
    "Section",
    "Table",
    "Tone",
    "code",
    "number",
    "ratio",
    "shown",
    "table",
    "text",
]


_NO_FRACTION: Final = 10_000
"""From here on nobody wants to see a fraction."""


class Tone(enum.Enum):
    """What a text is to be taken for; shown by colour, beside what the words say."""

    GOOD = "good"
    BAD = "bad"
    WARN = "warn"
    DIM = "dim"


class Cell(msgspec.Struct, frozen=True):
    """A value in a table. `sort`: what it is sorted by, where that is not its text; `code`: names, addresses."""

    text: str
    sort: float | None = None
    tone: Tone | None = None
    code: bool = False


class Column(msgspec.Struct, frozen=True):
    """A column's heading. `number`: set to the right."""

    title: str
    number: bool = False


class Paragraph(msgspec.Struct, frozen=True):
    """A text."""

    kind: ClassVar[str] = "paragraph"
    text: str
    tone: Tone | None = None


class Markdown(msgspec.Struct, frozen=True):
    """A text in Markdown; HTML in it stays text."""

    kind: ClassVar[str] = "markdown"
    text: str


class Absent(msgspec.Struct, frozen=True):
    """Says what is missing here, and why."""

    kind: ClassVar[str] = "absent"
    text: str


class Commands(msgspec.Struct, frozen=True):
    """Lines for a shell, each with what it does."""

    kind: ClassVar[str] = "commands"
    lines: Sequence[tuple[str, str]]


class Facts(msgspec.Struct, frozen=True):
    """Names and values."""

    kind: ClassVar[str] = "facts"
    rows: Sequence[tuple[str, Cell]]


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """A table; its first column heads the rows. `search`: with a field that filters them; `folded`: closed at first."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    search: bool = False
    folded: bool = False


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A chart: its Vega-Lite specification (`charts.to_spec`), what it shows, and how to read it."""

    kind: ClassVar[str] = "figure"
    title: str
    spec: dict[str, Any]
    caption: str = ""
    wide: bool = False


class Drawing(msgspec.Struct, frozen=True, kw_only=True):
    """A finished SVG document, and the same as text."""

    kind: ClassVar[str] = "drawing"
    title: str
    svg: str
    text: str


Part = Paragraph | Markdown | Absent | Commands | Facts | Table | Figure | Drawing


class Section(msgspec.Struct, frozen=True):
    """A part of the page with a place in its table of contents. `id`: the fragment that links to it."""

    id: str
    title: str
    parts: Sequence[Part]


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """A report. `badge`: the verdict in a word."""

    title: str
    subtitle: str
    badge: Cell | None
    sections: Sequence[Section]
    foot: str


def text(value: str, tone: Tone | None = None) -> Cell:
    """Words."""
    return Cell(value, tone=tone)


def code(value: str) -> Cell:
    """A name, an address, a digest."""
    return Cell(value, code=True)


def number(value: float | None, places: int | None = None, tone: Tone | None = None) -> Cell:
    """A number with thousands set apart; `places` after the point (None: as many as matter); None is no value."""
    if value is None:
        return Cell("-", tone=Tone.DIM)
    if isinstance(value, int):
        return Cell(f"{value:,}", float(value), tone)
    if places is None and abs(value) >= _NO_FRACTION:
        places = 0
    return Cell(f"{value:,.{places}f}" if places is not None else f"{value:,.5g}", value, tone)


def shown(value: object) -> Cell:
    """A setting or a measurement of whatever type; None is no value."""
    match value:
        case bool():
            return text("on" if value else "off")
        case None | int() | float():
            return number(value)
        case _:
            return text(str(value))


def ratio(value: float | None) -> Cell:
    """A quotient; None: there is none, because what it would be divided by is zero or missing."""
    if value is None:
        return Cell("-", tone=Tone.DIM)
    return Cell(f"{value:,.2f}x" if value < 100 else f"{value:,.0f}x", value)


def table(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    numbers: Sequence[int],
    search: bool = False,
    folded: bool = False,
) -> Table:
    """A table whose columns have these titles; `numbers`: the places of those that are numbers."""
    heads = [Column(title, place in numbers) for place, title in enumerate(columns)]
    return Table(caption=caption, columns=heads, rows=rows, search=search, folded=folded)
