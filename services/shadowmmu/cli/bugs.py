"""`shadowmmu bugs`: the catalogue of real bugs that the model can have, for people and as JSON."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from shadowmmu.cli.console import output_console

if TYPE_CHECKING:
    from shadowmmu.kvm import Fix

__all__ = ["bugs"]

_HASH = re.compile(r"[0-9a-f]{12,40}")
_SHORT = 12


def bugs(
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole catalogue as JSON.")] = False,
) -> None:
    """List the real bugs that a simulated kernel can have: each is there without its fix."""
    from shadowmmu.kvm.fixes import FIXES

    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode([_entry(fix) for fix in FIXES.values()]).decode()))
        return
    from rich import box
    from rich.table import Table

    table = Table(
        title="Bugs: PROFILE-FIX has the bug, PROFILE+FIX has not", box=box.SIMPLE_HEAD, title_justify="left"
    )
    for column in ("bug", "fix", "status", "alive", "commit", "rules", "litmus test", "what it is about"):
        table.add_column(
            column, overflow="fold", no_wrap=column in ("bug", "fix", "status", "alive", "commit")
        )
    for fix in FIXES.values():
        table.add_row(
            fix.bug,
            fix.slug,
            fix.status.value,
            fix.years,
            fix.commit[:_SHORT] if _HASH.fullmatch(fix.commit) else "?",
            ", ".join(map(str, fix.rules)) or "-",
            _litmus_test(fix),
            fix.description,
        )
    output_console().print(table)


def _litmus_test(fix: Fix) -> str:
    return f"{fix.slug}.toml"


def _entry(fix: Fix) -> dict[str, Any]:
    """The fix as a JSON object; `commit` is null where only the title is known."""
    entry: dict[str, Any] = msgspec.to_builtins(fix)
    if not _HASH.fullmatch(fix.commit):
        entry["commit"] = None
    entry["litmus"] = _litmus_test(fix)
    return entry
