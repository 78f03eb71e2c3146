"""A host agent: `shadowmmu worker host`."""

from __future__ import annotations

import asyncio
import os
import platform

import msgspec

from shadowmmu.client import KeyRole
from shadowmmu.client.life import LifeOptions, take_part
from shadowmmu.hostagent.connection import AgentConnection
from shadowmmu.hostagent.requests import HostRequests, Operations
from shadowmmu.machine.host_program import HostProgram
from shadowmmu.protocol.messages import Joined, Role
from shadowmmu.protocol.states import MMU

__all__ = ["AgentOptions", "run_agent"]


def _default_name() -> str:
    return f"host-{platform.node()}-{os.getpid()}"[:64]


class AgentOptions(LifeOptions, frozen=True, kw_only=True):
    """Options of `shadowmmu worker host`: those of any member of a run (`LifeOptions`)."""

    name: str = msgspec.field(default_factory=_default_name)


async def run_agent(options: AgentOptions) -> int:
    """Takes part in one run as the host; returns the exit status (see `life`). Takes over SIGTERM and SIGINT."""

    def make_part(joined: Joined) -> AgentConnection:
        config = joined.config

        def make_program(vcpus: int) -> Operations | None:
            return HostProgram(config, vcpus) if config.host_rate > 0.0 else None

        requests = HostRequests(make_program, asyncio.get_running_loop().time)
        return AgentConnection(
            joined.mmu_endpoint,
            requests,
            name=options.name,
            missed=options.missed,
            security=options.security.client(KeyRole.HOST, MMU),
        )

    return await take_part(options, Role.HOST, make_part)
