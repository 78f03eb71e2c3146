"""Guests that several tests begin with, as parts of litmus files."""

from __future__ import annotations

ONE_PAGE = """
[tables.root]
0 = "L3 wua"
[tables.L3]
0 = "L2 wua"
[tables.L2]
0 = "T wua"
[tables.T]
9 = "G wuad"
[addresses]
x = "0/0/0/9"
"""
"""The address x, which T[9] maps to G."""
