"""A vCPU client by hand, with pyzmq and msgpack and nothing of shadowmmu: touches some pages, then leaves.

    python tiny_client.py ADDRESS [BROKEN]

BROKEN names one of the ways in which it can be wrong (`BROKEN` below lists them); without, it is right.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import msgpack
import zmq

WRITE, USED, LOCKED = 1, 8, 16
MAY_WRITE, DIRTY = 0x100, 0x800
BASE = 0xFFFF_8000_00C0_0000
SMALL = 0xFFFF_8000_0000_0000 + (100 << 12)
CLEAN = 0xFFFF_8000_0000_0000 + (107 << 12)
"""A page that the guest's tables say is not dirty: it can be read before it can be written."""
VERSION = b"SMMU/1.1"
UNCOUNTED = ("attach", "attached", "resume", "resumed", "heartbeat", "detach", "ended", "error")

BROKEN = {
    "no-numbers": "numbers every message 1",
    "skips-a-number": "leaves number 5 out",
    "wrong-version-frame": "sends SMMU/1 as its version",
    "three-frames": "sends an empty frame first, as a REQ socket does",
    "heartbeat-before-welcome": "sends a heartbeat before Attached has come",
    "entry-from-zero": "counts guest entries from 0",
    "walks-not-numbered": "gives every walk the number 1",
    "ignores-flush": "keeps its TLB when Entered says flush",
    "ignores-no-vpid": "keeps its TLB over entries without VPID",
    "invlpg-keeps": "does not drop what INVLPG names",
    "ignores-rights": "writes through translations that are not dirty or writable",
    "ignores-kicks": "never answers a kick",
    "answers-stale-kicks": "leaves the next entry for a kick of the last one",
    "no-heartbeats": "sends no heartbeats while it waits",
    "ignores-credits": "ships logs without credit",
    "executes-completed-again": "executes again what was completed",
    "uses-late-walks": "uses the answer to a walk that it has abandoned",
    "goes-on-after-ended": "takes no notice of Ended",
    "keeps-tlb-when-given-up": "attaches anew with its old TLB",
    "dies-of-unknown-codes": "is killed by a code it does not know",
    "exact-version-only": "takes messages of its own minor version only",
    "fixmaps-only": "takes integers in their shortest form only",
    "exits-for-guest-faults": "exits for faults that do not exit",
    "no-detach": "ends without Detach",
    "leaves-at-once": "does not wait for Ended after Detach",
    "used-in-log": "logs accesses with USED",
    "wrong-fault": "exits with another error code than the walk's",
    "unasked-exit": "exits for an external interrupt now and then",
    "ignores-processor": "has one TLB for all processors",
    "acts-on-repetitions": "takes an Entered that comes twice for two entries",
    "does-not-resume": "says that it can resume, and waits",
    "resumes-with-a-wrong-count": "says that it has taken in more than it has",
    "forgets-what-was-lost": "does not say again what the service lacks",
    "repeats-what-was-not-lost": "says everything again that it has kept",
    "two-walks": "asks for a second walk without waiting for the first",
}


class Over(Exception):  # noqa: N818 (an outcome)
    """The session has ended."""


