"""What commands print on: tables on stdout, and a progress line on stderr where somebody looks."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.text import Text

__all__ = ["output_console", "plain", "progress_line"]

PLAIN_WIDTH: Final = 160
"""Columns of tables that go into a file or a pipe."""


def output_console() -> Console:
    """Standard output, as wide as the terminal."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, PLAIN_WIDTH))


def plain(*texts: str) -> list[Text]:
    """Texts of other people: brackets in them are no markup."""
    from rich.text import Text

    return [Text(text) for text in texts]


def progress_line() -> Progress:
    """A progress line that goes away at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        BarColumn(bar_width=20),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
