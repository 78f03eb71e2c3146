"""Services that do one thing wrong each. A mutant patches what the service uses, never what the kit does."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Final

import msgspec
import pytest

from shadowmmu.machine import GivenUp, HostRefused, Runner, ToVcpu
from shadowmmu.mmu import peers as peers_module
from shadowmmu.mmu import service as service_module
from shadowmmu.mmu.service import MmuService
from shadowmmu.mmu.startup import Prepared
from shadowmmu.protocol import (
    FROM_MMU,
    TO_MMU,
    VERSION_FRAME,
    Envelope,
    ErrorCode,
    HeartbeatTimer,
    RemoteProtocolError,
    Session,
    State,
    error_reply,
)
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.continuity import KEPT

replace = msgspec.structs.replace

Mutant = Callable[[pytest.MonkeyPatch], None]
MUTANTS: Final[dict[str, tuple[Mutant, str]]] = {}
"""By name: how the service is broken, and the check that has to find it."""


def breaks(check: str) -> Callable[[Mutant], Mutant]:
    def add(mutant: Mutant) -> Mutant:
        MUTANTS[mutant.__name__.strip("_").replace("_", "-")] = mutant, check
        return mutant

    return add


def _session(patch: pytest.MonkeyPatch, kind: type[Session]) -> None:
    patch.setattr(peers_module, "Session", kind)


def _method(patch: pytest.MonkeyPatch, name: str, method: Any) -> None:
    patch.setattr(MmuService, name, method)


class _Decoder:
    """The direction to the service, with something wrong about decoding."""

    def __init__(self, decode: Callable[[Sequence[bytes]], Envelope]) -> None:
        self.decode = decode


# --- numbers ------------------------------------------------------------------------------------------------------


class _Careless(Session):
    """Takes what comes twice as if it had come once; `heeded`: types of which it does not."""

    heeded: tuple[type, ...] = ()

    def repeated(self, envelope: Envelope) -> bool:
        return isinstance(envelope.body, self.heeded) and super().repeated(envelope)

    def receive(self, envelope: Envelope) -> bool:
        if (
            self.attached
            and envelope.incarnation == self.incarnation
            and 0 < envelope.seq < self.receive_seq
            and not isinstance(envelope.body, self.heeded)
        ):
            taken = super().receive(replace(envelope, seq=self.receive_seq))
            self.receive_seq -= 1
            return taken
        return super().receive(envelope)


@breaks("repeat.value")
def _executes_repetitions(patch: pytest.MonkeyPatch) -> None:
    _session(patch, _Careless)


@breaks("repeat.log")
def _applies_repeated_logs(patch: pytest.MonkeyPatch) -> None:
    class Broken(_Careless):
        heeded = (m.Locked, m.Load, m.Exit, m.Enter, m.Walk, m.Heartbeat, m.HostRequest)

    _session(patch, Broken)


@breaks("repeat.value")
def _refuses_repetitions(patch: pytest.MonkeyPatch) -> None:
    class Broken(Session):
        def receive(self, envelope: Envelope) -> bool:
            if self.repeated(envelope):
                raise RemoteProtocolError(
                    ErrorCode.DUPLICATE, "", incarnation=envelope.incarnation, seq=envelope.seq
                )
            return super().receive(envelope)

    _session(patch, Broken)


@breaks("repeat.value")
def _does_not_answer_again(patch: pytest.MonkeyPatch) -> None:
    class Broken(Session):
        def answer(self, seq: int) -> Envelope | None:
            return None

    _session(patch, Broken)


@breaks("repeat.walk")
def _answers_again_with_another_number(patch: pytest.MonkeyPatch) -> None:
    class Broken(Session):
        def answer(self, seq: int) -> Envelope | None:
            answer = super().answer(seq)
            return None if answer is None else replace(answer, seq=answer.seq - 1)

    _session(patch, Broken)


@breaks("repeat.host")
def _answers_again_with_something_else(patch: pytest.MonkeyPatch) -> None:
    class Broken(Session):
        def answer(self, seq: int) -> Envelope | None:
            answer = super().answer(seq)
            if answer is not None and isinstance(answer.body, m.HostReply):
                return replace(answer, body=replace(answer.body, gfns=[]))
            return answer

    _session(patch, Broken)


@breaks("repeat.contents")
def _looks_into_repetitions(patch: pytest.MonkeyPatch) -> None:
    class Broken(Session):
        def repeated(self, envelope: Envelope) -> bool:
            return super().repeated(envelope) and not isinstance(envelope.body, m.Load)

    _session(patch, Broken)


@breaks("numbers.zero")
def _takes_number_0_for_a_repetition(patch: pytest.MonkeyPatch) -> None:
    class Broken(Session):
        def receive(self, envelope: Envelope) -> bool:
            if self.attached and not envelope.seq and isinstance(envelope.body, m.Heartbeat | m.Exit):
                return False
            return super().receive(envelope)

    _session(patch, Broken)


@breaks("numbers.gap")
def _ignores_gaps(patch: pytest.MonkeyPatch) -> None:
    class Broken(Session):
        def receive(self, envelope: Envelope) -> bool:
            if self.attached and envelope.seq > self.receive_seq:
                self.receive_seq = envelope.seq
            return super().receive(envelope)

    _session(patch, Broken)


@breaks("numbers.gap")
def _a_gap_does_not_end_the_session(patch: pytest.MonkeyPatch) -> None:
    def refuse(self: MmuService, peer: Any, error: RemoteProtocolError) -> None:
        assert self.endpoint is not None
        self.endpoint.send(peer.address, FROM_MMU.encode(error_reply(error)))

    _method(patch, "_refuse", refuse)


@breaks("numbers.heartbeat")
def _does_not_count_heartbeats(patch: pytest.MonkeyPatch) -> None:
    class Broken(Session):
        def receive(self, envelope: Envelope) -> bool:
            if isinstance(envelope.body, m.Heartbeat) and self.attached:
                self.receive_seq = max(self.receive_seq, envelope.seq + 1)
                return True
            return super().receive(envelope)

    _session(patch, Broken)


@breaks("numbers.refused")
def _counts_refused_messages(patch: pytest.MonkeyPatch) -> None:
    class Broken(Session):
        def receive(self, envelope: Envelope) -> bool:
            try:
                return super().receive(envelope)
            except RemoteProtocolError:
                if self.attached and envelope.seq == self.receive_seq:
                    self.receive_seq += 1
                raise

    _session(patch, Broken)


@breaks("numbers.refused")
def _numbers_its_error_replies(patch: pytest.MonkeyPatch) -> None:
    def numbered(error: RemoteProtocolError) -> Envelope:
        reply = error_reply(error)
        return replace(reply, seq=77) if reply.incarnation else reply

    patch.setattr(service_module, "error_reply", numbered)


@breaks("numbers.refused")
def _does_not_say_which_message_it_refused(patch: pytest.MonkeyPatch) -> None:
    def unnamed(error: RemoteProtocolError) -> Envelope:
        reply = error_reply(error)
        return replace(reply, body=replace(reply.body, seq=0))

    patch.setattr(service_module, "error_reply", unnamed)


@breaks("walk.fault")
def _leaves_numbers_out(patch: pytest.MonkeyPatch) -> None:
    class Broken(Session):
        def send(self, body: m.Message) -> Envelope:
            self.send_seq += self.send_seq == 4
            return super().send(body)

    _session(patch, Broken)


# --- incarnations and entries -------------------------------------------------------------------------------------


@breaks("incarnation.anew")
def _gives_incarnations_again(patch: pytest.MonkeyPatch) -> None:
    def reuse(self: peers_module.Peers) -> int:
        self._incarnations %= 3
        return self._incarnations + 1

    patch.setattr(peers_module.Peers, "next_incarnation", reuse)


@breaks("incarnation.stale")
def _takes_other_incarnations(patch: pytest.MonkeyPatch) -> None:
    class Broken(Session):
        def receive(self, envelope: Envelope) -> bool:
            if self.attached and not isinstance(envelope.body, m.Attach):
                envelope = replace(envelope, incarnation=self.incarnation)
            return super().receive(envelope)

    _session(patch, Broken)


@breaks("entry.wrong")
def _takes_stale_entries(patch: pytest.MonkeyPatch) -> None:
    class Broken(Session):
        def receive(self, envelope: Envelope) -> bool:
            body = envelope.body
            if isinstance(body, m.Log | m.Walk | m.Load | m.Locked | m.Exit) and body.entry < self.entry:
                envelope = replace(envelope, body=replace(body, entry=self.entry))
            return super().receive(envelope)

    _session(patch, Broken)


@breaks("entry.wrong")
def _names_the_wrong_error(patch: pytest.MonkeyPatch) -> None:
    def renamed(error: RemoteProtocolError) -> Envelope:
        if error.code is ErrorCode.UNKNOWN_ENTRY:
            error.code = ErrorCode.STALE_ENTRY
        return error_reply(error)

    patch.setattr(service_module, "error_reply", renamed)


@breaks("walk.numbers")
def _takes_any_walk_number(patch: pytest.MonkeyPatch) -> None:
    class Broken(Session):
        def receive(self, envelope: Envelope) -> bool:
            if isinstance(envelope.body, m.Walk):
                envelope = replace(envelope, body=replace(envelope.body, walk=self.walk + 1))
            return super().receive(envelope)

    _session(patch, Broken)


@breaks("order.in-guest")
def _takes_enter_in_guest_mode(patch: pytest.MonkeyPatch) -> None:
    class Broken(Session):
        def receive(self, envelope: Envelope) -> bool:
            if isinstance(envelope.body, m.Enter) and self.state is State.IN_GUEST:
                self.receive_seq += 1
                return False
            return super().receive(envelope)

    _session(patch, Broken)


@breaks("opening.already-attached")
def _takes_a_second_attach(patch: pytest.MonkeyPatch) -> None:
    class Broken(Session):
        def receive(self, envelope: Envelope) -> bool:
            return not (isinstance(envelope.body, m.Attach) and self.attached) and super().receive(envelope)

    _session(patch, Broken)


@breaks("opening.vcpu-taken")
def _gives_a_vcpu_away_twice(patch: pytest.MonkeyPatch) -> None:
    place = peers_module.Peers._vcpu_place

    def generous(self: peers_module.Peers, attach: m.Attach) -> peers_module.Place:
        taken = attach.vcpu is not None and attach.vcpu in self._by_vcpu
        return peers_module.Place(attach.vcpu) if taken else place(self, attach)

    patch.setattr(peers_module.Peers, "_vcpu_place", generous)


@breaks("ending.detach")
def _does_not_say_good_bye(patch: pytest.MonkeyPatch) -> None:
    def quiet(self: MmuService, peer: peers_module.Peer, _ended: m.Ended) -> None:
        self.peers.remove(peer)

    _method(patch, "_say_ended", quiet)


# --- credits and limits -------------------------------------------------------------------------------------------


@breaks("log.credits")
def _does_not_count_log_credits(patch: pytest.MonkeyPatch) -> None:
    class Broken(Session):
        def receive(self, envelope: Envelope) -> bool:
            logs, self.logs = self.logs, 0
            try:
                return super().receive(envelope)
            finally:
                self.logs += logs

    _session(patch, Broken)


@breaks("host.credits")
def _does_not_count_host_credits(patch: pytest.MonkeyPatch) -> None:
    class Broken(Session):
        def receive(self, envelope: Envelope) -> bool:
            requests, self.requests = self.requests, {}
            try:
                return super().receive(envelope)
            finally:
                if self.attached:
                    self.requests = requests | self.requests

    _session(patch, Broken)


@breaks("limits.soft")
def _takes_messages_of_any_size(patch: pytest.MonkeyPatch) -> None:
    def decode(frames: Sequence[bytes]) -> Envelope:
        return TO_MMU.decode([frame[: TO_MMU.soft_limit] for frame in frames])

    patch.setattr(service_module, "TO_MMU", _Decoder(decode))


@breaks("version.major")
def _answers_other_major_versions(patch: pytest.MonkeyPatch) -> None:
    def decode(frames: Sequence[bytes]) -> Envelope:
        other = len(frames) == 2 and frames[0].startswith(b"SMMU/")
        return TO_MMU.decode([VERSION_FRAME, frames[1]] if other else frames)

    patch.setattr(service_module, "TO_MMU", _Decoder(decode))


@breaks("version.minor")
def _refuses_newer_minor_versions(patch: pytest.MonkeyPatch) -> None:
    def decode(frames: Sequence[bytes]) -> Envelope:
        if frames[0] != VERSION_FRAME:
            raise RemoteProtocolError(ErrorCode.UNSUPPORTED_VERSION, "not spoken here; spoken: SMMU/1.0")
        return TO_MMU.decode(frames)

    patch.setattr(service_module, "TO_MMU", _Decoder(decode))


@breaks("framing.parts")
def _takes_a_delimiter(patch: pytest.MonkeyPatch) -> None:
    def decode(frames: Sequence[bytes]) -> Envelope:
        return TO_MMU.decode(frames[1:] if frames[0] == b"" else frames)

    patch.setattr(service_module, "TO_MMU", _Decoder(decode))


@breaks("framing.body")
def _ends_the_session_of_who_misspells(patch: pytest.MonkeyPatch) -> None:
    refuse = MmuService._refuse

    def strict(self: MmuService, peer: peers_module.Peer, error: RemoteProtocolError) -> None:
        refuse(self, peer, error)
        attached = peer.address is not None and self.peers.get(peer.address) is peer
        if error.code is ErrorCode.MALFORMED and attached:
            self._end(peer, ErrorCode.INTERNAL, "bad spelling")

    _method(patch, "_refuse", strict)


# --- what is done -------------------------------------------------------------------------------------------------


def _submit(patch: pytest.MonkeyPatch, change: Callable[[MmuService, Any, Any], None]) -> None:
    submit = MmuService._submit_vcpu

    def changed(self: MmuService, peer: peers_module.Peer, body: Any) -> None:
        submit(self, peer, body)
        assert peer.vcpu is not None
        change(self, self.runner.machine.lanes[peer.vcpu], body)

    _method(patch, "_submit_vcpu", changed)


@breaks("log.before-exit")
def _forgets_logs_when_the_exit_comes(patch: pytest.MonkeyPatch) -> None:
    def forget(_self: MmuService, lane: Any, body: Any) -> None:
        if isinstance(body, m.Exit):
            lane.queue = deque(item for item in lane.queue if not isinstance(item, m.Log))
            lane._position = 0

    _submit(patch, forget)


@breaks("log.before-value")
def _executes_loads_before_logs(patch: pytest.MonkeyPatch) -> None:
    def hurry(_self: MmuService, lane: Any, body: Any) -> None:
        if isinstance(body, m.Load):
            lane.queue.appendleft(lane.queue.pop())

    _submit(patch, hurry)


@breaks("log.applied")
def _never_says_applied(patch: pytest.MonkeyPatch) -> None:
    deliver = MmuService._deliver

    def silent(self: MmuService, output: Any) -> None:
        if not (isinstance(output, ToVcpu) and isinstance(output.body, m.Applied)):
            deliver(self, output)

    _method(patch, "_deliver", silent)


@breaks("kick.awaited")
def _does_not_wait_for_kicked_vcpus(patch: pytest.MonkeyPatch) -> None:
    init = MmuService.__init__

    def mutant(self: MmuService, prepared: Prepared, *args: Any, **options: Any) -> None:
        config = replace(prepared.runner.machine.config, mutant=m.Mutant.FLUSH_NOT_AWAITED)
        runner = Runner(config, prepared.journal.write)
        init(self, replace(prepared, runner=runner), *args, **options)

    _method(patch, "__init__", mutant)


@breaks("kick.awaited")
def _never_kicks(patch: pytest.MonkeyPatch) -> None:
    deliver = MmuService._deliver

    def silent(self: MmuService, output: Any) -> None:
        if not (isinstance(output, ToVcpu) and isinstance(output.body, m.Kick)):
            deliver(self, output)

    _method(patch, "_deliver", silent)


@breaks("kick.interrupt")
def _loses_interrupts(patch: pytest.MonkeyPatch) -> None:
    deliver = MmuService._deliver

    def forgetful(self: MmuService, output: Any) -> None:
        if isinstance(output, ToVcpu) and isinstance(output.body, m.Entered):
            output = replace(output, body=replace(output.body, interrupts=[]))
        deliver(self, output)

    _method(patch, "_deliver", forgetful)


@breaks("host.impossible")
def _refuses_impossible_requests_outside_the_numbering(patch: pytest.MonkeyPatch) -> None:
    deliver = MmuService._deliver

    def unnumbered(self: MmuService, output: Any) -> None:
        found = self._hosts.answered(output) if isinstance(output, HostRefused) else None
        if found is None:
            deliver(self, output)
            return
        peer, reply = found
        assert isinstance(reply, m.ErrorReply)
        incarnation = peer.session.incarnation
        error = RemoteProtocolError(
            ErrorCode.BAD_ARGUMENT, reply.text, incarnation=incarnation, seq=reply.seq
        )
        self._refuse(peer, error)

    _method(patch, "_deliver", unnumbered)


@breaks("access.unknown-frame")
def _gives_unknown_frames_another_name(patch: pytest.MonkeyPatch) -> None:
    def lenient(self: MmuService, peer: peers_module.Peer, envelope: Envelope) -> None:
        refusal = None if peer.vcpu is None else self.runner.machine.refusal(peer.vcpu, envelope.body)
        if refusal is not None:
            raise RemoteProtocolError(ErrorCode.BAD_ARGUMENT, refusal[1], incarnation=0, seq=envelope.seq)

    _method(patch, "_check_contents", lenient)


# --- signs of life ------------------------------------------------------------------------------------------------


@breaks("life.heartbeats")
def _sends_no_heartbeats(patch: pytest.MonkeyPatch) -> None:
    class Broken(HeartbeatTimer):
        def due(self, now: float) -> bool:
            return False

    patch.setattr(service_module, "HeartbeatTimer", Broken)


@breaks("life.silence")
def _gives_nobody_up(patch: pytest.MonkeyPatch) -> None:
    class Broken(HeartbeatTimer):
        def expired(self, now: float) -> bool:
            return False

    patch.setattr(service_module, "HeartbeatTimer", Broken)


@breaks("life.silence")
def _takes_heartbeats_only_for_signs_of_life(patch: pytest.MonkeyPatch) -> None:
    act = MmuService._act

    class Broken(HeartbeatTimer):
        def heard(self, now: float) -> None:
            pass

    def heartbeats_only(self: MmuService, peer: peers_module.Peer, envelope: Envelope) -> None:
        if isinstance(envelope.body, m.Heartbeat):
            HeartbeatTimer.heard(peer.timer, time.monotonic())
        act(self, peer, envelope)

    patch.setattr(service_module, "HeartbeatTimer", Broken)
    _method(patch, "_act", heartbeats_only)


@breaks("life.silence")
def _takes_garbage_for_a_sign_of_life(patch: pytest.MonkeyPatch) -> None:
    refuse = MmuService._refuse

    def lenient(self: MmuService, peer: peers_module.Peer, error: RemoteProtocolError) -> None:
        peer.timer.heard(time.monotonic())
        refuse(self, peer, error)

    _method(patch, "_refuse", lenient)


@breaks("others.unmoved")
def _takes_messages_for_each_others(patch: pytest.MonkeyPatch) -> None:
    on_message = MmuService.on_message

    def confused(self: MmuService, address: bytes, frames: list[bytes]) -> None:
        if self.peers.get(address) is None and len(frames) == 2:
            for peer in self.peers:
                meant = msgspec.msgpack.encode(peer.session.incarnation) == frames[1][1:2]
                if meant and peer.address is not None:
                    address = peer.address
        on_message(self, address, frames)

    _method(patch, "on_message", confused)


# --- connections --------------------------------------------------------------------------------------------------


def _resumed(patch: pytest.MonkeyPatch, change: Callable[[Session, list[Envelope]], list[Envelope]]) -> None:
    """What the service says on a new connection, changed."""

    class Broken(Session):
        def resume(self, body: m.Resume) -> list[Envelope]:
            said = change(self, super().resume(body))
            self.send_seq = len(said) + 1
            return said

    _session(patch, Broken)


def _numbered(said: list[Envelope]) -> list[Envelope]:
    return [replace(envelope, seq=number) for number, envelope in enumerate(said, start=1)]


@breaks("resume.idle")
def _counts_wrongly(patch: pytest.MonkeyPatch) -> None:
    def wrong(_session: Session, said: list[Envelope]) -> list[Envelope]:
        body = said[0].body
        assert isinstance(body, m.Resumed)
        return [replace(said[0], body=m.Resumed(body.received - 1)), *said[1:]]

    _resumed(patch, wrong)


@breaks("resume.value")
def _forgets_what_the_peer_lacks(patch: pytest.MonkeyPatch) -> None:
    _resumed(patch, lambda _session, said: said[:1])


@breaks("resume.kick")
def _forgets_kicks(patch: pytest.MonkeyPatch) -> None:
    _resumed(
        patch,
        lambda _session, said: _numbered([each for each in said if not isinstance(each.body, m.Kick)]),
    )


@breaks("resume.kept")
def _says_again_in_another_order(patch: pytest.MonkeyPatch) -> None:
    _resumed(patch, lambda _session, said: _numbered([said[0], *reversed(said[1:])]))


@breaks("resume.idle")
def _goes_on_with_the_old_numbers(patch: pytest.MonkeyPatch) -> None:
    class Broken(Session):
        def resume(self, body: m.Resume) -> list[Envelope]:
            next_one = self.receive_seq
            said = super().resume(body)
            self.receive_seq = next_one
            return said

    _session(patch, Broken)


@breaks("resume.token")
def _takes_any_token(patch: pytest.MonkeyPatch) -> None:
    class Broken(Session):
        def receive(self, envelope: Envelope) -> bool:
            if isinstance(envelope.body, m.Resume) and self.token:
                envelope = replace(envelope, body=replace(envelope.body, token=self.token))
            return super().receive(envelope)

    _session(patch, Broken)


@breaks("resume.unasked")
def _gives_everybody_a_token(patch: pytest.MonkeyPatch) -> None:
    attach = MmuService._attach

    def generous(self: MmuService, peer: peers_module.Peer, body: m.Attach) -> None:
        attach(self, peer, replace(body, resumable=True))

    _method(patch, "_attach", generous)


@breaks("resume.counts")
def _ends_who_counts_wrongly(patch: pytest.MonkeyPatch) -> None:
    resume = MmuService._resume

    def strict(self: MmuService, address: bytes, sender: Any, envelope: Envelope, body: m.Resume) -> None:
        peer = self.peers.incarnation(envelope.incarnation)
        try:
            resume(self, address, sender, envelope, body)
        except RemoteProtocolError:
            if peer is not None:
                self._end(peer, ErrorCode.NOT_RESUMABLE, "a wrong count")
            raise

    _method(patch, "_resume", strict)


@breaks("resume.kept")
def _keeps_too_little(patch: pytest.MonkeyPatch) -> None:
    class Broken(Session):
        def reset(self) -> None:
            super().reset()
            self.continuity._kept = deque(maxlen=KEPT - 1)

    _session(patch, Broken)


@breaks("resume.stale")
def _calls_everything_not_resumable(patch: pytest.MonkeyPatch) -> None:
    def renamed(error: RemoteProtocolError) -> Envelope:
        if error.code is ErrorCode.STALE_INCARNATION and not error.seq:
            error.code = ErrorCode.NOT_RESUMABLE
        return error_reply(error)

    patch.setattr(service_module, "error_reply", renamed)


@breaks("resume.old")
def _goes_on_hearing_the_old_connection(patch: pytest.MonkeyPatch) -> None:
    move = peers_module.Peers.move

    def both(self: peers_module.Peers, peer: peers_module.Peer, address: bytes | None) -> None:
        before = peer.address
        move(self, peer, address)
        if before is not None and address is not None:
            self._by_address[before] = peer

    patch.setattr(peers_module.Peers, "move", both)


# --- places and programs ------------------------------------------------------------------------------------------


@breaks("takeover.token")
def _gives_places_away(patch: pytest.MonkeyPatch) -> None:
    place = peers_module.Peers._vcpu_place

    def generous(self: peers_module.Peers, attach: m.Attach) -> peers_module.Place:
        if attach.token and attach.vcpu is not None:
            attach = replace(attach, token=self._tokens.get(attach.vcpu, b""))
        return place(self, attach)

    patch.setattr(peers_module.Peers, "_vcpu_place", generous)


@breaks("takeover.replaced")
def _does_not_say_that_it_replaces(patch: pytest.MonkeyPatch) -> None:
    def quiet(self: MmuService, peer: peers_module.Peer) -> None:
        assert peer.vcpu is not None
        self.peers.remove(peer)
        self.runner.submit(GivenUp(peer.vcpu, ErrorCode.REPLACED.value, ""))

    _method(patch, "_replace", quiet)


@breaks("takeover.token")
def _keeps_the_token(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(service_module, "os", SimpleNamespace(urandom=lambda count: b"t" * count))


def _resumption(patch: pytest.MonkeyPatch, change: Callable[[m.Resumption], m.Resumption | None]) -> None:
    deliver = MmuService._deliver

    def changed(self: MmuService, output: Any) -> None:
        if isinstance(output, ToVcpu) and isinstance(output.body, m.Entered) and output.body.resume:
            output = replace(output, body=replace(output.body, resume=change(output.body.resume)))
        deliver(self, output)

    _method(patch, "_deliver", changed)


@breaks("takeover.place")
def _says_nothing_of_the_program(patch: pytest.MonkeyPatch) -> None:
    _resumption(patch, lambda _resumption: None)


@breaks("takeover.trail")
def _loses_the_state(patch: pytest.MonkeyPatch) -> None:
    _resumption(patch, lambda resumption: replace(resumption, state=None))


@breaks("takeover.trail")
def _counts_one_access_less(patch: pytest.MonkeyPatch) -> None:
    _resumption(patch, lambda resumption: replace(resumption, accesses=max(resumption.accesses - 1, 0)))


@breaks("takeover.chain")
def _loses_what_was_told_before(patch: pytest.MonkeyPatch) -> None:
    _resumption(patch, lambda resumption: replace(resumption, trail=resumption.trail[-1:]))


@breaks("takeover.anew")
def _goes_on_for_anybody(patch: pytest.MonkeyPatch) -> None:
    place = peers_module.Peers._vcpu_place

    def always(self: peers_module.Peers, attach: m.Attach) -> peers_module.Place:
        found = place(self, attach)
        found.resume = found.vcpu in self._tokens
        return found

    patch.setattr(peers_module.Peers, "_vcpu_place", always)


@breaks("life.interval")
def _does_not_ask_for_wishes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(service_module, "LONGEST_HEARTBEAT", 1.0)


@breaks("life.interval")
def _grants_every_wish(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(service_module, "SHORTEST_HEARTBEAT", 0.0)


@breaks("version.additions")
def _sends_everybody_what_is_new(patch: pytest.MonkeyPatch) -> None:
    class Broken(Session):
        def send(self, body: m.Message) -> Envelope:
            if isinstance(body, m.ErrorReply) and not body.request:
                request = next((each for each, seq in self.requests.items() if seq == body.seq), 0)
                body = replace(body, request=request)
            return super().send(body)

    _session(patch, Broken)
