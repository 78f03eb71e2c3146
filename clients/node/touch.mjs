#!/usr/bin/env node
// A vCPU that touches pages. Alone with an MMU service, or as a worker of a run: see README.md.

import { parseArgs } from "node:util";
import { touchPages } from "./guest.mjs";
import { ATTACH_ANEW } from "./protocol.mjs";
import { takePart } from "./run.mjs";
import { GeneralProtection, Vcpu } from "./vcpu.mjs";

const USAGE = `usage: touch.mjs [--pages N] [--rounds N] [--name NAME] [ADDRESS]
       touch.mjs --coordinator ADDRESS [--name NAME]
ADDRESS of the MMU service: else that of SHADOWMMU_MMU, else tcp://127.0.0.1:5701`;
const MEMORY_PAGES = 4096; // of a service that was started without a word about it
const MAX_INCARNATIONS = 5;

function options() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      coordinator: { type: "string" },
      pages: { type: "string", default: "32" },
      rounds: { type: "string", default: "8" },
      name: { type: "string", default: `node-${process.pid}` },
      help: { type: "boolean" },
    },
  });
  const number = (text, high) => {
    if (!/^[1-9]\d*$/.test(text) || Number(text) > high) throw new Error(`not a number from 1 to ${high}: ${text}`);
    return Number(text);
  };
  if (positionals.length > 1) throw new Error("more than one address");
  return {
    ...values,
    pages: number(values.pages, 64),
    rounds: number(values.rounds, 1_000_000),
    address: positionals[0] ?? process.env.SHADOWMMU_MMU ?? "tcp://127.0.0.1:5701",
  };
}

// No processor leaves PAE in long mode: the guest takes #GP.
async function writeWhatIsRefused(vcpu) {
  try {
    await vcpu.writeRegister("cr4", 0n);
  } catch (error) {
    if (error instanceof GeneralProtection) return;
    throw error;
  }
  throw new Error("CR4 was set to 0 in long mode");
}

async function touch({ address, name, pages, rounds }) {
  let number = null;
  let round = 0;
  for (let incarnation = 1; ; incarnation += 1) {
    try {
      const vcpu = await Vcpu.attach(address, { name, vcpu: number });
      number = vcpu.number;
      console.log(`attached as vCPU ${number}`);
      await vcpu.enter();
      await writeWhatIsRefused(vcpu);
      let faults = 0;
      for (; round < rounds; round += 1) {
        faults += await touchPages(vcpu, {
          memoryPages: MEMORY_PAGES, first: number * pages, count: pages, round, alone: true,
        });
      }
      const code = await vcpu.detach();
      const { counters } = vcpu;
      console.log(Object.entries(counters).map(([key, value]) => `${key} ${value}`).join(", "));
      console.log(`${code} in guest entry ${vcpu.entry}; the guest took ${faults} page faults`);
      if (vcpu.resumed) console.log(`resumed ${vcpu.resumed} times`);
      return 0;
    } catch (error) {
      if (!ATTACH_ANEW.has(error.code) || incarnation === MAX_INCARNATIONS) throw error;
      console.log(`${error.message}; attaching anew`);
    }
  }
}

async function run({ coordinator, name }) {
  const { verdict, text } = await takePart(coordinator, name);
  console.log(`verdict ${verdict}${text ? `: ${text}` : ""}`);
  return verdict === "pass" ? 0 : 1;
}

try {
  const given = options();
  if (given.help) console.log(USAGE);
  else process.exitCode = given.coordinator ? await run(given) : await touch(given);
} catch (error) {
  console.error(error.code?.startsWith?.("ERR_PARSE_ARGS") ? USAGE : `touch: ${error.message}`);
  process.exitCode = 1;
}
