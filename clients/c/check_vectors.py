"""The golden vectors against the C client's decoder and encoder: `check_vectors.py PROGRAM`.

The vectors are tests/protocol/vectors.json, PROGRAM is `vectors` (vectors.c). What this client neither sends nor
receives (messages of host agents, and of the MMU service to the coordinator; a program that goes on; tokens of others)
it has to refuse.
Relies on Python's standard library only.
"""

# ruff: noqa: INP001 (a script, in no package)

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

VECTORS = pathlib.Path(__file__).resolve().parents[2] / "tests" / "protocol" / "vectors.json"
DIRECTIONS = ["to the MMU service", "from the MMU service", "to the coordinator", "from the coordinator"]
NOT_OURS = {"host_request", "host_reply", "event_batch", "event_credit", "vcpu_lost"}
NEVER_SENT = {("progress", "tokens")}


def line(vector: dict[str, Any]) -> str:
    """The vector as a line for the program."""
    return " ".join(
        [str(DIRECTIONS.index(vector["direction"])), *(frame or "-" for frame in vector["frames"])]
    )


def valid_complaint(vector: dict[str, Any], answer: dict[str, Any]) -> str | None:
    """What is wrong with the answer to a valid message, or None."""
    body = vector["body"]
    if body["t"] in NOT_OURS or body.get("resume") is not None or body.get("tokens"):
        return None if answer.get("code") == "malformed" else "should not be known"
    meant = {
        "incarnation": vector["incarnation"],
        "number": vector["number"],
        "body": {
            field: value
            for field, value in vector.get("means", vector["body"]).items()
            if (vector["body"]["t"], field) not in NEVER_SENT
        },
    }
    again = answer.pop("again", None)
    if answer != meant:
        return f"{answer} in the place of {meant}"
    sent = vector["direction"].startswith("to ")
    if sent and vector["form"] == "full" and again != vector["frames"][1]:
        return f"is encoded as {again}"
    return None


def invalid_complaint(vector: dict[str, Any], answer: dict[str, Any]) -> str | None:
    """What is wrong with the answer to an invalid message, or None."""
    if answer.get("code") != vector["code"]:
        return f"{answer} in the place of {vector['code']}"
    return None


def main() -> int:
    """Prints what is wrong; returns 1 if anything is."""
    vectors = json.loads(VECTORS.read_text(encoding="utf-8"))
    judged = [(vector, valid_complaint) for vector in vectors["valid"]]
    judged += [(vector, invalid_complaint) for vector in vectors["invalid"]]
    lines = "".join(f"{line(vector)}\n" for vector, _ in judged)
    done = subprocess.run(sys.argv[1:], input=lines, capture_output=True, text=True, check=True)  # noqa: S603
    answers = [json.loads(answer) for answer in done.stdout.splitlines()]
    complaints = [
        f"{vector['name']}: {complaint}"
        for (vector, judge), answer in zip(judged, answers, strict=True)
        if (complaint := judge(vector, answer)) is not None
    ]
    summary = f"{len(judged)} vectors, {len(complaints)} complaints"
    sys.stdout.write("".join(f"{line}\n" for line in [*complaints, summary]))
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
