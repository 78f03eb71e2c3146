// A vCPU: docs/PROTOCOL.md, "A vCPU's life". Guest entries, exits, kicks, walks, the TLB, logs, values, interrupts.
// Relies on protocol.mjs for the session. Addresses and values are BigInt.

import { CONVERSATIONS, Session, Violation } from "./protocol.mjs";
import { Tlb } from "./tlb.mjs";

/** AccessFlag bits. */
export const WRITE = 0x1;
export const FETCH = 0x2;
export const USER = 0x4;
export const USED = 0x8;
export const LOCKED = 0x10;

const LOG_ACCESSES = 64;
const LOG_MILLISECONDS = 5;
const LOG_CREDITS = 4;
const TURN_MILLISECONDS = 1;

/** The guest takes a page fault: its program's affair. The TLB has lost the address already. */
export class GuestPageFault extends Error {
  constructor(cr2, errorCode) {
    super(`page fault at 0x${cr2.toString(16)}, error code ${errorCode}`);
    this.cr2 = cr2;
    this.errorCode = errorCode;
  }
}

/** The guest takes #GP: a register write was refused. */
export class GeneralProtection extends Error {}

/** stop() was called: no instruction is executed any more. */
export class Stopped extends Error {}

// What a wait for an answer gives when a kick comes first.
const KICKED = Symbol("kicked");

/** An attached vCPU. Each method that is an instruction gives a promise of its value; one at a time. */
export class Vcpu {
  /** Counters of what happened, by name. */
  counters = {
    instructions: 0, tlb_hits: 0, tlb_misses: 0, logs: 0, exits: 0, kicks: 0, interrupts: 0, walks_abandoned: 0,
  };
  /** Called with each interrupt's vector, between instructions; may execute instructions itself. */
  onInterrupt = async () => {};
  #session;
  #attached;
  #tlb;
  #entry = 0n;
  #walk = 0n;
  #answer;
  #kicked = false;
  #log = [];
  #logSince = 0;
  #credits = LOG_CREDITS;
  #interrupts = [];
  #inHandler = false;
  #stopping = false;
  #failure;
  #wake = () => {};
  #turnEnds = 0;

