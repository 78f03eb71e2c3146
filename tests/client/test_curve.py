"""CURVE on real sockets: who is let in, whose message it is, what a role may do, and what leaves this machine."""

from __future__ import annotations

import itertools
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from shadowmmu.client import (
    ClientKeys,
    Endpoint,
    HostClient,
    InsecureAddressError,
    KeyRole,
    MemberClient,
    Plain,
    RequestRefused,
    Security,
    ServerKeys,
    ServiceLost,
    SessionEnded,
    User,
    VcpuClient,
    forbidden,
    key_role,
    probe,
)
from shadowmmu.client.access import ANYBODY, MAY_OPEN
from shadowmmu.client.keys import Authorized, KeyPair, make_client_key, make_keys
from shadowmmu.coordinator import Coordinator, RunSettings
from shadowmmu.machine import Runner
from shadowmmu.mmu.journal_file import JournalFile
from shadowmmu.mmu.service import MmuService
from shadowmmu.mmu.startup import Prepared
from shadowmmu.protocol import COORDINATOR, FROM_MMU, MMU, TO_MMU, Envelope, ErrorCode, Service
from shadowmmu.protocol import messages as m
from tests.client.conftest import Until

Context = zmq.Context[zmq.Socket[bytes]]
LOOPBACK = "tcp://127.0.0.1:*"
CONFIG = m.RunConfig(park_rate=0.0, host_rate=0.0)
FAILED = (zmq.Event.HANDSHAKE_FAILED_PROTOCOL, zmq.Event.HANDSHAKE_FAILED_NO_DETAIL)
"""What a handshake comes to that failed: the second if the other side was faster to close."""
SECURITY_PAGE = Path(__file__).parents[2] / "docs" / "SECURITY.md"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Keys as `shadowmmu keys` makes them, with two further vCPUs, alice and bob."""
    folder = tmp_path / "keys"
    make_keys(folder)
    for name in ("alice", "bob"):
        make_client_key(folder, KeyRole.VCPU, name)
    return folder


def of(
    folder: Path, role: KeyRole = KeyRole.VCPU, service: Service = MMU, name: str | None = None
) -> ClientKeys:
    """The keys of a client: the role's, or those that were made for one of that name."""
    keys = Security(folder if name is None else folder / "clients" / name).client(role, service)
    assert isinstance(keys, ClientKeys)
    return keys


def with_key_of_nobody(keys: ClientKeys) -> ClientKeys:
    """The service's public key, and a key pair that is on no list."""
    public, secret = zmq.curve_keypair()
    return ClientKeys(KeyPair(public.decode(), secret.decode()), keys.server)


def revoke(folder: Path, key: str) -> None:
    """Takes the key's line off the list, as an editor does."""
    path = folder / "authorized"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if key not in line) + "\n")


class Server:
    """A socket with keys; `got` has whose message came, from which routing id, and what."""

    def __init__(self, folder: Path) -> None:
        keys = Security(folder).server(MMU)
        assert isinstance(keys, ServerKeys)
        self.authorized = keys.authorized
        self.got: list[tuple[User | None, bytes, list[bytes]]] = []
        self.endpoint = Endpoint.router(self._on_message, security=keys)
        self._monitor = self.endpoint.socket.get_monitor_socket()
        self._events: list[int] = []
        self.address = self.endpoint.bind(LOOPBACK)

    def _on_message(self, peer: bytes, frames: list[bytes]) -> None:
        self.got.append((self.endpoint.sender, peer, frames))

    def saw(self, *events: zmq.Event) -> bool:
        """Whether one of these has happened to a connection."""
        while self._monitor.poll(0):
            self._events.append(recv_monitor_message(self._monitor)["event"])
        return any(event in self._events for event in events)

    def close(self) -> None:
        self.endpoint.socket.disable_monitor()
        self._monitor.close(linger=0)


@pytest.fixture
async def server(folder: Path) -> AsyncIterator[Server]:
    server = Server(folder)
    async with server.endpoint:
        yield server
        server.close()


