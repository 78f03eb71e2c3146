// A session with a service: docs/PROTOCOL.md, "Sessions". Opening, incarnations, numbers, heartbeats, legal order,
// ending; with the MMU service over one ZeroMQ DEALER socket after another, if a connection is lost. Relies on
// framing.mjs for bytes and on order.mjs for what is legal when.

import { randomBytes } from "node:crypto";
import { Dealer } from "zeromq";
import { decodeMessage, encodeMessage, HARD_LIMITS } from "./framing.mjs";
import { DROPPED, UNCHANGED, VCPU, WORKER } from "./order.mjs";

const SILENT_INTERVALS = 5;
// Of a session that can resume: after so many it tries another connection, and while that is not taken up.
const QUIET_INTERVALS = 3;
const RESUMING_INTERVALS = 1;
const PATIENCE_SECONDS = 60;
const ATTACH_SECONDS = 5;
const KEPT = 64;
const UNCOUNTED = new Set(["attach", "attached", "resume", "resumed", "heartbeat", "detach", "ended"]);
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
  "given-up", "slow-consumer", "unreachable", "sequence-gap", "not-attached", "stale-incarnation", "not-resumable",
]);

// Of error replies during a session: those that say that there is none any more, ...
const NO_SESSION = new Set(["not-attached", "stale-incarnation"]);
// ... and those that say that this client is wrong. An unknown code is borne.
const OUR_FAULT = new Set([
  "malformed", "too-large", "bad-part-count", "unsupported-version", "unexpected-message",
  "stale-entry", "unknown-entry", "unknown-request", "credit-exceeded", "unknown-frame", "bad-argument",
]);

/** Which conversation it is. */
export const CONVERSATIONS = {
  vcpu: {
    order: VCPU, welcome: "attached", incarnation: (body) => body.incarnation, seconds: 30,
    outward: "to the MMU service", inward: "from the MMU service", resumable: true,
  },
  worker: {
    order: WORKER, welcome: "joined", incarnation: (body) => BigInt(body.member), seconds: 120,
    outward: "to the coordinator", inward: "from the coordinator", resumable: false,
  },
};

/**
 * One session. `take(body)` is called with each message that is not a heartbeat and not dropped, in order;
 * `isLate(body)` says of an answer that it is that of an abandoned walk; `over(error)` is called once, at the end.
 */
export class Session {
  state = "detached";
  /** How often the session went on over another connection. */
  resumed = 0;
  #address;
  #hello;
  #token;
  #resuming = false;
  #kept = []; // the last messages that count
  #sentCount = 0n; // of those
  #takenCount = 0n;
  #heardAt = 0;
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
    this.#address = address;
    this.#hello = body;
    this.#connect();
    const { promise, resolve, reject } = deferred();
    this.#opening = { resolve, reject };
    const seconds = this.#conversation.seconds;
    const timer = setTimeout(() => this.#end(new Violation(`no answer in ${seconds} s`)), seconds * 1000);
    const again = this.#conversation.resumable && setInterval(() => this.#attachAgain(), ATTACH_SECONDS * 1000);
    this.#move(this.#conversation.order.send, body.t);
    this.#sayHello();
    try {
      return await promise;
    } finally {
      clearTimeout(timer);
      clearInterval(again);
    }
  }

