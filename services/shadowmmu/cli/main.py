"""The command line: `shadowmmu`, or `python -m shadowmmu.cli`.

Exit statuses: 0 pass, 1 violated (or diverged, or not conforming), 2 unknown, 64 usage error.
"""

from __future__ import annotations

import typer

from shadowmmu.cli.bugs import bugs
from shadowmmu.cli.check import check
from shadowmmu.cli.costs import costs
from shadowmmu.cli.explain import explain
from shadowmmu.cli.explore import explore
from shadowmmu.cli.hunt import hunt
from shadowmmu.cli.keys import keys
from shadowmmu.cli.offline import conform, health, profiles, replay
from shadowmmu.cli.protocol import protocol_app
from shadowmmu.cli.report import report
from shadowmmu.cli.runs import runs_app
from shadowmmu.cli.serve import serve_app, worker_app
from shadowmmu.cli.simulate import simulate
from shadowmmu.cli.stress import stress
from shadowmmu.cli.sweep import sweep
from shadowmmu.cli.trace import trace
from shadowmmu.cli.usage import StrictGroup

__all__ = ["app"]

app = typer.Typer(
    cls=StrictGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="The shadow MMU of Linux 3.1's KVM as a distributed system that one can see, stress, stop and replay.",
)
app.command()(stress)
app.command()(simulate)
app.command()(explore)
app.command()(hunt)
app.command()(sweep)
app.add_typer(runs_app, name="runs")
app.command()(replay)
app.command()(explain)
app.command()(check)
app.command()(report)
app.command()(trace)
app.command()(conform)
app.add_typer(serve_app, name="serve")
app.add_typer(worker_app, name="worker")
app.add_typer(protocol_app, name="protocol")
app.command()(profiles)
app.command()(costs)
app.command()(bugs)
app.command()(keys)
app.command()(health)
