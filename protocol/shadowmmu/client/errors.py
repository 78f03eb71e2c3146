"""What can go wrong for a client, as exceptions that carry the code of the error registry."""

from __future__ import annotations

from shadowmmu.protocol import Effect, ErrorCode, ErrorInfo, error_info

__all__ = ["Kicked", "RequestRefused", "ServiceError", "ServiceLost", "SessionEnded"]


class ServiceError(Exception):
    """The service said no, or says nothing any more. `code` is of the error registry (or a newer service's)."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = str(code)
        self.text = text

    @property
    def info(self) -> ErrorInfo | None:
        """The registry's entry: what the code means and what to do. None for a code that we do not know."""
        return error_info(self.code)

    @property
    def definite(self) -> bool:
        """Whether the effect of what was asked is known (see the registry); False for codes that we do not know."""
        info = self.info
        return info is not None and info.effect is not Effect.UNKNOWN


class RequestRefused(ServiceError):  # noqa: N818 (says what happened; the base says that it is an error)
    """A message was refused and changed nothing (ErrorReply). `seq` is its sequence number, 0 if unknown."""

    def __init__(self, code: str, text: str, seq: int = 0) -> None:
        super().__init__(code, text)
        self.seq = seq


class SessionEnded(ServiceError):  # noqa: N818 (says what happened; the base says that it is an error)
    """The service ended the session (Ended), or we closed it."""


class ServiceLost(ServiceError):  # noqa: N818 (says what happened; the base says that it is an error)
    """The service does not answer: nothing was heard for too long, or attaching took too long."""

    def __init__(self, text: str) -> None:
        super().__init__(ErrorCode.UNREACHABLE, text)


class Kicked(Exception):  # noqa: N818 (not an error: it is what a kick does)
    """A kick of the current guest entry came: leave guest mode. The walk that was under way is abandoned."""

    def __init__(self, entry: int) -> None:
        super().__init__(f"guest entry {entry} was kicked")
        self.entry = entry
