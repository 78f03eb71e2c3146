"""The asyncio client over ZeroMQ.

    async with await VcpuClient.connect("tcp://127.0.0.1:5701") as vcpu:
        await vcpu.enter()
        answer = await vcpu.walk(0x400000, AccessFlag.WRITE)          # Walked | WalkFault; raises Kicked
        if isinstance(answer, WalkFault):
            entered = await vcpu.exit(PageFaultExit(0x400000, answer.error_code, Instruction(AccessFlag.WRITE)))

`HostClient.request(operation)` is a host agent's, `MemberClient` the side of a run's processes towards the
coordinator, `probe` a health check. Services use `Endpoint.router(on_message, on_batch=..., on_peer_lost=...)`, which
is the socket alone, with a `shadowmmu.protocol.Session` per peer. `docs/PROTOCOL.md` has an example that runs.

Other machines are reached with keys only: `security=Security(folder).client(KeyRole.VCPU, MMU)` (docs/SECURITY.md).
"""

from shadowmmu.client.access import KeyRole, User, forbidden, key_role
from shadowmmu.client.connection import ClientOptions, Connection
from shadowmmu.client.errors import Kicked, RequestRefused, ServiceError, ServiceLost, SessionEnded
from shadowmmu.client.host import HostClient, probe
from shadowmmu.client.keys import ClientKeys, InsecureAddressError, KeysError, Plain, Security, ServerKeys
from shadowmmu.client.member import MemberClient
from shadowmmu.client.transport import DRAIN_LIMIT, QUEUE_LIMIT, Endpoint, EndpointOptions
from shadowmmu.client.vcpu import VcpuClient

__all__ = [
    "VcpuClient",
    "Kicked",
    "HostClient",
    "MemberClient",
    "probe",
    # When the service says no, or nothing.
    "ServiceError",
    "RequestRefused",
    "SessionEnded",
    "ServiceLost",
    # The socket, for services and for clients of one's own.
    "Endpoint",
    "EndpointOptions",
    "ClientOptions",
    "Connection",
    # Keys: what a process was told, what its sockets are told, and who may do what.
    "Security",
    "ServerKeys",
    "ClientKeys",
    "Plain",
    "KeysError",
    "InsecureAddressError",
    "KeyRole",
    "User",
    "forbidden",
    "key_role",
    "DRAIN_LIMIT",
    "QUEUE_LIMIT",
]
