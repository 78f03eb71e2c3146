// Legal order: docs/PROTOCOL.md, the tables "A vCPU and the MMU service" and "A worker of a run and the coordinator",
// as a peer reads them. For each message: the states in which it may be sent (taken), and the state then.

export const UNCHANGED = Symbol("unchanged");
/** Taken, and its number counts, but nothing is done. */
export const DROPPED = Symbol("dropped");

const all = (states, then) => Object.fromEntries(states.map((state) => [state, then]));

const guest = ["in-guest", "waiting-walk", "waiting-value"];
const vcpuStates = ["outside", "handling", ...guest, "leaving"];

export const VCPU = {
  send: {
    attach: all(["detached", "ended"], "attaching"),
    enter: { outside: "handling" },
    exit: all(["in-guest", "waiting-walk"], "handling"),
    log: { "in-guest": UNCHANGED },
    walk: { "in-guest": "waiting-walk" },
    load: { "in-guest": "waiting-value" },
    locked: { "in-guest": "waiting-value" },
    detach: all(["outside", "handling"], "leaving"),
    heartbeat: all(vcpuStates, UNCHANGED),
  },
  receive: {
    error: { attaching: "detached" },
    attached: { attaching: "outside" },
    entered: { handling: "in-guest", leaving: DROPPED },
    applied: all(["handling", ...guest, "leaving"], UNCHANGED),
    walked: { "waiting-walk": "in-guest", ...all(["handling", "in-guest", "waiting-value", "leaving"], DROPPED) },
    walk_fault: { "waiting-walk": "in-guest", ...all(["handling", "in-guest", "waiting-value", "leaving"], DROPPED) },
    loaded: { "waiting-value": "in-guest" },
    kick: { ...all(guest, UNCHANGED), ...all(["handling", "leaving"], DROPPED) },
    heartbeat: all(vcpuStates, UNCHANGED),
    ended: all(["attaching", ...vcpuStates], "ended"),
  },
};

const members = ["joined", "ready", "running", "draining", "reported"];

export const WORKER = {
  send: {
    join: all(["detached", "ended"], "attaching"),
    ready: { joined: "ready" },
    progress: all(["running", "draining"], UNCHANGED),
    report: all(["joined", "ready", "running", "draining"], "reported"),
    heartbeat: all(members, UNCHANGED),
  },
  receive: {
    error: { attaching: "detached" },
    joined: { attaching: "joined" },
    start: { ready: "running", reported: DROPPED },
    drain: { ...all(["joined", "ready", "running"], "draining"), reported: DROPPED },
    finished: all(members, "ended"),
    heartbeat: all(members, UNCHANGED),
    ended: all(["attaching", ...members], "ended"),
  },
};
