/* A vCPU that touches pages. Alone with an MMU service, or as a worker of a run: see README.md. */
#include "guest.h"
#include "run.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zmq.h>

enum { MEMORY_PAGES = 4096 /* of a service that was started without a word about it */, MAX_INCARNATIONS = 5 };

static const char usage[] =
    "usage: touch [--pages N] [--rounds N] [--name NAME] [ADDRESS]\n"
    "       touch --coordinator ADDRESS [--name NAME]\n"
    "ADDRESS of the MMU service: else that of SHADOWMMU_MMU, else tcp://127.0.0.1:5701\n";

struct options { const char *address, *coordinator; char name[65]; uint64_t pages, rounds; };

/* The session's end, for people. */
static const char *why(const struct session *session)
{
    return session->why[0] ? session->why : session->code;
}

static void print_counters(const struct vcpu *vcpu, uint64_t faults)
{
    for (size_t i = 0; i < COUNTERS_OF_A_VCPU; i++)
        printf("%s%s %" PRIu64, i ? ", " : "", counter_names[i], vcpu->counters[i]);
    printf("\n%s in guest entry %" PRIu64 "; the guest took %" PRIu64 " page faults\n", vcpu->session.code,
           vcpu->entry, faults);
    if (vcpu->session.resumed)
        printf("resumed %" PRIu64 " times\n", vcpu->session.resumed);
}

/* No processor leaves PAE in long mode: the guest takes #GP. DONE: it did. */
static enum outcome write_what_is_refused(struct vcpu *vcpu)
{
    enum outcome outcome = vcpu_write_register(vcpu, CR4, 0);
    return outcome == GENERAL_PROTECTION ? DONE : outcome == DONE ? GENERAL_PROTECTION : outcome;
}

static const char *complaint(const struct vcpu *vcpu, enum outcome outcome, bool wrong)
{
    if (wrong)
        return "a word has another value than was stored";
    return outcome == GENERAL_PROTECTION ? "CR4 was set to 0 in long mode" : why(&vcpu->session);
}

/* Touches pages until the rounds are done; attaches anew when the service has given it up. */
static int touch(void *zmq_context, const struct options *options)
{
    static struct vcpu vcpu;
    struct touching touching = {.memory_pages = MEMORY_PAGES, .count = options->pages, .alone = true};
    int64_t number = NONE;
    for (int incarnation = 1; incarnation <= MAX_INCARNATIONS; incarnation++) {
        bool attached = vcpu_attach(&vcpu, zmq_context, options->address, options->name, number);
        enum outcome outcome = SESSION_OVER;
        if (attached) {
            number = (int64_t)vcpu.number;
            printf("attached as vCPU %" PRIu64 "\n", vcpu.number);
            fflush(stdout);
            touching.first = vcpu.number * options->pages;
            outcome = vcpu_enter(&vcpu);
        }
        if (outcome == DONE)
            outcome = write_what_is_refused(&vcpu);
        for (; outcome == DONE && touching.round < options->rounds && !touching.wrong; touching.round++)
            outcome = touch_pages(&vcpu, &touching);
        bool well = outcome == DONE && vcpu_detach(&vcpu) && !touching.wrong;
        bool again = !well && session_may_attach_anew(&vcpu.session);
        if (well)
            print_counters(&vcpu, touching.faults);
        else if (again)
            printf("the session is over: %s; attaching anew\n", why(&vcpu.session));
        else
            fprintf(stderr, "touch: %s\n", complaint(&vcpu, outcome, touching.wrong));
        fflush(stdout);
        vcpu_close(&vcpu);
        if (!again)
            return well ? 0 : 1;
    }
    return 1;
}

static bool parse_number(const char *text, uint64_t high, uint64_t *number)
{
    char *end;
    errno = 0;
    *number = strtoull(text, &end, 10);
    return !errno && *text >= '1' && *text <= '9' && !*end && *number <= high;
}

static bool parse(int argc, char **argv, struct options *options)
{
    const char *given = getenv("SHADOWMMU_MMU"), *positional = NULL;
    *options = (struct options){.pages = 32, .rounds = 8};
    snprintf(options->name, sizeof options->name, "c-%ld", (long)getpid());
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (argv[i][0] != '-') {
            if (positional)
                return false;
            positional = argv[i];
            continue;
        }
        if (!value)
            return false;
        i++;
        if (strcmp(argv[i - 1], "--coordinator") == 0)
            options->coordinator = value;
        else if (strcmp(argv[i - 1], "--name") == 0 && *value && strlen(value) < sizeof options->name)
            snprintf(options->name, sizeof options->name, "%s", value);
        else if (strcmp(argv[i - 1], "--pages") == 0 && parse_number(value, 64, &options->pages))
            continue;
        else if (strcmp(argv[i - 1], "--rounds") == 0 && parse_number(value, 1000000, &options->rounds))
            continue;
        else
            return false;
    }
    options->address = positional ? positional : given ? given : "tcp://127.0.0.1:5701";
    return true;
}

int main(int argc, char **argv)
{
    struct options options;
    if (!parse(argc, argv, &options)) {
        fputs(usage, stderr);
        return 1;
    }
    void *zmq_context = zmq_ctx_new();
    if (!zmq_context)
        return 1;
    int status = options.coordinator ? take_part(zmq_context, options.coordinator, options.name)
                                     : touch(zmq_context, &options);
    zmq_ctx_term(zmq_context);
    return status;
}
