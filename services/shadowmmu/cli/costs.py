"""`shadowmmu costs`: the cost models, and the figures of one."""

from __future__ import annotations

from typing import Annotated

import typer

from shadowmmu.cli.console import output_console
from shadowmmu.cli.usage import bad_value

__all__ = ["costs"]


def costs(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[NAME|FILE.toml]", help="A cost model. Without: list those there are."),
    ] = None,
) -> None:
    """List the cost models of virtual time, or one's figures with their sources."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from shadowmmu.experiments.cost_model import CostModelError, cost_model_names, load_cost_model

    console = output_console()
    if model is None:
        table = Table(box=box.SIMPLE_HEAD)
        for column in ("name", "machine", "GHz", "measured with"):
            table.add_column(column, overflow="fold")
        for name in cost_model_names():
            shipped = load_cost_model(name)
            table.add_row(name, shipped.title, f"{shipped.ghz:g}", shipped.kernel)
        console.print(table)
        return
    try:
        loaded = load_cost_model(model)
    except CostModelError as error:
        raise bad_value("NAME", str(error)) from error
    title = f"{loaded.name}: {loaded.title}, {loaded.processor}, {loaded.ghz:g} GHz, {loaded.kernel}"
    console.print(Text(f"{title}\n{loaded.notes}" if loaded.notes else title))
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("constant", "cycles", "from", "to", "label", "source, and how"):
        table.add_column(column, overflow="fold", no_wrap=column == "constant")
    for name, constant in loaded.constants.items():
        figures = (str(figure) for figure in (constant.cycles, constant.low, constant.high))
        source = f"{constant.source}. {constant.note}" if constant.note else constant.source
        table.add_row(name, *figures, constant.label.value, Text(source))
    console.print(table)
