"""Plays the MMU service to somebody's client, which is started as a process once per scene, and judges it.

The client learns the address from the environment variable SHADOWMMU_MMU, and from the argument `{address}` if its
command has one. A client that takes part in runs finds a coordinator at SHADOWMMU_COORDINATOR, or `{coordinator}`.
What the client does is its own affair; it may end by itself, or go on until its session is ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from typing import Final

import msgspec

from shadowmmu.protocol import State
from shadowmmu.protocol import messages as m
from shadowmmu.protocol_check.checks import Report
from shadowmmu.protocol_check.client_checks import ClientCheck
from shadowmmu.protocol_check.judge import Verdicts
from shadowmmu.protocol_check.run_host import RunHost
from shadowmmu.protocol_check.scene import Scene
from shadowmmu.protocol_check.scenes import SCENES
from shadowmmu.protocol_check.stage import TICK_SECONDS, Stage

__all__ = ["ClientLimits", "check_client"]

MMU_VARIABLE: Final = "SHADOWMMU_MMU"
COORDINATOR_VARIABLE: Final = "SHADOWMMU_COORDINATOR"
OUTPUT_KEPT: Final = 2000
_PROGRESS: Final = frozenset({m.Enter, m.Walk, m.Exit})


class ClientLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How long things may take, in seconds.

    `attach`: until the client attaches, and until it reacts to the end of its session; `scene`: for which a client is
    watched that does not end by itself; `kick`: for the answer to a kick; `leave`: for a process to end once it was
    told to. `messages`: after so many a client that does not end by itself has shown enough. `at_once`: scenes played
    at the same time, each to a process of its own; the first one is played alone.
    """

    attach: float = 10.0
    scene: float = 3.0
    kick: float = 2.0
    leave: float = 3.0
    messages: int = 3000
    at_once: int = 3


class _Played(msgspec.Struct):
    """What a scene has shown besides verdicts. `by_itself`: the client came to its own end."""

    attached: bool
    by_itself: bool
    kinds: set[type]


class _Findings(msgspec.Struct):
    """What is collected over all scenes."""

    verdicts: Verdicts
    notes: list[str]


