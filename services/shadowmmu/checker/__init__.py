"""Coherence rules over the event stream; pure.

`Checker().feed(event)` answers with the `Violation` that the event is, or None.
"""

from shadowmmu.checker.checker import Checker
from shadowmmu.checker.violation import Access, RelatedEvent, Rule, Violation

__all__ = ["Checker", "Violation", "Rule", "Access", "RelatedEvent"]
