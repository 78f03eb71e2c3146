/* See protocol.h. */
#include "protocol.h"

#include "framing.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>
#include <zmq.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))
#define IN(state) (1u << (state))

static const double open_seconds[] = {[WITH_MMU] = 30, [WITH_COORDINATOR] = 120};
static const enum tag welcomes[] = {[WITH_MMU] = ATTACHED, [WITH_COORDINATOR] = JOINED};
static const enum direction inward[] = {[WITH_MMU] = FROM_MMU, [WITH_COORDINATOR] = FROM_COORDINATOR};
static const int64_t hard_limits[] = {[WITH_MMU] = 16 << 20, [WITH_COORDINATOR] = 1 << 20};
static const double silent_intervals = 5;
/* Of a session that can resume: after so many it tries another connection, and while that is not taken up. */
static const double quiet_intervals = 3, resuming_intervals = 1;
static const double patience = 60, attach_again = 5; /* seconds */
enum { KEPT = 64 };

/* --- legal order: the page's tables as a peer reads them --------------------------------------------------------- */

enum { UNCHANGED = STATES, DROPPED };

struct rule { enum tag tag; unsigned states; int then; };

#define GUEST (IN(IN_GUEST) | IN(WAITING_WALK) | IN(WAITING_VALUE))
#define VCPU_LIVES (IN(OUTSIDE) | IN(HANDLING) | GUEST | IN(LEAVING))
#define BEFORE_REPORT (IN(A_MEMBER) | IN(IS_READY) | IN(RUNNING) | IN(DRAINING))
#define MEMBER_LIVES (BEFORE_REPORT | IN(REPORTED))

static const struct rule may_send[] = {
    {ATTACH, IN(DETACHED) | IN(OVER), ATTACHING},
    {ENTER, IN(OUTSIDE), HANDLING},
    {EXIT, IN(IN_GUEST) | IN(WAITING_WALK), HANDLING},
    {LOG, IN(IN_GUEST), UNCHANGED},
    {WALK, IN(IN_GUEST), WAITING_WALK},
    {LOAD, IN(IN_GUEST), WAITING_VALUE},
    {LOCKED, IN(IN_GUEST), WAITING_VALUE},
    {DETACH, IN(OUTSIDE) | IN(HANDLING), LEAVING},
    {HEARTBEAT, VCPU_LIVES | MEMBER_LIVES, UNCHANGED},
    {JOIN, IN(DETACHED) | IN(OVER), ATTACHING},
    {READY, IN(A_MEMBER), IS_READY},
    {PROGRESS, IN(RUNNING) | IN(DRAINING), UNCHANGED},
    {REPORT, BEFORE_REPORT, REPORTED},
};

static const struct rule may_arrive[] = {
    {ERROR_REPLY, IN(ATTACHING), DETACHED},
    {ATTACHED, IN(ATTACHING), OUTSIDE},
    {ENTERED, IN(HANDLING), IN_GUEST},
    {ENTERED, IN(LEAVING), DROPPED},
    {APPLIED, VCPU_LIVES & ~IN(OUTSIDE), UNCHANGED},
    {WALKED, IN(WAITING_WALK), IN_GUEST},
    {WALKED, IN(HANDLING) | IN(IN_GUEST) | IN(WAITING_VALUE) | IN(LEAVING), DROPPED},
    {WALK_FAULT, IN(WAITING_WALK), IN_GUEST},
    {WALK_FAULT, IN(HANDLING) | IN(IN_GUEST) | IN(WAITING_VALUE) | IN(LEAVING), DROPPED},
    {LOADED, IN(WAITING_VALUE), IN_GUEST},
    {KICK, GUEST, UNCHANGED},
    {KICK, IN(HANDLING) | IN(LEAVING), DROPPED},
    {JOINED, IN(ATTACHING), A_MEMBER},
    {START, IN(IS_READY), RUNNING},
    {START, IN(REPORTED), DROPPED},
    {DRAIN, IN(A_MEMBER) | IN(IS_READY) | IN(RUNNING), DRAINING},
    {DRAIN, IN(REPORTED), DROPPED},
    {FINISHED, MEMBER_LIVES, OVER},
    {HEARTBEAT, VCPU_LIVES | MEMBER_LIVES, UNCHANGED},
    {ENDED, IN(ATTACHING) | VCPU_LIVES | MEMBER_LIVES, OVER},
};

