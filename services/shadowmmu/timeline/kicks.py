"""Remote TLB flushes: which kicks are out, and the arrows from who asked to each vCPU and back.

A flow begins at the slice in which the operation waits, leads to the target's exit, and ends where the last answer lets
the operation go on. Bounded by the flushes under way.
"""

from __future__ import annotations

__all__ = ["Kicks"]


class Kicks:
    """The kicks of remote flushes that nobody has answered yet, and the flows of those that have."""

    def __init__(self) -> None:
        self._flows = 0
        self._unanswered: dict[tuple[int, int], list[tuple[int, int]]] = {}
        """By (vcpu, entry): (operation, flow) of each kick."""
        self._of_flush: dict[int, list[int]] = {}
        """The flows of each operation that waits."""
        self._asked: dict[int, int] = {}
        """When each operation asked."""
        self.sent = 0
        self.unanswered = 0

    def ask(self, now: int, op: int, targets: list[tuple[int, int]]) -> tuple[int, ...]:
        """Operation `op` kicks these (vcpu, entry) at a time; returns the flows that begin, one per target."""
        flows = []
        for target in targets:
            self._flows += 1
            flows.append(self._flows)
            self._unanswered.setdefault(target, []).append((op, self._flows))
        self._of_flush[op] = flows
        self._asked[op] = now
        self.sent += len(targets)
        self.unanswered += len(targets)
        return tuple(flows)

    def answer(self, now: int, vcpu: int, entry: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The vCPU has left the entry: the flows that lead there and on, and those that end there.

        In virtual time it may have left by itself before the operation came to kick it: no flow leads there then.
        """
        answered = self._unanswered.pop((vcpu, entry), None)
        if answered is None:
            return (), ()
        self.unanswered -= len(answered)
        onward, ending = [], []
        for op, flow in answered:
            if flow not in self._of_flush.get(op, ()):
                ending.append(flow)
            elif now >= self._asked[op]:
                onward.append(flow)
        return tuple(onward), tuple(ending)

    def flushed(self, op: int) -> tuple[int, ...]:
        """The operation goes on: the flows that end there; none if it does not wait."""
        self._asked.pop(op, None)
        return tuple(self._of_flush.pop(op, ()))

    def gave_up(self, op: int) -> None:
        """The operation goes on without its answers: its flows end at the vCPUs."""
        self.flushed(op)

    def waits(self, op: int) -> bool:
        """Whether the operation waits for answers."""
        return op in self._of_flush

    def loose(self) -> tuple[int, ...]:
        """Flows that have no end yet, when the run is over."""
        flows = {flow for flows in self._of_flush.values() for flow in flows}
        flows |= {flow for kicks in self._unanswered.values() for _, flow in kicks}
        return tuple(sorted(flows))
