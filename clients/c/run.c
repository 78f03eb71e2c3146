/* See run.h. */
#include "run.h"

#include "guest.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PAGES_PER_ROUND = 16, MAX_INCARNATIONS = 10 };
static const double progress_seconds = 0.25;

/* The coordinator's side, and what this worker is in the run. */
struct member {
    struct session session;
    struct run_config config;
    char endpoint[TEXT_BYTES];
    uint64_t vcpus; /* 0: the run has not started */
    bool draining, done;
    int verdict;
    struct vcpu vcpu;
    uint64_t before[COUNTERS_OF_A_VCPU]; /* what earlier incarnations of the vCPU counted */
    double last_progress;
    char error[ITEM_BYTES];
};

static void fill_counters(const struct member *member, struct counters *counters)
{
    counters->count = COUNTERS_OF_A_VCPU;
    for (size_t i = 0; i < COUNTERS_OF_A_VCPU; i++) {
        snprintf(counters->items[i].name, sizeof counters->items[i].name, "vcpu.%s", counter_names[i]);
        counters->items[i].value = member->before[i] + member->vcpu.counters[i];
    }
}

static void send_progress(struct member *member)
{
    struct message message = {.tag = PROGRESS, .progress = {.done = member->done}};
    if (!session_may_send(&member->session, PROGRESS))
        return;
    fill_counters(member, &message.progress.counters);
    session_send(&member->session, &message);
    member->last_progress = seconds_now();
}

/* What the coordinator says, and what it wants to hear now and then. */
static void serve_member(void *context)
{
    struct member *member = context;
    struct message message;
    while (session_take(&member->session, &message)) {
        if (message.tag == START)
            member->vcpus = message.start.vcpus;
        if (message.tag == DRAIN)
            member->draining = true;
        if (message.tag == FINISHED)
            member->verdict = message.finished.verdict;
    }
    session_tick(&member->session);
    if (member->vcpus && !member->draining && seconds_now() - member->last_progress > progress_seconds)
        send_progress(member);
    if (member->draining || member->session.ending != NOT_YET)
        member->vcpu.stopping = true;
}

static bool fail(struct member *member, const char *what, const char *why)
{
    snprintf(member->error, sizeof member->error, "%s: %.200s", what, why);
    return false;
}

static bool attach(struct member *member, void *zmq_context, const char *name, int64_t number)
{
    bool attached = vcpu_attach(&member->vcpu, zmq_context, member->endpoint, name, number);
    member->vcpu.on_interrupt = serve_shootdown;
    member->vcpu.meanwhile = serve_member;
    member->vcpu.beside = &member->session;
    member->vcpu.context = member;
    return attached || fail(member, "cannot attach", member->vcpu.session.why);
}

/* Executes the share and then serves others, until the run drains or the session is over. */
static enum outcome execute(struct member *member)
{
    struct vcpu *vcpu = &member->vcpu;
    uint64_t n = vcpu->number, ops = member->config.ops;
    uint64_t share = ops / member->vcpus + (n < ops % member->vcpus);
    struct touching touching = {.memory_pages = member->config.memory_pages, .count = PAGES_PER_ROUND};
    enum outcome outcome = vcpu_enter(vcpu);
    for (; outcome == DONE; touching.round++) {
        touching.first = touching.round * PAGES_PER_ROUND + n * 64;
        if (member->before[INSTRUCTIONS] + vcpu->counters[INSTRUCTIONS] < share) {
            outcome = touch_pages(vcpu, &touching);
            continue;
        }
        if (!member->done) {
            member->done = true;
            send_progress(member);
        }
        outcome = vcpu_halt(vcpu); /* until somebody needs this processor */
    }
    return outcome;
}

static bool attach_anew(struct member *member, void *zmq_context, const char *name)
{
    int64_t number = (int64_t)member->vcpu.number;
    for (size_t i = 0; i < COUNTERS_OF_A_VCPU; i++)
        member->before[i] += member->vcpu.counters[i];
    vcpu_close(&member->vcpu);
    return attach(member, zmq_context, name, number);
}

