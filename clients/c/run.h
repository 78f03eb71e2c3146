/* A vCPU worker's course in a run (docs/PROTOCOL.md, "A run"). Relies on guest.h. */
#ifndef SMMU_RUN_H
#define SMMU_RUN_H

/* Takes part in one run; says on stdout how it ended. Gives the exit status: 0 for verdict "pass", else 1. */
int take_part(void *zmq_context, const char *coordinator, const char *name);

#endif
