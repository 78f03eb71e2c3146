"""The parameters of each kind of run, as the tables in docs/EXPERIMENTS.md.

`python -m shadowmmu.experiments.reference docs/EXPERIMENTS.md` writes them between two comments of the page; a test
sees to it that they are those of the code.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from shadowmmu.experiments.parameters import NONE, Parameter
from shadowmmu.experiments.point import KINDS

__all__ = ["BEGIN", "END", "reference", "with_reference"]

BEGIN: Final = "<!-- parameters: begin -->"
END: Final = "<!-- parameters: end -->"
COSTS: Final = "cost."


def reference() -> str:
    """The tables, in Markdown."""
    lines: list[str] = []
    shown: dict[int, str] = {}
    for kind, runs in KINDS.items():
        parameters = runs.parameters
        lines += ["", f"### {kind.value}: {runs.title}", ""]
        if id(parameters) in shown:
            lines.append(f"The parameters of `{shown[id(parameters)]}`.")
            continue
        shown[id(parameters)] = kind.value
        lines += ["| parameter | values | if not given |", "| --- | --- | --- |"]
        costs = [name for name in parameters.all if name.startswith(COSTS)]
        for name, parameter in parameters.all.items():
            if name not in costs:
                lines.append(_row(parameters.short_name(parameter), parameter))
        if costs:
            values = parameters.all[costs[0]].describe()
            lines += ["", f"Factors on the cost model's constants ({values}; 1 if not given):"]
            lines += [", ".join(f"`{name}`" for name in costs) + "."]
    return "\n".join(lines[1:]) + "\n"


def _row(name: str, parameter: Parameter) -> str:
    default = parameter.default
    if default is None:
        shown = "must be given"
    elif isinstance(default, bool):
        shown = str(default).lower()
    else:
        shown = str(default) if default == NONE or not isinstance(default, str) else f'"{default}"'
    return f"| `{name}` | {parameter.describe()} | {shown} |"


def with_reference(page: str) -> str:
    """A page with the tables between its two comments. Raises ValueError if it lacks one."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} and {END}")
    return f"{before}{begin}\n\n{reference()}\n{end}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_reference(path.read_text()))
