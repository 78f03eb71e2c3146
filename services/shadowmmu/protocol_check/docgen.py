"""Writes the lists of checks into docs/CONFORMANCE_KIT.md.

    python -m shadowmmu.protocol_check.docgen [--check] [docs]

Each list stands between `<!-- generated: NAME -->` and `<!-- end -->`. `--check` changes nothing, and fails if one is
not up to date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from shadowmmu.protocol_check.check_server import server_checks
from shadowmmu.protocol_check.checks import Check
from shadowmmu.protocol_check.client_checks import ClientCheck

__all__ = ["main", "render"]

PAGE: Final = "CONFORMANCE_KIT.md"
_MARKED: Final = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _anchor(section: str) -> str:
    return re.sub(r"[^\w\- ]", "", section).lower().replace(" ", "-")


def _table(checks: Iterable[Check]) -> str:
    lines = ["| Check | What holds | Section |", "| --- | --- | --- |"]
    lines += [
        f"| `{check.id}` | {check.title} | [{check.section}](PROTOCOL.md#{_anchor(check.section)}) |"
        for check in checks
    ]
    return "\n".join(lines)


def render(page: str) -> str:
    """The page with its lists up to date. Raises KeyError for a list that there is not."""
    lists = {
        "server-checks": [check.check for check in server_checks()],
        "client-checks": [check.check for check in ClientCheck],
    }
    return _MARKED.sub(lambda match: f"{match[1]}\n{_table(lists[match[2]])}\n\n{match[3]}", page)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    folders = [arg for arg in args if arg != "--check"] or ["docs"]
    path = Path(folders[0]) / PAGE
    old = path.read_text()
    new = render(old)
    if old == new:
        return 0
    if "--check" in args:
        sys.stderr.write(f"{path} is not up to date: run python -m shadowmmu.protocol_check.docgen\n")
        return 1
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
