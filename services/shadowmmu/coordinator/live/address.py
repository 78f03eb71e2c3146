"""Where the live page listens: `[ADDRESS:]PORT`. Pure.

Without an address it is loopback, where no other machine can come. There only requests that name this machine are
answered: a stranger's page in somebody's browser could otherwise have its own host name point here (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
from typing import Final, Self

import msgspec

__all__ = ["LiveAddress"]

LOOPBACK: Final = "127.0.0.1"
NAMES_OF_LOOPBACK: Final = ("localhost", "127.0.0.1", "[::1]")


class LiveAddress(msgspec.Struct, frozen=True):
    """A host and a TCP port (0: any free one). `host` is an IP address, without brackets, or `localhost`."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """`PORT`, `:PORT`, `ADDRESS:PORT` or `[ADDRESS]:PORT`. Raises ValueError, in words for people."""
        host, _, port = text.rpartition(":")
        host = host or LOOPBACK
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise ValueError(f"{text!r}: an IPv6 address stands in brackets, as in [::1]:8080")
        if not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
            raise ValueError(f"{text!r} has no port; an address is ADDRESS:PORT, or PORT alone for loopback")
        if host == "localhost":
            return cls(LOOPBACK, int(port))
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise ValueError(f"{text!r}: {host!r} is no IP address") from None
        return cls(host, int(port))

    @property
    def loopback(self) -> bool:
        """Nobody can come there from another machine."""
        return ipaddress.ip_address(self.host).is_loopback

    @property
    def bracketed(self) -> str:
        """The host as it stands in URLs and in `Host`."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def url(self) -> str:
        """What one opens in a browser."""
        return f"http://{self.bracketed}:{self.port}/"

    @property
    def allowed_hosts(self) -> list[str]:
        """Which `Host` a request may have: by which names others know this machine is not for us to say."""
        return [*NAMES_OF_LOOPBACK, self.bracketed] if self.loopback else ["*"]
