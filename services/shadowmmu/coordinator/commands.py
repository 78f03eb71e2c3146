"""The command lines of a run's processes on one machine, and a free port for whoever has to keep its address."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import msgspec

from shadowmmu.client import Security
from shadowmmu.coordinator.run_types import RunSettings
from shadowmmu.protocol.messages import RunConfig

__all__ = ["Commands", "coordinator_command", "free_port", "loopback"]

_PROGRAM = [sys.executable, "-m", "shadowmmu.cli"]
_NO_OPTION = {"park_steps", "tlb_sets", "tlb_ways"}
"""Fields of a configuration that no option sets."""


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def loopback(port: int) -> str:
    """The ZeroMQ address of a port of this machine."""
    return f"tcp://127.0.0.1:{port}"


class Commands(msgspec.Struct, frozen=True, kw_only=True):
    """The commands of those that join the coordinator at `coordinator`.

    `mmu_bind`, `mmu_advertise`: where the MMU service listens, and where the others reach it; it listens there again
    after a restart.
    """

    coordinator: str
    mmu_bind: str
    directory: Path
    log_format: str
    mmu_advertise: str | None = None
    security: Security = Security()

    @property
    def _common(self) -> list[str]:
        return [f"--coordinator={self.coordinator}", *_for_all(self.log_format, self.security)]

    def mmu(self) -> list[str]:
        """The MMU service."""
        advertise = [] if self.mmu_advertise is None else [f"--advertise={self.mmu_advertise}"]
        where = [f"--bind={self.mmu_bind}", *advertise, f"--out={self.directory}"]
        return [*_PROGRAM, "serve", "mmu", *self._common, *where]

    def host(self, name: str) -> list[str]:
        """A host agent."""
        return [*_PROGRAM, "worker", "host", *self._common, f"--name={name}"]

    def vcpu(self, name: str) -> list[str]:
        """A vCPU worker."""
        return [*_PROGRAM, "worker", "vcpu", *self._common, f"--name={name}"]


def coordinator_command(
    settings: RunSettings, bind: str, directory: Path, log_format: str, security: Security
) -> list[str]:
    """A coordinator of that run."""
    return [
        *_PROGRAM,
        "serve",
        "coordinator",
        f"--bind={bind}",
        f"--out={directory}",
        "--json",
        f"--vcpus={settings.vcpus}",
        f"--hosts={settings.hosts}",
        f"--wait-seconds={settings.wait_seconds}",
        *_for_all(log_format, security),
        *config_options(settings.config),
    ]


def config_options(config: RunConfig) -> list[str]:
    """The options that make this configuration. Raises ValueError if there are none that do."""
    options = []
    for name in config.__struct_fields__:
        value = msgspec.to_builtins(getattr(config, name))
        option = name.replace("_", "-")
        if name in _NO_OPTION:
            if value != getattr(RunConfig(), name):
                raise ValueError(f"no option sets {name} to {value}")
        elif isinstance(value, bool):
            options.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            options.append(f"--{option}={value}")
    return options


def _for_all(log_format: str, security: Security) -> list[str]:
    keys = [] if security.folder is None else [f"--keys={security.folder}"]
    return [f"--log-format={log_format}", *keys]
