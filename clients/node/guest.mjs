// What the vCPU executes: docs/PROTOCOL.md, "The guest beside it". Programs over the data pages of the boot guest, and
// a processor's duties beside others: TLB shootdowns. Relies on vcpu.mjs.

import { GuestPageFault } from "./vcpu.mjs";

export const KERNEL_BASE = 0xffff_8000_0000_0000n;
const PAGE = 4096n;
const BLOCK_PAGES = 512;

/** Guest addresses of pages that hold data only: the last quarter of memory, whole blocks of 2 MiB of it. */
function dataPages(memoryPages) {
  const count = Math.floor(memoryPages / 4 / BLOCK_PAGES) * BLOCK_PAGES;
  const end = Math.floor(memoryPages / BLOCK_PAGES) * BLOCK_PAGES;
  const first = count ? Math.ceil((memoryPages - count) / BLOCK_PAGES) * BLOCK_PAGES : end - BLOCK_PAGES;
  return Array.from({ length: end - first }, (_, index) => KERNEL_BASE + PAGE * BigInt(first + index));
}

/** A word came back that is not what was stored. */
export class WrongValue extends Error {}

/**
 * The program for a guest of `memoryPages`: in each round it goes on to `count` other data pages, from number `first`
 * on. It stores to them, loads from them, adds to them and invalidates them, and looks at pages elsewhere. `alone`:
 * nobody else stores there, so that what is loaded must be what was stored. Gives the page faults that the guest took.
 */
export async function touchPages(vcpu, { memoryPages, first, count, round, alone }) {
  const data = dataPages(memoryPages);
  const pages = Array.from({ length: count }, (_, index) => data[(first + index) % data.length]);
  let faults = 0;
  const known = new Map();
  const attempt = async (gva, instruction) => {
    try {
      return await instruction();
    } catch (error) {
      if (!(error instanceof GuestPageFault)) throw error;
      faults += 1; // this kernel has no pages to give: its handler goes on behind the instruction
      known.delete(gva);
      return undefined;
    }
  };
  const verify = (gva, value, old) => {
    if (alone && value !== undefined && known.has(gva) && old !== value) {
      throw new WrongValue(`0x${gva.toString(16)} has ${value} in the place of ${old}`);
    }
  };
  for (const [index, page] of pages.entries()) {
    const gva = page + 8n * BigInt(round % 512);
    const stored = 2n * (BigInt(round) * 0x1_0000n + BigInt(index)); // bit 0 clear: never a present paging entry
    known.set(gva, stored);
    await attempt(gva, () => vcpu.touch(gva, { size: 4 })); // the first store to a page is often a fault of its own
    await attempt(gva, () => vcpu.store(gva, stored));
    if (index % 4 === 3) {
      verify(gva, await attempt(gva, () => vcpu.load(gva)), stored);
      verify(gva, await attempt(gva, () => vcpu.locked("xadd", gva, 2n)), stored);
      verify(gva, await attempt(gva, () => vcpu.load(gva)), stored + 2n);
    }
    const elsewhere = KERNEL_BASE + PAGE * BigInt((round * 41 + index * 67) % memoryPages);
    await attempt(gva, () => vcpu.touch(elsewhere));
    if (index % 16 === 9) await attempt(gva, () => vcpu.touch(gva, { user: true })); // kernel memory: it may not
    if (index % 8 === 7) await vcpu.invlpg(page);
  }
  return faults;
}

const SHOOTDOWN_VECTOR = 0xfd;
const WAKE_VECTOR = 0xfc;

/** The handler of interrupts of a vCPU in a run with `vcpus` vCPUs: does what other processors ask for. */
export function shootdownHandler(vcpu, vcpus) {
  const words = KERNEL_BASE + PAGE * BigInt(7 + vcpus);
  const word = (index) => words + 8n * BigInt(index);
  const cr3 = PAGE * BigInt(8 + 2 * vcpus); // the root of address space 0
  return async (vector) => {
    if (vector !== SHOOTDOWN_VECTOR) return;
    const pending = await vcpu.locked("xchg", word(256 + vcpu.number), 0n);
    for (let asker = 0; asker < vcpus; asker += 1) {
      if (!((pending >> BigInt(asker)) & 1n)) continue;
      const mail = await vcpu.load(word(384 + asker));
      const gva = (mail >> 24n) << 12n;
      const pagesToWrite = (mail >> 12n) & 0xfn; // such a request may be left undone
      if (!pagesToWrite) {
        if (gva) await vcpu.invlpg(gva);
        else await vcpu.writeRegister("cr3", cr3);
      }
      const acknowledged = (await vcpu.locked("xadd", word(320 + asker), 1n)) + 1n;
      if (acknowledged === ((mail >> 16n) & 0xffn)) await vcpu.sendIpi([asker], WAKE_VECTOR);
    }
  };
}
