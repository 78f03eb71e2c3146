// A TLB: docs/PROTOCOL.md, "The TLB" and "Walks". A bank for each physical processor, each of bounded size.

const MAY_WRITE = 0x100;
const MAY_USER = 0x200;
const MAY_FETCH = 0x400;
const DIRTY = 0x800;
const SMEP = 0x2000;
const WRITE = 0x1;
const FETCH = 0x2;
const USER = 0x4;

const CAPACITY = 512;
const LEVELS = [1, 2, 3];

const shift = (level) => 12n + 9n * BigInt(level - 1);
const key = (gva, level) => ((gva >> shift(level)) << 2n) | BigInt(level);

class Translation {
  constructor({ pfn, level, flags }) {
    this.pfn = pfn;
    this.level = level;
    this.flags = flags;
  }

  /** The 4 KiB frame of an address that this translates. */
  frame(gva) {
    const pages = (1n << (shift(this.level) - 12n)) - 1n;
    return this.pfn + Number((gva >> 12n) & pages);
  }

  permits(access) {
    if (access & WRITE && !(this.flags & MAY_WRITE && this.flags & DIRTY)) return false;
    if (access & USER && !(this.flags & MAY_USER)) return false;
    if (access & FETCH && (!(this.flags & MAY_FETCH) || (this.flags & SMEP && !(access & USER)))) return false;
    return true;
  }
}

export class Tlb {
  #banks = new Map();
  #bank;

  constructor() {
    this.use(0);
  }

  /** From now on it is the TLB of this processor. */
  use(processor) {
    if (!this.#banks.has(processor)) this.#banks.set(processor, new Map());
    this.#bank = this.#banks.get(processor);
  }

  empty() {
    this.#bank.clear();
  }

  /** Drops what there is for an address, of all sizes. */
  drop(gva) {
    for (const level of LEVELS) this.#bank.delete(key(gva, level));
  }

  /** A translation that permits the access, or undefined. */
  find(gva, access) {
    for (const level of LEVELS) {
      const translation = this.#bank.get(key(gva, level));
      if (translation?.permits(access)) return translation;
    }
    return undefined;
  }

  /** Keeps what a walk brought, in the place of the oldest if it is full. */
  insert(gva, walked) {
    if (this.#bank.size >= CAPACITY) this.#bank.delete(this.#bank.keys().next().value);
    const translation = new Translation(walked);
    this.#bank.set(key(gva, walked.level), translation);
    return translation;
  }
}
