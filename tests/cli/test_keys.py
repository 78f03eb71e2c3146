"""`shadowmmu keys`: what it makes, who can read it, and that commands go without keys nowhere but on this machine."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shadowmmu.cli.main import app
from shadowmmu.cli.usage import USAGE_STATUS
from shadowmmu.client.access import KeyRole
from shadowmmu.client.keys import (
    Authorized,
    ClientKeys,
    KeyPair,
    KeysError,
    Security,
    ServerKeys,
    is_local,
    read_key_pair,
    read_public_key,
)
from shadowmmu.protocol import COORDINATOR, MMU, Service

runner = CliRunner()
PUBLIC = "tcp://0.0.0.0:5701"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def run(*arguments: object) -> int:
    return runner.invoke(app, [str(argument) for argument in arguments]).exit_code


def client(folder: Path, role: KeyRole, service: Service) -> ClientKeys:
    keys = Security(folder).client(role, service)
    assert isinstance(keys, ClientKeys)
    return keys


@pytest.fixture(autouse=True)
def _without_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHADOWMMU_KEYS", raising=False)
    monkeypatch.delenv("SHADOWMMU_INSECURE", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "keys"
    assert run("keys", folder) == 0
    return folder


# --- making -----------------------------------------------------------------------------------------------------


def test_everybody_gets_a_key_and_every_client_stands_on_the_list(folder: Path) -> None:
    authorized = Authorized(folder / "authorized")
    for service in Service:
        server = Security(folder).server(service)
        assert isinstance(server, ServerKeys)
        for role in KeyRole:
            keys = client(folder, role, service)
            assert keys.server == server.pair.public
            user = authorized.user(keys.pair.public)
            assert user is not None
            assert user.role is role


def test_it_says_what_it_has_made(tmp_path: Path) -> None:
    printed = runner.invoke(app, ["keys", str(tmp_path)]).stdout.splitlines()
    assert len(printed) == len(Service) + len(KeyRole)
    for line in printed:
        made, public, path = line.split()
        assert made == "made"
        assert read_key_pair(Path(path)).public == public
        assert read_key_pair(Path(path)).secret not in line


def test_nobody_else_can_read_secrets_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert run("keys", tmp_path / "keys") == 0
        assert run("keys", tmp_path / "keys", "--role", "vcpu", "--name", "alice") == 0
    finally:
        os.umask(before)
    made = list((tmp_path / "keys").rglob("*"))
    secrets = [path for path in made if path.suffix == ".key_secret"]
    assert len(secrets) == len(Service) + len(KeyRole) + 1
    assert {mode(path) for path in secrets} == {0o600}
    assert {mode(path) for path in (tmp_path / "keys", *made) if path.is_dir()} == {0o700}


def test_git_does_not_take_keys_for_sources(folder: Path) -> None:
    assert (folder / ".gitignore").read_text() == "*\n"


def test_keys_that_are_there_are_kept(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = runner.invoke(app, ["keys", str(folder)])
    assert result.exit_code == 0
    assert {line.split()[0] for line in result.stdout.splitlines()} == {"kept"}
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_revoked_key_is_not_authorised_again_by_making_what_is_missing(folder: Path) -> None:
    key = client(folder, KeyRole.HOST, MMU).pair.public
    path = folder / "authorized"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if key not in line))
    assert run("keys", folder) == 0
    assert Authorized(path).user(key) is None


def test_force_replaces_keys_and_their_lines(folder: Path) -> None:
    path = folder / "authorized"
    path.write_text(path.read_text() + "# mine\n")
    old = {role: client(folder, role, MMU).pair.public for role in KeyRole}
    assert run("keys", folder, "--role", "vcpu", "--force") == 0
    authorized = Authorized(path)
    for role in KeyRole:
        new = client(folder, role, MMU).pair.public
        assert (new != old[role]) is (role is KeyRole.VCPU)
        assert authorized.user(new) is not None
    assert authorized.user(old[KeyRole.VCPU]) is None
    assert "# mine\n" in path.read_text()


def test_a_single_key_that_is_there_is_not_replaced_without_force(folder: Path) -> None:
    before = client(folder, KeyRole.VCPU, MMU).pair
    assert run("keys", folder, "--role", "vcpu") == USAGE_STATUS
    assert client(folder, KeyRole.VCPU, MMU).pair == before
    service = read_public_key(folder / "services" / "mmu.key")
    assert run("keys", folder, "--service", "mmu") == USAGE_STATUS
    assert read_public_key(folder / "services" / "mmu.key") == service
    assert run("keys", folder, "--service", "mmu", "--force") == 0
    assert read_public_key(folder / "services" / "mmu.key") != service


def test_a_client_of_its_own_gets_a_folder_with_all_it_needs_and_no_more(folder: Path) -> None:
    assert run("keys", folder, "--role", "vcpu", "--name", "alice") == 0
    alice = folder / "clients" / "alice"
    keys = client(alice, KeyRole.VCPU, MMU)
    user = Authorized(folder / "authorized").user(keys.pair.public)
    assert user is not None
    assert (user.role, user.name) == (KeyRole.VCPU, "alice")
    assert keys.server == client(folder, KeyRole.VCPU, MMU).server
    assert client(alice, KeyRole.VCPU, COORDINATOR).server == client(folder, KeyRole.VCPU, COORDINATOR).server
    assert [path.name for path in alice.rglob("*.key_secret")] == ["vcpu.key_secret"]


@pytest.mark.parametrize(
    "options",
    [
        ("--name", "alice"),
        ("--role", "nobody"),
        ("--role", "vcpu", "--service", "mmu"),
        ("--role", "vcpu", "--name", "../alice"),
        ("--role", "vcpu", "--name", ""),
    ],
)
def test_options_that_make_no_sense_make_nothing(folder: Path, options: tuple[str, ...]) -> None:
    before = sorted(folder.rglob("*"))
    assert run("keys", folder, *options) == USAGE_STATUS
    assert sorted(folder.rglob("*")) == before


def test_a_name_cannot_be_had_before_there_are_services(tmp_path: Path) -> None:
    assert run("keys", tmp_path / "new", "--role", "vcpu", "--name", "alice") == USAGE_STATUS


# --- reading ----------------------------------------------------------------------------------------------------


def test_a_secret_that_others_can_read_is_not_used(folder: Path) -> None:
    path = folder / "roles" / "vcpu.key_secret"
    path.chmod(0o604)
    with pytest.raises(KeysError, match="604"):
        Security(folder).client(KeyRole.VCPU, MMU)


@pytest.mark.parametrize("text", ["", "curve\n", 'curve\n    public-key = "short"\n', "\xff"])
def test_what_is_no_key_file_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "some.key"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(KeysError, match=r"some\.key"):
        read_public_key(path)


def test_a_secret_does_not_get_into_a_log() -> None:
    assert "secret" not in repr(KeyPair("public", "secret"))


def test_lines_that_make_no_sense_authorise_nobody_and_harm_nobody(folder: Path) -> None:
    key = client(folder, KeyRole.VCPU, MMU).pair.public
    path = folder / "authorized"
    unknown = "a" * 40
    path.write_text(
        f"\n# comment\n  \nroot {unknown} x\nvcpu\nvcpu short\n{unknown} vcpu\nhost {key} first one counts\n"
        + path.read_text()
    )
    authorized = Authorized(path)
    assert authorized.user(unknown) is None
    user = authorized.user(key)
    assert user is not None
    assert (user.role, user.name) == (KeyRole.HOST, "first one counts")


def test_a_list_counts_once_it_has_come_to_rest(folder: Path) -> None:
    path = folder / "authorized"
    key = client(folder, KeyRole.VCPU, MMU).pair.public
    authorized = Authorized(path)
    path.write_text("")  # an editor begins to write
    authorized.refresh()
    assert authorized.user(key) is not None
    authorized.refresh()
    assert authorized.user(key) is None


def test_a_list_that_is_gone_changes_nothing(folder: Path) -> None:
    key = client(folder, KeyRole.VCPU, MMU).pair.public
    authorized = Authorized(folder / "authorized")
    (folder / "authorized").unlink()
    for _ in range(3):
        authorized.refresh()
    assert authorized.user(key) is not None
    with pytest.raises(KeysError, match="authorized"):
        Authorized(folder / "authorized")


# --- without keys -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "mmu", "--bind", PUBLIC),
        ("serve", "mmu", "--coordinator", "tcp://coordinator:5700"),
        ("serve", "coordinator", "--bind", "tcp://*:5700"),
        ("worker", "vcpu", "--coordinator", "tcp://coordinator:5700"),
        ("worker", "host", "--coordinator", "tcp://192.0.2.1:5700"),
        ("health", "--connect", "tcp://mmu:5701"),
    ],
)
def test_no_command_leaves_this_machine_without_keys(arguments: tuple[str, ...]) -> None:
    result = runner.invoke(app, list(arguments))
    assert result.exit_code == USAGE_STATUS
    assert "shadowmmu keys" in " ".join(result.output.split()), result.output


def test_a_command_whose_keys_are_missing_says_which(tmp_path: Path) -> None:
    result = runner.invoke(app, ["serve", "mmu", "--bind", PUBLIC, "--keys", str(tmp_path)])
    assert result.exit_code == USAGE_STATUS
    assert "mmu.key_secret" in result.output


def test_health_with_keys_has_to_know_whose_it_asks(folder: Path) -> None:
    assert run("health", "--connect", "tcp://mmu:5701", "--keys", folder) == USAGE_STATUS


@pytest.mark.parametrize(
    "address",
    [
        "tcp://127.0.0.1:5701",
        "tcp://127.8.9.10:*",
        "tcp://localhost:5701",
        "tcp://[::1]:5701",
        "ipc:///run/mmu",
        "inproc://mmu",
    ],
)
def test_loopback_and_sockets_of_the_machine_are_local(address: str) -> None:
    assert is_local(address)


@pytest.mark.parametrize(
    "address",
    [
        "tcp://*:5701",
        "tcp://0.0.0.0:5701",
        "tcp://[::]:5701",
        "tcp://eth0:5701",
        "tcp://10.0.0.1:5701",
        "tcp://localhost.example.org:5701",
        "tcp://127.0.0.1.example.org:5701",
        "tcp://127.0.0.1:0;192.0.2.1:5701",
        "tcp://127.1:5701",
        "pgm://127.0.0.1:5701",
        "udp://127.0.0.1:5701",
        "",
    ],
)
def test_everything_else_is_not(address: str) -> None:
    assert not is_local(address)
