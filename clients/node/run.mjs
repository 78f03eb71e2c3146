// A vCPU worker's course in a run: docs/PROTOCOL.md, "A run". Relies on protocol.mjs, vcpu.mjs and guest.mjs.

import { shootdownHandler, touchPages } from "./guest.mjs";
import { ATTACH_ANEW, CONVERSATIONS, deferred, Session } from "./protocol.mjs";
import { Stopped, Vcpu } from "./vcpu.mjs";

const PROGRESS_MILLISECONDS = 250;
const PAGES_PER_ROUND = 16;
const MAX_INCARNATIONS = 10;

// The coordinator's side: what it has said, and promises of it.
class Member {
  draining = false;
  onDrain = () => {};
  #started = deferred();
  #finished = deferred();

  constructor() {
    this.session = new Session(CONVERSATIONS.worker, {
      take: (body) => this.#take(body),
      over: (error) => {
        this.#started.reject(error);
        this.#finished.reject(error); // no effect if it is finished
        this.#drain();
      },
    });
    this.#started.promise.catch(() => {});
    this.#finished.promise.catch(() => {});
  }

  /** The number of vCPUs, or null if the run ends without a start. */
  get started() {
    return this.#started.promise;
  }

  get finished() {
    return this.#finished.promise;
  }

  #take(body) {
    if (body.t === "start") this.#started.resolve(body.vcpus);
    if (body.t === "finished") this.#finished.resolve(body);
    if (body.t === "drain") {
      this.#started.resolve(null);
      this.#drain();
    }
  }

  #drain() {
    this.draining = true;
    this.onDrain();
  }
}

/** Takes part in one run as a vCPU; gives Finished. Throws if the run, or this worker's part in it, fails. */
export async function takePart(coordinator, name) {
  const member = new Member();
  const joined = await member.session.open(coordinator, { t: "join", role: "vcpu", name });
  const totals = {};
  let failure;
  try {
    await execute(member, joined, name, totals);
  } catch (error) {
    failure = error;
  }
  const info = { client: "node", ...(failure && { error: failure.message }) };
  member.session.send({ t: "report", counters: totals, info });
  const finished = await member.finished;
  if (failure) throw failure;
  return finished;
}

async function execute(member, { config, mmu_endpoint: endpoint }, name, totals) {
  if (config.workload === "modes" || config.mode !== "paging64" || config.tdp !== null) {
    throw new Error("this client plays a 64-bit guest with shadow paging only");
  }
  let vcpu = await Vcpu.attach(endpoint, { name });
  const { number } = vcpu;
  member.session.send({ t: "ready", vcpu: number });
  const vcpus = await member.started;
  if (vcpus === null) {
    await vcpu.detach();
    return;
  }
  const share = Math.floor(config.ops / vcpus) + (number < config.ops % vcpus ? 1 : 0);
  const before = {}; // of earlier incarnations
  let done = false;
  const count = () => {
    for (const [key, value] of Object.entries(vcpu.counters)) totals[`vcpu.${key}`] = (before[key] ?? 0) + value;
  };
  const progress = () => {
    count();
    if (member.session.may("progress")) member.session.send({ t: "progress", counters: { ...totals }, done });
  };
  const timer = setInterval(progress, PROGRESS_MILLISECONDS);
  member.onDrain = () => vcpu.stop();
  try {
    for (let incarnation = 1; ; incarnation += 1) {
      try {
        if (member.draining) vcpu.stop();
        vcpu.onInterrupt = shootdownHandler(vcpu, vcpus);
        await vcpu.enter();
        for (let round = 0; ; round += 1) {
          const executed = () => (before.instructions ?? 0) + vcpu.counters.instructions;
          const first = round * PAGES_PER_ROUND + number * 64;
          if (executed() < share) {
            await touchPages(vcpu, {
              memoryPages: config.memory_pages, first, count: PAGES_PER_ROUND, round, alone: false,
            });
          } else {
            if (!done) {
              done = true;
              progress();
            }
            await vcpu.halt(); // until somebody needs this processor
          }
        }
      } catch (error) {
        count();
        if (error instanceof Stopped) {
          await vcpu.detach();
          count();
          return;
        }
        if (error.code === "finished" || member.draining) return;
        if (!ATTACH_ANEW.has(error.code) || incarnation === MAX_INCARNATIONS) throw error;
        for (const [key, value] of Object.entries(vcpu.counters)) before[key] = (before[key] ?? 0) + value;
        vcpu = await Vcpu.attach(endpoint, { name, vcpu: number });
      }
    }
  } finally {
    clearInterval(timer);
  }
}
