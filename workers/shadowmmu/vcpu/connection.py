"""The driver on a line: connections, the loop's timers, and nothing that decides anything.

Messages that arrive together are handed to the driver together, then the core takes a turn, and what it sends leaves
with the same turn of the socket. A core that can go on gets its next turn from the loop, which looks at the socket in
between; one that waits costs nothing until a message comes or its log is due.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from shadowmmu.client import ClientKeys, Plain
from shadowmmu.client.line import Line
from shadowmmu.protocol.codec import FROM_MMU
from shadowmmu.vcpu.driver import Reopen, VcpuDriver

__all__ = ["VcpuConnection"]

_log = structlog.get_logger(__name__)


class VcpuConnection:
    """A driver's connection to the MMU service at `address`, from `open` to `close`. Belongs to the running loop.

    The events are set once and stay: `attached`, `done` (the vCPU's share is executed), `ended`.
    """

    def __init__(self, driver: VcpuDriver, address: str, security: ClientKeys | Plain) -> None:
        self.driver = driver
        self.attached = asyncio.Event()
        self.done = asyncio.Event()
        self.ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._line = Line(
            address,
            "vcpu",
            self._on_message,
            self._on_open,
            on_batch=self._on_batch,
            on_failure=self._on_failure,
            hard_limit=FROM_MMU.hard_limit,
            security=security,
        )
        self._news = False
        self._next_turn: asyncio.Handle | None = None
        self._log_timer: asyncio.TimerHandle | None = None
        self._ticker: asyncio.TimerHandle | None = None

    # --- for the worker's life ----------------------------------------------------------------------------------

    def open(self) -> None:
        """Connects and attaches."""
        self._line.open()
        self._arm_ticker()

    def start(self, vcpus: int) -> None:
        """The run begins."""
        self._guarded(lambda: self.driver.start(vcpus))
        self._turn()

    def leave(self) -> None:
        """The core leaves guest mode and detaches; `ended` follows."""
        self._guarded(self.driver.drain)
        self._turn()

    def abandon(self, text: str) -> None:
        """Leaves at once."""
        self._guarded(lambda: self.driver.abandon(text))

    @property
    def vcpu(self) -> int | None:
        return self.driver.vcpu

    @property
    def token(self) -> bytes:
        return self.driver.token

    @property
    def failure(self) -> str | None:
        """Why the attachment ended, if not in order."""
        end = self.driver.end
        return None if end is None or end.in_order else end.text

    def counters(self) -> dict[str, int]:
        return self.driver.counters()

    def histograms(self) -> dict[str, str]:
        return self.driver.histograms()

    async def close(self, linger: float) -> None:
        """Closes the socket; what waits in it has `linger` seconds to leave."""
        for handle in (self._next_turn, self._log_timer, self._ticker):
            if handle is not None:
                handle.cancel()
        await self._line.close(linger)

    # --- called by the loop --------------------------------------------------------------------------------------

    def _on_open(self) -> None:
        self._guarded(self.driver.opened)

    def _on_message(self, frames: list[bytes]) -> None:
        self._news = True
        try:
            self.driver.received(frames)
        except Exception as error:  # noqa: BLE001 (as in _turn)
            self._defect(error)

    def _on_batch(self) -> None:
        if self._news:
            self._news = False
            self._turn()

    def _on_failure(self, error: Exception) -> None:
        _log.error("the connection to the MMU service failed", exc_info=error)
        self.driver.fail(f"the connection to the MMU service failed: {error!r}")
        self._look()

    def _go_on(self) -> None:
        self._next_turn = None
        self._turn()

    def _log_due(self) -> None:
        self._log_timer = None
        self._turn()

    def _tick(self) -> None:
        self._guarded(self.driver.tick)
        self._arm_ticker()

    def _arm_ticker(self) -> None:
        if self.driver.end is None:
            self._ticker = self._loop.call_later(self.driver.tick_seconds, self._tick)

    # --- turns ---------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        more = False
        try:
            more = self.driver.turn()
        except Exception as error:  # noqa: BLE001 (whatever the guest or the core ran into ends the worker)
            self._defect(error)
        self._look()
        if more:
            if self._next_turn is None:
                self._next_turn = self._loop.call_soon(self._go_on)
        else:
            self._arm_log_timer()

    def _arm_log_timer(self) -> None:
        """Only a core that waits needs it: turns look at the log themselves."""
        deadline = self.driver.log_deadline
        if deadline is not None and self._log_timer is None and self.driver.end is None:
            self._log_timer = self._loop.call_at(deadline, self._log_due)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 (as in _turn)
            self._defect(error)
        self._look()

    def _defect(self, error: Exception) -> None:
        """The core or the driver raised: the worker cannot go on, but it can still leave."""
        _log.error("the vCPU failed", vcpu=self.driver.vcpu, exc_info=error)
        text = f"the vCPU failed: {error!r}"
        try:
            self.driver.abandon(text)
        except Exception as second:  # noqa: BLE001 (then without saying good-bye)
            _log.error("the vCPU cannot even leave", exc_info=second)
            self.driver.fail(text)

    def _look(self) -> None:
        """Sends what there is to send and tells the worker what has changed."""
        driver = self.driver
        for frames in driver.take_frames():
            self._line.send(frames)
        reopen, driver.reopen = driver.reopen, None
        if reopen is Reopen.NOW:
            self._loop.call_soon(self._line.open)  # not from within a callback of the connection
        elif reopen is Reopen.LATER:
            self._loop.call_soon(self._line.open_later)
        if driver.vcpu is not None:
            self.attached.set()
        if driver.done:
            self.done.set()
        if driver.end is not None:
            self.ended.set()
