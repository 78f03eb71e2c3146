"""Who has which place in a run: joining, joining again, taking the place of somebody who is absent. Pure.

A member that joins again shows its token. A process that comes without one while the run is under way is a
*candidate*: it takes the place of an absent member of its role, and waits for as long as it may take until a silent
member is noticed. One with the name of a member that has been silent for two heartbeats is taken for its restart.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Hashable

import msgspec

from shadowmmu.coordinator.members import Member, Recovery
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.heartbeat import MISSED_LIMIT, HeartbeatTimer

__all__ = ["Candidate", "NewToken", "Roster"]

NewToken = Callable[[], bytes]
"""Gives a token that nobody can guess."""
SUSPECT_INTERVALS = 2
"""A member with a candidate of its own name is absent after so many heartbeat intervals without a sign of life."""


class Candidate(msgspec.Struct, frozen=True):
    """A process that waits for a place until `until` (seconds)."""

    peer: Hashable
    join: m.Join
    until: float


class Roster:
    """The members of a run. `heartbeat`: seconds between signs of life."""

    def __init__(self, heartbeat: float, new_token: NewToken) -> None:
        self.members: list[Member] = []  # everybody who ever joined, probes excepted
        self.recoveries: list[Recovery] = []
        self.candidates: list[Candidate] = []
        self._heartbeat = heartbeat
        self._new_token = new_token
        self._numbers = 0  # of members and probes, given out so far
        self._peers: dict[Hashable, Member] = {}

    # --- looking up ---------------------------------------------------------------------------------------------

    def at(self, peer: Hashable) -> Member | None:
        """The member that is connected as `peer`."""
        return self._peers.get(peer)

    def knows(self, peer: Hashable) -> bool:
        """Whether that connection has joined: it has a place, or waits for one."""
        return peer in self._peers or any(peer == candidate.peer for candidate in self.candidates)

    def live(self, *roles: m.Role) -> list[Member]:
        """Everybody who has a place (of these roles), present or not."""
        return [member for member in self.members if member.live and (not roles or member.role in roles)]

    def present(self, *roles: m.Role) -> list[Member]:
        """Those of them who are connected."""
        return [member for member in self.live(*roles) if member.present]

    def absent(self, *roles: m.Role) -> list[Member]:
        """Those of them who are not."""
        return [member for member in self.live(*roles) if member.absent]

    @property
    def mmu(self) -> Member | None:
        """The MMU service, present or not."""
        return next(iter(self.live(m.Role.MMU)), None)

    def holder(self, join: m.Join) -> Member | None:
        """Who joins again, if number, role and token are right."""
        for member in self.members:
            if member.number == join.member and member.role is join.role:
                right = bool(member.token) and hmac.compare_digest(member.token, join.token)
                return member if right else None
        return None

    # --- places -------------------------------------------------------------------------------------------------

    def next_number(self) -> int:
        """Numbers of members and probes count from 1."""
        self._numbers += 1
        return self._numbers

    def add(self, peer: Hashable, join: m.Join, now: float) -> Member:
        """A new place."""
        member = Member(
            number=self.next_number(),
            peer=peer,
            role=join.role,
            name=join.name,
            endpoint=join.endpoint,
            token=self._new_token(),
            timer=self._timer(now),
        )
        self.members.append(member)
        self._peers[peer] = member
        return member

    def restore(self, member: Member) -> None:
        """A place that an earlier process of ours had given; its member is absent."""
        self.members.append(member)
        self._numbers = max(self._numbers, member.number)

    def seat(self, member: Member, peer: Hashable, now: float) -> Hashable | None:
        """The member is here, on connection `peer`; returns the connection that it had until now, if any."""
        former = member.peer
        if former is not None:
            self._peers.pop(former, None)
            self._note_absence(member, "it came again on a new connection", now)
        self._note_return(member, now, None)
        member.lost = None
        member.connect(peer, self._timer(now))
        self._peers[peer] = member
        return former

    def replace(self, member: Member, candidate: Candidate, now: float) -> None:
        """The candidate takes the place of an absent member."""
        assert member.absent
        self.candidates.remove(candidate)
        join = candidate.join
        self._note_return(member, now, join.name)
        member.replace(join.name, join.endpoint, self._new_token())
        member.connect(candidate.peer, self._timer(now))
        self._peers[candidate.peer] = member

    def disconnect(self, member: Member, text: str, now: float) -> None:
        """The member is absent from now on."""
        self._unseat(member)
        member.absent_reason = text
        member.done = False
        self._note_absence(member, text, now)

    def lose(self, member: Member, text: str, now: float) -> None:
        """The member has lost its place."""
        self._unseat(member)
        member.lost = text
        member.lost_at = now

    def suspect(self, candidate: Candidate) -> Member | None:
        """A member in whose name the candidate comes, and of which nothing was heard lately."""
        join = candidate.join
        return next(
            (
                member
                for member in self.present(join.role)
                if member.name == join.name and member.timer.silence >= SUSPECT_INTERVALS * self._heartbeat
            ),
            None,
        )

    def place_for(self, candidate: Candidate) -> Member | None:
        """An absent member whose place it may take: one of its own name first."""
        absent = [member for member in self.absent(candidate.join.role) if member.report is None]
        return min(absent, key=lambda member: member.name != candidate.join.name, default=None)

    def wait(self, peer: Hashable, join: m.Join, now: float) -> None:
        """The process waits for a place: as long as it takes to notice that a member is silent, and a little more."""
        patience = (MISSED_LIMIT + 1) * self._heartbeat
        self.candidates.append(Candidate(peer, join, now + patience))

    # --- inside -------------------------------------------------------------------------------------------------

    def _timer(self, now: float) -> HeartbeatTimer:
        return HeartbeatTimer(self._heartbeat, now, missed=MISSED_LIMIT)

    def _unseat(self, member: Member) -> None:
        if member.peer is not None:
            self._peers.pop(member.peer, None)
            member.peer = None

    def _note_absence(self, member: Member, reason: str, now: float) -> None:
        recovery = Recovery(
            member=member.number,
            role=member.role,
            name=member.name,
            vcpu=member.vcpu,
            reason=reason,
            lost_at=now,
        )
        self.recoveries.append(recovery)

    def _note_return(self, member: Member, now: float, replaced_by: str | None) -> None:
        for recovery in reversed(self.recoveries):
            if recovery.member == member.number and recovery.back_at is None:
                recovery.back_at = now
                recovery.replaced_by = replaced_by
                return
