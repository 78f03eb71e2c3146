// Two frames from a message and back: docs/PROTOCOL.md, "Framing" and "Versions". Relies on @msgpack/msgpack and on
// the tables of messages.mjs; knows no sockets.

import { Decoder, encode } from "@msgpack/msgpack";
import { DIRECTIONS, Float, isMessage, Refusal } from "./messages.mjs";

export const MAJOR = 1;
export const VERSION = "SMMU/1.1";
/** A larger frame ends the connection. */
export const HARD_LIMITS = { "from the MMU service": 16 * 1024 * 1024, "from the coordinator": 1024 * 1024 };

const MAX_U64 = (1n << 64n) - 1n;
const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

// The library's decoder gives 2.0 and 2 alike, and reads what is no UTF-8 somehow. The page wants both told apart, so
// three of its methods are replaced. They are not part of its documented interface: the golden vectors watch them.
// Where the structure can be read all the same, `flaw` says what is wrong, so that the envelope's numbers are known.
class StrictDecoder extends Decoder {
  flaw = undefined;
  #keys = 0;

  constructor() {
    super({
      useBigInt64: true,
      maxArrayLength: 1 << 20,
      maxMapLength: 1 << 16,
      mapKeyConverter: (key) => {
        if (typeof key !== "string") this.flaw = "a key that is no string";
        this.#keys += 1;
        return String(key);
      },
    });
  }

  readF32() {
    return new Float(super.readF32());
  }

  readF64() {
    return new Float(super.readF64());
  }

  decodeString(length, header) {
    const start = this.pos + header;
    if (start + length > this.bytes.byteLength) throw new RangeError("a string is cut off");
    this.pos = start + length;
    const bytes = this.bytes.subarray(start, this.pos);
    try {
      return utf8.decode(bytes);
    } catch {
      this.flaw = "a string that is no UTF-8";
      return Buffer.from(bytes).toString("latin1");
    }
  }

  decode(bytes) {
    const value = super.decode(bytes);
    if (countKeys(value) !== this.#keys) this.flaw ??= "a key that is there twice";
    return value;
  }
}

for (const method of ["readF32", "readF64", "decodeString"]) {
  if (typeof Decoder.prototype[method] !== "function") {
    throw new Error(`this version of @msgpack/msgpack has no Decoder.${method}`);
  }
}

function countKeys(value) {
  if (Array.isArray(value)) return value.reduce((sum, item) => sum + countKeys(item), 0);
  if (typeof value !== "object" || value === null || Object.getPrototypeOf(value) !== Object.prototype) return 0;
  const members = Object.values(value);
  return members.reduce((sum, item) => sum + countKeys(item), members.length);
}

/** The numbers of a version frame; a Refusal if it is none. */
export function parseVersion(frame) {
  const match = /^SMMU\/(0|[1-9]\d{0,4})\.(0|[1-9]\d{0,4})$/.exec(Buffer.from(frame).toString("latin1"));
  if (!match || match[0].length !== frame.length) throw new Refusal("malformed", "no version frame");
  return { major: Number(match[1]), minor: Number(match[2]) };
}

/**
 * Frames to send: `body` has the fields that are not left out.
 * `number` and `incarnation` are BigInt.
 */
export function encodeMessage(direction, incarnation, number, body) {
  const small = (value) => (value < 0x1_0000_0000n ? Number(value) : value);
  const packed = DIRECTIONS[direction].bodies.write(body);
  return [Buffer.from(VERSION), encode([small(incarnation), small(number), packed], { useBigInt64: true })];
}

/**
 * What these frames say: {major, minor, incarnation, number, body}, the body with its defaults. Throws a Refusal,
 * which has incarnation and number as far as they could be read.
 */
export function decodeMessage(direction, frames) {
  if (frames.length !== 2) throw new Refusal("bad-part-count", `${frames.length} frames`);
  const [versionFrame, envelopeFrame] = frames;
  const version = parseVersion(versionFrame);
  if (version.major !== MAJOR) return decodeForeign(direction, version, envelopeFrame);
  return { ...version, ...decodeEnvelope(direction, envelopeFrame) };
}

// The error reply "unsupported-version" keeps its form in every major version; nothing else of one can be read.
function decodeForeign(direction, version, envelopeFrame) {
  let message;
  try {
    message = decodeEnvelope(direction, envelopeFrame);
  } catch {
    message = undefined;
  }
  if (message?.body.t === "error" && message.body.code === "unsupported-version") return { ...version, ...message };
  throw new Refusal("unsupported-version", `SMMU/${version.major}.${version.minor} is not spoken here`);
}

function decodeEnvelope(direction, frame) {
  const { bodies, limit, tables } = DIRECTIONS[direction];
  if (frame.length > limit) throw new Refusal("too-large", `${frame.length} bytes`);
  const decoder = new StrictDecoder();
  let envelope;
  try {
    envelope = decoder.decode(frame);
  } catch (error) {
    throw new Refusal("malformed", error.message);
  }
  if (!Array.isArray(envelope) || envelope.length !== 3) throw new Refusal("malformed", "no array of three");
  const [incarnation, number] = envelope.slice(0, 2).map((value) => {
    const isInteger = typeof value === "bigint" || Number.isInteger(value);
    if (!isInteger || value < 0 || value > MAX_U64) throw new Refusal("malformed", "an envelope's number");
    return BigInt(value);
  });
  try {
    if (decoder.flaw) throw new Refusal("malformed", decoder.flaw);
    const tag = envelope[2]?.t;
    if (typeof tag === "string" && isMessage(tag) && !Object.hasOwn(tables, tag)) {
      throw new Refusal("unexpected-message", `${tag} does not go this way`);
    }
    return { incarnation, number, body: bodies.read(envelope[2], "") };
  } catch (error) {
    throw Object.assign(error, { incarnation, number });
  }
}
