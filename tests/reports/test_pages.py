"""What reports say, and what becomes of folders that have nothing to say."""

import itertools
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from shadowmmu.coordinator import decode_report
from shadowmmu.reports import page_of, render_html
from shadowmmu.reports.page import (
    Absent,
    Commands,
    Drawing,
    Figure,
    Markdown,
    Page,
    Paragraph,
    Section,
    Table,
    Tone,
)
from shadowmmu.reports.run_command import stress_command
from tests.reports.conftest import command, edit

Copy = Callable[[Path], Path]


def said(page: Page, section: str) -> str:
    """The paragraphs of a section, and what it says is missing."""
    (found,) = (one for one in page.sections if one.id == section)
    return "\n".join(part.text for part in found.parts if isinstance(part, Paragraph | Absent))


def table(page: Page, section: str, caption: str) -> list[list[str]]:
    (found,) = (one for one in page.sections if one.id == section)
    (one,) = (part for part in found.parts if isinstance(part, Table) and part.caption.startswith(caption))
    return [[cell.text for cell in row] for row in one.rows]


def figures(page: Page, section: str) -> list[str]:
    (found,) = (one for one in page.sections if one.id == section)
    return [part.title for part in found.parts if isinstance(part, Figure)]


class TestRun:
    def test_what_was_covered_least_comes_first(self, passed: Path) -> None:
        rows = table(page_of(passed), "coverage", "Named points")
        reached = [row[1] for row in rows]
        assert reached[0] == "never"
        assert "never" not in reached[reached.count("never") :]

    def test_every_counter_is_there_with_its_rate(self, passed: Path) -> None:
        counters = decode_report((passed / "report.json").read_bytes()).counters
        rows = {row[0]: row[1:] for row in table(page_of(passed), "counters", "All counters")}
        assert rows.keys() == counters.keys()
        exits, instructions = counters["exits.page_fault"], counters["vcpu.instructions"]
        assert rows["exits.page_fault"] == [f"{exits:,}", f"{1000 * exits / instructions:,.3f}"]

    def test_the_command_that_it_names_gives_the_same_run(self, pre_patch: Path, tmp_path: Path) -> None:
        (summary,) = (one for one in page_of(pre_patch).sections if one.id == "summary")
        (commands,) = (part for part in summary.parts if isinstance(part, Commands))
        line = next(line for line, what in commands.lines if "again, to the digest" in what)
        assert command(*shlex.split(line)[1:], "--out", tmp_path)[0] == 0
        runs = [decode_report((folder / "report.json").read_bytes()) for folder in (pre_patch, tmp_path)]
        assert runs[0].stream == runs[1].stream

    def test_there_is_no_command_for_what_no_option_says(self, passed: Path) -> None:
        from msgspec.structs import replace

        config = decode_report((passed / "report.json").read_bytes()).config
        assert stress_command(config, 2, in_process=False) is not None
        assert stress_command(replace(config, tlb_ways=8), 2, in_process=False) is None
        assert stress_command(replace(config, profile="of-the-future"), 2, in_process=False) is None

    def test_a_violation_has_its_rule_and_a_diagram(self, violated: Path) -> None:
        page = page_of(violated)
        assert page.badge is not None and page.badge.tone is Tone.BAD
        (section,) = (one for one in page.sections if one.id == "violation")
        (drawing,) = (part for part in section.parts if isinstance(part, Drawing))
        assert drawing.svg.startswith("<svg") and "vCPU 1" in drawing.text

    def test_of_a_long_list_in_an_event_the_beginning_is_shown(self, violated: Path, copy: Copy) -> None:
        folder = copy(violated)
        violation = json.loads((folder / "report.json").read_text())["violation"]
        event = {
            "index": 29_715,
            "type": "DirtyLogRead",
            "note": "the answer",
            "fields": {"gfns": list(range(500))},
        }
        edit(folder, violation=violation | {"related": [event]})
        (row,) = table(page_of(folder), "violation", "Earlier events")
        assert row[:3] == ["29,715", "DirtyLogRead", "the answer"]
        assert row[3] == "gfns=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ... 500 in all]"

    def test_why_a_run_was_stopped_is_said_once(self, passed: Path, copy: Copy) -> None:
        folder = copy(passed)
        edit(
            folder,
            verdict="unknown",
            text="interrupted by SIGINT",
            problems=["interrupted by SIGINT", "lost"],
        )
        assert said(page_of(folder), "summary") == "interrupted by SIGINT\nProblem: lost"

    def test_bypass_guest_pf_is_told_of_the_kernel_that_has_it(self, pre_patch: Path, passed: Path) -> None:
        rows = {row[0] for row in table(page_of(pre_patch), "page-faults", "bypass_guest_pf on")}
        assert {"delivered without an exit", "exits: page_fault"} <= rows
        assert "Profile fixed has no bypass_guest_pf" in said(page_of(passed), "page-faults")

    def test_what_is_missing_is_named_with_the_reason(self, passed: Path, copy: Copy) -> None:
        folder = copy(passed)
        edit(folder, counters={}, histograms={}, series=[], coverage={"points": [], "outcomes": []})
        (folder / "chaos.json").write_text("{")
        (folder / "broken.repro").write_text('{"format": 99}')
        page = page_of(folder)
        assert "no counters: no member had reported" in said(page, "counters")
        assert "no histograms" in said(page, "latencies")
        assert "no samples over time" in said(page, "series")
        assert "no coverage" in said(page, "coverage")
        assert "chaos.json cannot be used" in said(page, "chaos")
        assert "broken.repro cannot be used" in said(page, "violation")
        assert render_html(page)

    def test_a_histogram_that_cannot_be_decoded_is_said_to_be_so(self, passed: Path, copy: Copy) -> None:
        folder = copy(passed)
        histograms = json.loads((folder / "report.json").read_text())["histograms"]
        histograms["lock_wait_steps"]["encoded"] = "HISTOGRAM"
        edit(folder, histograms=histograms)
        page = page_of(folder)
        assert "lock_wait_steps of this run: not a readable HdrHistogram" in said(page, "latencies")
        assert figures(page, "latencies") == []


