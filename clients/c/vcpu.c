/* See vcpu.h. */
#include "vcpu.h"

#include <stdio.h>
#include <string.h>

static const double log_seconds = 0.005;
static const uint64_t log_credits = 4;
static const int wait_milliseconds = 100;

const char *const counter_names[COUNTERS_OF_A_VCPU] = {
    "instructions", "tlb_hits", "tlb_misses", "logs", "exits", "kicks", "interrupts", "walks_abandoned"};

/* --- what arrives ------------------------------------------------------------------------------------------------ */

/* What Entered says takes effect as it arrives: a kick may be right behind it. */
static void entered_guest(struct vcpu *vcpu, const struct entered *entered)
{
    if (entered->entry != vcpu->entry + 1) {
        session_violation(&vcpu->session, "Entered has another entry than the next one");
        return;
    }
    vcpu->entry = entered->entry;
    if (!tlb_use(&vcpu->tlb, entered->processor)) {
        session_violation(&vcpu->session, "no memory for another TLB");
        return;
    }
    if (entered->flush || !vcpu->vpid)
        tlb_empty(&vcpu->tlb);
    if (entered->inject.there)
        tlb_drop(&vcpu->tlb, entered->inject.cr2);
    for (size_t i = 0; i < entered->interrupts.count; i++) {
        if (vcpu->interrupt_count == sizeof vcpu->interrupts / sizeof vcpu->interrupts[0]) {
            session_violation(&vcpu->session, "more interrupts than this client can keep");
            return;
        }
        vcpu->interrupts[vcpu->interrupt_count++] = entered->interrupts.items[i];
    }
}

static void take(struct vcpu *vcpu, const struct message *message)
{
    uint64_t entry = vcpu->entry;
    switch (message->tag) {
    case KICK:
        if (message->kick.entry > vcpu->entry)
            session_violation(&vcpu->session, "a kick of an entry that has not begun");
        if (message->kick.entry != vcpu->entry)
            return;
        vcpu->kicked = true;
        vcpu->counters[KICKS]++;
        return;
    case APPLIED:
        vcpu->credits += message->applied.logs;
        if (vcpu->credits > log_credits)
            session_violation(&vcpu->session, "more credits are given back than were taken");
        return;
    case ENTERED:
        entered_guest(vcpu, &message->entered);
        entry = vcpu->entry;
        break;
    case WALKED:
        entry = message->walked.walk == vcpu->walk ? message->walked.entry : 0;
        break;
    case WALK_FAULT:
        entry = message->walk_fault.walk == vcpu->walk ? message->walk_fault.entry : 0;
        break;
    case LOADED:
        entry = message->loaded.entry;
        break;
    default:
        return;
    }
    if (entry != vcpu->entry)
        session_violation(&vcpu->session, "an answer to another entry or walk");
    vcpu->answer = *message;
    vcpu->answered = true;
}

static void pump(struct vcpu *vcpu)
{
    struct message message;
    while (session_take(&vcpu->session, &message))
        take(vcpu, &message);
    session_tick(&vcpu->session);
    if (vcpu->meanwhile)
        vcpu->meanwhile(vcpu->context);
}

static void pump_or_wait(struct vcpu *vcpu)
{
    struct session *sessions[2] = {&vcpu->session, vcpu->beside};
    sessions_wait(sessions, vcpu->beside ? 2 : 1, wait_milliseconds);
    pump(vcpu);
}

static bool over(const struct vcpu *vcpu) { return vcpu->session.ending != NOT_YET; }

/* --- the way out and in ------------------------------------------------------------------------------------------ */

static enum outcome ship(struct vcpu *vcpu)
{
    if (vcpu->log.log.accesses.count == 0)
        return DONE;
    while (vcpu->credits == 0 && !over(vcpu))
        pump_or_wait(vcpu);
    if (over(vcpu))
        return SESSION_OVER;
    vcpu->credits--;
    vcpu->counters[LOGS]++;
    vcpu->log.log.entry = vcpu->entry;
    session_send(&vcpu->session, &vcpu->log);
    vcpu->log.log.accesses.count = 0;
    return DONE;
}

