from __future__ import annotations

import subprocess
import sys


def test_the_protocol_does_no_io() -> None:
    program = "import shadowmmu.protocol, sys; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(run.stdout.split())
    assert "shadowmmu.protocol.session" in loaded
    assert not loaded & {"zmq", "asyncio", "socket", "selectors", "ssl", "subprocess", "structlog", "logging"}
