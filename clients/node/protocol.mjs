// A session with a service over a ZeroMQ DEALER socket: docs/PROTOCOL.md, "Sessions". Opening, incarnations, numbers,
// heartbeats, legal order, ending. Relies on framing.mjs for bytes and on order.mjs for what is legal when.

import { randomBytes } from "node:crypto";
import { Dealer } from "zeromq";
import { decodeMessage, encodeMessage, HARD_LIMITS } from "./framing.mjs";
import { DROPPED, UNCHANGED, VCPU, WORKER } from "./order.mjs";

const SILENT_INTERVALS = 5;
const TICKS_PER_INTERVAL = 3;

/** The service does not keep to the protocol; the connection is closed. */
export class Violation extends Error {}

/** The service refused a message, or the attaching itself. `code` is that of the error registry. */
export class Refused extends Error {
  constructor({ code, text, seq }) {
    super(`refused: ${code}: ${text} (message ${seq})`);
    this.code = code;
  }
}

/** The session is over. `code` is that of the error registry. */
export class SessionEnded extends Error {
  constructor(code, text) {
    super(`the session is over: ${code}${text ? `: ${text}` : ""}`);
    this.code = code;
  }
}

/** The codes of an end (or refusal) after which a vCPU attaches anew, with an empty TLB. */
export const ATTACH_ANEW = new Set([
  "given-up", "slow-consumer", "unreachable", "sequence-gap", "not-attached", "stale-incarnation",
]);

// Of error replies during a session: those that say that there is none any more, ...
const NO_SESSION = new Set(["not-attached", "stale-incarnation"]);
// ... and those that say that this client is wrong. An unknown code is borne.
const OUR_FAULT = new Set([
  "malformed", "too-large", "bad-part-count", "unsupported-version", "unexpected-message", "already-attached",
  "duplicate", "stale-entry", "unknown-entry", "unknown-request", "credit-exceeded", "unknown-frame", "bad-argument",
]);

/** Which conversation it is. */
export const CONVERSATIONS = {
  vcpu: {
    order: VCPU, welcome: "attached", incarnation: (body) => body.incarnation, seconds: 30,
    outward: "to the MMU service", inward: "from the MMU service",
  },
  worker: {
    order: WORKER, welcome: "joined", incarnation: (body) => BigInt(body.member), seconds: 120,
    outward: "to the coordinator", inward: "from the coordinator",
  },
};

/**
 * One session. `take(body)` is called with each message that is not a heartbeat and not dropped, in order;
 * `isLate(body)` says of an answer that it is that of an abandoned walk; `over(error)` is called once, at the end.
 */
export class Session {
  state = "detached";
  #conversation;
  #socket;
  #sending = Promise.resolve();
  #incarnation = 0n;
  #sent = 0n;
  #received = 0n;
  #heartbeat = 0;
  #timer;
  #lastSent = 0;
  #silentTicks = 0;
  #hooks;
  #opening;
  #over = false;

  constructor(conversation, hooks) {
    this.#conversation = conversation;
    this.#hooks = { isLate: () => false, ...hooks };
  }

  /** Connects and attaches (or joins) with `body`; gives the welcome. Throws Refused, SessionEnded or Violation. */
  async open(address, body) {
    this.#socket = new Dealer({
      routingId: `node-${process.pid}-${randomBytes(6).toString("hex")}`,
      maxMessageSize: HARD_LIMITS[this.#conversation.inward],
      linger: 0, // everything that matters is answered before the end
    });
    this.#socket.connect(address);
    const { promise, resolve, reject } = deferred();
    this.#opening = { resolve, reject };
    const seconds = this.#conversation.seconds;
    const timer = setTimeout(() => this.#end(new Violation(`no answer in ${seconds} s`)), seconds * 1000);
    this.#receive();
    this.#move(this.#conversation.order.send, body.t);
    this.#write(encodeMessage(this.#conversation.outward, 0n, 0n, body));
    try {
      return await promise;
    } finally {
      clearTimeout(timer);
    }
  }

