"""Errors of the model. Each says who erred: these are all mistakes of whoever calls the model."""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "KvmError",
    "NoSuchFrameError",
    "UnknownFixError",
    "UnknownProfileError",
    "VcpuModeError",
]


class KvmError(Exception):
    """Base of the model's errors: the caller asked for something that makes no sense. Nothing was changed."""


class ConfigError(KvmError, ValueError):
    """A virtual machine cannot be made from this configuration."""


class NoSuchFrameError(KvmError, ValueError):
    """A guest frame (or an address in it) that no memory slot holds."""

    def __init__(self, gfn: int) -> None:
        super().__init__(f"guest frame {gfn} is in no memory slot")
        self.gfn = gfn


class VcpuModeError(KvmError):
    """A vCPU is to enter the guest that has not left it."""

    def __init__(self, vcpu_id: int, mode: str) -> None:
        super().__init__(
            f"vCPU {vcpu_id} is {mode}: its exit has not taken effect, it cannot enter the guest"
        )


class UnknownProfileError(KvmError, ValueError):
    """A profile name that does not begin with a known base."""

    def __init__(self, text: str, known: list[str]) -> None:
        super().__init__(
            f"unknown profile {text!r}; known: {', '.join(known)}, each with +slug and -slug switches"
        )
        self.text = text
        self.known = known


class UnknownFixError(KvmError, ValueError):
    """A switch that is in no catalogue."""

    def __init__(self, slug: str, known: list[str]) -> None:
        super().__init__(f"unknown fix {slug!r}; known: {', '.join(known)}")
        self.slug = slug
        self.known = known