static const struct rule *find_rule(const struct rule *rules, size_t count, enum tag tag, enum state state)
{
    for (size_t i = 0; i < count; i++)
        if (rules[i].tag == tag && rules[i].states & IN(state))
            return &rules[i];
    return NULL;
}

/* --- the end ----------------------------------------------------------------------------------------------------- */

static void end(struct session *session, enum ending ending, const char *code, const char *why)
{
    if (session->ending != NOT_YET)
        return;
    session->ending = ending;
    session->state = OVER;
    snprintf(session->code, sizeof session->code, "%s", code);
    snprintf(session->why, sizeof session->why, "%s", why);
}

void session_violation(struct session *session, const char *why) { end(session, VIOLATION, "", why); }

bool session_may_attach_anew(const struct session *session)
{
    static const char *const codes[] = {"given-up", "slow-consumer", "unreachable", "sequence-gap", "not-attached",
                                        "stale-incarnation", "not-resumable"};
    for (size_t i = 0; i < COUNT(codes); i++)
        if (strcmp(session->code, codes[i]) == 0)
            return true;
    return session->ending == SILENCE;
}

void session_close(struct session *session)
{
    if (session->socket)
        zmq_close(session->socket);
    session->socket = NULL;
    free(session->kept);
    session->kept = NULL;
}

double seconds_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* --- sending ----------------------------------------------------------------------------------------------------- */

static bool counts(enum tag tag)
{
    return tag != ATTACH && tag != ATTACHED && tag != RESUME && tag != RESUMED && tag != HEARTBEAT && tag != DETACH &&
           tag != ENDED && tag != ERROR_REPLY;
}

/* To the MMU service without waiting: where there is no connection, what counts is sent again on the next. */
static void transmit(struct session *session, uint64_t incarnation, uint64_t number, const struct message *message)
{
    int flags = session->conversation == WITH_MMU ? ZMQ_DONTWAIT : 0;
    msgpack_sbuffer *envelope = encode(incarnation, number, message);
    bool sent = envelope &&
                zmq_send(session->socket, version_frame, strlen(version_frame), ZMQ_SNDMORE | flags) >= 0 &&
                zmq_send(session->socket, envelope->data, envelope->size, flags) >= 0;
    if (!sent && !(envelope && flags && zmq_errno() == EAGAIN))
        end(session, BROKEN, "", envelope ? zmq_strerror(zmq_errno()) : "no memory");
    if (envelope)
        msgpack_sbuffer_free(envelope);
    session->last_sent = seconds_now();
}

bool session_may_send(const struct session *session, enum tag tag)
{
    return session->ending == NOT_YET && find_rule(may_send, COUNT(may_send), tag, session->state);
}

void session_send(struct session *session, const struct message *message)
{
    if (session->ending != NOT_YET)
        return;
    const struct rule *rule = find_rule(may_send, COUNT(may_send), message->tag, session->state);
    if (!rule) {
        end(session, BROKEN, "", "this client would send what is not legal");
        return;
    }
    if (rule->then != UNCHANGED)
        session->state = (enum state)rule->then;
    if (message->tag == WALK)
        session->walk = message->walk.walk;
    if (counts(message->tag) && session->kept)
        session->kept[session->sent_count++ % KEPT] = *message;
    if (!session->resuming)
        transmit(session, session->incarnation, ++session->sent, message);
}

/* --- connections ------------------------------------------------------------------------------------------------- */

/*
 * A socket of its own for each connection. With the MMU service ZeroMQ does not connect again by itself: what was lost
 * in between would be missed only when it is too late.
 */