class TestComparison:
    def test_of_two_runs(self, pre_patch: Path, passed: Path) -> None:
        page = page_of(pre_patch, passed)
        assert {row[0] for row in table(page, "against", "Differences of the configurations")} == {
            *("profile", "bypass_guest_pf", "ops", "seed", "vpid")
        }
        both = [
            decode_report((folder / "report.json").read_bytes()).counters for folder in (pre_patch, passed)
        ]
        rates = [1000 * one["lock.taken"] / one["vcpu.instructions"] for one in both]
        row = {row[0]: row[1:] for row in table(page, "against", "Counters side by side")}["lock.taken"]
        assert row == [
            *(f"{one['lock.taken']:,}" for one in both),
            *(f"{rate:,.3f}" for rate in rates),
            f"{rates[0] / rates[1]:,.2f}x",
        ]
        assert "They had different events" in said(page, "against")

    def test_of_a_run_with_itself(self, passed: Path) -> None:
        page = page_of(passed, passed)
        assert "the same events, byte for byte" in said(page, "against")
        assert "Their configurations are the same" in said(page, "against")
        assert "Both covered the same points" in said(page, "against")

    def test_of_two_sweeps_is_by_point(self, sweep: Path) -> None:
        page = page_of(sweep, sweep)
        rows = table(page, "against", "iteration_cycles")
        assert [row[:2] for row in rows] == [["on", "1"], ["on", "2"], ["off", "1"], ["off", "2"]]
        assert {row[4] for row in rows} == {"1.00x"}
        assert "the same, to the digest" in said(page, "against")

    def test_of_many_parameters_no_lines_are_drawn_that_cannot_be_told_apart(
        self, sweep: Path, copy: Copy
    ) -> None:
        folder = copy(sweep)
        header = json.loads((folder / "sweep.json").read_text())
        header["spec"]["grid"] = {
            "vpid": [True, False],
            "vcpus": [1],
            "memory_pages": list(range(4096, 4106)),
        }
        (folder / "sweep.json").write_text(json.dumps(header))
        table = pl.read_parquet(folder / "results.parquet").head(1)
        points = [
            table.with_columns(vpid=pl.lit(on), memory_pages=pl.lit(pages), point=pl.lit(place, pl.Int64))
            for place, (on, pages) in enumerate(itertools.product((True, False), range(4096, 4106)))
        ]
        pl.concat(points).write_parquet(folder / "results.parquet")
        page = page_of(folder, folder)
        assert "its 20 lines could not be told apart" in said(page, "against")
        assert figures(page, "against") == []

    def test_of_different_kinds_is_refused(self, passed: Path, sweep: Path) -> None:
        status, output = command("report", passed, "--against", sweep)
        assert status == 64
        assert "cannot be compared" in output


