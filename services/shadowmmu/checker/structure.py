"""Rule 7: broken structure. The kernel's own mmu_audit checks found the shadow page tables inconsistent."""

from __future__ import annotations

from shadowmmu.checker.history import History
from shadowmmu.checker.violation import Rule, Violation
from shadowmmu.protocol.events import AuditFailed

__all__ = ["audit_failed"]


def audit_failed(history: History, event: AuditFailed) -> Violation:
    """Every failed audit is a violation; its text says what was found where."""
    return Violation(
        rule=Rule.BROKEN_STRUCTURE,
        text=f"{event.check}: {event.text}",
        vcpu=-1,
        access=None,
        journal_record=history.record,
        event_index=history.index,
        blame="the operations since the audit before",
    )
