"""A child process whose runs do what their parameters say: `python -m tests.experiments.stub_child`."""

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from shadowmmu.experiments.child import serve
from shadowmmu.experiments.point import Job
from shadowmmu.experiments.values import Metric


def run(job: Job) -> Mapping[str, Metric]:
    match job.parameters.get("test"):
        case "raise":
            raise ValueError("this point is no good")
        case "die":
            os.write(2, b"last words\n")
            os.kill(os.getpid(), signal.SIGKILL)
        case "leave":
            os._exit(3)
        case "hang":
            while True:
                time.sleep(3600)
        case "print":
            os.write(1, b"this is no result\n")
        case "read":
            sys.stdin.read()
        case "large":
            return {"count": 1 << 63}
        case "many":
            return {f"metric {n}": n for n in range(20_000)}
        case "clash":
            return {"test": 1}
        case "flaky":
            # The first time it fails.
            path = Path(str(job.parameters["profile"]))
            if not path.exists():
                path.touch()
                raise OSError("not yet")
    return {"seed_again": job.seed, "process": "child", "length": len(str(job.parameters.get("test")))}


if __name__ == "__main__":
    serve(run)
