"""Which message is legal when: the conversations' states and their tables, as data.

A *conversation* is what two ends say to each other on one connection: a peer (vCPU worker, host agent, probe, member
of a run) and a service (MMU service, coordinator). Each end keeps its own view of the state, moved by what it sends
and by what it receives; since messages of both directions cross on the wire, the two views differ for a while. So a
rule has two readings: what its sender may send in a state, and what its receiver must then be ready to receive.
The rules marked `crossing` are for the receiver only: messages that were legal for their sender, who had not
yet seen what the receiver had sent. Some of them are `ignored`, as the design says of kicks and walks that came late.

`session.Session` executes these tables; `docgen` prints and draws them for docs/PROTOCOL.md.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

import msgspec

from shadowmmu.protocol import messages as m

__all__ = [
    "CONVERSATIONS",
    "COORDINATOR",
    "GUEST_MODE",
    "HOST",
    "MEMBER",
    "MMU",
    "MMU_MEMBER",
    "OPENINGS",
    "PROBE",
    "RUN_PROBE",
    "VCPU",
    "Conversation",
    "Rule",
    "Service",
    "Side",
    "State",
    "Step",
]


class Side(enum.Enum):
    """An end of a conversation."""

    PEER = "peer"
    SERVICE = "service"

    @property
    def other(self) -> Side:
        return Side.SERVICE if self is Side.PEER else Side.PEER


class State(enum.Enum):
    """The states of all conversations, as one end sees them."""

    DETACHED = "detached"  # no session yet
    ATTACHING = "attaching"  # Attach (Join) is under way

    # A vCPU and the MMU service.
    OUTSIDE = "outside"  # attached, never entered
    HANDLING = "handling"  # an exit, or the first entry, is being handled by the host
    IN_GUEST = "in-guest"  # guest mode
    WAITING_WALK = "waiting-walk"  # guest mode; a walk is under way
    WAITING_VALUE = "waiting-value"  # guest mode; a load or a locked operation is under way

    # A host agent or a probe and the MMU service.
    SERVING = "serving"  # attached

    # A process of a run and the coordinator.
    JOINED = "joined"  # a member, not ready yet
    READY = "ready"  # waits for the start
    RUNNING = "running"
    DRAINING = "draining"  # finishes what is under way
    REPORTED = "reported"  # has said its final word

    LEAVING = "leaving"  # Detach is under way
    ENDED = "ended"  # the session is over; the peer may attach anew


S = State

GUEST_MODE: Final = frozenset({S.IN_GUEST, S.WAITING_WALK, S.WAITING_VALUE})
"""The states in which a guest entry is under way, as this end sees it."""


class Rule(msgspec.Struct, frozen=True):
    """`sender` sends `message` in one of the states `at`; then the state is `to` (None: unchanged).

    `crossing`: not for the sender; the receiver takes it in these states too. `ignored`: and drops it.
    """

    sender: Side
    message: type[m.Message]
    at: tuple[State, ...]
    to: State | None = None
    crossing: bool = False
    ignored: bool = False


class Step(msgspec.Struct, frozen=True):
    """What a table says of a message that is legal: the next state, and whether the message is dropped."""

    to: State
    ignored: bool


class Conversation:
    """A named set of rules, compiled for look-up by side, state and message type."""

    def __init__(self, name: str, title: str, rules: tuple[Rule, ...]) -> None:
        self.name = name
        self.title = title
        self.rules = rules
        self._sends = {side: _compile(rules, side, receiving=False) for side in Side}
        self._receives = {side: _compile(rules, side, receiving=True) for side in Side}

    def __repr__(self) -> str:
        return f"<Conversation {self.name}>"

    def sends(self, side: Side) -> Mapping[State, Mapping[type, Step]]:
        """What `side` may send, by state."""
        return self._sends[side]

    def receives(self, side: Side) -> Mapping[State, Mapping[type, Step]]:
        """What `side` must take, by state."""
        return self._receives[side]

    @property
    def states(self) -> tuple[State, ...]:
        """The states that its rules mention, in order."""
        used = {state for rule in self.rules for state in (*rule.at, rule.to)}
        return tuple(state for state in State if state in used)


def _compile(rules: tuple[Rule, ...], side: Side, *, receiving: bool) -> dict[State, dict[type, Step]]:
    table: dict[State, dict[type, Step]] = {state: {} for state in State}
    for rule in rules:
        if (rule.sender is side) == receiving or (rule.crossing and not receiving):
            continue
        for state in rule.at:
            if rule.message in table[state]:
                raise ValueError(f"two rules for {rule.message.__name__} in {state.value}")
            table[state][rule.message] = Step(rule.to or state, rule.ignored)
    return table


def _up(
    message: type[m.Message],
    *at: State,
    to: State | None = None,
    crossing: bool = False,
    ignored: bool = False,
) -> Rule:
    return Rule(Side.PEER, message, at, to, crossing, ignored)


def _down(
    message: type[m.Message],
    *at: State,
    to: State | None = None,
    crossing: bool = False,
    ignored: bool = False,
) -> Rule:
    return Rule(Side.SERVICE, message, at, to, crossing, ignored)


_ATTACH = (
    _up(m.Attach, S.DETACHED, S.ENDED, to=S.ATTACHING),
    _down(m.ErrorReply, S.ATTACHING, to=S.DETACHED),
)
_JOIN = (
    _up(m.Join, S.DETACHED, S.ENDED, to=S.ATTACHING),
    _down(m.ErrorReply, S.ATTACHING, to=S.DETACHED),
)


def _resuming(*states: State) -> tuple[Rule, ...]:
    """On a new connection, in whatever state. A Detach may come again: it does not count."""
    return (
        _up(m.Resume, *states),
        _down(m.Resumed, *states),
        _up(m.Detach, S.LEAVING, crossing=True, ignored=True),
    )


_VCPU_STATES = (S.OUTSIDE, S.HANDLING, S.IN_GUEST, S.WAITING_WALK, S.WAITING_VALUE, S.LEAVING)

VCPU: Final = Conversation(
    "vcpu",
    "A vCPU and the MMU service",
    (
        *_ATTACH,
        _down(m.Attached, S.ATTACHING, to=S.OUTSIDE),
        # Guest mode and back.
        _up(m.Enter, S.OUTSIDE, to=S.HANDLING),
        _down(m.Entered, S.HANDLING, to=S.IN_GUEST),
        _up(m.Exit, S.IN_GUEST, S.WAITING_WALK, to=S.HANDLING),
        # What a vCPU does in guest mode.
        _up(m.Log, S.IN_GUEST),
        _down(m.Applied, S.HANDLING, S.IN_GUEST, S.WAITING_WALK, S.WAITING_VALUE, S.LEAVING),
        _up(m.Walk, S.IN_GUEST, to=S.WAITING_WALK),
        _down(m.Walked, S.WAITING_WALK, to=S.IN_GUEST),
        _down(m.WalkFault, S.WAITING_WALK, to=S.IN_GUEST),
        _up(m.Load, S.IN_GUEST, to=S.WAITING_VALUE),
        _up(m.Locked, S.IN_GUEST, to=S.WAITING_VALUE),
        _down(m.Loaded, S.WAITING_VALUE, to=S.IN_GUEST),
        # An Exit may abandon a walk: the answer comes late, or never.
        _down(m.Walked, S.HANDLING, S.IN_GUEST, S.WAITING_VALUE, S.LEAVING, ignored=True),
        _down(m.WalkFault, S.HANDLING, S.IN_GUEST, S.WAITING_VALUE, S.LEAVING, ignored=True),
        # Kicks, which may cross the Exit.
        _down(m.Kick, S.IN_GUEST, S.WAITING_WALK, S.WAITING_VALUE),
        _down(m.Kick, S.HANDLING, S.LEAVING, crossing=True, ignored=True),
        # The end. A Detach may cross the Entered that answers the last Exit (or Enter).
        _up(m.Detach, S.OUTSIDE, S.HANDLING, to=S.LEAVING),
        _up(m.Detach, S.IN_GUEST, to=S.LEAVING, crossing=True),
        _down(m.Entered, S.LEAVING, crossing=True, ignored=True),
        *_resuming(*_VCPU_STATES),
        _up(m.Heartbeat, *_VCPU_STATES),
        _down(m.Heartbeat, *_VCPU_STATES),
        _down(m.Ended, S.ATTACHING, *_VCPU_STATES, to=S.ENDED),
    ),
)

HOST: Final = Conversation(
    "host",
    "A host agent and the MMU service",
    (
        *_ATTACH,
        _down(m.Attached, S.ATTACHING, to=S.SERVING),
        _up(m.HostRequest, S.SERVING),
        _down(m.HostReply, S.SERVING, S.LEAVING),
        _down(m.ErrorReply, S.SERVING, S.LEAVING),
        _up(m.Detach, S.SERVING, to=S.LEAVING),
        *_resuming(S.SERVING, S.LEAVING),
        _up(m.Heartbeat, S.SERVING, S.LEAVING),
        _down(m.Heartbeat, S.SERVING, S.LEAVING),
        _down(m.Ended, S.ATTACHING, S.SERVING, S.LEAVING, to=S.ENDED),
    ),
)

PROBE: Final = Conversation(
    "probe",
    "A probe and the MMU service",
    (
        *_ATTACH,
        _down(m.Attached, S.ATTACHING, to=S.SERVING),
        _up(m.Detach, S.SERVING, to=S.LEAVING),
        _up(m.Heartbeat, S.SERVING, S.LEAVING),
        _down(m.Heartbeat, S.SERVING, S.LEAVING),
        _down(m.Ended, S.ATTACHING, S.SERVING, S.LEAVING, to=S.ENDED),
    ),
)

_MEMBER_STATES = (S.JOINED, S.READY, S.RUNNING, S.DRAINING, S.REPORTED)
_ACTIVE_STATES = (S.JOINED, S.READY, S.RUNNING, S.DRAINING)

_MEMBER_RULES = (
    *_JOIN,
    _down(m.Joined, S.ATTACHING, to=S.JOINED),
    _up(m.Ready, S.JOINED, to=S.READY),
    _up(m.Ready, S.DRAINING, crossing=True),
    _down(m.Start, S.READY, to=S.RUNNING),
    _up(m.Progress, S.RUNNING, S.DRAINING),
    # A run that does not come about is drained before its start.
    _down(m.Drain, S.JOINED, S.READY, S.RUNNING, to=S.DRAINING),
    # A member that cannot go on reports without being asked to.
    _up(m.Report, *_ACTIVE_STATES, to=S.REPORTED),
    _down(m.Start, S.REPORTED, crossing=True, ignored=True),
    _down(m.Drain, S.REPORTED, crossing=True, ignored=True),
    _up(m.Heartbeat, *_MEMBER_STATES),
    _down(m.Heartbeat, *_MEMBER_STATES),
    _down(m.Finished, *_MEMBER_STATES, to=S.ENDED),
    _down(m.Ended, S.ATTACHING, *_MEMBER_STATES, to=S.ENDED),
)

MEMBER: Final = Conversation("member", "A worker of a run and the coordinator", _MEMBER_RULES)

MMU_MEMBER: Final = Conversation(
    "mmu-member",
    "The MMU service and the coordinator",
    (
        *_MEMBER_RULES,
        _up(m.EventBatch, *_ACTIVE_STATES),
        _down(m.EventCredit, *_MEMBER_STATES),
        _up(m.VcpuLost, *_ACTIVE_STATES),
    ),
)

RUN_PROBE: Final = Conversation(
    "run-probe",
    "A probe and the coordinator",
    (
        *_JOIN,
        _down(m.Joined, S.ATTACHING, to=S.JOINED),
        _up(m.Heartbeat, S.JOINED),
        _down(m.Heartbeat, S.JOINED),
        _down(m.Finished, S.JOINED, to=S.ENDED),
        _down(m.Ended, S.ATTACHING, S.JOINED, to=S.ENDED),
    ),
)

CONVERSATIONS: Final = (VCPU, HOST, PROBE, MMU_MEMBER, MEMBER, RUN_PROBE)
"""All of them, in the order of the documentation."""


class Service(enum.Enum):
    """The services that a peer can talk to."""

    MMU = "mmu"
    COORDINATOR = "coordinator"


MMU: Final = Service.MMU
COORDINATOR: Final = Service.COORDINATOR

OPENINGS: Final[Mapping[tuple[Service, m.Role], Conversation]] = {
    (MMU, m.Role.VCPU): VCPU,
    (MMU, m.Role.HOST): HOST,
    (MMU, m.Role.PROBE): PROBE,
    (COORDINATOR, m.Role.MMU): MMU_MEMBER,
    (COORDINATOR, m.Role.VCPU): MEMBER,
    (COORDINATOR, m.Role.HOST): MEMBER,
    (COORDINATOR, m.Role.PROBE): RUN_PROBE,
}
"""Which conversation an Attach or a Join with a role opens."""
