"""Where in the stream the checker is, and the little of the past that explains a violation.

Rules ask this module who did something and when a vCPU last flushed. Nothing here decides whether a rule is broken.
Memory is bounded by the numbers of vCPUs and of operations in flight.
"""

from __future__ import annotations

from shadowmmu.checker.violation import Access, RelatedEvent, Rule, Violation
from shadowmmu.protocol.events import (
    Accesses,
    FlushAnswered,
    FlushRequested,
    Invalidated,
    OperationEnded,
    OperationStarted,
    TlbsDirtyCleared,
    TlbsDirtyRaised,
)

__all__ = ["History"]

OPERATIONS_LIMIT = 4096
"""Operations in flight that are remembered; a run has a few per vCPU."""


class History:
    """Position, operations in flight, and each vCPU's last flush."""

    def __init__(self) -> None:
        self.index = -1  # of the event that is being looked at
        self.record = -1  # of the last InputConsumed
        self.tlbs_dirty = 0
        self._operations: dict[int, OperationStarted] = {}
        self._host_operations = 0  # of these, the host's own
        self._flush_asked: dict[int, tuple[int, FlushRequested]] = {}  # by vCPU
        self._flush_answered: dict[int, tuple[int, FlushAnswered]] = {}  # by vCPU
        self._flush_targets: dict[int, FlushRequested] = {}  # by operation, until answered
        self._emptied: dict[int, tuple[int, Invalidated]] = {}  # by vCPU

    # --- what the stream says -----------------------------------------------------------------------------------

    def operation_started(self, event: OperationStarted) -> None:
        if len(self._operations) >= OPERATIONS_LIMIT:
            forgotten = self._operations.pop(next(iter(self._operations)))
            self._host_operations -= forgotten.vcpu < 0
        self._operations[event.op] = event
        self._host_operations += event.vcpu < 0

    def operation_ended(self, event: OperationEnded) -> None:
        started = self._operations.pop(event.op, None)
        self._host_operations -= started is not None and started.vcpu < 0
        self._flush_targets.pop(event.op, None)

    def flush_requested(self, event: FlushRequested) -> None:
        if len(self._flush_targets) >= OPERATIONS_LIMIT:
            del self._flush_targets[next(iter(self._flush_targets))]
        self._flush_targets[event.op] = event
        for vcpu, _entry in event.targets:
            self._flush_asked[vcpu] = (self.index, event)

    def flush_answered(self, event: FlushAnswered) -> None:
        asked = self._flush_targets.pop(event.op, None)
        if asked is not None:
            for vcpu, _entry in asked.targets:
                self._flush_answered[vcpu] = (self.index, event)

    def invalidated(self, event: Invalidated) -> None:
        if event.gva == -1:
            self._emptied[event.vcpu] = (self.index, event)

    def tlbs_dirty_raised(self, event: TlbsDirtyRaised) -> None:
        self.tlbs_dirty = event.value

    def tlbs_dirty_cleared(self, _event: TlbsDirtyCleared) -> None:
        self.tlbs_dirty = 0

    # --- what rules ask -----------------------------------------------------------------------------------------

    def describe_operation(self, op: int) -> str:
        """An operation in flight in words; ask while it is in flight."""
        started = self._operations.get(op)
        if started is None:
            return f"operation {op}"
        who = "the host" if started.vcpu < 0 else f"vCPU {started.vcpu}"
        return f"operation {op} ({started.name}, for {who})"

    @property
    def host_is_at_work(self) -> bool:
        """An operation of the host itself is under way."""
        return self._host_operations > 0

    def describe_host_operations(self) -> str:
        """The host's own operations in flight (notifiers and the like) in words; empty if there are none."""
        ops = [event.op for event in self._operations.values() if event.vcpu < 0]
        return " or ".join(self.describe_operation(op) for op in ops)

    def flushes_of(self, vcpu: int) -> list[RelatedEvent]:
        """When the vCPU was last asked to flush, had last answered, and last emptied its TLB."""
        found = []
        if vcpu in self._emptied:
            index, emptied = self._emptied[vcpu]
            found.append(RelatedEvent(index, emptied, f"vCPU {vcpu}'s TLB was last emptied here"))
        if vcpu in self._flush_asked:
            index, asked = self._flush_asked[vcpu]
            found.append(RelatedEvent(index, asked, f"the last remote flush that kicked vCPU {vcpu}"))
        if vcpu in self._flush_answered:
            index, answered = self._flush_answered[vcpu]
            found.append(
                RelatedEvent(index, answered, f"the last such flush of vCPU {vcpu} that was answered")
            )
        return found

    def describe_tlbs_dirty(self) -> str:
        """The deferred flushes in words."""
        return f"tlbs_dirty is {self.tlbs_dirty}"

    def access_violation(
        self,
        rule: Rule,
        event: Accesses,
        number: int,
        *,
        why: str,
        blame: str,
        related: list[RelatedEvent],
    ) -> Violation:
        """The violation that item `number` of `event` is. `why` continues the sentence that describes the access."""
        access = Access(event.vcpu, event.entry, *event.items[number])
        everything = sorted([*related, *self.flushes_of(event.vcpu)], key=lambda one: one.index)
        return Violation(
            rule=rule,
            text=f"{access} {why}",
            vcpu=event.vcpu,
            access=access,
            journal_record=self.record,
            event_index=self.index,
            blame=f"{blame}; {self.describe_tlbs_dirty()}",
            related=tuple(everything),
        )
