// What messages look like: the tables of docs/PROTOCOL.md, sections "Types" and "Messages", as data, and their use
// to read and to write a body. Relies on nothing: MessagePack and framing are in framing.mjs.
//
// Integers of more than 53 bits (u64, int) are BigInt everywhere; smaller ones are Number.

/** A message that is not as the page says. `code` is that of the error registry. */
export class Refusal extends Error {
  constructor(code, text) {
    super(`${code}: ${text}`);
    this.code = code;
  }
}

/** A MessagePack float, which unlike 2.0 in JavaScript is not the same as an integer. */
export class Float {
  constructor(value) {
    this.value = value;
  }
}

const malformed = (path, what) => new Refusal("malformed", `${path || "body"}: ${what}`);
const isInteger = (value) => typeof value === "bigint" || Number.isInteger(value);

// A type has read(decoded, path), which gives the value or throws a Refusal, and write(value), what MessagePack is
// to encode. The encoder writes a Number below 2^32, and a BigInt from there on, as an integer of the right size.

const pack = (value) => (value < 0x1_0000_0000n && value >= -0x8000_0000n ? Number(value) : BigInt(value));

function integer(low, high) {
  const big = high > BigInt(Number.MAX_SAFE_INTEGER);
  return {
    read(value, path) {
      if (!isInteger(value)) throw malformed(path, "no integer");
      if (value < low || value > high) throw malformed(path, "out of range");
      return big ? BigInt(value) : Number(value);
    },
    write: pack,
  };
}

const uint = (bits) => integer(0n, (1n << BigInt(bits)) - 1n);
const [u16, u32, u40, u64] = [16, 32, 40, 64].map(uint);
const int64 = integer(-(1n << 63n), (1n << 64n) - 1n);
const byte = integer(0n, 255n);
const vector = integer(32n, 255n);
const accessFlags = integer(0n, 31n);

const bool = {
  read(value, path) {
    if (typeof value !== "boolean") throw malformed(path, "no boolean");
    return value;
  },
  write: (value) => value,
};

function float(low, high = Infinity, { above = false } = {}) {
  return {
    read(value, path) {
      if (!(value instanceof Float) && !isInteger(value)) throw malformed(path, "no number");
      const number = value instanceof Float ? value.value : Number(value);
      if (!Number.isFinite(number)) throw malformed(path, "not finite");
      if (number < low || number > high || (above && number === low)) throw malformed(path, "out of range");
      return number;
    },
    write: (value) => value,
  };
}

function str(low, high) {
  return {
    read(value, path) {
      if (typeof value !== "string") throw malformed(path, "no string");
      const length = [...value].length; // code points
      if (length < low || length > high) throw malformed(path, "too short or too long");
      return value;
    },
    write: (value) => value,
  };
}

const text = str(0, 1024);
const code = str(1, 64);
const anyStr = str(0, Infinity);

function oneOf(...names) {
  return {
    read(value, path) {
      if (!names.includes(value)) throw malformed(path, `not one of ${names.join(", ")}`);
      return value;
    },
    write: (value) => value,
  };
}

function bytes(high) {
  return {
    read(value, path) {
      if (!(value instanceof Uint8Array)) throw malformed(path, "no byte string");
      if (value.length > high) throw malformed(path, "too long");
      return value;
    },
    write: (value) => value,
  };
}

const bin = bytes(Infinity);
const token = bytes(64);
const none = new Uint8Array(0);

function nullable(type) {
  return {
    read: (value, path) => (value === null ? null : type.read(value, path)),
    write: (value) => (value === null ? null : type.write(value)),
  };
}

function array(type, low = 0, high = Infinity) {
  return {
    read(value, path) {
      if (!Array.isArray(value)) throw malformed(path, "no array");
      if (value.length < low || value.length > high) throw malformed(path, "too few or too many");
      return value.map((item, index) => type.read(item, `${path}[${index}]`));
    },
    write: (value) => value.map(type.write),
  };
}

function tuple(...types) {
  return {
    read(value, path) {
      if (!Array.isArray(value) || value.length !== types.length) throw malformed(path, `no array of ${types.length}`);
      return types.map((type, index) => type.read(value[index], `${path}[${index}]`));
    },
    write: (value) => types.map((type, index) => type.write(value[index])),
  };
}

const isMap = (value) =>
  typeof value === "object" && value !== null && [Object.prototype, null].includes(Object.getPrototypeOf(value));

function mapOf(type) {
  return {
    read(value, path) {
      if (!isMap(value)) throw malformed(path, "no map");
      return Object.fromEntries(
        Object.entries(value).map(([key, item]) => [key, type.read(item, `${path}.${key}`)]),
      );
    },
    write: (value) => Object.fromEntries(Object.entries(value).map(([key, item]) => [key, type.write(item)])),
  };
}

