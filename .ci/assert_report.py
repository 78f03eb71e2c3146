"""Asserts what a run's report.json says, and prints it in one line."""

import argparse
import json
import pathlib
import sys


def main() -> int:
    """Returns 0 if the report is as expected, 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=pathlib.Path)
    parser.add_argument("--verdict", required=True)
    parser.add_argument(
        "--vcpus-min", type=int, required=True, help="fewest vCPUs that may have been attached"
    )
    parser.add_argument("--vcpus-max", type=int, required=True, help="most vCPUs that may have been attached")
    arguments = parser.parse_args()

    report = json.loads(arguments.report.read_text(encoding="utf-8"))
    verdict, vcpus = report["verdict"], report["vcpus"]
    attached = vcpus if isinstance(vcpus, int) else len(vcpus)
    print(f"report: verdict {verdict}, {attached} vCPUs attached")
    if verdict != arguments.verdict:
        print(f"expected the verdict {arguments.verdict}", file=sys.stderr)
        return 1
    if not arguments.vcpus_min <= attached <= arguments.vcpus_max:
        print(f"expected {arguments.vcpus_min} to {arguments.vcpus_max} vCPUs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
