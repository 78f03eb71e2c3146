"""The conformance kit: judges a running MMU service, or somebody's client, by docs/PROTOCOL.md.

    report = check_server("tcp://127.0.0.1:5701")               # plays clients to a service
    report = await check_client(["./my-client", "{address}"])   # plays the service to a process
    print(render(report, ReportFormat.TAP))

docs/CONFORMANCE_KIT.md lists all checks. What judges is pure (`judge`, `tlb_model`, `scenes`, `checks`, `report`); the
sockets are in `peer` and `lab` (ours are the clients) and in `stage` and `run_host` (ours is the service).
"""

from shadowmmu.protocol_check.check_client import ClientLimits, check_client
from shadowmmu.protocol_check.check_server import (
    ServerLimits,
    ServiceUnreachableError,
    check_server,
    server_checks,
)
from shadowmmu.protocol_check.checks import Check, Outcome, Report, Result
from shadowmmu.protocol_check.client_checks import ClientCheck
from shadowmmu.protocol_check.report import ReportFormat, render

__all__ = [
    "check_server",
    "ServerLimits",
    "ServiceUnreachableError",
    "check_client",
    "ClientLimits",
    "Report",
    "Result",
    "Check",
    "Outcome",
    "render",
    "ReportFormat",
    "server_checks",
    "ClientCheck",
]
