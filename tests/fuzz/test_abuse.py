"""A real service process, and clients that abuse it on purpose: with frames, nesting, numbers, tags, types, encodings, replays.

After each: the service answers an honest client, another client's session is where it was, and its memory has not grown beyond a bound.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shadowmmu.protocol import FROM_MMU, MMU, TO_MMU, VERSION_FRAME, Envelope, Session, Side, State
from shadowmmu.protocol import messages as m
from tests.protocol.golden import INVALID, VALID, frames

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

PATIENCE_MS = 20_000
MOST_GROWTH_KB = 64 * 1024
MIB = 1 << 20
EXAMPLES = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Client:
    """A DEALER socket with a session, through which anything can be sent as well."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self.socket = context.socket(zmq.SocketType.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(address)
        self.session = Session(MMU, Side.PEER)
        self.sent: list[list[bytes]] = []

    def ask(self, body: m.VcpuMessage) -> m.Message:
        """Sends what is legal and waits for what is not a heartbeat."""
        self.sent.append(TO_MMU.encode(self.session.send(body)))
        self.socket.send_multipart(self.sent[-1])
        while True:
            answer = self.hear()
            if not isinstance(answer, m.Heartbeat | m.Applied):
                return answer

    def hear(self) -> m.Message:
        assert self.socket.poll(PATIENCE_MS), "the service does not answer"
        envelope = FROM_MMU.decode(self.socket.recv_multipart())
        self.session.receive(envelope)
        return envelope.body

    def attach(self, role: m.Role = m.Role.VCPU, **options: Any) -> m.Message:
        return self.ask(m.Attach(role, "client", **options))

    def close(self) -> None:
        self.socket.close(linger=0)


