/* What the vCPU executes (docs/PROTOCOL.md, "The guest beside it"). Relies on vcpu.h. */
#ifndef SMMU_GUEST_H
#define SMMU_GUEST_H

#include "vcpu.h"

/*
 * The program for a guest of `memory_pages`: in each round it goes to `count` data pages, from number `first` on. It
 * stores to them, loads from them, adds to them and invalidates them, and looks at pages elsewhere.
 */
struct touching {
    uint64_t memory_pages, first, count, round;
    bool alone;      /* nobody else stores there: what is loaded must be what was stored */
    uint64_t faults; /* that the guest took */
    bool wrong;      /* a value was not what was stored */
};

/* One round. GUEST_FAULT does not come out. */
enum outcome touch_pages(struct vcpu *vcpu, struct touching *touching);

/* A handler of interrupts: serves TLB shootdowns. `beside_vcpus` has to be set to the number of vCPUs of the run. */
extern uint64_t beside_vcpus;
enum outcome serve_shootdown(struct vcpu *vcpu, uint64_t vector);

#endif
