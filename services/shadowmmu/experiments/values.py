"""What a parameter's value and a measured value can be: the plain values that TOML, Parquet and JSON share."""

from __future__ import annotations

from typing import TypeAlias

__all__ = ["Metric", "Value"]

Value: TypeAlias = bool | int | float | str
"""The value of a parameter."""

Metric: TypeAlias = bool | int | float | str | None
"""What was measured at a point; None: nothing to be measured there."""
