"""`shadowmmu explore`: search for schedules under which a scenario goes wrong.

Exit status: 0 nothing forbidden was found, 1 something was, 2 the search was cut off before it could say (an exhaustive
one that was not complete, or one that was interrupted).
"""

from __future__ import annotations

from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from shadowmmu.cli.options import ModeOption, WorkloadOption, make_config, usable_cores
from shadowmmu.cli.usage import bad_value, make_folder
from shadowmmu.explorer.strategy import Strategy
from shadowmmu.protocol.messages import GuestMode, Workload

if TYPE_CHECKING:
    from shadowmmu.explorer.campaign import SearchReport
    from shadowmmu.explorer.scenario import Scenario

__all__ = ["explore"]

WORKLOAD_PAGES: Final = 1024
WORKLOAD_MMU_PAGES: Final = 64
_SEARCH: Final = "Search"
_WORKLOAD: Final = "Random guests instead of litmus tests"
NEVER_SHOWN: Final = 40
"""Pairs of points that are listed."""


def explore(
    *,
    tests: Annotated[
        list[str] | None,
        typer.Argument(
            help="Litmus tests: files, or names of those that come with the program.", metavar="TEST..."
        ),
    ] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", help="The kernel; without: the one that the test names.")
    ] = None,
    strategy: Annotated[
        Strategy, typer.Option("--strategy", help="How schedules are chosen.", rich_help_panel=_SEARCH)
    ] = Strategy.PORTFOLIO,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget", min=0.1, help="Longest time in seconds, for all tests.", rich_help_panel=_SEARCH
        ),
    ] = None,
    executions: Annotated[
        int | None,
        typer.Option("--executions", min=1, help="Most executions, per test.", rich_help_panel=_SEARCH),
    ] = None,
    first: Annotated[
        bool, typer.Option("--first", help="Stop at the first failure of a test.", rich_help_panel=_SEARCH)
    ] = False,
    seed: Annotated[
        int, typer.Option("--seed", min=0, rich_help_panel=_SEARCH, help="Fixes all choices.")
    ] = 0,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            min=1,
            help="Processes: several tests, or several seeds of one. If not given 1; as many as there are cores for "
            "--all-bugs.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state", help="Go on with the search in this file, and keep it there.", rich_help_panel=_SEARCH
        ),
    ] = None,
    coverage: Annotated[
        bool, typer.Option("--coverage", help="List pairs of points that were never exercised.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for .repro files of what was found.", metavar="DIR")
    ] = None,
    shrink: Annotated[
        int,
        typer.Option("--shrink", min=0, help="Executions spent on making a failure shorter; 0: not at all."),
    ] = 500,
    all_bugs: Annotated[
        bool, typer.Option("--all-bugs", help="Every bug of the catalogue, each by its own litmus test.")
    ] = False,
    workload: WorkloadOption = None,
    mode: ModeOption = None,
    vcpus: Annotated[
        int, typer.Option("--vcpus", min=1, max=60, help="vCPUs.", rich_help_panel=_WORKLOAD)
    ] = 3,
    ops: Annotated[
        int, typer.Option("--ops", min=1, help="Instructions of all vCPUs.", rich_help_panel=_WORKLOAD)
    ] = 200,
    host_ops: Annotated[
        int, typer.Option("--host-ops", min=0, help="Operations of the host.", rich_help_panel=_WORKLOAD)
    ] = 20,
) -> None:
    """Search for schedules under which a litmus test, or a random guest, breaks a coherence rule.

    Prints the final states with how many executions reached each, and the verdict.
    """
    if out is not None:
        make_folder("--out", out)
    if all_bugs:
        if tests or workload:
            raise bad_value("--all-bugs", "takes no tests and no workload: it has its own")
        from shadowmmu.cli.all_bugs import all_bugs as run_all_bugs

        try:
            status = run_all_bugs(budget or 600.0, strategy, seed, jobs or usable_cores(), out)
        except BrokenExecutor as error:
            typer.echo(f"shadowmmu explore: {error}", err=True)
            status = 2
        raise typer.Exit(status)
    if workload is not None:
        scenarios: list[Scenario] = [
            _workload(workload, mode, profile, vcpus=vcpus, ops=ops, host_ops=host_ops, seed=seed)
        ]
    elif tests:
        scenarios = [_test(name) for name in tests]
    else:
        raise bad_value("TEST...", "name a litmus test, or --workload, or --all-bugs")
    if budget is None and executions is None:
        budget = 10.0 * len(scenarios)
    raise typer.Exit(
        _explore(
            scenarios,
            profile,
            strategy,
            budget=budget,
            executions=executions,
            first=first,
            seed=seed,
            jobs=jobs or 1,
            state=state,
            coverage=coverage,
            out=out,
            shrink=shrink,
        )
    )


def _test(name: str) -> Scenario:
    from shadowmmu.explorer.library import find_test
    from shadowmmu.explorer.litmus import LitmusError

    try:
        return find_test(name)
    except LitmusError as error:
        raise bad_value("TEST", str(error)) from error