  // A socket of its own for each connection. One that can resume does not let ZeroMQ connect again by itself: what was
  // lost in between would be missed only when it is too late.
  #connect() {
    this.#socket?.close();
    this.#socket = new Dealer({
      routingId: `node-${process.pid}-${randomBytes(6).toString("hex")}`,
      maxMessageSize: HARD_LIMITS[this.#conversation.inward],
      linger: 0, // everything that matters is answered before the end
      ...(this.#conversation.resumable && { reconnectInterval: -1 }),
    });
    this.#sending = Promise.resolve();
    this.#socket.connect(this.#address);
    this.#receive(this.#socket);
  }

  #attachAgain() {
    this.#connect();
    this.#sayHello();
  }

  #sayHello() {
    this.#write(encodeMessage(this.#conversation.outward, 0n, 0n, this.#hello));
  }

  // The connection is lost, or something on it: goes on over another one.
  #resume() {
    this.#resuming = true;
    this.#silentTicks = 0;
    this.#connect();
    const body = { t: "resume", token: this.#token, received: this.#takenCount };
    this.#write(encodeMessage(this.#conversation.outward, this.#incarnation, 0n, body));
  }

  #canResume() {
    return this.#conversation.resumable && this.#token?.length > 0;
  }

  /** Sends a numbered message. To send what is not legal is a mistake of the caller. */
  send(body) {
    if (this.#over) return;
    this.#move(this.#conversation.order.send, body.t);
    if (!UNCOUNTED.has(body.t)) {
      this.#kept = [...this.#kept.slice(1 - KEPT), body];
      this.#sentCount += 1n;
    }
    if (!this.#resuming) this.#transmit(body);
  }

  #transmit(body) {
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
    const socket = this.#socket;
    this.#sending = this.#sending.then(() => socket.send(frames)).catch((error) => {
      if (socket !== this.#socket) return; // of a connection that is given up
      if (this.#canResume()) this.#silentTicks = Infinity;
      else this.#end(error);
    });
  }

  async #receive(socket) {
    try {
      for await (const frames of socket) {
        if (socket !== this.#socket) return;
        this.#arrived(decodeMessage(this.#conversation.inward, frames));
        if (this.#over) return;
      }
    } catch (error) {
      if (socket !== this.#socket) return;
      this.#end(error instanceof Violation ? error : new Violation(error.message, { cause: error }));
    }
  }

  #arrived({ incarnation, number, body }) {
    if (incarnation < this.#incarnation && !(incarnation === 0n && body.t === "error")) return;
    if (this.state === "attaching") return this.#answered(incarnation, number, body);
    if (this.#resuming) return this.#answeredResume(incarnation, number, body);
    this.#heard();
    if (body.t === "error" && number === 0n) return this.#refused(number, body);
    if (incarnation !== this.#incarnation) throw new Violation(`incarnation ${incarnation} was never given`);
    if (number >= 1n && number <= this.#received) return; // a repetition
    if (number !== this.#received + 1n) {
      if (this.#canResume() && number !== 0n) return this.#resume(); // something was lost on the way
      throw new Violation(`number ${number} follows ${this.#received}`);
    }
    if (body.t === "error") return this.#refused(number, body);
    this.#received = number;
    if (!UNCOUNTED.has(body.t)) this.#takenCount += 1n;
    if (this.#hooks.isLate(body)) return;
    if (this.#move(this.#conversation.order.receive, body.t) === DROPPED || body.t === "heartbeat") return;
    if (body.t === "ended") return this.#end(new SessionEnded(body.code, body.text));
    this.#hooks.take(body);
    if (body.t === "finished") this.#end(undefined);
  }

  #heard() {
    this.#silentTicks = 0;
    this.#heardAt = performance.now();
  }

  // On a connection that is not taken up yet only the answer to Resume counts.
  #answeredResume(incarnation, number, body) {
    if (body.t === "error" && number === 0n) {
      if (body.code === "already-attached") return undefined;
      // Nothing is left of what is being left: only Ended was lost.
      const left = this.state === "leaving" && body.code === "stale-incarnation";
      if (left) return this.#end(new SessionEnded("detached", body.text));
      return this.#end(new SessionEnded(body.code, body.text));
    }
    if (incarnation !== this.#incarnation) return undefined;
    if (body.t === "ended") return this.#end(new SessionEnded(body.code, body.text));
    if (body.t !== "resumed" || number !== 1n) return undefined;
    const lacking = this.#sentCount - body.received;
    if (lacking < 0n || lacking > this.#kept.length) {
      return this.#end(new SessionEnded("not-resumable", "the service lacks what is not kept, or counts wrongly"));
    }
    this.#heard();
    this.#resuming = false;
    this.resumed += 1;
    this.#sent = 0n;
    this.#received = 1n;
    for (const again of this.#kept.slice(this.#kept.length - Number(lacking))) this.#transmit(again);
    if (this.state === "leaving") this.#transmit({ t: "detach" });
    return undefined;
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
    this.#token = body.token;
    this.#heard();
    this.#heartbeat = body.heartbeat * 1000;
    this.#timer = setInterval(() => this.#tick(), this.#heartbeat / TICKS_PER_INTERVAL);
    this.#opening.resolve(body);
  }

  // Only host agents get error replies with a number.
  #refused(number, body) {
    if (number !== 0n) throw new Violation("an error reply with a number");
    if (body.code === "already-attached") return undefined; // the Attach came twice
    if (NO_SESSION.has(body.code) && this.#canResume()) return this.#resume(); // the service was restarted
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
    const quiet = this.#resuming ? RESUMING_INTERVALS : QUIET_INTERVALS;
    if (this.#canResume() && performance.now() - this.#heardAt < PATIENCE_SECONDS * 1000) {
      if (this.#silentTicks > quiet * TICKS_PER_INTERVAL) this.#resume();
    } else if (this.#silentTicks > SILENT_INTERVALS * TICKS_PER_INTERVAL) {
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