class _Process:
    """The client's process; what it prints is kept for the report."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.asked = False  # to end, by a signal of ours
        self._reader = asyncio.create_task(self._read())
        self.output = b""

    @classmethod
    async def start(cls, command: Sequence[str], address: str, coordinator: str) -> _Process:
        """Starts it in a process group of its own. Raises OSError if that is not possible."""
        filled = [
            part.replace("{address}", address).replace("{coordinator}", coordinator) for part in command
        ]
        environment = os.environ | {MMU_VARIABLE: address, COORDINATOR_VARIABLE: coordinator}
        return cls(
            await asyncio.create_subprocess_exec(
                *filled,
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        )

    async def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        while data := await stream.read(4096):
            self.output = (self.output + data)[-OUTPUT_KEPT:]

    @property
    def status(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self._process.returncode

    async def end(self, seconds: float) -> None:
        """SIGTERM, and SIGKILL for it and its children if that does not help."""
        self.asked = self.asked or self.status is None
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.status is not None:
                break
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # children that it has left behind
        await self._reader


async def check_client(
    command: Sequence[str],
    limits: ClientLimits | None = None,
    scenes: Sequence[type[Scene]] = SCENES,
) -> Report:
    """Plays `scenes` to the client that `command` starts: the others are compared with the first. Raises OSError if it
    cannot be started.
    """
    limits = limits or ClientLimits()
    findings = _Findings(Verdicts(), [])
    first, *others = scenes
    ordinary = await _play(first(), command, limits, findings, None)
    if not ordinary.attached:
        others = []  # nothing more would be seen
    at_once = asyncio.Semaphore(limits.at_once)

    async def play(kind: type[Scene]) -> None:
        async with at_once:
            await _play(kind(), command, limits, findings, ordinary)

    await asyncio.gather(*map(play, others))
    return Report(f"The client {' '.join(command)}", findings.verdicts.results(), findings.notes)


async def _play(
    scene: Scene,
    command: Sequence[str],
    limits: ClientLimits,
    findings: _Findings,
    ordinary: _Played | None,
) -> _Played:
    verdicts, notes = findings.verdicts, findings.notes
    stage = Stage(scene, verdicts, limits.kick)
    host = RunHost(
        scene.config, stage.address, scene.heartbeat, lambda text: stage.fail(ClientCheck.ORDER, text)
    )
    failed_before = len(verdicts.failures)
    try:
        process = await _Process.start(command, stage.address, host.address)
        try:
            played = await _watch(stage, host, process, limits, ordinary)
        finally:
            await process.end(limits.leave)
    finally:
        await host.close()
        await stage.close()
    if len(verdicts.failures) > failed_before and process.output:
        lines = process.output.decode(errors="replace").splitlines()[-12:]
        notes += [f"What it printed in scene {scene.name}:", *(f"    {line}" for line in lines)]
    return played


async def _watch(
    stage: Stage, host: RunHost, process: _Process, limits: ClientLimits, ordinary: _Played | None
) -> _Played:
    """Waits until the scene is over; says what was missing."""
    scene = stage.scene
    # Whoever comes to its own end is waited for, and is to come to it in every scene.
    bounded = ordinary is not None and ordinary.by_itself
    watched = scene.delays + (max(limits.scene, limits.attach) if bounded else limits.scene)
    begin = stage.now
    leaving: float | None = None
    while process.status is None:
        await asyncio.sleep(TICK_SECONDS)
        if stage.failure is not None:
            raise stage.failure
        now = stage.now
        if stage.attached_at is None:
            if now - begin > limits.attach:
                stage.fail(ClientCheck.ATTACH, f"it did not attach within {limits.attach:g} s")
                break
            continue
        if leaving is not None:
            if now - leaving > limits.leave:
                break
        elif stage.ended_at is not None and not stage.reattached:
            if now - stage.ended_at > limits.attach:
                stage.fail(scene.blame, f"it has neither ended nor attached anew for {limits.attach:g} s")
                break
        elif now - stage.attached_at > watched or (not bounded and stage.messages > limits.messages):
            if bounded:
                stage.fail(
                    scene.blame,
                    f"it did not come to its end within {watched:g} s, as it does when left alone",
                )
            leaving = now
            if host.used:
                host.drain()
            else:
                stage.leave()
    _judge_the_end(stage, process, ordinary)
    by_itself = process.status is not None and leaving is None
    return _Played(stage.attached_at is not None, by_itself, stage.kinds)


def _judge_the_end(stage: Stage, process: _Process, ordinary: _Played | None) -> None:
    scene = stage.scene
    status = process.status
    if status is not None and status < 0:
        stage.fail(scene.blame, f"it was killed by {signal.Signals(-status).name}")
    elif status is not None and stage.attached_at is None:
        stage.fail(ClientCheck.ATTACH, f"it ended with status {status} before it had attached")
    elif status is not None and stage.attached:
        stage.fail(
            ClientCheck.LEAVE if stage.session.state is State.LEAVING else scene.blame,
            f"it ended with status {status} in state {stage.session.state.value}: without Detach, or without"
            " waiting for Ended",
        )
    elif stage.left:
        stage.exercise(ClientCheck.LEAVE)
    if scene.ending:
        if stage.ended_at is not None:
            stage.exercise(scene.blame, ClientCheck.ENDED)
        return
    missing = () if ordinary is None else (ordinary.kinds & _PROGRESS) - stage.kinds
    if missing:
        names = ", ".join(sorted(kind.__name__ for kind in missing))
        stage.fail(scene.blame, f"it did not get as far as when left alone: no {names}")
    elif scene.blame in (ClientCheck.MINOR, ClientCheck.ENCODING, ClientCheck.REPEATED):
        stage.exercise(scene.blame)
