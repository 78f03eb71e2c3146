"""The page of a sweep: the question, the answer of its analysis with charts and tables, the design, what failed.

Relies on `shadowmmu.experiments` for the folder and for what it says (`findings_of`), and on Polars for tables. Reads
the sweep's folder through `SweepFolder`.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import polars as pl

from shadowmmu.experiments.findings import FindingsError, findings_of
from shadowmmu.experiments.results import HEADER_NAME, TABLE_NAME, SweepFolder, SweepFolderError, open_sweep
from shadowmmu.experiments.statistics import summary
from shadowmmu.experiments.table import RESERVED, Status
from shadowmmu.reports.charts import PALETTE, Estimate, estimates, has_panels, to_spec
from shadowmmu.reports.comparison import Names, differences
from shadowmmu.reports.errors import ReportError
from shadowmmu.reports.page import (
    Absent,
    Cell,
    Column,
    Facts,
    Figure,
    Markdown,
    Page,
    Paragraph,
    Part,
    Section,
    Table,
    Tone,
    code,
    number,
    ratio,
    shown,
    text,
)

__all__ = ["read_sweep", "sweep_page", "table_of_frame"]

_MOST_ROWS: Final = 2000
"""Of a table on the page; results.parquet has all."""
_MOST_COLUMNS: Final = 40
_MOST_METRICS: Final = 8
"""Compared between two sweeps that declare no plots."""
_TIMES: Final = ("iteration_cycles", "cycles")


def read_sweep(path: Path) -> SweepFolder:
    """The sweep in a folder. Raises ReportError."""
    try:
        sweep = open_sweep(path)
        sweep.full_table()  # damaged files are found here, and not half-way through a page
    except SweepFolderError as error:
        raise ReportError(str(error)) from error
    except RecursionError as error:
        raise ReportError(f"{path / HEADER_NAME} is damaged: {error}") from error
    except (TypeError, ValueError) as error:
        what = str(error).partition("\n")[0]
        raise ReportError(
            f"{path / TABLE_NAME} has values that are not of its columns' types: {what}"
        ) from error
    return sweep


def sweep_page(sweep: SweepFolder, against: SweepFolder | None = None) -> Page:
    """The page of a sweep; with another one, also the ratios at the points that both have."""
    table, failures = sweep.table(), sweep.failures()
    names = None if against is None else Names.of(sweep.path, against.path)
    sections = [_summary(sweep, table, failures)]
    sections.append(Section("answer", "Answer", _answer(sweep, table)))
    if against is not None and names is not None:
        sections.append(Section("against", f"Against {names.other}", _against(sweep, against, names)))
    sections += [
        Section("design", "Design", _design(sweep)),
        Section("failures", "Failures", _failures(failures)),
        Section("runs", "Runs", _runs(sweep, table)),
    ]
    badge = _badge(sweep, table, failures)
    return Page(
        title=sweep.spec.title + ("" if names is None else f": {names.this} against {names.other}"),
        subtitle=f"Sweep {sweep.path.resolve().name}: {table.height:,} of {sweep.runs:,} runs",
        badge=badge,
        sections=sections,
        foot=f"Made by shadowmmu {sweep.code}. Virtual times are cycles of a cost model, not of this machine.",
    )


def _badge(sweep: SweepFolder, table: pl.DataFrame, failures: pl.DataFrame) -> Cell:
    if table.height < sweep.runs:
        return Cell("incomplete", tone=Tone.WARN)
    if failures.height:
        return Cell(f"{failures.height:,} failed", tone=Tone.WARN)
    return Cell("complete", tone=Tone.GOOD)


def _summary(sweep: SweepFolder, table: pl.DataFrame, failures: pl.DataFrame) -> Section:
    spec = sweep.spec
    parts: list[Part] = [
        Markdown(spec.question) if spec.question else Absent("The experiment's file asks no question."),
        Facts(
            [
                ("runs", text(f"{table.height:,} of {sweep.runs:,}")),
                ("failed", number(failures.height, tone=Tone.WARN if failures.height else None)),
                ("kind", text(spec.kind.value)),
                ("replicates of each point", number(spec.replicates)),
                ("seed", code(str(spec.seed))),
                (
                    "seeds of replicates",
                    text("the same at all points" if spec.common_random_numbers else "all distinct"),
                ),
                ("version", text(sweep.code)),
                ("digest of the table", code(sweep.digest())),
            ]
        ),
    ]
    if table.height < sweep.runs:
        folder = shlex.quote(str(sweep.path))
        parts.append(
            Paragraph(
                f"The sweep is not complete: 'shadowmmu sweep' with --out {folder} goes on with it. What follows is of "
                "the runs that there are.",
                Tone.WARN,
            )
        )
    return Section("summary", "Question", parts)


def _answer(sweep: SweepFolder, table: pl.DataFrame) -> list[Part]:
    if _good(table).is_empty():
        return [Absent("No run has succeeded: there is nothing that an answer could follow from.")]
    try:
        findings = findings_of(sweep)
    except FindingsError as error:
        return [Absent(f"The analysis cannot be made: {error}")]
    except Exception as error:  # noqa: BLE001 - there are many ways to trip over a table of another experiment
        what = str(error).partition("\n")[0]
        return [Absent(f"The analysis cannot be made of this table: {type(error).__name__}: {what}")]
    parts: list[Part] = [Markdown(findings.answer)]
    if not findings.charts:
        parts.append(Absent("No plots: the experiment's file declares none, or there are too few runs yet."))
    # Beside one that is as wide as the page there would be a hole.
    wide = len(findings.charts) == 1 or any(has_panels(chart) for _, chart in findings.charts)
    for title, chart in findings.charts:
        parts.append(Figure(title=title, spec=to_spec(chart, title), wide=wide))
    parts += [table_of_frame(title, frame) for title, frame in findings.tables]
    return parts


def _design(sweep: SweepFolder) -> list[Part]:
    spec = sweep.spec
    parts: list[Part] = []
    if spec.grid:
        rows = [
            [code(name), text(", ".join(shown(value).text for value in values)), number(len(values))]
            for name, values in spec.grid.items()
        ]
        columns = [Column("parameter"), Column("values"), Column("number of them", number=True)]
        parts.append(Table(caption="Varied: every combination", columns=columns, rows=rows))
    if spec.points:
        of_points = list(dict.fromkeys(name for point in spec.points for name in point))
        rows = [[shown(point.get(name)) for name in of_points] for point in spec.points]
        parts.append(Table(caption="Points", columns=[Column(name) for name in of_points], rows=rows))
    if spec.fixed:
        rows = [[code(name), shown(value)] for name, value in spec.fixed.items()]
        columns = [Column("parameter"), Column("value")]
        parts.append(Table(caption="The same at every point", columns=columns, rows=rows))
    return parts or [Absent("The experiment has no parameters: all runs are replicates of one point.")]


def _failures(failures: pl.DataFrame) -> list[Part]:
    if failures.is_empty():
        return [Paragraph("No run failed.", Tone.GOOD)]
    return [
        Paragraph("A failed run is made again by the same sweep with --retry-failed.", Tone.WARN),
        table_of_frame("Runs that failed", failures),
    ]


def _runs(sweep: SweepFolder, table: pl.DataFrame) -> list[Part]:
    if table.is_empty():
        return [Absent("No run has ended yet.")]
    columns = table.columns
    parts: list[Part] = []
    if len(columns) > _MOST_COLUMNS:
        known = RESERVED | set(sweep.spec.names()) | {plot.y for plot in sweep.spec.plots}
        columns = [name for name in columns if name in known]
        parts.append(
            Absent(
                f"Of {len(table.columns)} columns the table shows parameters and what is plotted; {TABLE_NAME} has all."
            )
        )
    return [*parts, table_of_frame("All runs", table.select(columns), folded=True)]


def table_of_frame(caption: str, frame: pl.DataFrame, *, folded: bool = False) -> Table:
    """A data frame as a table; of a long one the first rows."""
    columns = [Column(name, number=frame.schema[name].is_numeric()) for name in frame.columns]
    if frame.height > _MOST_ROWS:
        caption = f"{caption} (the first {_MOST_ROWS:,} of {frame.height:,} rows)"
    rows = [
        [code(str(value)) if name == "seed" else shown(value) for name, value in row.items()]
        for row in frame.head(_MOST_ROWS).iter_rows(named=True)
    ]
    return Table(caption=caption, columns=columns, rows=rows, search=frame.height > 20, folded=folded)


# --- two sweeps ------------------------------------------------------------------------------------------------------


def _against(sweep: SweepFolder, against: SweepFolder, names: Names) -> list[Part]:
    tables = [_good(sweep.table()), _good(against.table())]
    digests = sweep.digest(), against.digest()
    same = digests[0] == digests[1]
    parts: list[Part] = [
        Paragraph("Their tables are the same, to the digest.", Tone.GOOD)
        if same
        else Paragraph("Their tables differ."),
        *differences(_said(sweep), _said(against), names),
    ]
    by = [name for name in sweep.spec.varied() if name in against.spec.names()]
    metrics = _compared(sweep, *tables)
    if not metrics:
        return [*parts, Absent("They cannot be compared point by point: they have no metric in common.")]
    means = [summary(table, by, metrics) for table in tables]
    others = {tuple(row[name] for name in by): row for row in means[1].to_dicts()}
    pairs = [
        (row, other)
        for row in means[0].to_dicts()
        if (other := others.get(tuple(row[name] for name in by))) is not None
    ]
    if not pairs:
        return [*parts, Absent("They cannot be compared point by point: they have no point in common.")]
    for metric in metrics:
        parts += _ratio_parts(sweep, by, metric, pairs, names)
    return parts


def _good(table: pl.DataFrame) -> pl.DataFrame:
    return table.filter(pl.col("status") == Status.OK.value)


def _compared(sweep: SweepFolder, table: pl.DataFrame, other: pl.DataFrame) -> list[str]:
    """The metrics of the declared plots; if there are none, of all, those first that an experiment is about."""
    known = RESERVED | set(sweep.spec.names())
    common = [
        name
        for name in table.columns
        if name not in known
        and name in other.columns
        and table.schema[name].is_numeric()
        and other.schema[name].is_numeric()
    ]
    declared = list(dict.fromkeys(plot.y for plot in sweep.spec.plots if plot.y in common))
    return declared or sorted(common, key=lambda name: name not in _TIMES)[:_MOST_METRICS]


def _said(sweep: SweepFolder) -> dict[str, str]:
    spec = sweep.spec
    return {
        "kind": spec.kind.value,
        "replicates": str(spec.replicates),
        "seed": str(spec.seed),
        "version": sweep.code,
        **{name: shown(value).text for name, value in spec.fixed.items()},
        **{name: ", ".join(shown(value).text for value in values) for name, values in spec.grid.items()},
        **({"points": str(len(spec.points))} if spec.points else {}),
    }


def _ratio_parts(
    sweep: SweepFolder,
    by: Sequence[str],
    metric: str,
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    names: Names,
) -> list[Part]:
    rows, points = [], []
    plot = next((plot for plot in sweep.spec.plots if plot.y == metric), None)
    x = plot.x if plot is not None and plot.x in by else next(iter(by), None)
    for this, other in pairs:
        value, low, high = _ratio(this, other, metric)
        rows.append(
            [
                *(shown(this[name]) for name in by),
                number(this[metric]),
                number(other[metric]),
                ratio(value),
                ratio(low),
                ratio(high),
            ]
        )
        if value is not None and x is not None and this[x] is not None:
            line = ", ".join(f"{name} {shown(this[name]).text}" for name in by if name != x)
            at = (
                this[x]
                if isinstance(this[x], int | float) and not isinstance(this[x], bool)
                else str(this[x])
            )
            points.append(Estimate(at, value, low, high, line))
    parts: list[Part] = []
    title = f"{metric}: {names.this} / {names.other}"
    lines = len({point.line for point in points})
    if lines > len(PALETTE):
        parts.append(
            Absent(f"No plot of {title}: its {lines} lines could not be told apart. The table has all.")
        )
    elif x is not None and points:
        positive = all(not isinstance(point.x, str) and point.x > 0 for point in points)
        logarithmic = plot is not None and plot.log_x and positive
        chart = estimates(points, x, "ratio of the means", x_log=logarithmic)
        caption = "Intervals are approximate: from the relative widths of both means' 95 % intervals."
        parts.append(Figure(title=title, spec=to_spec(chart, title), caption=caption))
    columns = [
        *(Column(name) for name in by),
        *(Column(name, number=True) for name in (names.this, names.other, "ratio", "from", "to")),
    ]
    parts.append(Table(caption=title, columns=columns, rows=rows, folded=True))
    return parts


def _ratio(
    this: Mapping[str, Any], other: Mapping[str, Any], metric: str
) -> tuple[float | None, float | None, float | None]:
    """The quotient of two means with its interval, as far as there are such."""
    first, second = this[metric], other[metric]
    if first is None or not second:
        return None, None, None
    value = first / second
    widths = [
        None
        if not row[metric] or row[f"{metric}.high"] is None
        else (row[f"{metric}.high"] - row[metric]) / row[metric]
        for row in (this, other)
    ]
    if widths[0] is None or widths[1] is None:
        return value, None, None
    half = abs(value) * math.hypot(widths[0], widths[1])
    return value, value - half, value + half