static enum outcome await_entered(struct vcpu *vcpu)
{
    vcpu->answered = false;
    while (!vcpu->answered) {
        if (over(vcpu))
            return SESSION_OVER;
        if (vcpu->stopping)
            return STOPPED;
        pump_or_wait(vcpu);
    }
    return over(vcpu) ? SESSION_OVER : DONE;
}

static enum outcome leave_guest(struct vcpu *vcpu, const struct reason *reason)
{
    if (ship(vcpu) != DONE)
        return SESSION_OVER;
    vcpu->counters[EXITS]++;
    if (!vcpu->vpid)
        tlb_empty(&vcpu->tlb);
    struct message message = {.tag = EXIT, .exit = {.entry = vcpu->entry, .reason = *reason}};
    session_send(&vcpu->session, &message);
    vcpu->kicked = false;
    return over(vcpu) ? SESSION_OVER : DONE;
}

/* Leaves guest mode and comes back; `answer` is Entered then. */
static enum outcome exit_and_enter(struct vcpu *vcpu, const struct reason *reason)
{
    enum outcome outcome = leave_guest(vcpu, reason);
    return outcome == DONE ? await_entered(vcpu) : outcome;
}

/* Between two instructions: kicks are answered, interrupts taken, an old log is shipped. */
static enum outcome boundary(struct vcpu *vcpu)
{
    static const struct reason external_interrupt = {.tag = EXIT_EXTERNAL_INTERRUPT};
    enum outcome outcome = DONE;
    pump(vcpu);
    if (over(vcpu))
        return SESSION_OVER;
    if (vcpu->stopping)
        return STOPPED;
    if (vcpu->log.log.accesses.count && seconds_now() - vcpu->log_since > log_seconds)
        outcome = ship(vcpu);
    while (outcome == DONE && vcpu->kicked)
        outcome = exit_and_enter(vcpu, &external_interrupt);
    while (outcome == DONE && vcpu->interrupt_count && !vcpu->in_handler) {
        uint64_t vector = vcpu->interrupts[0];
        memmove(vcpu->interrupts, vcpu->interrupts + 1, --vcpu->interrupt_count * sizeof vcpu->interrupts[0]);
        vcpu->counters[INTERRUPTS]++;
        if (vcpu->on_interrupt) {
            vcpu->in_handler = true;
            outcome = vcpu->on_interrupt(vcpu, vector);
            vcpu->in_handler = false;
        }
    }
    return outcome;
}

/* --- accesses ---------------------------------------------------------------------------------------------------- */

/* `answer` is Walked or WalkFault, or nothing if a kick came first: then the walk will be abandoned. */
static enum outcome walk(struct vcpu *vcpu, const struct wanted *wanted)
{
    if (ship(vcpu) != DONE)
        return SESSION_OVER;
    vcpu->answered = false;
    struct message message = {
        .tag = WALK, .walk = {vcpu->entry, ++vcpu->walk, wanted->gva, wanted->flags}};
    session_send(&vcpu->session, &message);
    while (!vcpu->answered && !vcpu->kicked) {
        if (over(vcpu))
            return SESSION_OVER;
        if (vcpu->stopping)
            return STOPPED;
        pump_or_wait(vcpu);
    }
    return over(vcpu) ? SESSION_OVER : DONE;
}

/* Exits with a fault. `completed`: the instruction is done, and `value` is what it loaded. */
static enum outcome fault(struct vcpu *vcpu, const struct wanted *wanted, bool *completed, uint64_t *value)
{
    struct walk_fault walk_fault = vcpu->answer.walk_fault;
    tlb_drop(&vcpu->tlb, wanted->gva);
    if (!walk_fault.misconfig && (walk_fault.error_code & vcpu->pfec_mask) != vcpu->pfec_match) {
        vcpu->fault = (struct injected){true, walk_fault.error_code, wanted->gva};
        return GUEST_FAULT;
    }
    struct reason reason = {
        .tag = walk_fault.misconfig ? EXIT_EPT_MISCONFIG : EXIT_PAGE_FAULT,
        .gva = wanted->gva,
        .error_code = walk_fault.error_code,
        .instruction = {wanted->flags, wanted->size, wanted->value, wanted->op, wanted->expected},
    };
    enum outcome outcome = exit_and_enter(vcpu, &reason);
    if (outcome != DONE)
        return outcome;
    const struct entered *entered = &vcpu->answer.entered;
    vcpu->fault = entered->inject;
    *completed = entered->completed.there;
    *value = entered->completed.value;
    return entered->inject.there ? GUEST_FAULT : DONE;
}

