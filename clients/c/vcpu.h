/*
 * A vCPU (docs/PROTOCOL.md, "A vCPU's life"): guest entries, exits, kicks, walks, logs, values, interrupts. Relies on
 * protocol.h for the session and on tlb.h.
 */
#ifndef SMMU_VCPU_H
#define SMMU_VCPU_H

#include "protocol.h"
#include "tlb.h"

/* How an instruction went. */
enum outcome {
    DONE,
    GUEST_FAULT,        /* the guest takes a page fault: `fault` of the vCPU */
    GENERAL_PROTECTION, /* a register write was refused */
    STOPPED,            /* `stopping` is set: nothing more is executed */
    SESSION_OVER
};

enum counter {
    INSTRUCTIONS, TLB_HITS, TLB_MISSES, LOGS, EXITS, KICKS, INTERRUPTS, WALKS_ABANDONED, COUNTERS_OF_A_VCPU
};
extern const char *const counter_names[COUNTERS_OF_A_VCPU];

struct vcpu {
    struct session session;
    uint64_t number;
    bool stopping;
    struct injected fault; /* of the last GUEST_FAULT */
    uint64_t counters[COUNTERS_OF_A_VCPU];
    /* Called with each interrupt's vector, between instructions; may execute instructions itself. */
    enum outcome (*on_interrupt)(struct vcpu *vcpu, uint64_t vector);
    void (*meanwhile)(void *context); /* called whenever messages are looked for */
    void *context;
    struct session *beside;           /* another session that is waited for, too; or NULL */

    /* For vcpu.c only. */
    bool vpid;
    uint64_t pfec_mask, pfec_match;
    struct tlb tlb;
    uint64_t entry, walk;
    bool kicked, in_handler;
    struct message log;
    double log_since;
    uint64_t credits;
    uint64_t interrupts[2 * MAX_TARGETS]; /* that are not taken yet, in order */
    size_t interrupt_count;
    bool answered;
    struct message answer;
};

/* An access of an instruction. `op` NONE: a load or store. */
struct wanted { uint64_t gva, flags, size, value; int op; uint64_t expected; };

/* Attaches as vCPU `number`, or as any if that is NONE. False: see the session's ending. To be closed either way. */
bool vcpu_attach(struct vcpu *vcpu, void *zmq_context, const char *address, const char *name, int64_t number);
enum outcome vcpu_enter(struct vcpu *vcpu);

/* Instructions. */
enum outcome vcpu_store(struct vcpu *vcpu, uint64_t gva, uint64_t value);
/* A load whose value is not used; `flags` may have ACCESS_USER or ACCESS_FETCH. */
enum outcome vcpu_touch(struct vcpu *vcpu, uint64_t gva, uint64_t flags);
enum outcome vcpu_load(struct vcpu *vcpu, uint64_t gva, uint64_t *value);
enum outcome vcpu_locked(struct vcpu *vcpu, enum locked_op op, uint64_t gva, uint64_t operand, uint64_t expected,
                         uint64_t *old);
enum outcome vcpu_invlpg(struct vcpu *vcpu, uint64_t gva);
enum outcome vcpu_write_register(struct vcpu *vcpu, enum control_register reg, uint64_t value);
enum outcome vcpu_send_ipi(struct vcpu *vcpu, uint64_t target, uint64_t vector);
enum outcome vcpu_halt(struct vcpu *vcpu); /* comes back when an interrupt was taken */

/* Leaves guest mode if need be, detaches and waits for the end. Whether that is as it should be. */
bool vcpu_detach(struct vcpu *vcpu);
void vcpu_close(struct vcpu *vcpu);

#endif