/** A field with a default, which stands for it when it is left out. */
const or = (type, fallback) => ({ ...type, fallback });

/** A map with these fields; with a tag, "t" is the first of them. */
function struct(fields, tag) {
  const names = Object.keys(fields);
  return {
    read(value, path) {
      if (!isMap(value)) throw malformed(path, "no map");
      for (const key of Object.keys(value)) {
        if (!Object.hasOwn(fields, key) && !(key === "t" && tag)) throw malformed(path, `unknown field ${key}`);
      }
      const result = tag ? { t: tag } : {};
      for (const name of names) {
        if (Object.hasOwn(value, name)) result[name] = fields[name].read(value[name], `${path}.${name}`);
        else if ("fallback" in fields[name]) result[name] = fields[name].fallback;
        else throw malformed(path, `${name} is missing`);
      }
      return result;
    },
    write(value) {
      const result = tag ? { t: tag } : {};
      for (const name of names) if (value[name] !== undefined) result[name] = fields[name].write(value[name]);
      return result;
    },
  };
}

/** One of several structs, told apart by their tags. */
function tagged(table) {
  const structs = Object.fromEntries(Object.entries(table).map(([tag, fields]) => [tag, struct(fields, tag)]));
  const choose = (value, path) => {
    if (!isMap(value)) throw malformed(path, "no map");
    if (typeof value.t !== "string" || !Object.hasOwn(structs, value.t)) throw malformed(path, "unknown tag");
    return structs[value.t];
  };
  return {
    read: (value, path) => choose(value, path).read(value, path),
    write: (value) => choose(value, "").write(value),
  };
}

// Inside messages.

const loggedAccess = tuple(u16, u64, u40, integer(1n, 8n), u64);
const lockedOp = oneOf("cmpxchg", "xchg", "xadd");
const role = oneOf("mmu", "vcpu", "host", "probe");
const counters = mapOf(int64);

const instruction = struct({
  flags: accessFlags,
  size: or(integer(1n, 8n), 8),
  value: or(u64, 0n),
  op: or(nullable(lockedOp), null),
  expected: or(u64, 0n),
});

const exitReason = tagged({
  page_fault: { gva: u64, error_code: accessFlags, instruction },
  ept_misconfig: { gpa: u64, instruction },
  invlpg: { gva: u64 },
  register_write: { register: oneOf("cr0", "cr3", "cr4", "efer"), value: u64 },
  send_ipi: { targets: array(byte, 0, 256), vector },
  halt: {},
  external_interrupt: {},
});

const pages = integer(1n, 1048576n);
const hostOperation = tagged({
  unmap: { gfn: u40 },
  unmap_range: { gfn: u40, npages: pages },
  reclaim: { gfn: u40 },
  reclaim_idle: { gfns: array(u40, 1, 64) },
  move: { gfn: u40, writable: bool },
  age: { gfn: u40 },
  test_age: { gfn: u40 },
  set_dirty_log: { slot: u32, enable: bool },
  get_dirty_log: { slot: u32 },
  set_memory_region: { slot: integer(0n, 31n), gfn: u40, npages: integer(0n, 1048576n), huge: or(bool, false) },
  shrink: { n: u32 },
  set_mmu_pages: { n: integer(64n, 1048576n) },
  zap_all: {},
  migrate: { vcpu: byte, processor: byte },
  write_phys: { words: array(tuple(u64, u64), 1, 4096) },
  set_registers: { vcpu: byte, cr0: u64, cr3: u64, cr4: u64, efer: u64 },
});

const runConfig = struct({
  workload: or(
    oneOf("anon", "fork", "mprotect", "mmap-churn", "context-switch", "huge", "sloppy", "mixed", "modes"),
    "mixed",
  ),
  mode: or(oneOf("paging64", "pae", "paging32", "nonpaging", "mixed"), "paging64"),
  tdp: or(nullable(oneOf("ept", "npt")), null),
  bypass_guest_pf: or(bool, false),
  memory_model: or(oneOf("sc", "tso"), "sc"),
  seed: or(u64, 0n),
  ops: or(integer(1n, 281474976710656n), 100000),
  profile: or(str(1, 4096), "fixed"),
  vpid: or(bool, true),
  audit: or(oneOf("never", "sampled", "always"), "sampled"),
  mutant: or(
    nullable(oneOf("flush-not-awaited", "answer-before-log", "entry-flush-skipped", "notifier-ignores-tlbs-dirty")),
    null,
  ),
  memory_pages: or(integer(1024n, 1048576n), 4096),
  mmu_pages: or(integer(64n, 1048576n), 128),
  park_rate: or(float(0, 1), 0.1),
  park_steps: or(integer(1n, 1048576n), 200),
  host_rate: or(float(0, 1000), 5.0),
  tlb_sets: or(integer(1n, 4096n), 128),
  tlb_ways: or(integer(1n, 64n), 4),
  check: or(bool, true),
});