static enum outcome use_value(struct vcpu *vcpu, const struct access *access, const struct wanted *wanted,
                              uint64_t *value)
{
    if (ship(vcpu) != DONE)
        return SESSION_OVER;
    vcpu->answered = false;
    struct message message = {.tag = LOAD, .load = {vcpu->entry, *access}};
    if (wanted->op != NONE)
        message = (struct message){.tag = LOCKED, .locked = {vcpu->entry, *access, wanted->op, wanted->expected}};
    session_send(&vcpu->session, &message);
    while (!vcpu->answered && !over(vcpu))
        pump_or_wait(vcpu);
    if (over(vcpu))
        return SESSION_OVER;
    *value = vcpu->answer.loaded.value;
    return DONE;
}

static enum outcome log_access(struct vcpu *vcpu, const struct access *access)
{
    struct accesses *log = &vcpu->log.log.accesses;
    if (log->count == 0)
        vcpu->log_since = seconds_now();
    log->items[log->count++] = *access;
    return log->count == LOG_ACCESSES ? ship(vcpu) : DONE;
}

/* One access: by the TLB, else by a walk, else by whatever the fault leads to. */
static enum outcome perform(struct vcpu *vcpu, const struct wanted *wanted, uint64_t *value)
{
    for (;;) {
        enum outcome outcome = boundary(vcpu);
        if (outcome != DONE)
            return outcome;
        const struct translation *translation = tlb_find(&vcpu->tlb, wanted->gva, wanted->flags);
        vcpu->counters[translation ? TLB_HITS : TLB_MISSES]++;
        if (!translation) {
            outcome = walk(vcpu, wanted);
            if (outcome != DONE)
                return outcome;
            if (!vcpu->answered) {
                vcpu->counters[WALKS_ABANDONED]++;
                continue; /* the boundary exits, and the access starts again */
            }
            if (vcpu->answer.tag == WALK_FAULT) {
                bool completed = false;
                outcome = fault(vcpu, wanted, &completed, value);
                if (outcome != DONE)
                    return outcome;
                if (!completed)
                    continue;
                vcpu->counters[INSTRUCTIONS]++;
                return DONE;
            }
            translation = tlb_insert(&vcpu->tlb, wanted->gva, &vcpu->answer.walked);
        }
        vcpu->counters[INSTRUCTIONS]++;
        struct access access = {wanted->flags | translation->flags, wanted->gva,
                                translation_frame(translation, wanted->gva), wanted->size, wanted->value};
        return wanted->flags & ACCESS_USED ? use_value(vcpu, &access, wanted, value) : log_access(vcpu, &access);
    }
}

enum outcome vcpu_store(struct vcpu *vcpu, uint64_t gva, uint64_t value)
{
    uint64_t unused;
    return perform(vcpu, &(struct wanted){gva, ACCESS_WRITE, 8, value, NONE, 0}, &unused);
}

enum outcome vcpu_touch(struct vcpu *vcpu, uint64_t gva, uint64_t flags)
{
    uint64_t unused;
    return perform(vcpu, &(struct wanted){gva, flags, 4, 0, NONE, 0}, &unused);
}

enum outcome vcpu_load(struct vcpu *vcpu, uint64_t gva, uint64_t *value)
{
    return perform(vcpu, &(struct wanted){gva, ACCESS_USED, 8, 0, NONE, 0}, value);
}

enum outcome vcpu_locked(struct vcpu *vcpu, enum locked_op op, uint64_t gva, uint64_t operand, uint64_t expected,
                         uint64_t *old)
{
    uint64_t flags = ACCESS_WRITE | ACCESS_USED | ACCESS_LOCKED;
    return perform(vcpu, &(struct wanted){gva, flags, 8, operand, (int)op, expected}, old);
}

