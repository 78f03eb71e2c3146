"""The keys of CURVE: folders of key files, the list of authorised keys, and what a socket is told of them.

    KEYS/                          0700
      authorized                   who may connect: a role, a public key and a name per line; people edit it
      services/mmu.key             a service's public key: clients have to know it
      services/mmu.key_secret      0600
      services/coordinator.key...
      roles/vcpu.key               a client's public key, for information
      roles/vcpu.key_secret        0600; a client uses that of its role
      roles/host.key...            mmu, coordinator, observer likewise
      clients/NAME/                a folder of the same form for one further client: to be handed over as a whole

Key files are pyzmq's (`zmq.auth`), keys are written in Z85. Nobody needs all of them: `docs/SECURITY.md` says who
needs which. `make_keys` is what `shadowmmu keys` does; `Security` is what a process was told about keys.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import shutil
import tempfile
from pathlib import Path
from typing import Final, TypeAlias

import msgspec
import structlog
import zmq.auth

from shadowmmu.client.access import KeyRole, User
from shadowmmu.protocol import Service

__all__ = [
    "Authorized",
    "ClientKeys",
    "InsecureAddressError",
    "KeyPair",
    "KeysError",
    "MadeKey",
    "Plain",
    "Security",
    "ServerKeys",
    "is_local",
    "make_client_key",
    "make_keys",
    "make_role_key",
    "make_service_key",
    "read_key_pair",
    "read_public_key",
]

AUTHORIZED_NAME: Final = "authorized"
FOLDER_MODE: Final = 0o700
SECRET_MODE: Final = 0o600
_READ_BY_OTHERS: Final = 0o007
_KEY: Final = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_NAME: Final = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,63}")

_LIST_HEADER: Final = """\
# Who may connect to the services: a role, a public key and a name, one per line.
# Roles: vcpu, host, mmu, coordinator, observer. Running services notice changes within two seconds.
"""

log = structlog.get_logger(__name__)


class KeysError(Exception):
    """A key file or folder cannot be used; the text says which and why."""


class InsecureAddressError(ConnectionError):
    """A socket without keys was to leave this machine."""


class KeyPair(msgspec.Struct, frozen=True):
    """A public and a secret key, in Z85."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"KeyPair({self.public!r}, ...)"  # the secret must not get into a log


# --- reading -----------------------------------------------------------------------------------------------------


def read_public_key(path: Path) -> str:
    """The public key in a key file. Raises KeysError."""
    return _load(path)[0]


def read_key_pair(path: Path) -> KeyPair:
    """The keys in a secret key file. Raises KeysError, also if everybody on the machine may read it."""
    public, secret = _load(path)
    if secret is None:
        raise KeysError(f"{path} has no secret key")
    mode = path.stat().st_mode & 0o777
    if mode & _READ_BY_OTHERS:
        raise KeysError(f"{path} is a secret that others can read (mode {mode:03o}): chmod 600 it")
    return KeyPair(public, secret)