  /** Sends a numbered message. To send what is not legal is a mistake of the caller. */
  send(body) {
    if (this.#over) return;
    this.#move(this.#conversation.order.send, body.t);
    this.#sent += 1n;
    this.#write(encodeMessage(this.#conversation.outward, this.#incarnation, this.#sent, body));
  }

  /** Whether this message may be sent now. */
  may(tag) {
    return !this.#over && Object.hasOwn(this.#conversation.order.send[tag], this.state);
  }

  /** Closes the connection, whatever the state; the reason goes to `over`. */
  close(reason) {
    this.#end(reason);
  }

  #move(table, tag) {
    const then = table[tag]?.[this.state];
    if (then === undefined) throw new Violation(`${tag} is not legal in state ${this.state}`);
    if (then !== UNCHANGED && then !== DROPPED) this.state = then;
    return then;
  }

  // A socket of this library sends one message at a time.
  #write(frames) {
    this.#lastSent = performance.now();
    this.#sending = this.#sending.then(() => this.#socket.send(frames)).catch((error) => this.#end(error));
  }

  async #receive() {
    try {
      for await (const frames of this.#socket) {
        this.#silentTicks = 0;
        this.#arrived(decodeMessage(this.#conversation.inward, frames));
        if (this.#over) return;
      }
    } catch (error) {
      this.#end(error instanceof Violation ? error : new Violation(error.message, { cause: error }));
    }
  }

  #arrived({ incarnation, number, body }) {
    if (incarnation < this.#incarnation && !(incarnation === 0n && body.t === "error")) return;
    if (this.state === "attaching") return this.#answered(incarnation, number, body);
    if (body.t === "error") return this.#refused(number, body);
    if (incarnation !== this.#incarnation) throw new Violation(`incarnation ${incarnation} was never given`);
    if (number !== this.#received + 1n) throw new Violation(`number ${number} follows ${this.#received}`);
    this.#received = number;
    if (this.#hooks.isLate(body)) return;
    if (this.#move(this.#conversation.order.receive, body.t) === DROPPED || body.t === "heartbeat") return;
    if (body.t === "ended") return this.#end(new SessionEnded(body.code, body.text));
    this.#hooks.take(body);
    if (body.t === "finished") this.#end(undefined);
  }

  #answered(incarnation, number, body) {
    this.#move(this.#conversation.order.receive, body.t);
    if (body.t === "error") return this.#end(new Refused(body));
    if (body.t === "ended") return this.#end(new SessionEnded(body.code, body.text));
    if (number !== 1n || incarnation !== this.#conversation.incarnation(body) || incarnation === 0n) {
      throw new Violation("the welcome's envelope");
    }
    this.#incarnation = incarnation;
    this.#received = 1n;
    this.#heartbeat = body.heartbeat * 1000;
    this.#timer = setInterval(() => this.#tick(), this.#heartbeat / TICKS_PER_INTERVAL);
    this.#opening.resolve(body);
  }

  // Only host agents get error replies with a number.
  #refused(number, body) {
    if (number !== 0n) throw new Violation("an error reply with a number");
    if (NO_SESSION.has(body.code)) return this.#end(new SessionEnded(body.code, body.text));
    if (OUR_FAULT.has(body.code)) return this.#end(new Refused(body));
    // sequence-gap is followed by Ended; what is unknown may or may not have happened, and ends nothing.
    console.error(`error reply ${body.code}: ${body.text}`);
  }

  // Sends a heartbeat when nothing else was sent. Silence is counted in ticks, not by the clock: a process that was
  // stopped makes one tick, and then reads what lies in its socket.
  #tick() {
    if (performance.now() - this.#lastSent >= this.#heartbeat / 2 && this.may("heartbeat")) {
      this.send({ t: "heartbeat" });
    }
    this.#silentTicks += 1;
    if (this.#silentTicks > SILENT_INTERVALS * TICKS_PER_INTERVAL) {
      this.#end(new SessionEnded("unreachable", "nothing was heard of the service for too long"));
    }
  }

  #end(error) {
    if (this.#over) return;
    this.#over = true;
    this.state = "ended";
    clearInterval(this.#timer);
    this.#opening?.reject(error);
    this.#sending.finally(() => this.#socket?.close());
    this.#hooks.over?.(error);
  }
}

/** A promise with the functions that settle it. */
export function deferred() {
  let resolve;
  let reject;
  const promise = new Promise((yes, no) => {
    resolve = yes;
    reject = no;
  });
  return { promise, resolve, reject };
}