/* --- instructions that exit -------------------------------------------------------------------------------------- */

static enum outcome exiting_instruction(struct vcpu *vcpu, const struct reason *reason)
{
    enum outcome outcome = boundary(vcpu);
    if (outcome != DONE)
        return outcome;
    if (reason->tag == EXIT_INVLPG)
        tlb_drop(&vcpu->tlb, reason->gva);
    outcome = exit_and_enter(vcpu, reason);
    if (outcome == DONE)
        vcpu->counters[INSTRUCTIONS]++;
    return outcome;
}

enum outcome vcpu_invlpg(struct vcpu *vcpu, uint64_t gva)
{
    return exiting_instruction(vcpu, &(struct reason){.tag = EXIT_INVLPG, .gva = gva});
}

enum outcome vcpu_write_register(struct vcpu *vcpu, enum control_register reg, uint64_t value)
{
    struct reason reason = {.tag = EXIT_REGISTER_WRITE, .reg = (int)reg, .value = value};
    enum outcome outcome = exiting_instruction(vcpu, &reason);
    return outcome == DONE && vcpu->answer.entered.general_protection ? GENERAL_PROTECTION : outcome;
}

enum outcome vcpu_send_ipi(struct vcpu *vcpu, uint64_t target, uint64_t vector)
{
    struct reason reason = {.tag = EXIT_SEND_IPI, .targets = {1, {target}}, .vector = vector};
    return exiting_instruction(vcpu, &reason);
}

enum outcome vcpu_halt(struct vcpu *vcpu)
{
    enum outcome outcome = exiting_instruction(vcpu, &(struct reason){.tag = EXIT_HALT});
    return outcome == DONE ? boundary(vcpu) : outcome;
}

/* --- attaching and leaving --------------------------------------------------------------------------------------- */

bool vcpu_attach(struct vcpu *vcpu, void *zmq_context, const char *address, const char *name, int64_t number)
{
    memset(vcpu, 0, sizeof *vcpu);
    vcpu->log.tag = LOG;
    vcpu->credits = log_credits;
    struct message hello = {
        .tag = ATTACH,
        .attach = {.role = ROLE_VCPU, .vcpu = number, .resumable = true, .heartbeat = NONE},
    };
    struct message welcome;
    snprintf(hello.attach.name, sizeof hello.attach.name, "%s", name);
    if (!session_open(&vcpu->session, WITH_MMU, zmq_context, address, &hello, &welcome))
        return false;
    vcpu->number = (uint64_t)welcome.attached.vcpu;
    vcpu->vpid = welcome.attached.vpid;
    vcpu->pfec_mask = welcome.attached.pfec_mask;
    vcpu->pfec_match = welcome.attached.pfec_match;
    if (welcome.attached.vcpu == NONE || !tlb_use(&vcpu->tlb, 0)) {
        session_violation(&vcpu->session, "no number of a vCPU in Attached, or no memory for a TLB");
        return false;
    }
    return true;
}

enum outcome vcpu_enter(struct vcpu *vcpu)
{
    session_send(&vcpu->session, &(struct message){.tag = ENTER});
    return await_entered(vcpu);
}

bool vcpu_detach(struct vcpu *vcpu)
{
    static const struct reason external_interrupt = {.tag = EXIT_EXTERNAL_INTERRUPT};
    vcpu->stopping = false; /* from here on every answer is waited for */
    if (session_may_send(&vcpu->session, EXIT) && leave_guest(vcpu, &external_interrupt) != DONE)
        return false;
    session_send(&vcpu->session, &(struct message){.tag = DETACH});
    while (!over(vcpu))
        pump_or_wait(vcpu);
    return vcpu->session.ending == ENDED_BY_SERVICE &&
           (strcmp(vcpu->session.code, "detached") == 0 || strcmp(vcpu->session.code, "finished") == 0);
}

void vcpu_close(struct vcpu *vcpu)
{
    session_close(&vcpu->session);
    tlb_free(&vcpu->tlb);
}
