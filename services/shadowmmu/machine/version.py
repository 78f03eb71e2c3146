"""Which code made a journal."""

from __future__ import annotations

from importlib.metadata import version

__all__ = ["code_version"]


def code_version() -> str:
    """The version of the installed distribution."""
    return version("shadowmmu")
