"""`python -m benchmarks`: measures and prints; no figure passes or fails."""

from __future__ import annotations

import argparse

from benchmarks.exploration import executions_per_second
from benchmarks.figures import Figure, print_figures
from benchmarks.floods import throughput_left
from benchmarks.model import page_faults
from benchmarks.service import protected_requests_per_second, requests_per_second
from benchmarks.side_by_side import model_against
from benchmarks.stress import accesses_per_second
from benchmarks.virtual_time import virtual_time_per_second


def main() -> None:
    """Runs the benchmarks asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="measurements per figure")
    parser.add_argument(
        "--only",
        choices=["model", "exploration", "virtual-time", "service", "protection", "stress", "floods"],
        help="only these",
    )
    parser.add_argument(
        "--against", metavar="REVISION", help="the model's speed against this commit's, and no more"
    )
    arguments = parser.parse_args()
    figures: list[Figure] = []
    if arguments.against is not None:
        print_figures(model_against(arguments.against, arguments.runs))
        return
    if arguments.only in (None, "model"):
        figures.append(page_faults(arguments.runs))
    if arguments.only in (None, "exploration"):
        figures += executions_per_second(arguments.runs)
    if arguments.only in (None, "virtual-time"):
        figures += virtual_time_per_second(arguments.runs)
    if arguments.only in (None, "service"):
        figures += requests_per_second(arguments.runs)
    if arguments.only in (None, "protection"):
        figures += protected_requests_per_second(arguments.runs)
    if arguments.only in (None, "stress"):
        figures += accesses_per_second(arguments.runs)
    if arguments.only == "floods":  # takes minutes
        figures += throughput_left(arguments.runs)
    print_figures(figures)


if __name__ == "__main__":
    main()
