"""The agent at the MMU service: sends the requests, takes in the replies.

It goes on over another connection when one is lost. If the service has given it up, it attaches anew; what happened to
the requests under way is then not known, and they are not asked for again: the host's program does not depend on them.
"""

from __future__ import annotations

import asyncio
from typing import Unpack

from shadowmmu.client import ClientOptions, Connection, RequestRefused, ServiceError, SessionEnded
from shadowmmu.hostagent.requests import HostRequests
from shadowmmu.protocol import messages as m
from shadowmmu.protocol.errors import ErrorCode
from shadowmmu.protocol.states import MMU, State

__all__ = ["AgentConnection"]


class AgentConnection(Connection):
    """A host agent at the MMU service, from `open` to `close`; `requests` are those of the run.

    The events are set once and stay. A host's work is never done: `done` only says that it waits for nobody.
    """

    default_name = "host"

    def __init__(self, address: str, requests: HostRequests, **options: Unpack[ClientOptions]) -> None:
        options["resumable"] = True
        super().__init__(MMU, address, **options)
        self.attached = asyncio.Event()
        self.done = asyncio.Event()
        self.ended = asyncio.Event()
        self._requests = requests
        self._leaving = False

    # --- for the agent's life ------------------------------------------------------------------------------------

    def open(self) -> None:
        """Attaches."""
        self._opening = m.Attach(m.Role.HOST, self.name, resumable=True)
        self.send(self._opening)

    def start(self, vcpus: int) -> None:
        """The run begins."""
        requests = self._requests.start(vcpus)
        if self.session.state is State.SERVING:
            self._send_all(requests)
        else:
            self._requests.forget()  # between two incarnations: the next one asks

    def leave(self) -> None:
        """Asks for nothing new, waits for the replies, and detaches; `ended` follows."""
        if self.error is None and not self._leaving:
            self._leaving = True
            requests = self._requests.drain()
            if self.session.state is State.SERVING:
                self._send_all(requests)
            else:
                self._requests.forget()
            self._detach_if_idle()

    def abandon(self, text: str) -> None:  # noqa: ARG002 (a host agent's death concerns nobody)
        """Detaches without waiting for replies."""
        if self.error is None and self.session.state is State.SERVING:
            self.send(m.Detach())

    @property
    def vcpu(self) -> int | None:
        return None

    @property
    def token(self) -> bytes:
        """A host agent's is of no use to others."""
        return b""

    @property
    def failure(self) -> str | None:
        """Why the attachment ended, if not by our own Detach."""
        error = self.error
        if error is None or (
            self._leaving and isinstance(error, SessionEnded) and error.code == ErrorCode.DETACHED
        ):
            return None
        return f"the MMU service is lost: {error}"

    def counters(self) -> dict[str, int]:
        return self._requests.counters()

    def histograms(self) -> dict[str, str]:
        return self._requests.histograms()

    # --- messages ------------------------------------------------------------------------------------------------

    def _send_all(self, requests: list[m.HostRequest]) -> None:
        for request in requests:
            self.send(request)

    def _detach_if_idle(self) -> None:
        if self._leaving and not self._requests.under_way and self.session.state is State.SERVING:
            self.send(m.Detach())

    def _handle(self, body: m.Message) -> None:
        match body:
            case m.Attached():
                again = self.attached.is_set()
                self.attached.set()
                if again and not self._leaving:
                    self._send_all(self._requests.resume())
                self._detach_if_idle()
            case m.HostReply():
                self._send_all(self._requests.replied(body))
                self._detach_if_idle()
            case m.ErrorReply():
                # The program asks for possible things only: a refusal is a defect of ours.
                self._fail(RequestRefused(body.code, body.text, body.seq))
            case _:
                pass

    def _incarnation_lost(self) -> bool:
        if self._leaving:
            return False
        self._requests.forget()
        return True

    def _failed(self, error: ServiceError) -> None:  # noqa: ARG002 (it is kept in `error`)
        self.ended.set()
