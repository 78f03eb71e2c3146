"""Where the live page listens."""

import pytest

from shadowmmu.coordinator.live import LiveAddress


@pytest.mark.parametrize(
    "text, host, port, url",
    [
        ("8080", "127.0.0.1", 8080, "http://127.0.0.1:8080/"),
        (":0", "127.0.0.1", 0, "http://127.0.0.1:0/"),
        ("localhost:80", "127.0.0.1", 80, "http://127.0.0.1:80/"),
        ("0.0.0.0:65535", "0.0.0.0", 65535, "http://0.0.0.0:65535/"),
        ("[::1]:9", "::1", 9, "http://[::1]:9/"),
    ],
)
def test_an_address_is_loopback_unless_it_names_another(text: str, host: str, port: int, url: str) -> None:
    address = LiveAddress.parse(text)
    assert (address.host, address.port, address.url) == (host, port, url)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "http://127.0.0.1:80",
        "65536",
        "-1",
        "127.0.0.1",
        "::1:80",
        "example.org:80",
        "1.2.3.4:²",
        "[1:80",
    ],
)
def test_anything_else_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"port|brackets|IP address"):
        LiveAddress.parse(text)


def test_only_loopback_knows_by_which_names_it_is_called() -> None:
    assert "127.0.0.2" in LiveAddress.parse("127.0.0.2:80").allowed_hosts
    assert "localhost" in LiveAddress.parse("80").allowed_hosts
    assert LiveAddress.parse("0.0.0.0:80").allowed_hosts == ["*"]
