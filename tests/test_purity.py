"""The pure packages load nothing that does I/O: each is imported in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

IMPURE = {"zmq", "asyncio", "socket", "selectors", "threading", "subprocess", "structlog", "typer", "rich"}


@pytest.mark.parametrize("package", ["protocol", "kvm", "cpu", "checker", "machine"])
def test_a_pure_package_loads_no_io(package: str) -> None:
    program = f"import shadowmmu.{package}, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert f"shadowmmu.{package}" in done.stdout.split()
    assert not IMPURE & set(done.stdout.split())