def test_a_virtual_time_run_shows_where_its_cycles_went(simulated: Path, simulated_wider: Path) -> None:
    result = json.loads((simulated / "simulation.json").read_text())["result"]
    page = page_of(simulated, simulated_wider)
    rows = {row[0]: row[1] for row in table(page, "causes", "Cycles by cause")}
    words = {name: name.replace("_", " ").replace("tlb", "TLB") for name in result["causes"]}
    assert rows == {words[name]: f"{cycles:,}" for name, cycles in result["causes"].items()}
    assert figures(page, "causes") == ["Time of all vCPUs by cause", "Time of each vCPU by cause"]
    assert table(page, "against", "Differences of the configurations")[0][0] == "vcpus"


def test_a_sweep_shows_its_question_its_plots_and_its_digest(sweep: Path) -> None:
    page = page_of(sweep)
    assert page.badge is not None and page.badge.text == "complete"
    assert figures(page, "answer") == ["Cycles by vCPUs", "Cycles in panels"]
    written = render_html(page)
    assert "How does <em>fork</em> scale, with &lt;b&gt;vpid&lt;/b&gt; &amp; without?" in written
    assert (sweep / "results.digest").read_text().strip() in written


def test_a_sweep_without_results_says_so(sweep: Path, copy: Copy) -> None:
    folder = copy(sweep)
    (folder / "results.parquet").unlink()
    page = page_of(folder)
    assert page.badge is not None and page.badge.text == "incomplete"
    assert "No run has ended yet" in said(page, "runs")
    assert render_html(page)


class TestAnswer:
    def test_if_every_run_has_failed_there_is_none(self, sweep: Path, copy: Copy) -> None:
        folder = copy(sweep)
        table_ = pl.read_parquet(folder / "results.parquet")
        failed = table_.with_columns(status=pl.lit("failed"), error=pl.lit("no"), traceback=pl.lit("no"))
        failed.write_parquet(folder / "results.parquet")
        page = page_of(folder)
        assert page.badge is not None and page.badge.text == "8 failed"
        assert "No run has succeeded" in said(page, "answer")
        assert len(table(page, "failures", "Runs that failed")) == 8

    @pytest.mark.parametrize("analysis", ["no-such", "../os", "fork-scaling"])
    def test_an_analysis_that_is_not_for_this_table_is_said_to_be_so(
        self, analysis: str, sweep: Path, copy: Copy
    ) -> None:
        folder = copy(sweep)
        header = json.loads((folder / "sweep.json").read_text())
        header["spec"]["analysis"] = analysis
        (folder / "sweep.json").write_text(json.dumps(header))
        assert "The analysis cannot be made" in said(page_of(folder), "answer")

    def test_its_links_lead_only_to_where_a_single_file_can_lead(self) -> None:
        words = Markdown("[a page](fork.md), [a site](https://example.org/), [a trap](javascript:1)")
        written = render_html(
            Page(title="", subtitle="", badge=None, sections=[Section("a", "A", [words])], foot="")
        )
        assert "<span>a page</span>" in written
        assert '<a href="https://example.org/">a site</a>' in written
        assert 'href="javascript' not in written


