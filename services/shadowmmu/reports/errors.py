"""Why there is no report."""

from __future__ import annotations

__all__ = ["ReportError"]


class ReportError(ValueError):
    """What was to be reported cannot be: a folder that is damaged, foreign, or none. The message is one line."""