// The messages.

const error = { code, text, seq: or(u64, 0n), request: or(u64, 0n) };
const ended = { code, text: or(text, "") };
const heartbeat = float(0, Infinity, { above: true });
const state = or(nullable(bytes(192 * 1024)), null);

const loaded = { entry: u64, value: u64 };
const walkFault = { entry: u64, walk: u64, error_code: accessFlags, misconfig: or(bool, false) };
const entered = {
  entry: u64,
  flush: or(bool, false),
  inject: or(nullable(struct({ error_code: accessFlags, cr2: u64 })), null),
  completed: or(nullable(struct({ value: or(u64, 0n), mmio: or(bool, false) })), null),
  general_protection: or(bool, false),
  interrupts: or(array(vector, 0, 256), []),
  processor: or(byte, 0),
};
// A trail's Entered has no trail itself.
const toldInTrail = tagged({
  entered: { ...entered, resume: or(nullable(struct({})), null) },
  loaded,
  walk_fault: walkFault,
});
const asked = oneOf(
  "enter", "walk", "load", "locked", "page_fault", "ept_misconfig", "invlpg", "register_write", "send_ipi", "halt",
  "external_interrupt",
);
const resumption = struct({
  state,
  trail: or(array(tuple(u64, asked, toldInTrail), 0, 4096), []),
  accesses: or(u64, 0n),
});

/** The directions of docs/PROTOCOL.md: what is sent to and from the two services, and the soft limits there. */
export const DIRECTIONS = {
  "to the MMU service": {
    limit: 256 * 1024,
    tables: {
      attach: {
        role,
        name: str(1, 64),
        vcpu: or(nullable(byte), null),
        resumable: or(bool, false),
        token: or(token, none),
        heartbeat: or(nullable(heartbeat), null),
      },
      resume: { token, received: u64 },
      enter: {},
      log: { entry: u64, accesses: array(loggedAccess, 1, 64) },
      walk: { entry: u64, walk: u64, gva: u64, flags: accessFlags },
      load: { entry: u64, access: loggedAccess, state },
      locked: { entry: u64, access: loggedAccess, op: lockedOp, expected: or(u64, 0n), state },
      exit: { entry: u64, reason: exitReason, state },
      detach: {},
      heartbeat: {},
      host_request: { request: u64, operation: hostOperation, paced: or(bool, false) },
    },
  },
  "from the MMU service": {
    limit: 8 * 1024 * 1024,
    tables: {
      attached: {
        vcpu: nullable(byte),
        incarnation: u64,
        vpid: bool,
        heartbeat,
        pfec_mask: or(u32, 0),
        pfec_match: or(u32, 0),
        token: or(token, none),
      },
      resumed: { received: u64 },
      entered: { ...entered, resume: or(nullable(resumption), null) },
      walked: { entry: u64, walk: u64, pfn: u40, level: integer(1n, 3n), flags: u16 },
      walk_fault: walkFault,
      loaded,
      applied: { logs: u32 },
      kick: { entry: u64 },
      host_reply: { request: u64, result: int64, gfns: or(array(u40), []) },
      error,
      ended,
      heartbeat: {},
    },
  },
  "to the coordinator": {
    limit: 1024 * 1024,
    tables: {
      join: { role, name: str(1, 64), endpoint: or(text, ""), member: or(u32, 0), token: or(token, none) },
      ready: { vcpu: or(nullable(byte), null), token: or(token, none) },
      progress: { counters, done: or(bool, false), tokens: or(array(tuple(byte, token), 0, 256), []) },
      event_batch: { first: u64, count: u32, data: bin },
      vcpu_lost: { vcpu: byte, text },
      report: { counters, histograms: or(mapOf(anyStr), {}), info: or(mapOf(anyStr), {}) },
      heartbeat: {},
    },
  },
  "from the coordinator": {
    limit: 64 * 1024,
    tables: {
      joined: {
        member: u32,
        config: runConfig,
        mmu_endpoint: text,
        heartbeat,
        run: or(token, none),
        token: or(token, none),
        vcpu: or(nullable(byte), null),
        vcpu_token: or(token, none),
        next_event: or(u64, 0n),
      },
      start: { vcpus: integer(1n, 256n) },
      event_credit: { batches: u32 },
      drain: {},
      finished: { verdict: oneOf("pass", "violated", "unknown"), text: or(text, "") },
      error,
      ended,
      heartbeat: {},
    },
  },
};

for (const direction of Object.values(DIRECTIONS)) direction.bodies = tagged(direction.tables);

/** Whether any direction has a message with this tag. */
export const isMessage = (tag) => Object.values(DIRECTIONS).some(({ tables }) => Object.hasOwn(tables, tag));