class Dealers:
    """Makes clients' sockets, with keys and without."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._sockets: list[zmq.Socket[bytes]] = []

    def __call__(
        self, address: str, keys: ClientKeys | None, routing_id: bytes = b"somebody"
    ) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        self._sockets.append(socket)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.ROUTING_ID, routing_id)
        if keys is not None:
            socket.setsockopt(zmq.CURVE_SERVERKEY, keys.server.encode())
            socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.pair.public.encode())
            socket.setsockopt(zmq.CURVE_SECRETKEY, keys.pair.secret.encode())
        socket.connect(address)
        return socket


@pytest.fixture
def dealer(context: Context) -> Iterator[Dealers]:
    return Dealers(context)  # type: ignore[return-value] # the context ends them all


# --- who is let in ----------------------------------------------------------------------------------------------


async def test_an_authorised_key_is_let_in_and_named(
    server: Server, folder: Path, dealer: Dealers, until: Until
) -> None:
    keys = of(folder, name="alice")
    peer = dealer(server.address, keys)
    peer.send_multipart([b"one", b"two"])
    peer.send_multipart([b"three"])
    await until(lambda: len(server.got) == 2)
    alice = User(KeyRole.VCPU, "alice", keys.pair.public)
    assert server.got == [(alice, b"somebody", [b"one", b"two"]), (alice, b"somebody", [b"three"])]
    server.endpoint.send(b"somebody", [b"answer"])
    await until(lambda: peer.poll(0))
    assert peer.recv_multipart() == [b"answer"]


async def test_a_key_that_is_on_no_list_gets_nothing_and_costs_nothing(
    server: Server, folder: Path, dealer: Dealers, until: Until
) -> None:
    stranger = dealer(server.address, with_key_of_nobody(of(folder)), b"stranger")
    stranger.send_multipart([b"let me in"])
    await until(lambda: server.endpoint.not_let_in)
    assert server.got == []
    peer = dealer(server.address, of(folder))
    peer.send_multipart([b"hello"])
    await until(lambda: server.got)
    assert [frames for _, _, frames in server.got] == [[b"hello"]]
    assert not stranger.poll(0)


async def test_who_has_the_wrong_public_key_of_the_service_does_not_speak_to_it(
    server: Server, folder: Path, dealer: Dealers, until: Until
) -> None:
    keys = of(folder)
    other = of(folder, service=COORDINATOR)
    peer = dealer(server.address, ClientKeys(keys.pair, other.server))
    peer.send_multipart([b"secret"])
    await until(lambda: server.saw(*FAILED))
    assert server.got == []
    assert not server.saw(zmq.Event.HANDSHAKE_SUCCEEDED)


async def test_who_speaks_plain_text_is_not_heard(server: Server, dealer: Dealers, until: Until) -> None:
    peer = dealer(server.address, None)
    peer.send_multipart([b"hello"])
    await until(lambda: server.saw(*FAILED))
    assert server.got == []
    assert not server.saw(zmq.Event.HANDSHAKE_SUCCEEDED)


async def test_a_client_says_what_may_be_wrong_with_its_keys(
    server: Server, folder: Path, context: Context
) -> None:
    keys = with_key_of_nobody(of(folder))
    with pytest.raises(ServiceLost, match="authorised"):
        await VcpuClient.connect(server.address, context=context, security=keys, timeout=0.5)


# --- whose message it is ----------------------------------------------------------------------------------------


async def test_a_routing_id_that_is_taken_over_is_seen_to_have_another_key(
    server: Server, folder: Path, dealer: Dealers, until: Until
) -> None:
    alice, bob = (of(folder, name=name) for name in ("alice", "bob"))
    dealer(server.address, alice, b"the same").send_multipart([b"by alice"])
    await until(lambda: server.got)
    dealer(server.address, bob, b"the same").send_multipart([b"by bob"])
    await until(lambda: len(server.got) == 2)
    names = [(None if user is None else user.name, peer) for user, peer, _ in server.got]
    assert names == [("alice", b"the same"), ("bob", b"the same")]


async def test_keys_come_and_go_without_a_restart(
    server: Server, folder: Path, dealer: Dealers, until: Until
) -> None:
    peer = dealer(server.address, of(folder, name="alice"), b"alice")
    peer.send_multipart([b"before"])
    await until(lambda: server.got)
    revoke(folder, of(folder, name="alice").pair.public)
    make_client_key(folder, KeyRole.HOST, "carol")
    for _ in range(2):  # a change counts when the file has come to rest
        server.authorized.refresh()
    peer.send_multipart([b"after"])
    dealer(server.address, of(folder, KeyRole.HOST, name="carol"), b"carol").send_multipart([b"hello"])
    await until(lambda: len(server.got) == 3)
    users = {frames[0]: user for user, _, frames in server.got}
    assert users[b"after"] is None
    carol = users[b"hello"]
    assert carol is not None
    assert (carol.role, carol.name) == (KeyRole.HOST, "carol")
    dealer(server.address, of(folder, name="alice"), b"alice again").send_multipart([b"again"])
    await until(lambda: server.endpoint.not_let_in)
    assert len(server.got) == 3


# --- what stays on this machine ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address", ["tcp://0.0.0.0:*", "tcp://*:*", "tcp://[::]:*", "tcp://eth0:*", "tcp://192.0.2.1:5701"]
)
async def test_a_socket_without_keys_is_bound_to_nothing_public(address: str) -> None:
    async with Endpoint.router(lambda _peer, _frames: None) as endpoint:
        with pytest.raises(InsecureAddressError, match="shadowmmu keys"):
            endpoint.bind(address)


@pytest.mark.parametrize(
    "address", ["tcp://mmu:5701", "tcp://192.0.2.1:5701", "tcp://127.0.0.1.example.org:1"]
)
async def test_a_client_without_keys_stays_on_this_machine(context: Context, address: str) -> None:
    with pytest.raises(InsecureAddressError, match="--insecure"):
        await VcpuClient.connect(address, context=context)


async def test_unless_told_so(folder: Path, tmp_path: Path) -> None:
    for security in (Plain(anywhere=True), Security(folder).server(MMU)):
        async with Endpoint.router(lambda _peer, _frames: None, security=security) as endpoint:
            assert endpoint.bind("tcp://0.0.0.0:*").startswith("tcp://0.0.0.0:")
    async with Endpoint.router(lambda _peer, _frames: None) as endpoint:
        for address in (LOOPBACK, "tcp://localhost:*", "inproc://here", f"ipc://{tmp_path}/socket"):
            endpoint.bind(address)


async def test_keys_are_not_said_to_protect_what_they_do_not(folder: Path) -> None:
    async with Endpoint.router(
        lambda _peer, _frames: None, security=Security(folder).server(MMU)
    ) as endpoint:
        with pytest.raises(InsecureAddressError, match="no effect"):
            endpoint.bind("inproc://here")


# --- what a role may do -----------------------------------------------------------------------------------------


class SecuredMmu:
    """The MMU service with two vCPUs, with keys."""

    def __init__(self, folder: Path, path: Path, context: Context) -> None:
        self.folder = folder
        self.context = context
        keys = Security(folder).server(MMU)
        assert isinstance(keys, ServerKeys)
        self.authorized: Authorized = keys.authorized
        self.journal = JournalFile(path)
        self.service = MmuService(Prepared(Runner(CONFIG, self.journal.write), self.journal), 1.0)
        self.endpoint = Endpoint.router(
            self.service.on_message,
            on_batch=self.service.on_batch,
            on_peer_lost=self.service.on_peer_lost,
            on_failure=self.service.fail,
            security=keys,
        )
        self.service.endpoint = self.endpoint
        self.address = self.endpoint.bind(LOOPBACK)
        self.service.start(2)

    def options(self, role: KeyRole, name: str | None = None) -> Any:
        return {"security": of(self.folder, role, name=name), "context": self.context}


@pytest.fixture
async def mmu_service(folder: Path, tmp_path: Path, context: Context) -> AsyncIterator[SecuredMmu]:
    served = SecuredMmu(folder, tmp_path / "journal", context)
    try:
        async with served.endpoint:
            yield served
        if served.service.failure.done():
            served.service.failure.result()
    finally:
        served.journal.close()


@asynccontextmanager
async def opened(served: SecuredMmu, role: m.Role, key: KeyRole) -> AsyncIterator[None]:
    """A session at the MMU service as `role`, with a key of role `key`."""
    match role:
        case m.Role.VCPU:
            async with await VcpuClient.connect(served.address, **served.options(key)):
                yield
        case m.Role.HOST:
            async with await HostClient.connect(served.address, **served.options(key)):
                yield
        case _:
            await probe(served.address, **served.options(key))
            yield


@pytest.mark.parametrize("key", KeyRole)
async def test_a_key_opens_at_the_mmu_service_what_its_role_may_and_nothing_else(
    mmu_service: SecuredMmu, key: KeyRole
) -> None:
    for role in (m.Role.VCPU, m.Role.HOST, m.Role.PROBE):
        if role in MAY_OPEN[key][MMU]:
            async with opened(mmu_service, role, key):
                pass
        else:
            with pytest.raises(RequestRefused, match="forbidden"):
                async with opened(mmu_service, role, key):
                    pass


@pytest.mark.parametrize("key", KeyRole)
async def test_a_key_joins_the_run_as_what_its_role_may_and_nothing_else(
    folder: Path, context: Context, key: KeyRole
) -> None:
    settings = RunSettings(config=CONFIG, vcpus=1)
    async with Coordinator(settings, security=Security(folder)) as coordinator:
        address = coordinator.bind(LOOPBACK)
        coordinator._endpoint.start()  # its messages, without its clock
        # First the MMU service, for whose endpoint everybody's welcome waits.
        mmu = await MemberClient.join(
            address,
            m.Role.MMU,
            endpoint="tcp://127.0.0.1:1",
            context=context,
            security=of(folder, KeyRole.MMU, COORDINATOR),
        )
        for role in (m.Role.VCPU, m.Role.HOST, m.Role.PROBE):
            join = MemberClient.join(address, role, context=context, security=of(folder, key, COORDINATOR))
            if role in MAY_OPEN[key][COORDINATOR]:
                await (await join).close()
            else:
                with pytest.raises(RequestRefused, match="forbidden"):
                    await join
        await mmu.close()


async def test_nobody_gets_anything_of_a_session_by_taking_its_routing_id_over(
    mmu_service: SecuredMmu, dealer: Dealers, until: Until
) -> None:
    """The frames of the session itself, sent by another key, are refused; the session is as it was."""
    served = mmu_service
    alice = dealer(served.address, of(served.folder, name="alice"), b"the same")
    attach = Envelope(0, 0, m.Attach(m.Role.VCPU, "alice"))
    alice.send_multipart(TO_MMU.encode(attach))
    await until(lambda: alice.poll(0))
    attached = FROM_MMU.decode(alice.recv_multipart())
    assert isinstance(attached.body, m.Attached)
    owner = served.service.peers.vcpu(0)
    assert owner is not None
    before = owner.session.state

    bob = dealer(served.address, of(served.folder, name="bob"), b"the same")
    bob.send_multipart(TO_MMU.encode(Envelope(attached.incarnation, 1, m.Enter())))
    await until(lambda: bob.poll(0))
    answer = FROM_MMU.decode(bob.recv_multipart())
    assert isinstance(answer.body, m.ErrorReply)
    assert answer.body.code == ErrorCode.FORBIDDEN
    assert served.service.peers.vcpu(0) is owner
    assert owner.session.state is before


@pytest.mark.parametrize("role, name, works", [(KeyRole.VCPU, "bob", True), (KeyRole.HOST, None, False)])
async def test_a_token_resumes_a_session_with_a_key_of_the_same_role_only(
    mmu_service: SecuredMmu, dealer: Dealers, until: Until, role: KeyRole, name: str | None, *, works: bool
) -> None:
    served = mmu_service
    alice = dealer(served.address, of(served.folder, name="alice"), b"alice")
    alice.send_multipart(TO_MMU.encode(Envelope(0, 0, m.Attach(m.Role.VCPU, "alice", resumable=True))))
    await until(lambda: alice.poll(0))
    attached = FROM_MMU.decode(alice.recv_multipart())
    assert isinstance(attached.body, m.Attached)

    keys = of(served.folder, role, name=name)
    other = dealer(served.address, keys, b"other")
    resume = Envelope(attached.incarnation, 0, m.Resume(attached.body.token, 0))
    other.send_multipart(TO_MMU.encode(resume))
    await until(lambda: other.poll(0))
    answer = FROM_MMU.decode(other.recv_multipart()).body
    owner = served.service.peers.vcpu(0)
    assert owner is not None
    assert owner.user is not None
    if works:
        assert isinstance(answer, m.Resumed)
        assert owner.user.key == keys.pair.public
    else:
        assert isinstance(answer, m.ErrorReply)
        assert answer.code == ErrorCode.FORBIDDEN
        assert owner.user.name == "alice"


async def test_a_session_whose_key_is_revoked_ends_with_its_next_message(
    mmu_service: SecuredMmu, until: Until
) -> None:
    served = mmu_service
    client = await VcpuClient.connect(served.address, **served.options(KeyRole.VCPU, "alice"))
    other = await VcpuClient.connect(served.address, **served.options(KeyRole.VCPU, "bob"))
    revoke(served.folder, of(served.folder, name="alice").pair.public)
    for _ in range(2):
        served.authorized.refresh()
    with pytest.raises((RequestRefused, SessionEnded), match="forbidden"):
        await client.enter()
    await until(lambda: served.service.peers.vcpus == [1])
    await other.enter()
    await other.close()
    await client.close()


# --- the table --------------------------------------------------------------------------------------------------


def test_every_pair_of_role_and_opening_is_decided_by_the_table() -> None:
    for key, service, role in itertools.product(KeyRole, Service, m.Role):
        text = forbidden(User(key, key="k"), service, opens=role)
        assert (text is None) is (role in MAY_OPEN[key][service])
        assert forbidden(ANYBODY, service, opens=role) is None
        assert forbidden(None, service, opens=role) is not None


def test_each_role_of_a_peer_has_a_key_that_may_play_it() -> None:
    for role in m.Role:
        key = key_role(role)
        assert any(role in MAY_OPEN[key][service] for service in Service)


def test_the_table_stands_in_the_security_page() -> None:
    section = SECURITY_PAGE.read_text(encoding="utf-8").partition("\n## Roles\n")[2].partition("\n## ")[0]
    rows = re.findall(r"(?m)^\| `(\w+)` \| ([^|]*) \| ([^|]*) \|", section)
    written = {
        KeyRole(key): {MMU: set(re.findall(r"`(\w+)`", mmu)), COORDINATOR: set(re.findall(r"`(\w+)`", run))}
        for key, mmu, run in rows
    }
    table = {
        key: {service: {role.value for role in roles} for service, roles in may.items()}
        for key, may in MAY_OPEN.items()
    }
    assert written == table