def _profile(text: str) -> str:
    from shadowmmu.kvm.errors import UnknownFixError, UnknownProfileError
    from shadowmmu.kvm.profiles import Profile

    try:
        Profile.parse(text)
    except (UnknownProfileError, UnknownFixError) as error:
        raise bad_value("--profile", str(error)) from error
    return text


def _workload(
    workload: Workload,
    mode: GuestMode | None,
    profile: str | None,
    *,
    vcpus: int,
    ops: int,
    host_ops: int,
    seed: int,
) -> Scenario:
    from shadowmmu.explorer.workload import workload_scenario

    config = make_config(
        vcpus,
        workload=workload,
        mode=mode,
        profile=profile or "linux-3.1",
        ops=ops,
        seed=seed,
        memory_pages=WORKLOAD_PAGES,
        mmu_pages=WORKLOAD_MMU_PAGES,
    )
    return workload_scenario(config, vcpus, host_ops)


def _explore(
    scenarios: list[Scenario],
    profile: str | None,
    strategy: Strategy,
    *,
    budget: float | None,
    executions: int | None,
    first: bool,
    seed: int,
    jobs: int,
    state: Path | None,
    coverage: bool,
    out: Path | None,
    shrink: int,
) -> int:
    from shadowmmu.cli.exploration import SearchProgress
    from shadowmmu.explorer.campaign import SearchSpec, merge, run_all, run_search
    from shadowmmu.explorer.search import Budget
    from shadowmmu.explorer.world import ScenarioError

    if state is not None and (len(scenarios) > 1 or jobs > 1):
        raise bad_value("--state", "keeps one search: one test, one job")
    chosen = None if profile is None else _profile(profile)
    seeds = jobs if len(scenarios) == 1 and strategy is not Strategy.EXHAUSTIVE else 1
    rounds = -(-len(scenarios) * seeds // jobs)
    each = Budget(None if budget is None else budget / rounds, executions, first)
    specs = [
        SearchSpec(
            scenario,
            chosen or scenario.profile,
            strategy,
            seed + n,
            each,
            "" if state is None else str(state),
        )
        for scenario in scenarios
        for n in range(seeds)
    ]
    status = 0
    try:
        if len(specs) == 1:
            with SearchProgress(each) as progress:
                reports = [run_search(specs[0], progress)]
        else:
            whole = Budget(budget, executions and executions * len(specs), first)
            with SearchProgress(whole) as progress:
                reports = run_all(specs, jobs, progress.of_all)
    except (ScenarioError, ValueError, OSError, BrokenExecutor) as error:
        typer.echo(f"shadowmmu explore: {error}", err=True)
        return 2
    for scenario in scenarios:
        report = merge(
            [report for report in reports if report.scenario is scenario or report.scenario == scenario]
        )
        status = max(status, _show(report, coverage=coverage, out=out, shrink=shrink), key=_GRAVITY.index)
    return 2 if progress.interrupted and status == 0 else status


_GRAVITY: Final = (0, 2, 1)
"""Exit statuses, the one that prevails last."""


def _show(report: SearchReport, *, coverage: bool, out: Path | None, shrink: int) -> int:
    """The report for people; the exit status of this search."""
    scenario = report.scenario
    typer.echo(f"Test {scenario.name}: {scenario.title}")
    typer.echo(f"Profile {report.profile}")
    typer.echo(f"States {len(report.outcomes)}")
    for outcome, count in sorted(report.outcomes.items(), key=lambda item: (-item[1], item[0])):
        typer.echo(f"{count:>8} :> {outcome or '(no registers)'}")
    bad = sum(report.failures.values())
    ended = sum(report.outcomes.values())
    typer.echo(f"Witnesses: {bad} bad, {ended - bad} good")
    if scenario.forbidden:
        typer.echo(f"Forbidden: {scenario.forbidden}")
    if scenario.exists:
        typer.echo(f"Legal, and to be seen: {scenario.exists}: {report.exists or 'never'}")
    how = f"complete, {report.pruned} of them cut short as known" if report.complete else "not all"
    typer.echo(
        f"Executions {report.executions} ({report.strategy.value}, seed {report.seed}, {how}) in {report.seconds:.1f} s"
    )
    typer.echo(f"Digest {report.digest}")
    if coverage:
        typer.echo(
            f"Pairs of points exercised: {report.pairs}; reached, and never exercised: {len(report.never)}"
        )
        for standing, going in report.never[:NEVER_SHOWN]:
            typer.echo(f"    never: {standing} stands, {going} goes on")
    first = report.first
    if first is None:
        cut_off = report.strategy is Strategy.EXHAUSTIVE and not report.complete
        typer.echo(
            "Verdict: unknown, the search was cut off" if cut_off else "Verdict: nothing forbidden was found"
        )
        return 2 if cut_off else 0
    from shadowmmu.cli.exploration import show_found

    show_found(report, first, out, shrink)
    return 1