  /** Attaches at `address`, as vCPU `vcpu` or, if that is null, as any. */
  static async attach(address, { name, vcpu = null }) {
    const self = new Vcpu();
    self.#session = new Session(CONVERSATIONS.vcpu, {
      take: (body) => self.#take(body),
      isLate: (body) => self.#isLate(body),
      over: (error) => {
        self.#failure = error;
        self.#wake();
      },
    });
    self.#attached = await self.#session.open(address, {
      t: "attach", role: "vcpu", name, vcpu, resumable: true,
    });
    self.#tlb = new Tlb();
    return self;
  }

  /** The number of this vCPU. */
  get number() {
    return this.#attached.vcpu;
  }

  get entry() {
    return this.#entry;
  }

  /** How often it went on over another connection. */
  get resumed() {
    return this.#session.resumed;
  }

  /** The first guest entry. */
  async enter() {
    this.#session.send({ t: "enter" });
    await this.#entered();
  }

  /** A store; it is logged. */
  store(gva, value, { size = 8, user = false } = {}) {
    return this.#access({ gva, flags: WRITE | (user ? USER : 0), size, value });
  }

  /** A load whose value is not used; it is logged. */
  touch(gva, { size = 8, user = false, fetch = false } = {}) {
    return this.#access({ gva, flags: (user ? USER : 0) | (fetch ? FETCH : 0), size, value: 0n });
  }

  /** A load: gives what memory has. */
  load(gva, { size = 8, user = false } = {}) {
    return this.#access({ gva, flags: USED | (user ? USER : 0), size, value: 0n });
  }

  /** A locked operation: gives what memory had. */
  locked(op, gva, value, { size = 8, expected = 0n, user = false } = {}) {
    return this.#access({ gva, flags: WRITE | USED | LOCKED | (user ? USER : 0), size, value, op, expected });
  }

  async invlpg(gva) {
    await this.#boundary();
    this.#tlb.drop(gva);
    await this.#exit({ t: "invlpg", gva });
    this.counters.instructions += 1;
  }

  /** Throws GeneralProtection if the write is refused. */
  async writeRegister(register, value) {
    await this.#boundary();
    const { general_protection: refused } = await this.#exit({ t: "register_write", register, value });
    this.counters.instructions += 1;
    if (refused) throw new GeneralProtection(`${register} = 0x${value.toString(16)}`);
  }

  async sendIpi(targets, vector) {
    await this.#boundary();
    await this.#exit({ t: "send_ipi", targets, vector });
    this.counters.instructions += 1;
  }

  /** HLT: comes back when an interrupt was taken. */
  async halt() {
    await this.#boundary();
    await this.#exit({ t: "halt" });
    this.counters.instructions += 1;
    await this.#boundary();
  }

  /** From now on no instruction is executed: what is under way throws Stopped. */
  stop() {
    this.#stopping = true;
    this.#wake();
  }

  /** Leaves guest mode if need be, detaches, and waits for the end. Gives the code of Ended. */
  async detach() {
    this.#stopping = false; // from here on every answer is waited for
    if (this.#session.may("exit")) {
      await this.#ship();
      this.#sendExit({ t: "external_interrupt" });
    }
    this.#session.send({ t: "detach" });
    while (!this.#failure) await this.#woken();
    if (!this.#failure.code) throw this.#failure;
    return this.#failure.code;
  }

  // One access: by the TLB, else by a walk, else by whatever the fault leads to.
  async #access(access) {
    const { gva, flags, size, value, op = null, expected = 0n } = access;
    for (;;) {
      await this.#boundary();
      let translation = this.#tlb.find(gva, flags);
      if (translation) {
        this.counters.tlb_hits += 1;
      } else {
        this.counters.tlb_misses += 1;
        const answer = await this.#walked(gva, flags);
        if (answer === KICKED) continue; // the boundary exits, and the access starts again
        if (answer.t === "walk_fault") {
          this.#tlb.drop(gva);
          const { error_code } = answer;
          const { pfec_mask, pfec_match } = this.#attached;
          if (!answer.misconfig && (error_code & pfec_mask) !== pfec_match) throw new GuestPageFault(gva, error_code);
          const instruction = { flags, size, value, op, expected };
          const { inject, completed } = await this.#exit(
            answer.misconfig
              ? { t: "ept_misconfig", gpa: gva, instruction }
              : { t: "page_fault", gva, error_code, instruction },
          );
          if (inject) throw new GuestPageFault(inject.cr2, inject.error_code);
          if (!completed) continue;
          this.counters.instructions += 1;
          return completed.value;
        }
        translation = this.#tlb.insert(gva, answer);
      }
      const logged = [flags | translation.flags, gva, translation.frame(gva), size, value];
      this.counters.instructions += 1;
      if (flags & USED) return this.#value(logged, op, expected);
      if (this.#log.length === 0) this.#logSince = performance.now();
      this.#log.push(logged);
      if (this.#log.length === LOG_ACCESSES) await this.#ship();
      return undefined;
    }
  }

  async #walked(gva, flags) {
    await this.#ship();
    this.#walk += 1n;
    this.#answer = undefined;
    this.#session.send({ t: "walk", entry: this.#entry, walk: this.#walk, gva, flags });
    await this.#until(() => this.#answer || this.#kicked, { stoppable: true });
    if (this.#answer) return this.#answer;
    this.counters.walks_abandoned += 1;
    return KICKED;
  }

  async #value(access, op, expected) {
    await this.#ship();
    this.#answer = undefined;
    const entry = this.#entry;
    this.#session.send(op ? { t: "locked", entry, access, op, expected } : { t: "load", entry, access });
    await this.#until(() => this.#answer);
    return this.#answer.value;
  }

  // Between two instructions: kicks are answered, interrupts taken, an old log is shipped.
  async #boundary() {
    if (performance.now() >= this.#turnEnds) {
      await new Promise(setImmediate); // let the socket be read
      this.#turnEnds = performance.now() + TURN_MILLISECONDS;
    }
    if (this.#failure) throw this.#failure;
    if (this.#stopping) throw new Stopped();
    if (this.#log.length && performance.now() - this.#logSince > LOG_MILLISECONDS) await this.#ship();
    while (this.#kicked) await this.#exit({ t: "external_interrupt" });
    while (this.#interrupts.length && !this.#inHandler) {
      this.#inHandler = true;
      this.counters.interrupts += 1;
      try {
        await this.onInterrupt(this.#interrupts.shift());
      } finally {
        this.#inHandler = false;
      }
    }
  }

  // Sends the log, as soon as there is credit for it.
  async #ship() {
    if (!this.#log.length) return;
    await this.#until(() => this.#credits > 0);
    this.#credits -= 1;
    this.counters.logs += 1;
    this.#session.send({ t: "log", entry: this.#entry, accesses: this.#log });
    this.#log = [];
  }

  // Leaves guest mode and comes back: gives what Entered says.
  async #exit(reason) {
    await this.#ship();
    this.#sendExit(reason);
    return this.#entered();
  }

  #sendExit(reason) {
    this.counters.exits += 1;
    if (!this.#attached.vpid) this.#tlb.empty();
    this.#session.send({ t: "exit", entry: this.#entry, reason });
    this.#kicked = false;
  }

  async #entered() {
    this.#answer = undefined;
    await this.#until(() => this.#answer, { stoppable: true });
    return this.#answer;
  }

  // What Entered says takes effect as it arrives: a kick may be right behind it.
  #enteredGuest(body) {
    if (body.entry !== this.#entry + 1n) throw new Violation(`entry ${body.entry} follows ${this.#entry}`);
    this.#entry = body.entry;
    this.#tlb.use(body.processor);
    if (body.flush || !this.#attached.vpid) this.#tlb.empty();
    if (body.inject) this.#tlb.drop(body.inject.cr2);
    this.#interrupts.push(...body.interrupts);
  }

  #isLate(body) {
    if (body.t !== "walked" && body.t !== "walk_fault") return false;
    if (body.walk > this.#walk) throw new Violation(`walk ${body.walk} was never asked for`);
    return body.walk < this.#walk;
  }

  #take(body) {
    switch (body.t) {
      case "kick":
        if (body.entry > this.#entry) throw new Violation(`a kick of entry ${body.entry}, which has not begun`);
        if (body.entry < this.#entry) return;
        this.#kicked = true;
        this.counters.kicks += 1;
        break;
      case "applied":
        this.#credits += body.logs;
        if (this.#credits > LOG_CREDITS) throw new Violation("more credits are given back than were taken");
        break;
      case "entered":
        this.#enteredGuest(body);
        this.#answer = body;
        break;
      case "loaded":
      case "walked":
      case "walk_fault":
        if (body.entry !== this.#entry) throw new Violation(`an answer for entry ${body.entry}`);
        this.#answer = body;
        break;
    }
    this.#wake();
  }

  #woken() {
    return new Promise((resolve) => {
      this.#wake = resolve;
    });
  }

  async #until(condition, { stoppable = false } = {}) {
    while (!condition()) {
      if (this.#failure) throw this.#failure;
      if (stoppable && this.#stopping) throw new Stopped();
      await this.#woken();
    }
  }
}
