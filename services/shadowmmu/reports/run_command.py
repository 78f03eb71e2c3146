"""The `shadowmmu stress` command line that gives a run's configuration again. Pure."""

from __future__ import annotations

import shlex
from typing import Final

from shadowmmu.kvm import KernelTree, KvmError, Profile
from shadowmmu.protocol.messages import GuestMode, RunConfig

__all__ = ["stress_command"]

_VALUES: Final = (
    "seed",
    "ops",
    "profile",
    "memory_model",
    "audit",
    "mutant",
    "host_rate",
    "park_rate",
    "memory_pages",
    "mmu_pages",
)
"""Fields whose option has their name and their value."""
_SWITCHES: Final = ("vpid", "check")
_NO_OPTION: Final = ("park_steps", "tlb_sets", "tlb_ways")
_DEFAULTS: Final = RunConfig()


def stress_command(config: RunConfig, vcpus: int, *, in_process: bool) -> str | None:
    """The command line, with what differs from the defaults; None if options of this version cannot say it."""
    if any(getattr(config, name) != getattr(_DEFAULTS, name) for name in _NO_OPTION):
        return None
    try:
        kernel = Profile.parse(config.profile).kernel
    except KvmError:  # of another version
        return None
    words = ["shadowmmu", "stress", "--vcpus", str(max(vcpus, 1))]
    if in_process:
        words.append("--in-process")
    if config.tdp is not None:
        words += ["--tdp", config.tdp.value]
    elif config.mode is not GuestMode.PAGING64:
        words += ["--mode", config.mode.value]
    else:
        words += ["--workload", config.workload.value]
    for name in _VALUES:
        value = getattr(config, name)
        if value != getattr(_DEFAULTS, name):
            words += [_option(name), str(getattr(value, "value", value))]
    for name in _SWITCHES:
        if getattr(config, name) != getattr(_DEFAULTS, name):
            words.append(f"--no-{name}")
    # Where there is the parameter at all, it is on unless switched off.
    if kernel is KernelTree.PRE_PATCH and not config.bypass_guest_pf and config.tdp is None:
        words.append("--no-bypass-guest-pf")
    return shlex.join(words)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