class TestFile:
    def test_it_is_one_file_that_refers_to_nothing(self, passed: Path, tmp_path: Path) -> None:
        target = tmp_path / "report.html"
        status, output = command("report", passed, "-o", target)
        assert (status, output.strip()) == (0, str(target))
        written = target.read_text(encoding="utf-8")
        assert len(written) < 2_000_000
        assert written.count("window.vegaEmbed = vegaEmbed") <= 1
        markup = "".join(part.partition("</script>")[2] for part in written.split("<script"))
        assert "http" not in markup.replace("http-equiv", "")
        assert " src=" not in markup.replace('src="data:', "")

    def test_it_is_the_same_each_time(self, passed: Path) -> None:
        assert render_html(page_of(passed)) == render_html(page_of(passed))

    def test_without_a_name_it_is_in_the_folder(self, passed: Path, copy: Copy) -> None:
        folder = copy(passed)
        assert command("report", folder)[0] == 0
        assert (folder / "report.html").stat().st_size > 100_000

    def test_a_file_that_cannot_be_written_is_a_usage_error(self, passed: Path, tmp_path: Path) -> None:
        status, output = command("report", passed, "-o", tmp_path / "nowhere" / "report.html")
        assert status == 64
        assert "--output" in output


DAMAGED = [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"schema": "shadowmmu-report/1"}', b"{}"]


class TestDamage:
    @pytest.mark.parametrize("name", ["report.json", "simulation.json", "sweep.json"])
    @pytest.mark.parametrize("data", DAMAGED, ids=range(len(DAMAGED)))
    def test_a_damaged_file_gets_one_line_that_names_it(self, name: str, data: bytes, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(data)
        status, output = command("report", tmp_path)
        assert status == 64
        complaint, help_line = output.splitlines()
        assert name in complaint
        assert help_line.endswith("--help' says what there is.")

    def test_a_report_of_another_schema(self, passed: Path, copy: Copy) -> None:
        folder = copy(passed)
        edit(folder, schema="shadowmmu-report/2")
        assert "the schema is shadowmmu-report/2" in command("report", folder)[1]

    def test_a_table_of_a_sweep_that_is_damaged(self, sweep: Path, copy: Copy) -> None:
        folder = copy(sweep)
        (folder / "results.parquet").write_bytes(b"PAR1 and no more")
        status, output = command("report", folder)
        assert status == 64
        assert "results.parquet" in output

    def test_folders_that_are_none(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for folder, words in (
            ("nothing", "there is no folder"),
            ("file", "is not a folder"),
            (".", "has none of"),
        ):
            status, output = command("report", tmp_path / folder)
            assert status == 64
            assert words in output

    @pytest.mark.parametrize("column, value", [("point", "x"), ("iteration_cycles", [1, 2])])
    def test_a_table_of_a_sweep_with_values_of_other_types(
        self, column: str, value: object, sweep: Path, copy: Copy
    ) -> None:
        folder = copy(sweep)
        table = pl.read_parquet(folder / "results.parquet").with_columns(pl.lit(value).alias(column))
        table.write_parquet(folder / "results.parquet")
        status, output = command("report", folder)
        assert status == 64
        assert "results.parquet" in output

    def test_a_folder_whose_name_is_no_text(self, passed: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(passed, tmp_path / os.fsdecode(b"na\xffme"))
        assert command("report", folder)[0] == 0
        assert "Run na?me" in (folder / "report.html").read_text(encoding="utf-8")

    def test_a_pipe_instead_of_a_reproduction_is_not_waited_for(self, passed: Path, copy: Copy) -> None:
        folder = copy(passed)
        os.mkfifo(folder / "x.repro")
        assert "is not a file" in said(page_of(folder), "violation")

    def test_a_pipe_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "report.json")
        status, output = command("report", tmp_path)
        assert status == 64
        assert "is not a file" in output
