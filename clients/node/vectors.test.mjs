// The golden vectors (tests/protocol/vectors.json): every message as bytes, and what must be refused.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { decodeMessage, encodeMessage } from "./framing.mjs";

// JSON.parse would round integers of more than 53 bits: they are made strings first, and BigInt afterwards.
function parseExactly(text) {
  const quoted = text.replace(/(?<=[:[,] ?)(\d{16,})(?=[,\]}])/g, '"$1n"');
  return JSON.parse(quoted, (_, value) => {
    if (typeof value === "string" && /^\d{16,}n$/.test(value)) return BigInt(value.slice(0, -1));
    if (typeof value === "object" && value !== null && "$bin" in value) return Buffer.from(value.$bin, "hex");
    return value;
  });
}

const vectors = parseExactly(
  readFileSync(new URL("../../tests/protocol/vectors.json", import.meta.url), "utf-8"),
);
const bytes = (vector) => vector.frames.map((frame) => Buffer.from(frame, "hex"));

// Integers as BigInt and byte strings as hexadecimal, whatever their size, so that values compare.
function plain(value) {
  if (typeof value === "number" && Number.isInteger(value)) return BigInt(value);
  if (value instanceof Uint8Array) return Buffer.from(value).toString("hex");
  if (Array.isArray(value)) return value.map(plain);
  if (typeof value !== "object" || value === null) return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, plain(item)]));
}

test("every valid message is read as what it means", () => {
  for (const vector of vectors.valid) {
    const { incarnation, number, body } = decodeMessage(vector.direction, bytes(vector));
    assert.equal(incarnation, BigInt(vector.incarnation), vector.name);
    assert.equal(number, BigInt(vector.number), vector.name);
    assert.deepEqual(plain(body), plain(vector.means ?? vector.body), vector.name);
  }
});

test("what a client sends has the golden bytes", () => {
  const sent = vectors.valid.filter(
    ({ direction, form }) => direction.startsWith("to ") && (form === "full" || form === "sparse"),
  );
  assert.ok(sent.length > 40);
  for (const vector of sent) {
    const frames = encodeMessage(vector.direction, BigInt(vector.incarnation), BigInt(vector.number), vector.body);
    assert.equal(Buffer.from(frames[0]).toString(), "SMMU/1.1", vector.name);
    assert.equal(Buffer.from(frames[1]).toString("hex"), vector.frames[1], vector.name);
  }
});

test("every invalid message is refused with its code", () => {
  for (const vector of vectors.invalid) {
    assert.throws(
      () => decodeMessage(vector.direction, bytes(vector)),
      ({ code, incarnation = 0n, number = 0n }) => {
        assert.equal(code, vector.code, vector.name);
        assert.deepEqual([incarnation, number], [BigInt(vector.incarnation), BigInt(vector.number)], vector.name);
        return true;
      },
    );
  }
});

test("a key that is there twice is refused, though the last one alone would do", () => {
  const envelope = Buffer.from("93010282a174a5656e746572a174a5656e746572", "hex");
  assert.throws(() => decodeMessage("to the MMU service", [Buffer.from("SMMU/1.0"), envelope]), { code: "malformed" });
});

test("the reason why a major version is refused can be read in any version", () => {
  const [, envelope] = encodeMessage("to the coordinator", 0n, 0n, { t: "heartbeat" });
  assert.throws(() => decodeMessage("from the coordinator", [Buffer.from("SMMU/2.0"), envelope]), {
    code: "unsupported-version",
  });
  const reply = vectors.valid.find(({ direction, body }) => direction === "from the MMU service" && body.t === "error");
  const text = Buffer.from(reply.frames[1], "hex");
  const same = Buffer.from(
    text.toString("latin1").replace(`\xa4code${String.fromCharCode(0xa0 + reply.body.code.length)}${reply.body.code}`,
      "\xa4code\xb3unsupported-version"), "latin1");
  const { major, body } = decodeMessage("from the MMU service", [Buffer.from("SMMU/2.0"), same]);
  assert.equal(major, 2);
  assert.equal(body.code, "unsupported-version");
});