class Client:
    def __init__(self, address: str, broken: str) -> None:
        self.broken = broken
        self.address = address
        self.socket = self.connect()
        self.banks: dict[int, dict[int, tuple[int, int, int]]] = {}
        self.log: list[tuple[int, int, int, int, int]] = []
        self.reset()

    def connect(self) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SocketType.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, b"tiny-" + os.urandom(8))
        socket.setsockopt(zmq.LINGER, 500)
        socket.connect(self.address)
        return socket

    def reset(self) -> None:
        self.token = b""
        self.heard = 0
        self.heard_at = time.monotonic()
        self.taken = 0
        self.kept: list[tuple[str, dict[str, Any]]] = []
        self.sent = 0
        self.entries = 0
        self.incarnation = 0
        self.number = 0
        self.entry = 0
        self.walks = 0
        self.credits = 4
        self.processor = 0
        self.kicked = False
        self.heartbeat = 3600.0
        self.log = []
        if self.broken != "keeps-tlb-when-given-up":
            self.banks = {}

    @property
    def tlb(self) -> dict[int, tuple[int, int, int]]:
        return self.banks.setdefault(0 if self.broken == "ignores-processor" else self.processor, {})

    # --- messages --------------------------------------------------------------------------------------------------

    def send(self, tag: str, **body: Any) -> None:
        if tag not in UNCOUNTED:
            self.kept = [*self.kept[-63:], (tag, body)]
            self.sent += 1
        self.transmit(tag, body)

    def transmit(self, tag: str, body: dict[str, Any]) -> None:
        number = 0
        if self.incarnation:
            self.number += 1 + (self.broken == "skips-a-number" and self.number == 4)
            number = 1 if self.broken == "no-numbers" else self.number
        frames = [VERSION, msgpack.packb([self.incarnation, number, {"t": tag, **body}])]
        if self.broken == "wrong-version-frame":
            frames[0] = b"SMMU/1"
        if self.broken == "three-frames":
            frames.insert(0, b"")
        self.socket.send_multipart(frames)
        self.last_sent = time.monotonic()

    def resume(self) -> None:
        """On another connection, as often as it takes."""
        received = self.taken + (self.broken == "resumes-with-a-wrong-count")
        while True:
            self.socket.close(linger=0)
            self.socket = self.connect()
            self.heard_at = time.monotonic()
            resume = {"t": "resume", "token": self.token, "received": received}
            self.socket.send_multipart([VERSION, msgpack.packb([self.incarnation, 0, resume])])
            if not self.socket.poll(1000):
                continue
            incarnation, number, body = msgpack.unpackb(self.socket.recv_multipart()[1])
            if self.leaving and body.get("code") == "stale-incarnation":
                raise Over("detached")  # the Ended was lost
            if body["t"] != "resumed" or (incarnation, number) != (self.incarnation, 1):
                raise SystemExit(3)
            self.number, self.heard, self.heard_at = 0, 1, time.monotonic()
            lacking = self.sent - body["received"]
            if self.broken == "repeats-what-was-not-lost":
                lacking = len(self.kept)
            if self.broken != "forgets-what-was-lost":
                for tag, again in self.kept[len(self.kept) - lacking :]:
                    self.transmit(tag, again)
                if self.leaving:
                    self.transmit("detach", {})
            return

    def receive(self, patience: float = 30.0) -> dict[str, Any] | None:
        """The next message but heartbeats, or None if none comes in time. Sends heartbeats meanwhile."""
        until = time.monotonic() + patience
        while True:
            now = time.monotonic()
            if now - self.last_sent >= self.heartbeat and self.broken != "no-heartbeats":
                self.send("heartbeat")
            if self.token and now - self.heard_at > 3 * self.heartbeat and self.broken != "does-not-resume":
                self.resume()
            if not self.socket.poll(round(max(0, min(until - now, self.heartbeat / 4, 1.0)) * 1000)):
                if now >= until:
                    return None
                continue
            version, data = self.socket.recv_multipart()
            self.heard_at = time.monotonic()
            if self.broken == "exact-version-only" and version != VERSION:
                continue
            if self.broken == "fixmaps-only" and data[1] in b"\xcf\xd3":
                continue
            incarnation, number, body = msgpack.unpackb(data)
            if incarnation not in (0, self.incarnation) and body["t"] != "attached":
                continue  # of an earlier incarnation
            if 0 < number <= self.heard and body["t"] != "attached" and self.broken != "acts-on-repetitions":
                continue
            if body["t"] == "attached" and self.incarnation:
                continue
            self.heard = max(self.heard, number)
            self.entries += body["t"] == "entered"
            self.taken += number > 0 and body["t"] not in UNCOUNTED
            if number == 0 and body["t"] == "error" and self.incarnation:
                if self.broken == "goes-on-after-ended":
                    continue
                raise SystemExit(3)
            if body["t"] != "heartbeat":
                taken: dict[str, Any] = body
                return taken

    def answer(self, *tags: str) -> dict[str, Any]:
        """The next message of these kinds; credits, kicks and the end are seen to meanwhile."""
        while True:
            body = self.receive()
            if body is None:
                raise SystemExit(4)
            tag = body["t"]
            if tag == "applied":
                self.credits += body["logs"]
            elif tag == "kick":
                stale = body["entry"] != self.entry or self.entry == self.left
                if self.broken == "answers-stale-kicks" or not stale:
                    self.kicked = True
            elif tag == "ended" and self.broken != "goes-on-after-ended":
                if self.broken == "dies-of-unknown-codes" and body["code"] == "not-yet-invented":
                    os.abort()
                raise Over(body["code"])
            if tag in tags or (tag == "kick" and self.kicked and "kick" in tags):
                return body

    left = 0  # the last entry that was left
    leaving = False

    # --- entries ---------------------------------------------------------------------------------------------------

    def attach(self) -> bool:
        self.reset()
        self.leaving = False
        self.last_sent = time.monotonic()
        self.send("attach", role="vcpu", name="tiny", resumable=True)
        if self.broken == "heartbeat-before-welcome":
            self.send("heartbeat")
        body = self.receive()
        if body is None or body["t"] == "ended":
            return False
        if body["t"] == "error":
            if self.broken == "dies-of-unknown-codes":
                os.abort()
            return self.attach()
        self.incarnation = body["incarnation"]
        self.token = body["token"]
        self.vpid = body["vpid"]
        self.heartbeat = body["heartbeat"]
        self.mask, self.match = body.get("pfec_mask", 0), body.get("pfec_match", 0)
        self.left = 0
        return True

    def entered(self) -> dict[str, Any]:
        body = self.answer("entered")
        self.entry = body["entry"]
        if self.broken != "answers-stale-kicks":
            self.kicked = False
        self.processor = body.get("processor", 0)
        if body.get("flush") and self.broken != "ignores-flush":
            self.tlb.clear()
        if not self.vpid and self.broken != "ignores-no-vpid":
            self.tlb.clear()
        if body.get("inject"):
            self.drop(body["inject"]["cr2"])
        return body

    def named(self) -> int:
        if self.broken == "acts-on-repetitions":
            return self.entries
        return self.entry - (self.broken == "entry-from-zero")

    def exit(self, reason: dict[str, Any]) -> dict[str, Any]:
        self.ship()
        self.send("exit", entry=self.named(), reason=reason)
        self.left = self.entry
        if not self.vpid and self.broken != "ignores-no-vpid":
            self.tlb.clear()
        return self.entered()

    def drop(self, gva: int) -> None:
        for shift in (12, 21):
            self.tlb.pop(gva >> shift << 8 | shift, None)

    def boundary(self) -> None:
        """Between two instructions: looks for kicks, and answers one."""
        while (body := self.receive(0)) is not None:
            if body["t"] == "applied":
                self.credits += body["logs"]
            elif body["t"] == "kick" and (
                body["entry"] == self.entry or self.broken == "answers-stale-kicks"
            ):
                self.kicked = True
            elif body["t"] == "ended" and self.broken != "goes-on-after-ended":
                if self.broken == "dies-of-unknown-codes" and body["code"] == "not-yet-invented":
                    os.abort()
                raise Over(body["code"])
        if self.kicked and self.broken != "ignores-kicks":
            self.kicked = False
            self.exit({"t": "external_interrupt"})

    # --- memory ----------------------------------------------------------------------------------------------------

    def lookup(self, gva: int, flags: int) -> tuple[int, int] | None:
        for shift in (12, 21):
            held = self.tlb.get(gva >> shift << 8 | shift)
            if held is not None:
                pfn, level, rights = held
                need = MAY_WRITE | DIRTY if flags & WRITE and self.broken != "ignores-rights" else 0
                if rights & need == need:
                    return pfn + ((gva >> 12) & 511 if level == 2 else 0), rights
        return None

    def translate(self, gva: int, flags: int, value: int, op: str | None = None) -> tuple[int, int] | None:
        """The frame and the rights for an access; None if the emulator has executed it."""
        while True:
            self.boundary()
            found = self.lookup(gva, flags)
            if found is not None:
                return found
            self.ship()
            self.walks += self.broken != "walks-not-numbered" or not self.walks
            self.send("walk", entry=self.named(), walk=self.walks, gva=gva, flags=flags)
            if self.broken == "two-walks" and self.walks == 1:
                self.walks += 1
                self.send("walk", entry=self.named(), walk=self.walks, gva=gva, flags=flags)
            body = self.answer("walked", "walk_fault", "kick")
            if body["t"] == "kick":
                if self.broken == "ignores-kicks":
                    body = self.answer("walked", "walk_fault")
                else:
                    self.kicked = False
                    self.abandon(gva)
                    continue
            if body["walk"] != self.walks and self.broken != "walks-not-numbered":
                continue
            if body["t"] == "walked":
                self.keep(gva, body)
                if self.broken != "ignores-rights":
                    level = body["level"]
                    return body["pfn"] + ((gva >> 12) & 511 if level == 2 else 0), body["flags"]
                continue
            self.drop(gva)
            code = body["error_code"]
            if code & self.mask != self.match and self.broken != "exits-for-guest-faults":
                continue
            instruction = {"flags": flags, "value": value, "op": op}
            entered = self.exit(
                {
                    "t": "page_fault",
                    "gva": gva,
                    "error_code": code ^ (self.broken == "wrong-fault"),
                    "instruction": instruction,
                }
            )
            if entered.get("completed") is not None and self.broken != "executes-completed-again":
                return None

    def keep(self, gva: int, body: dict[str, Any]) -> None:
        shift = 12 if body["level"] == 1 else 21
        self.tlb[gva >> shift << 8 | shift] = body["pfn"], body["level"], body["flags"]

    def abandon(self, gva: int) -> None:
        """A kick while a walk is under way."""
        self.ship()
        self.send("exit", entry=self.named(), reason={"t": "external_interrupt"})
        self.left = self.entry
        if self.broken == "uses-late-walks":
            body = self.answer("walked", "walk_fault", "entered")
            if body["t"] == "walked":
                self.entered()
                self.keep(gva, body)
                return
            if body["t"] == "entered":
                self.entry = body["entry"]
                return
        self.entered()

    def ship(self) -> None:
        while self.log and self.credits <= 0 and self.broken != "ignores-credits":
            self.answer("applied")
        if self.log:
            self.credits -= 1
            self.send("log", entry=self.named(), accesses=self.log)
            self.log = []

    def touch(self, gva: int, flags: int = 0, value: int = 0) -> None:
        found = self.translate(gva, flags, value)
        if found is not None:
            pfn, rights = found
            extra = USED if self.broken == "used-in-log" else 0
            self.log.append((flags | rights | extra, gva, pfn, 8, value))
            if len(self.log) == 4:
                self.ship()

    def load(self, gva: int) -> None:
        found = self.translate(gva, USED, 0)
        if found is not None:
            self.ship()
            self.send("load", entry=self.named(), access=(USED | found[1], gva, found[0], 8, 0))
            self.answer("loaded")

    def xadd(self, gva: int, operand: int) -> None:
        flags = WRITE | USED | LOCKED
        found = self.translate(gva, flags, operand, "xadd")
        if found is not None:
            self.ship()
            self.send(
                "locked", entry=self.named(), access=(flags | found[1], gva, found[0], 8, operand), op="xadd"
            )
            self.answer("loaded")

    # --- the program -------------------------------------------------------------------------------------------------

    def program(self) -> None:
        self.send("enter")
        self.entered()
        for turn in range(6):
            for page in range(4):
                self.touch(SMALL + 0x1000 * page + 8 * turn)
            for page in range(12):
                self.touch(BASE + 0x1000 * page + 8 * turn, flags=WRITE, value=turn)
                self.touch(BASE + 0x1000 * page + 8 * turn)
            self.load(BASE + 8 * turn)
            self.boundary()
            self.ship()
            if self.broken != "invlpg-keeps":
                self.drop(SMALL)
            self.exit({"t": "invlpg", "gva": SMALL})
            self.touch(CLEAN)
            self.xadd(CLEAN, 0)
            self.xadd(BASE + 0x20_0000, 1)
            if self.broken == "unasked-exit":
                self.exit({"t": "external_interrupt"})
        self.boundary()
        self.exit({"t": "register_write", "register": "cr4", "value": 0xA0})
        self.ship()
        self.send("exit", entry=self.named(), reason={"t": "external_interrupt"})
        self.left = self.entry
        if self.broken == "no-detach":
            return
        self.leaving = True
        self.send("detach")
        if self.broken == "leaves-at-once":
            return
        while True:
            self.answer("never")

    def run(self) -> None:
        for _ in range(3):
            if not self.attach():
                return
            try:
                self.program()
                return
            except Over as over:
                if str(over) in ("detached", "finished"):
                    return


if __name__ == "__main__":
    Client(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "").run()
