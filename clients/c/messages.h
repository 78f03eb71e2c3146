/*
 * Messages: what a vCPU worker sends and receives, as structs, and tables that say how these look on the wire
 * (docs/PROTOCOL.md, "Types", "Messages"). Relies on nothing.
 *
 * Every integer is a uint64_t. What may be null has NONE for it.
 */
#ifndef SMMU_MESSAGES_H
#define SMMU_MESSAGES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NONE (-1)

enum {
    LOG_ACCESSES = 64,
    MAX_TARGETS = 256,
    MAX_ITEMS = 16, /* of the maps that this client sends */
    ITEM_BYTES = 512,
    NAME_BYTES = 64 * 4 + 1,
    TEXT_BYTES = 1024 * 4 + 1,
    PROFILE_BYTES = 4096 * 4 + 1,
    TOKEN_BYTES = 64, /* of a program's state, which this client does not send, no more either */
};

enum direction { TO_MMU, FROM_MMU, TO_COORDINATOR, FROM_COORDINATOR, DIRECTIONS };

enum tag {
    ATTACH, RESUME, ENTER, LOG, WALK, LOAD, LOCKED, EXIT, DETACH,
    ATTACHED, RESUMED, ENTERED, WALKED, WALK_FAULT, LOADED, APPLIED, KICK,
    JOIN, READY, PROGRESS, REPORT,
    JOINED, START, DRAIN, FINISHED,
    HEARTBEAT, ERROR_REPLY, ENDED,
    TAGS
};

enum access_flag {
    ACCESS_WRITE = 0x1, ACCESS_FETCH = 0x2, ACCESS_USER = 0x4, ACCESS_USED = 0x8, ACCESS_LOCKED = 0x10,
    MAY_WRITE = 0x100, MAY_USER = 0x200, MAY_FETCH = 0x400, DIRTY = 0x800, LARGE = 0x1000, SMEP = 0x2000,
};

enum role { ROLE_MMU, ROLE_VCPU, ROLE_HOST, ROLE_PROBE };
enum locked_op { OP_CMPXCHG, OP_XCHG, OP_XADD };
enum control_register { CR0, CR3, CR4, EFER };
enum verdict { PASS, VIOLATED, UNKNOWN };
enum { WORKLOAD_MIXED = 7, WORKLOAD_MODES = 8, MODE_PAGING64 = 0 };
enum reason_tag {
    EXIT_PAGE_FAULT, EXIT_EPT_MISCONFIG, EXIT_INVLPG, EXIT_REGISTER_WRITE, EXIT_SEND_IPI, EXIT_HALT,
    EXIT_EXTERNAL_INTERRUPT, REASONS
};

struct access { uint64_t flags, gva, pfn, size, value; };
struct accesses { size_t count; struct access items[LOG_ACCESSES]; };
struct octets { size_t count; uint64_t items[MAX_TARGETS]; };
struct counters { size_t count; struct { char name[NAME_BYTES]; uint64_t value; } items[MAX_ITEMS]; };
struct texts { size_t count; struct { char name[NAME_BYTES]; char text[ITEM_BYTES]; } items[MAX_ITEMS]; };

struct instruction { uint64_t flags, size, value; int op; uint64_t expected; };
struct reason {
    enum reason_tag tag;
    uint64_t gva; /* EptMisconfigExit: gpa */
    uint64_t error_code;
    struct instruction instruction;
    int reg;
    uint64_t value;
    struct octets targets;
    uint64_t vector;
};

struct bytes { bool there; size_t count; unsigned char items[TOKEN_BYTES]; };

