"""A vCPU worker: `shadowmmu worker vcpu`."""

from __future__ import annotations

import asyncio
import os
import platform

import msgspec

from shadowmmu.client import KeyRole
from shadowmmu.client.life import LifeOptions, take_part
from shadowmmu.cpu import VcpuCore, make_program
from shadowmmu.protocol.messages import Joined, Role
from shadowmmu.protocol.states import MMU
from shadowmmu.vcpu.connection import VcpuConnection
from shadowmmu.vcpu.driver import VcpuDriver

__all__ = ["WorkerOptions", "run_worker"]


def _default_name() -> str:
    return f"vcpu-{platform.node()}-{os.getpid()}"[:64]


class WorkerOptions(LifeOptions, frozen=True, kw_only=True):
    """Options of `shadowmmu worker vcpu`: those of any member of a run (`LifeOptions`)."""

    name: str = msgspec.field(default_factory=_default_name)


async def run_worker(options: WorkerOptions) -> int:
    """Takes part in one run as a vCPU; returns the exit status (see `life`). Takes over SIGTERM and SIGINT."""

    def make_part(joined: Joined) -> VcpuConnection:
        config = joined.config

        def make_core(vcpu: int, vcpus: int) -> VcpuCore:
            return VcpuCore(config, vcpu, vcpus, make_program(config, vcpu, vcpus))

        clock = asyncio.get_running_loop().time
        place = None if joined.vcpu is None else (joined.vcpu, joined.vcpu_token)
        driver = VcpuDriver(options.name, make_core, clock, patience=options.patience_seconds, place=place)
        security = options.security.client(KeyRole.VCPU, MMU)
        return VcpuConnection(driver, joined.mmu_endpoint, security)

    return await take_part(options, Role.VCPU, make_part)