/* From Joined to the end of the vCPU. False: `error` says what went wrong. */
static bool work(struct member *member, void *zmq_context, const char *name)
{
    if (member->config.workload == WORKLOAD_MODES || member->config.mode != MODE_PAGING64 || member->config.tdp != NONE)
        return fail(member, "cannot", "this client plays a 64-bit guest with shadow paging only");
    if (!attach(member, zmq_context, name, NONE))
        return false;
    struct vcpu *vcpu = &member->vcpu;
    session_send(&member->session, &(struct message){.tag = READY, .ready = {.vcpu = (int64_t)vcpu->number}});
    while (!member->vcpus && !vcpu->stopping && vcpu->session.ending == NOT_YET) {
        struct message message;
        sessions_wait((struct session *[]){&member->session, &vcpu->session}, 2, 100);
        while (session_take(&vcpu->session, &message))
            session_violation(&vcpu->session, "a message to a vCPU that has not entered");
        session_tick(&vcpu->session);
        serve_member(member);
    }
    beside_vcpus = member->vcpus;
    for (int incarnation = 1;; incarnation++) {
        enum outcome outcome = vcpu->stopping || !member->vcpus ? STOPPED : execute(member);
        if (outcome == STOPPED)
            return vcpu_detach(vcpu) || fail(member, "detaching", vcpu->session.why);
        if (outcome != SESSION_OVER)
            return fail(member, "the guest program", "a fault of its kernel");
        if (strcmp(vcpu->session.code, "finished") == 0 || member->draining)
            return true;
        if (!session_may_attach_anew(&vcpu->session) || incarnation == MAX_INCARNATIONS)
            return fail(member, vcpu->session.code[0] ? vcpu->session.code : "session", vcpu->session.why);
        if (!attach_anew(member, zmq_context, name))
            return false;
    }
}

static void report(struct member *member)
{
    struct message *message = calloc(1, sizeof *message);
    if (!message)
        return;
    message->tag = REPORT;
    fill_counters(member, &message->report.counters);
    struct texts *info = &message->report.info;
    info->count = member->error[0] ? 2 : 1;
    snprintf(info->items[0].name, sizeof info->items[0].name, "client");
    snprintf(info->items[0].text, sizeof info->items[0].text, "c");
    snprintf(info->items[1].name, sizeof info->items[1].name, "error");
    snprintf(info->items[1].text, sizeof info->items[1].text, "%s", member->error);
    session_send(&member->session, message);
    free(message);
}

int take_part(void *zmq_context, const char *coordinator, const char *name)
{
    struct member *member = calloc(1, sizeof *member);
    struct message hello = {.tag = JOIN, .join = {.role = ROLE_VCPU}}, welcome;
    int status = 1;
    if (!member)
        return status;
    snprintf(hello.join.name, sizeof hello.join.name, "%s", name);
    if (session_open(&member->session, WITH_COORDINATOR, zmq_context, coordinator, &hello, &welcome)) {
        member->config = welcome.joined.config;
        member->verdict = UNKNOWN;
        memcpy(member->endpoint, welcome.joined.mmu_endpoint, sizeof member->endpoint);
        bool well = work(member, zmq_context, name);
        report(member);
        while (member->session.ending == NOT_YET) {
            sessions_wait((struct session *[]){&member->session}, 1, 100);
            serve_member(member);
        }
        if (!well)
            fprintf(stderr, "touch: %s\n", member->error);
        else if (member->session.ending == FINISHED_RUN && member->verdict == PASS)
            status = 0;
        vcpu_close(&member->vcpu);
    }
    printf("%s: %s\n", member->session.ending == FINISHED_RUN ? "finished" : "the run is lost", member->session.why);
    session_close(&member->session);
    free(member);
    return status;
}
