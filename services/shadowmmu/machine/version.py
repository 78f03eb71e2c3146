"""Which code made a journal."""

from __future__ import annotations

__all__ = ["code_version"]


def code_version() -> str:
    """The version of the installed distribution."""
    # Here, not above: importlib.metadata loads the standard library's mail and socket modules.
    from importlib.metadata import version  # noqa: PLC0415

    return version("shadowmmu")
