"""Plays clients to a running MMU service, and says which checks it passes."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from shadowmmu.protocol import ProtocolError

# The modules of checks, in the order of the report.
from shadowmmu.protocol_check import (
    server_framing,
    server_guest,
    server_host,
    server_life,
    server_random,
    server_repeat,
    server_resume,
    server_sessions,
    server_takeover,
)
from shadowmmu.protocol_check.checks import Outcome, Report, Result
from shadowmmu.protocol_check.lab import Lab
from shadowmmu.protocol_check.registry import SERVER_CHECKS, CheckFailed, CheckSkipped, ServerCheck

__all__ = ["ServerLimits", "ServiceUnreachableError", "check_server", "server_checks"]


class ServerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """`patience`: seconds that one answer may take; `seed` and `budget` (seconds): of the random client."""

    patience: float = 5.0
    seed: int = 0
    budget: float = 5.0


class ServiceUnreachableError(Exception):
    """There is no MMU service at the address, or it takes nobody in."""


def server_checks() -> list[ServerCheck]:
    """All checks of a service, in the order of the report."""
    modules = (
        server_framing,
        server_sessions,
        server_guest,
        server_host,
        server_life,
        server_repeat,
        server_resume,
        server_takeover,
        server_random,
    )
    order = {module.__name__: number for number, module in enumerate(modules)}
    return sorted(SERVER_CHECKS, key=lambda check: order[check.procedure.__module__])


def check_server(
    address: str,
    limits: ServerLimits | None = None,
    only: Callable[[str], bool] = lambda _id: True,
) -> Report:
    """Carries out the checks whose ids `only` picks, one after the other. Raises ServiceUnreachableError.

    The service is to have no other clients meanwhile; afterwards all of ours have left.
    """
    limits = limits or ServerLimits()
    lab = Lab(address, limits.patience, limits.seed, limits.budget)
    try:
        try:
            lab.census()
        except (CheckFailed, ProtocolError) as error:
            raise ServiceUnreachableError(
                f"no MMU service that could be checked at {address}: {error}"
            ) from error
        if not lab.vcpus:
            raise ServiceUnreachableError(f"the service at {address} has no vCPU for us: is it in use?")
        results = [_carry_out(lab, check) for check in server_checks() if only(check.check.id)]
    finally:
        lab.close()
    notes = [f"{lab.vcpus} vCPUs, heartbeat {lab.heartbeat:g} s, seed {limits.seed}"]
    return Report(f"The MMU service at {address}", results, notes)


def _carry_out(lab: Lab, check: ServerCheck) -> Result:
    begin = time.monotonic()
    outcome, text = Outcome.PASSED, ""
    try:
        check.procedure(lab)
    except CheckSkipped as skipped:
        outcome, text = Outcome.SKIPPED, str(skipped)
    except (CheckFailed, ProtocolError) as failed:
        outcome = Outcome.FAILED
        text = "; ".join([str(failed), *getattr(failed, "__notes__", ())])
    finally:
        lab.clear()
    return Result(check.check, outcome, text, time.monotonic() - begin)