static bool connect_to_service(struct session *session)
{
    uint64_t random;
    char id[64];
    if (getrandom(&random, sizeof random, 0) != (ssize_t)sizeof random)
        return false;
    int length = snprintf(id, sizeof id, "c-%ld-%016llx", (long)getpid(), (unsigned long long)random);
    int linger = 0; /* everything that matters is answered before the end */
    int never = -1;
    int64_t limit = hard_limits[session->conversation];
    if (session->socket)
        zmq_close(session->socket);
    session->socket = zmq_socket(session->context, ZMQ_DEALER);
    return session->socket && zmq_setsockopt(session->socket, ZMQ_ROUTING_ID, id, (size_t)length) == 0 &&
           zmq_setsockopt(session->socket, ZMQ_LINGER, &linger, sizeof linger) == 0 &&
           zmq_setsockopt(session->socket, ZMQ_MAXMSGSIZE, &limit, sizeof limit) == 0 &&
           (session->conversation != WITH_MMU ||
            zmq_setsockopt(session->socket, ZMQ_RECONNECT_IVL, &never, sizeof never) == 0) &&
           zmq_connect(session->socket, session->address) == 0;
}

static bool can_resume(const struct session *session) { return session->token.count && session->kept; }

/* The connection is lost, or something on it: goes on over another one. */
static void resume(struct session *session)
{
    struct message message = {.tag = RESUME, .resume = {.token = session->token, .received = session->taken_count}};
    session->resuming = true;
    session->silent = 0;
    if (connect_to_service(session))
        transmit(session, session->incarnation, 0, &message);
    else
        end(session, BROKEN, "", zmq_strerror(zmq_errno()));
}

/* The service has taken up the new connection: sends again what it lacks. */
static void go_on(struct session *session, uint64_t received)
{
    uint64_t lacking = session->sent_count - received;
    if (lacking > KEPT || received > session->sent_count) {
        end(session, REFUSED, "not-resumable", "the service lacks what is not kept, or counts wrongly");
        return;
    }
    session->resuming = false;
    session->resumed++;
    session->received = 1;
    session->sent = 0;
    for (uint64_t i = session->sent_count - lacking; i < session->sent_count; i++)
        transmit(session, session->incarnation, ++session->sent, &session->kept[i % KEPT]);
    if (session->state == LEAVING)
        transmit(session, session->incarnation, ++session->sent, &(struct message){.tag = DETACH});
}

/* --- receiving --------------------------------------------------------------------------------------------------- */

/* Error replies during a session: the message was refused, or there is no session any more. */
static void refused(struct session *session, uint64_t number, const struct error_reply *reply)
{
    static const char *const our_fault[] = {
        "malformed", "too-large", "bad-part-count", "unsupported-version", "unexpected-message", "stale-entry",
        "unknown-entry", "unknown-request", "credit-exceeded", "unknown-frame", "bad-argument", "not-attached",
        "stale-incarnation",
    };
    if (number != 0) {
        session_violation(session, "an error reply with a number");
        return;
    }
    if (strcmp(reply->code, "already-attached") == 0)
        return; /* the Attach came twice */
    bool no_session = strcmp(reply->code, "not-attached") == 0 || strcmp(reply->code, "stale-incarnation") == 0;
    if (no_session && can_resume(session)) {
        resume(session); /* the service was restarted */
        return;
    }
    for (size_t i = 0; i < COUNT(our_fault); i++)
        if (strcmp(reply->code, our_fault[i]) == 0)
            end(session, REFUSED, reply->code, reply->text);
    /* sequence-gap is followed by Ended; what is unknown may or may not have happened, and ends nothing. */
    if (session->ending == NOT_YET)
        fprintf(stderr, "error reply %s: %s\n", reply->code, reply->text);
}

