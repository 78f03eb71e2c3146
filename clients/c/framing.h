/*
 * Two frames of bytes from a message and back (docs/PROTOCOL.md, "Framing", "Versions"). Relies on msgpack-c and on the
 * tables of messages.h; knows no sockets.
 */
#ifndef SMMU_FRAMING_H
#define SMMU_FRAMING_H

#include "messages.h"

#include <msgpack.h>

struct envelope { unsigned major, minor; uint64_t incarnation, number; };
struct frame { const void *data; size_t size; };

/* A message that is not as the page says. `code` is that of the error registry, NULL: all is well. */
struct refusal { const char *code; const char *why; };

/*
 * What two frames say. Where the numbers of the envelope can be read they are set even if the message is refused.
 * A message of another major version is refused, but an error reply "unsupported-version" is read in each.
 */
struct refusal decode(enum direction direction, const struct frame *frames, size_t count, struct envelope *envelope,
                      struct message *message);

/* The envelope frame of a message, all fields of it: to be destroyed by the caller. NULL: no memory. */
msgpack_sbuffer *encode(uint64_t incarnation, uint64_t number, const struct message *message);

extern const char version_frame[]; /* "SMMU/1.0" */

#endif