class Service:
    """`shadowmmu serve mmu` as a process, and a vCPU in guest mode that keeps to the protocol all the time."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        command = [
            sys.executable,
            "-m",
            "shadowmmu.cli",
            "serve",
            "mmu",
            "--bind",
            "tcp://127.0.0.1:*",
            "--vcpus",
            "8",
        ]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        self.address = self._address()
        self.honest = self.client()
        self.honest.attach()
        self.honest.ask(m.Enter())
        self.check()
        self.memory = self.rss()

    def _address(self) -> str:
        with self.log.open() as lines:
            while self.process.poll() is None:
                found = re.search(r"tcp://127\.0\.0\.1:\d+", lines.readline())
                if found and not found[0].endswith(":0"):
                    return found[0]
        raise AssertionError(self.log.read_text())

    def client(self) -> Client:
        return Client(self.context, self.address)

    def rss(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1])

    def check(self) -> None:
        """The honest vCPU goes on where it was: same incarnation, next numbers, next entry; and strangers are let in."""
        session = self.honest.session
        if session.state is not State.IN_GUEST:
            self.honest.hear()
        entry, incarnation = session.entry, session.incarnation
        answer = self.honest.ask(m.Walk(entry, session.walk + 1, 0x1000, 0))
        assert isinstance(answer, m.Walked | m.WalkFault), answer
        assert (session.entry, session.incarnation) == (entry, incarnation)
        probe = self.client()
        assert isinstance(probe.attach(m.Role.PROBE), m.Attached)
        assert isinstance(probe.ask(m.Detach()), m.Ended)
        probe.close()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.context.destroy(linger=0)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("service"))
    try:
        yield service
        assert service.process.poll() is None, "the service has ended"
    finally:
        service.close()


@pytest.fixture
def abuser(service: Service) -> Iterator[Client]:
    """A client for abuse; afterwards all is as it was."""
    client = service.client()
    yield client
    client.close()
    service.check()
    assert service.rss() < service.memory + MOST_GROWTH_KB


def refused(client: Client, parts: list[bytes]) -> str:
    """Sends frames; the code that they are refused with."""
    client.socket.send_multipart(parts)
    assert client.socket.poll(PATIENCE_MS), "no answer"
    body = FROM_MMU.decode(client.socket.recv_multipart()).body
    assert isinstance(body, m.ErrorReply), body
    return body.code


def packed(body: Any, incarnation: int = 0, number: int = 0) -> list[bytes]:
    return [VERSION_FRAME, msgpack.packb([incarnation, number, body], use_bin_type=True)]


@pytest.mark.parametrize("parts", [1, 3, 9, 50])
def test_a_bomb_of_frames_is_refused_as_one_message(abuser: Client, parts: int) -> None:
    assert refused(abuser, [b"x"] * parts) == "bad-part-count"


@pytest.mark.parametrize("parts", [1000, 20_000])
def test_a_bigger_one_costs_the_connection(abuser: Client, parts: int) -> None:
    monitor = abuser.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    abuser.socket.send_multipart([b"x"] * parts)
    assert monitor.poll(PATIENCE_MS), "still connected"
    abuser.socket.disable_monitor()
    monitor.close()


def test_many_large_messages_leave_no_memory_behind(service: Service, abuser: Client) -> None:
    large = b"x" * (MIB - 64)
    for _ in range(100):
        assert refused(abuser, [VERSION_FRAME, large]) == "too-large"


def test_a_frame_above_the_hard_limit_cuts_its_senders_connection_only(abuser: Client) -> None:
    abuser.socket.send_multipart([VERSION_FRAME, b"x" * (4 * MIB)])


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1t", b"\x81\xa9operation"])
@pytest.mark.parametrize("depth", [10, 1000, 30_000])
def test_deep_nesting_is_refused(abuser: Client, opening: bytes, depth: int) -> None:
    assert refused(abuser, [VERSION_FRAME, b"\x93\x00\x00" + opening * depth + b"\xc0"]) in (
        "malformed",
        "too-large",
    )


def test_lengths_that_lie_are_refused(abuser: Client) -> None:
    for lie in (
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
    ):
        assert refused(abuser, [VERSION_FRAME, b"\x93\x00\x00" + lie]) == "malformed"
        assert (
            refused(abuser, [VERSION_FRAME, b"\x93\x00\x00\x82\xa1t\xa6attach\xa4name" + lie]) == "malformed"
        )


@pytest.mark.parametrize("text", [b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\x80", b"\xf5\x80\x80\x80"])
def test_texts_that_are_not_utf_8_are_refused(abuser: Client, text: bytes) -> None:
    attach = b"\x83\xa1t\xa6attach\xa4role\xa4vcpu\xa4name" + bytes([0xA0 | len(text)]) + text
    assert refused(abuser, [VERSION_FRAME, b"\x93\x00\x00" + attach]) == "malformed"


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=8),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)
BODIES = [
    vector["body"] for vector in VALID if vector["direction"] == TO_MMU.name and vector["incarnation"] != 0
]


@EXAMPLES
@given(tree=TREES)
def test_values_of_any_type_are_refused(service: Service, tree: Any) -> None:
    client = service.client()
    try:
        assert refused(client, packed(tree)) in (
            "malformed",
            "unexpected-message",
            "not-attached",
            "bad-argument",
        )
    finally:
        client.close()


@EXAMPLES
@given(data=st.data())
def test_messages_with_a_field_of_another_type_or_an_unknown_one_change_nothing(
    service: Service, data: st.DataObject
) -> None:
    body = dict(data.draw(st.sampled_from(BODIES)))
    body[data.draw(st.sampled_from([*body, "unknown"]))] = data.draw(TREES)
    client = service.client()
    try:
        assert refused(client, packed(body, 1, 1)) in (
            "malformed",
            "unexpected-message",
            "not-attached",
            "stale-incarnation",
        )
    finally:
        client.close()


def test_every_invalid_golden_vector_is_refused_and_changes_nothing(abuser: Client) -> None:
    for vector in INVALID:
        if vector["direction"] == TO_MMU.name and vector["frames"]:
            assert refused(abuser, frames(vector)) == vector["code"], vector["name"]


def test_half_a_message_is_none(service: Service, abuser: Client) -> None:
    abuser.socket.send(VERSION_FRAME, zmq.SNDMORE)
    service.check()
    abuser.close()
    for whole in (frames(vector) for vector in VALID if vector["direction"] == TO_MMU.name):
        another = service.client()
        assert refused(another, [whole[0], whole[1][: len(whole[1]) // 2]]) in (
            "malformed",
            "unsupported-version",
        )
        another.close()


def test_a_recorded_conversation_is_refused_when_it_is_replayed(service: Service, abuser: Client) -> None:
    """Only the Attach opens a session, another one, and nothing else of the recording belongs to it."""
    recorded = service.client()
    assert isinstance(recorded.attach(m.Role.HOST), m.Attached)
    for number in range(1, 5):
        assert isinstance(recorded.ask(m.HostRequest(number, m.TestAge(100))), m.HostReply)
    for frames_ in recorded.sent[1:]:
        assert refused(abuser, frames_) == "not-attached"
    abuser.socket.send_multipart(recorded.sent[0])
    assert abuser.socket.poll(PATIENCE_MS)
    assert isinstance(FROM_MMU.decode(abuser.socket.recv_multipart()).body, m.Attached)
    for frames_ in recorded.sent[1:]:
        assert refused(abuser, frames_) == "stale-incarnation"
    assert isinstance(recorded.ask(m.HostRequest(5, m.TestAge(100))), m.HostReply)
    assert isinstance(recorded.ask(m.Detach()), m.Ended)
    recorded.close()


def test_messages_of_another_ones_incarnation_do_not_reach_it(service: Service, abuser: Client) -> None:
    honest = service.honest.session
    legal_for_it = TO_MMU.encode(
        Envelope(honest.incarnation, honest.send_seq, m.Exit(honest.entry, m.ExternalInterruptExit()))
    )
    assert refused(abuser, legal_for_it) == "not-attached"
    assert isinstance(abuser.attach(), m.Attached)
    assert refused(abuser, legal_for_it) == "stale-incarnation"
    resume = TO_MMU.encode(Envelope(honest.incarnation, 0, m.Resume(os.urandom(16), 0)))
    assert refused(abuser, resume) == "not-resumable"
    assert isinstance(abuser.ask(m.Detach()), m.Ended)


def test_large_host_requests_wait_and_the_honest_one_is_served_before_them(
    service: Service, abuser: Client
) -> None:
    """Sixteen of the largest, again and again: half a second of work is asked for at once, and begun bit by bit."""
    assert isinstance(abuser.attach(m.Role.HOST), m.Attached)
    words = [(0x600000 + 8 * word, word) for word in range(4096)]
    for number in range(1, 17):
        abuser.socket.send_multipart(
            TO_MMU.encode(abuser.session.send(m.HostRequest(number, m.WritePhys(words))))
        )
    service.check()
    replies = 0
    while replies < 16:
        replies += isinstance(abuser.hear(), m.HostReply)
    assert isinstance(abuser.ask(m.Detach()), m.Ended)


def test_a_flooder_is_cut_off_and_the_honest_one_is_served_all_the_while(
    service: Service, abuser: Client
) -> None:
    """Counts only: after each hundred of the flooder's messages one of the honest vCPU's is answered."""
    assert isinstance(abuser.attach(m.Role.PROBE), m.Attached)
    garbage = [VERSION_FRAME, b"\xc1"]
    for _ in range(40):
        for _ in range(100):
            abuser.socket.send_multipart(garbage)
        service.check()
    ended = None
    while ended is None:
        assert abuser.socket.poll(PATIENCE_MS), "the flooder's session is not ended"
        body = FROM_MMU.decode(abuser.socket.recv_multipart()).body
        ended = body if isinstance(body, m.Ended) else None
    assert ended.code == "flooding"
