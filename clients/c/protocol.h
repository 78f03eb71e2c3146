/*
 * A session with a service (docs/PROTOCOL.md, "Sessions"): opening, incarnations, numbers, heartbeats, legal order,
 * ending; with the MMU service over one ZeroMQ DEALER socket after another, if a connection is lost. Relies on libzmq,
 * and on framing.h for bytes.
 */
#ifndef SMMU_PROTOCOL_H
#define SMMU_PROTOCOL_H

#include "messages.h"

enum state {
    DETACHED, ATTACHING, OVER,
    OUTSIDE, HANDLING, IN_GUEST, WAITING_WALK, WAITING_VALUE, LEAVING,   /* a vCPU */
    A_MEMBER, IS_READY, RUNNING, DRAINING, REPORTED,                       /* a worker of a run */
    STATES
};

enum conversation { WITH_MMU, WITH_COORDINATOR };

/* Why a session is over. */
enum ending { NOT_YET, ENDED_BY_SERVICE, FINISHED_RUN, REFUSED, VIOLATION, SILENCE, BROKEN };

struct session {
    enum conversation conversation;
    void *context, *socket;
    char address[TEXT_BYTES];
    enum state state;
    uint64_t incarnation, sent, received;
    double heartbeat, last_sent, last_tick, silent; /* seconds */
    uint64_t walk; /* number of the last walk: answers to earlier ones are late */
    /* With a token the session goes on over another connection. */
    struct bytes token;
    bool resuming;
    uint64_t sent_count, taken_count; /* of the messages that count */
    struct message *kept;             /* the last of those that were sent, a ring of KEPT */
    double heard_at;
    uint64_t resumed; /* how often it went on */
    enum ending ending;
    char code[NAME_BYTES]; /* of the error registry, or "" */
    char why[TEXT_BYTES];
};

/* Seconds of a clock that is never set. */
double seconds_now(void);

/*
 * Connects to `address` and sends `hello` (Attach or Join). True: `welcome` is Attached or Joined. False: the session
 * is over, see `ending`. To be closed in either case.
 */
bool session_open(struct session *session, enum conversation conversation, void *context, const char *address,
                  const struct message *hello, struct message *welcome);

/* Sends a numbered message. What is not legal in this state ends the session as BROKEN: a mistake of the caller. */
void session_send(struct session *session, const struct message *message);

/* Whether this message may be sent now. */
bool session_may_send(const struct session *session, enum tag tag);

/* The next message that is no heartbeat and not dropped, if it is there. False: none, or the session is over. */
bool session_take(struct session *session, struct message *message);

/* Sends a heartbeat if it is time, and gives the service up if it has been silent for too long. */
void session_tick(struct session *session);

/* Waits until one of these has something to read, or for some milliseconds, at most until a heartbeat is due. */
void sessions_wait(struct session *const sessions[], size_t count, int milliseconds);

/* Ends the session from this side, as a violation of the service. */
void session_violation(struct session *session, const char *why);

/* Whether a vCPU attaches anew after this end. */
bool session_may_attach_anew(const struct session *session);

void session_close(struct session *session);

#endif