static bool check_welcome(struct session *session, const struct envelope *envelope, const struct message *message)
{
    bool attached = message->tag == ATTACHED;
    uint64_t incarnation = attached ? message->attached.incarnation : message->joined.member;
    if (message->tag != welcomes[session->conversation] || envelope->number != 1 || incarnation == 0 ||
        envelope->incarnation != incarnation) {
        session_violation(session, "the envelope of the welcome");
        return false;
    }
    session->incarnation = incarnation;
    session->received = 1;
    session->heard_at = seconds_now();
    if (attached)
        session->token = message->attached.token;
    session->heartbeat = attached ? message->attached.heartbeat : message->joined.heartbeat;
    return true;
}

static bool is_late(const struct session *session, const struct message *message)
{
    return (message->tag == WALKED && message->walked.walk < session->walk) ||
           (message->tag == WALK_FAULT && message->walk_fault.walk < session->walk);
}

/* On a connection that is not taken up yet only the answer to Resume means anything. */
static void answered_resume(struct session *session, const struct envelope *envelope, const struct message *message)
{
    if (message->tag == ERROR_REPLY && envelope->number == 0) {
        if (strcmp(message->error.code, "already-attached") == 0)
            return;
        if (session->state == LEAVING && strcmp(message->error.code, "stale-incarnation") == 0)
            end(session, ENDED_BY_SERVICE, "detached", ""); /* only Ended was lost */
        else
            end(session, REFUSED, message->error.code, message->error.text);
    } else if (envelope->incarnation != session->incarnation) {
        return;
    } else if (message->tag == ENDED) {
        end(session, ENDED_BY_SERVICE, message->ended.code, message->ended.text);
    } else if (message->tag == RESUMED && envelope->number == 1) {
        session->heard_at = seconds_now();
        session->silent = 0;
        go_on(session, message->resumed.received);
    }
}

/* Whether the message is one for the caller. */
static bool arrived(struct session *session, const struct envelope *envelope, const struct message *message)
{
    bool attaching = session->state == ATTACHING;
    if (session->resuming) {
        answered_resume(session, envelope, message);
        return false;
    }
    session->silent = 0;
    session->heard_at = seconds_now();
    if (message->tag == ERROR_REPLY && !attaching) {
        if (envelope->incarnation == session->incarnation || envelope->incarnation == 0)
            refused(session, envelope->number, &message->error);
        return false;
    }
    if (envelope->incarnation < session->incarnation)
        return false;
    if (!attaching) {
        bool ours = envelope->incarnation == session->incarnation && envelope->number > 0;
        if (ours && envelope->number <= session->received)
            return false; /* a repetition */
        if (ours && envelope->number > session->received + 1 && can_resume(session)) {
            resume(session); /* something was lost on the way */
            return false;
        }
        if (envelope->incarnation != session->incarnation || envelope->number != session->received + 1) {
            session_violation(session, "a number of an envelope is not the next one");
            return false;
        }
        session->received++;
        session->taken_count += counts(message->tag);
        if (is_late(session, message))
            return false;
    }
    const struct rule *rule = find_rule(may_arrive, COUNT(may_arrive), message->tag, session->state);
    if (!rule) {
        session_violation(session, "a message that is not legal in this state");
        return false;
    }
    if (rule->then == DROPPED || message->tag == HEARTBEAT)
        return false;
    if (message->tag == ENDED)
        end(session, ENDED_BY_SERVICE, message->ended.code, message->ended.text);
    else if (message->tag == ERROR_REPLY)
        end(session, REFUSED, message->error.code, message->error.text);
    else if (message->tag == FINISHED)
        end(session, FINISHED_RUN, "", message->finished.text);
    else if (rule->then != UNCHANGED)
        session->state = (enum state)rule->then;
    if (message->tag == ENDED || message->tag == ERROR_REPLY)
        return false;
    return !attaching || check_welcome(session, envelope, message);
}

