from __future__ import annotations

import pytest

from shadowmmu.protocol import REGISTRY, Effect, ErrorCode, RemoteProtocolError, error_info, error_reply
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.errors import Stage


def test_every_code_is_registered() -> None:
    assert list(REGISTRY) == list(ErrorCode)
    for code, info in REGISTRY.items():
        assert info.code is code
        assert info.meaning.endswith(".") and info.advice.endswith(".")
        assert 1 <= len(code) <= 64
        if info.stage in (Stage.FRAME, Stage.SESSION, Stage.OPERATION):
            assert info.effect is Effect.NONE
        else:
            assert info.ends


def test_codes_of_other_versions_are_unknown() -> None:
    assert error_info("malformed") is REGISTRY[ErrorCode.MALFORMED]
    assert error_info("invented-later") is None


def test_an_error_and_its_reply() -> None:
    error = RemoteProtocolError(ErrorCode.DUPLICATE, "number 3", incarnation=2, seq=3)
    assert str(error) == "duplicate: number 3"
    assert error.info is REGISTRY[ErrorCode.DUPLICATE]
    assert error_reply(error) == m.Envelope(2, 0, m.ErrorReply("duplicate", "number 3", 3))
    body = error_reply(RemoteProtocolError(ErrorCode.MALFORMED, "x" * 2000)).body
    assert isinstance(body, m.ErrorReply)
    assert len(body.text) == 1024


@pytest.mark.parametrize("code", ErrorCode)
def test_codes_are_strings(code: ErrorCode) -> None:
    assert f"{code}" == code.value == code