/* `heartbeat`: NONE for null. */
struct attach { int role; char name[NAME_BYTES]; int64_t vcpu; bool resumable; struct bytes token; double heartbeat; };
struct resume { struct bytes token; uint64_t received; };
struct log { uint64_t entry; struct accesses accesses; };
struct walk { uint64_t entry, walk, gva, flags; };
struct load { uint64_t entry; struct access access; struct bytes state; };
struct locked { uint64_t entry; struct access access; int op; uint64_t expected; struct bytes state; };
struct exit { uint64_t entry; struct reason reason; struct bytes state; };
struct attached {
    int64_t vcpu;
    uint64_t incarnation;
    bool vpid;
    double heartbeat;
    uint64_t pfec_mask, pfec_match;
    struct bytes token;
};
struct resumed { uint64_t received; };
struct injected { bool there; uint64_t error_code, cr2; };
struct completed { bool there; uint64_t value; bool mmio; };
struct entered {
    uint64_t entry;
    bool flush;
    struct injected inject;
    struct completed completed;
    bool general_protection;
    struct octets interrupts;
    uint64_t processor;
    bool resume; /* never: it is for who attaches with a token */
};
struct walked { uint64_t entry, walk, pfn, level, flags; };
struct walk_fault { uint64_t entry, walk, error_code; bool misconfig; };
struct loaded { uint64_t entry, value; };
struct applied { uint64_t logs; };
struct kick { uint64_t entry; };
struct join { int role; char name[NAME_BYTES]; char endpoint[TEXT_BYTES]; uint64_t member; struct bytes token; };
struct ready { int64_t vcpu; struct bytes token; };
struct progress { struct counters counters; bool done; };
struct report { struct counters counters; struct texts histograms, info; };
struct run_config {
    bool there; /* always: a config is never null */
    int workload, mode, tdp;
    bool bypass_guest_pf;
    int memory_model;
    uint64_t seed, ops;
    char profile[PROFILE_BYTES];
    bool vpid;
    int audit, mutant;
    uint64_t memory_pages, mmu_pages;
    double park_rate;
    uint64_t park_steps;
    double host_rate;
    uint64_t tlb_sets, tlb_ways;
    bool check;
};
struct joined {
    uint64_t member;
    struct run_config config;
    char mmu_endpoint[TEXT_BYTES];
    double heartbeat;
    struct bytes run, token;
    int64_t vcpu;
    struct bytes vcpu_token;
    uint64_t next_event;
};
struct start { uint64_t vcpus; };
struct finished { int verdict; char text[TEXT_BYTES]; };
struct error_reply { char code[NAME_BYTES]; char text[TEXT_BYTES]; uint64_t seq, request; };
struct ended { char code[NAME_BYTES]; char text[TEXT_BYTES]; };

struct message {
    enum tag tag;
    union {
        struct attach attach;
        struct resume resume;
        struct log log;
        struct walk walk;
        struct load load;
        struct locked locked;
        struct exit exit;
        struct attached attached;
        struct resumed resumed;
        struct entered entered;
        struct walked walked;
        struct walk_fault walk_fault;
        struct loaded loaded;
        struct applied applied;
        struct kick kick;
        struct join join;
        struct ready ready;
        struct progress progress;
        struct report report;
        struct joined joined;
        struct start start;
        struct finished finished;
        struct error_reply error;
        struct ended ended;
    };
};

/* What the tables say of a field of a struct. */
enum kind {
    UINT, UINT_OR_NULL, BOOL, REAL, REAL_OR_NULL, TEXT, BYTES, BYTES_OR_NULL, NOTHING, CHOICE, CHOICE_OR_NULL, ACCESS,
    ACCESSES, OCTETS, COUNTERS, TEXTS, STRUCT, STRUCT_OR_NULL, INSTRUCTION, REASON
};
struct field {
    const char *name;
    enum kind kind;
    size_t at;
    uint64_t low, high;       /* of integers; of lengths of texts and lists */
    const char *const *names; /* of choices, ended by NULL */
    const struct shape *shape;
    bool has_default;
    uint64_t fallback;
    double real_low, real_high, real_fallback;
    const char *text_fallback;
};
struct shape { const char *tag; size_t size; const struct field *fields; size_t count; };

const struct shape *shape_of(enum tag tag);
const struct shape *shape_of_reason(enum reason_tag tag);

/* Whether a message goes in this direction; the size of an envelope there, in bytes, above which it is refused. */
bool goes(enum direction direction, enum tag tag);
size_t soft_limit(enum direction direction);

#endif