bool session_take(struct session *session, struct message *message)
{
    while (session->ending == NOT_YET) {
        zmq_msg_t parts[2];
        struct frame frames[2];
        size_t count = 0;
        int more = 1;
        while (more) {
            zmq_msg_t part;
            zmq_msg_init(&part);
            if (zmq_msg_recv(&part, session->socket, ZMQ_DONTWAIT) < 0) {
                zmq_msg_close(&part); /* the parts of a message arrive together: this can only be the first */
                if (errno != EAGAIN && errno != EINTR)
                    end(session, BROKEN, "", zmq_strerror(errno));
                return false;
            }
            more = zmq_msg_more(&part);
            if (count < COUNT(parts)) {
                zmq_msg_init(&parts[count]);
                zmq_msg_move(&parts[count], &part);
                frames[count] = (struct frame){zmq_msg_data(&parts[count]), zmq_msg_size(&parts[count])};
            }
            count++;
            zmq_msg_close(&part);
        }
        struct envelope envelope;
        struct refusal refusal = decode(inward[session->conversation], frames, count, &envelope, message);
        for (size_t i = 0; i < COUNT(parts) && i < count; i++)
            zmq_msg_close(&parts[i]);
        if (refusal.code) {
            session_violation(session, refusal.why);
            return false;
        }
        if (arrived(session, &envelope, message))
            return true;
    }
    return false;
}

/* --- signs of life ----------------------------------------------------------------------------------------------- */

/*
 * Heartbeats go out at half the interval. Silence counts only while this process was awake: between two calls no more
 * than one interval, and what lies in the socket is read before the next.
 */
void session_tick(struct session *session)
{
    if (session->ending != NOT_YET || session->heartbeat == 0)
        return;
    double now = seconds_now(), passed = now - session->last_tick;
    session->last_tick = now;
    session->silent += passed < session->heartbeat ? passed : session->heartbeat;
    double quiet = session->resuming ? resuming_intervals : quiet_intervals;
    if (can_resume(session) && now - session->heard_at < patience) {
        if (session->silent > quiet * session->heartbeat)
            resume(session);
    } else if (session->silent > (silent_intervals + 1) * session->heartbeat)
        end(session, SILENCE, "", "nothing was heard of the service for too long");
    static const struct message heartbeat = {.tag = HEARTBEAT};
    if (now - session->last_sent >= session->heartbeat / 2 && session_may_send(session, HEARTBEAT))
        session_send(session, &heartbeat);
}

void sessions_wait(struct session *const sessions[], size_t count, int milliseconds)
{
    zmq_pollitem_t items[2];
    int used = 0;
    for (size_t i = 0; i < count && i < COUNT(items); i++) {
        if (!sessions[i]->socket || sessions[i]->ending != NOT_YET)
            continue;
        items[used++] = (zmq_pollitem_t){.socket = sessions[i]->socket, .events = ZMQ_POLLIN};
        if (sessions[i]->heartbeat > 0 && sessions[i]->heartbeat * 250 < milliseconds)
            milliseconds = (int)(sessions[i]->heartbeat * 250) + 1;
    }
    zmq_poll(items, used, milliseconds);
}

/* --- opening ----------------------------------------------------------------------------------------------------- */

bool session_open(struct session *session, enum conversation conversation, void *context, const char *address,
                  const struct message *hello, struct message *welcome)
{
    *session = (struct session){.conversation = conversation, .state = ATTACHING, .context = context};
    snprintf(session->address, sizeof session->address, "%s", address);
    if (conversation == WITH_MMU)
        session->kept = calloc(KEPT, sizeof *session->kept);
    if ((conversation == WITH_MMU && !session->kept) || !connect_to_service(session)) {
        end(session, BROKEN, "", zmq_strerror(zmq_errno()));
        return false;
    }
    transmit(session, 0, 0, hello);
    double deadline = seconds_now() + open_seconds[conversation];
    while (session->ending == NOT_YET) {
        if (session_take(session, welcome)) {
            session->last_tick = seconds_now();
            return true;
        }
        if (seconds_now() > deadline)
            end(session, SILENCE, "", "no answer");
        else if (conversation == WITH_MMU && seconds_now() - session->last_sent > attach_again &&
                 connect_to_service(session))
            transmit(session, 0, 0, hello);
        sessions_wait((struct session *[]){session}, 1, 100);
    }
    return false;
}