def _load(path: Path) -> tuple[str, str | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
        keys = public.decode("ascii"), None if secret is None else secret.decode("ascii")
    except OSError as error:
        raise KeysError(f"{path}: {error.strerror or 'there is no such file'}") from error
    except ValueError as error:
        raise KeysError(f"{path} is no key file") from error
    if not all(key is None or _KEY.fullmatch(key) for key in keys):
        raise KeysError(f"{path} has a key that is none (40 characters of Z85)")
    return keys


class Authorized:
    """The list of authorised keys, as its file has it. Raises KeysError if it cannot be read at first.

    Lines that make no sense authorise nobody, and are told to the log.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._users: dict[str, User] = {}
        self._seen = self._loaded = self._stamp()
        try:
            self._read()
        except (OSError, UnicodeDecodeError) as error:
            raise KeysError(f"the list of authorised keys {path} cannot be read: {error}") from error

    def user(self, key: str) -> User | None:
        """Whose key it is; None: nobody's who is authorised."""
        return self._users.get(key)

    def refresh(self) -> None:
        """Looks at the file; to be called now and then.

        A changed file counts when it is as it was at the last look: not while an editor is writing it. One that
        cannot be read leaves everything as it was: to lock everybody out, empty it.
        """
        stamp = self._stamp()
        settled, self._seen = stamp == self._seen, stamp
        if not settled or stamp == self._loaded:
            return
        self._loaded = stamp
        try:
            self._read()
        except (OSError, UnicodeDecodeError) as error:
            log.error("the list of authorised keys cannot be read; the last one counts", error=str(error))  # noqa: TRY400
        else:
            log.info("authorised keys read again", path=str(self.path), keys=len(self._users))

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            stat = self.path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> None:
        users = {}
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
            words = line.split(None, 2)
            if not words or words[0].startswith("#"):
                continue
            user = _user(words)
            if user is None or user.key in users:
                why = "no role and key" if user is None else "a key that was there before"
                log.warning(
                    "ignored in the list of authorised keys", path=str(self.path), line=number, why=why
                )
            else:
                users[user.key] = user
        self._users = users


def _user(words: list[str]) -> User | None:
    with contextlib.suppress(ValueError):
        role = KeyRole(words[0])
        if len(words) > 1 and _KEY.fullmatch(words[1]):
            return User(role, words[2].strip() if len(words) > 2 else "", words[1])
    return None


# --- what sockets are told ---------------------------------------------------------------------------------------


class ServerKeys(msgspec.Struct, frozen=True):
    """A service's socket: its own keys, and who may connect."""

    pair: KeyPair
    authorized: Authorized


class ClientKeys(msgspec.Struct, frozen=True):
    """A client's socket: its own keys, and the service's public key."""

    pair: KeyPair
    server: str


class Plain(msgspec.Struct, frozen=True):
    """A socket without keys: on this machine alone, or `anywhere`, if somebody wants it so."""

    anywhere: bool = False

    def check(self, address: str) -> None:
        """Raises InsecureAddressError if the address is not for a socket without keys."""
        if not self.anywhere and not is_local(address):
            raise InsecureAddressError(
                f"{address} is not on loopback, and there are no keys: make some with 'shadowmmu keys DIR' and name"
                " them (--keys DIR or SHADOWMMU_KEYS), or say --insecure"
            )


Link: TypeAlias = ServerKeys | ClientKeys | Plain


class Security(msgspec.Struct, frozen=True):
    """What a process was told: the folder of its keys, or None; and whether it may go without them anywhere."""

    folder: Path | None = None
    insecure: bool = False

    def server(self, service: Service) -> ServerKeys | Plain:
        """For a service's own socket. Raises KeysError."""
        if self.folder is None:
            return Plain(self.insecure)
        pair = read_key_pair(_secret_file(self.folder / "services", service.value))
        return ServerKeys(pair, Authorized(self.folder / AUTHORIZED_NAME))

    def client(self, role: KeyRole, service: Service) -> ClientKeys | Plain:
        """For a connection to a service, as that role. Raises KeysError."""
        if self.folder is None:
            return Plain(self.insecure)
        pair = read_key_pair(_secret_file(self.folder / "roles", role.value))
        return ClientKeys(pair, read_public_key(_public_file(self.folder / "services", service.value)))


def is_local(address: str) -> bool:
    """Whether a ZeroMQ address is for this machine alone: ipc, inproc, or TCP on loopback.

    Names count for what they say: only localhost is known to be loopback without asking anybody.
    """
    scheme, _, rest = address.partition("://")
    if scheme != "tcp":
        return scheme in ("ipc", "inproc")
    host = rest.rpartition(";")[2].rpartition(":")[0].strip("[]").lower()
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# --- making ------------------------------------------------------------------------------------------------------


class MadeKey(msgspec.Struct, frozen=True):
    """A key that `make_...` was to make. `path`: of its secret; `made` False: it was there before, and is as it was."""

    path: Path
    made: bool


def make_keys(folder: Path, *, force: bool = False) -> list[MadeKey]:
    """Makes what a run needs: a key per service and per role, and the list. Keeps what is there, unless `force`.

    Raises OSError.
    """
    made = [make_service_key(folder, service, force=force) for service in Service]
    (folder / ".gitignore").write_text(
        "*\n", encoding="utf-8"
    )  # secrets are no sources, wherever the folder is
    return made + [make_role_key(folder, role, force=force) for role in KeyRole]


def make_service_key(folder: Path, service: Service, *, force: bool = False) -> MadeKey:
    """A service's own key."""
    return _make(
        _private_folder(folder), _private_folder(folder, "services"), service.value, None, force=force
    )


def make_role_key(folder: Path, role: KeyRole, *, force: bool = False) -> MadeKey:
    """The key that clients of a role share."""
    own = User(role, role.value)
    return _make(_private_folder(folder), _private_folder(folder, "roles"), role.value, own, force=force)


def make_client_key(folder: Path, role: KeyRole, name: str, *, force: bool = False) -> MadeKey:
    """A key of its own for one client, in a folder that has what it needs, the services' public keys included.

    Raises KeysError if the name is none, or the services have no keys yet.
    """
    if not _NAME.fullmatch(name):
        raise KeysError(f"{name!r} is no name: letters, digits, '.', '_' and '-', at most 64")
    publics = {
        service: read_public_key(_public_file(folder / "services", service.value)) for service in Service
    }
    clients = _private_folder(_private_folder(folder), "clients", name)
    made = _make(folder, _private_folder(clients, "roles"), role.value, User(role, name), force=force)
    services = _private_folder(clients, "services")
    for service in publics:
        file = _public_file(services, service.value)
        file.write_bytes(_public_file(folder / "services", service.value).read_bytes())
    return made


def _make(root: Path, folder: Path, name: str, user: User | None, *, force: bool) -> MadeKey:
    """Makes a pair of key files, and puts the user on the list first: who is on it without a key does no harm."""
    secret = _secret_file(folder, name)
    if secret.exists() and not force:
        return MadeKey(secret, made=False)
    replaced = _replaced_key(secret)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # of mode 0700
        _, fresh = map(Path, zmq.auth.create_certificates(scratch, name))
        fresh.chmod(SECRET_MODE)
        if user is not None:
            _put_on_list(root, msgspec.structs.replace(user, key=read_public_key(fresh)), replaced)
        fresh.with_suffix(".key").replace(_public_file(folder, name))
        fresh.replace(secret)
    return MadeKey(secret, made=True)


def _replaced_key(secret: Path) -> str | None:
    with contextlib.suppress(KeysError):
        return read_public_key(secret)
    return None


def _put_on_list(root: Path, user: User, replaced: str | None) -> None:
    """Adds a line, and drops the one of the key that this one replaces; leaves everything else as people wrote it."""
    path = root / AUTHORIZED_NAME
    text = path.read_text(encoding="utf-8") if path.exists() else _LIST_HEADER
    lines = [line for line in text.splitlines() if replaced is None or line.split(None, 2)[1:2] != [replaced]]
    assert user.role is not None
    lines.append(f"{user.role.value} {user.key} {user.name}")
    fresh = path.with_name(f".{AUTHORIZED_NAME}.new")
    fresh.touch(mode=SECRET_MODE)
    fresh.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if path.exists():
        shutil.copymode(path, fresh)
    fresh.replace(path)


def _private_folder(base: Path, *names: str) -> Path:
    """The folder, made with everything above it that is missing; of ours, nobody else reads it."""
    base.mkdir(parents=True, exist_ok=True, mode=FOLDER_MODE)
    folder = base
    for name in names:
        folder = folder / name
        folder.mkdir(exist_ok=True, mode=FOLDER_MODE)
    return folder


def _secret_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.key_secret"


def _public_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.key"
