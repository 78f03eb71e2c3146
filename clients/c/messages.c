/* See messages.h. */
#include "messages.h"

#include <math.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

#define U16 0xffffu
#define U32 0xffffffffu
#define U40 ((UINT64_C(1) << 40) - 1)
#define U64 UINT64_MAX

#define AT(struct_, member) .name = #member, .at = offsetof(struct struct_, member)
#define INT(struct_, member, low_, high_) {AT(struct_, member), .kind = UINT, .low = low_, .high = high_}
#define INT_OR(struct_, member, low_, high_, value) \
    {AT(struct_, member), .kind = UINT, .low = low_, .high = high_, .has_default = true, .fallback = value}
#define FLAG(struct_, member) {AT(struct_, member), .kind = BOOL}
#define FLAG_OR(struct_, member, value) {AT(struct_, member), .kind = BOOL, .has_default = true, .fallback = value}
#define STRING(struct_, member, low_, high_) {AT(struct_, member), .kind = TEXT, .low = low_, .high = high_}
#define STRING_OR(struct_, member, low_, high_, value) \
    {AT(struct_, member), .kind = TEXT, .low = low_, .high = high_, .has_default = true, .text_fallback = value}
#define TOKEN_OR_EMPTY(struct_, member) {AT(struct_, member), .kind = BYTES, .has_default = true}
#define STATE(struct_) {AT(struct_, state), .kind = BYTES_OR_NULL, .has_default = true}
#define ONE_OF(struct_, member, names_) {AT(struct_, member), .kind = CHOICE, .names = names_}
#define ONE_OF_OR(struct_, member, names_, value) \
    {AT(struct_, member), .kind = CHOICE, .names = names_, .has_default = true, .fallback = value}
#define ONE_OF_OR_NULL(struct_, member, names_) \
    {AT(struct_, member), .kind = CHOICE_OR_NULL, .names = names_, .has_default = true}

static const char *const roles[] = {"mmu", "vcpu", "host", "probe", NULL};
static const char *const locked_ops[] = {"cmpxchg", "xchg", "xadd", NULL};
static const char *const registers[] = {"cr0", "cr3", "cr4", "efer", NULL};
static const char *const verdicts[] = {"pass", "violated", "unknown", NULL};
static const char *const workloads[] = {"anon", "fork", "mprotect", "mmap-churn", "context-switch", "huge", "sloppy",
                                        "mixed", "modes", NULL};
static const char *const modes[] = {"paging64", "pae", "paging32", "nonpaging", "mixed", NULL};
static const char *const tdps[] = {"ept", "npt", NULL};
static const char *const memory_models[] = {"sc", "tso", NULL};
static const char *const audits[] = {"never", "sampled", "always", NULL};
static const char *const mutants[] = {"flush-not-awaited", "answer-before-log", "entry-flush-skipped",
                                      "notifier-ignores-tlbs-dirty", NULL};

static const struct field instruction_fields[] = {
    INT(instruction, flags, 0, 31),
    INT_OR(instruction, size, 1, 8, 8),
    INT_OR(instruction, value, 0, U64, 0),
    ONE_OF_OR_NULL(instruction, op, locked_ops),
    INT_OR(instruction, expected, 0, U64, 0),
};
static const struct shape instruction_shape = {NULL, sizeof(struct instruction), instruction_fields,
                                               COUNT(instruction_fields)};

static const struct field page_fault_fields[] = {
    INT(reason, gva, 0, U64),
    INT(reason, error_code, 0, 31),
    {AT(reason, instruction), .kind = INSTRUCTION, .shape = &instruction_shape},
};
static const struct field ept_misconfig_fields[] = {
    {.name = "gpa", .at = offsetof(struct reason, gva), .kind = UINT, .high = U64},
    {AT(reason, instruction), .kind = INSTRUCTION, .shape = &instruction_shape},
};
static const struct field invlpg_fields[] = {INT(reason, gva, 0, U64)};
static const struct field register_write_fields[] = {
    {.name = "register", .at = offsetof(struct reason, reg), .kind = CHOICE, .names = registers},
    INT(reason, value, 0, U64),
};
static const struct field send_ipi_fields[] = {
    {AT(reason, targets), .kind = OCTETS, .high = 255},
    INT(reason, vector, 32, 255),
};
#define REASON_SHAPE(tag_, fields_) {tag_, sizeof(struct reason), fields_, COUNT(fields_)}
static const struct shape reason_shapes[REASONS] = {
    [EXIT_PAGE_FAULT] = REASON_SHAPE("page_fault", page_fault_fields),
    [EXIT_EPT_MISCONFIG] = REASON_SHAPE("ept_misconfig", ept_misconfig_fields),
    [EXIT_INVLPG] = REASON_SHAPE("invlpg", invlpg_fields),
    [EXIT_REGISTER_WRITE] = REASON_SHAPE("register_write", register_write_fields),
    [EXIT_SEND_IPI] = REASON_SHAPE("send_ipi", send_ipi_fields),
    [EXIT_HALT] = {"halt", sizeof(struct reason), NULL, 0},
    [EXIT_EXTERNAL_INTERRUPT] = {"external_interrupt", sizeof(struct reason), NULL, 0},
};

static const struct field injected_fields[] = {INT(injected, error_code, 0, 31), INT(injected, cr2, 0, U64)};
static const struct shape injected_shape = {NULL, sizeof(struct injected), injected_fields, COUNT(injected_fields)};
static const struct field completed_fields[] = {INT_OR(completed, value, 0, U64, 0), FLAG_OR(completed, mmio, false)};
static const struct shape completed_shape = {NULL, sizeof(struct completed), completed_fields,
                                             COUNT(completed_fields)};

static const struct field run_config_fields[] = {
    ONE_OF_OR(run_config, workload, workloads, WORKLOAD_MIXED),
    ONE_OF_OR(run_config, mode, modes, MODE_PAGING64),
    ONE_OF_OR_NULL(run_config, tdp, tdps),
    FLAG_OR(run_config, bypass_guest_pf, false),
    ONE_OF_OR(run_config, memory_model, memory_models, 0),
    INT_OR(run_config, seed, 0, U64, 0),
    INT_OR(run_config, ops, 1, UINT64_C(281474976710656), 100000),
    STRING_OR(run_config, profile, 1, 4096, "fixed"),
    FLAG_OR(run_config, vpid, true),
    ONE_OF_OR(run_config, audit, audits, 1),
    ONE_OF_OR_NULL(run_config, mutant, mutants),
    INT_OR(run_config, memory_pages, 1024, 1048576, 4096),
    INT_OR(run_config, mmu_pages, 64, 1048576, 128),
    {AT(run_config, park_rate), .kind = REAL, .real_high = 1.0, .has_default = true, .real_fallback = 0.1},
    INT_OR(run_config, park_steps, 1, 1048576, 200),
    {AT(run_config, host_rate), .kind = REAL, .real_high = 1000.0, .has_default = true, .real_fallback = 5.0},
    INT_OR(run_config, tlb_sets, 1, 4096, 128),
    INT_OR(run_config, tlb_ways, 1, 64, 4),
    FLAG_OR(run_config, check, true),
};
static const struct shape run_config_shape = {NULL, sizeof(struct run_config), run_config_fields,
                                              COUNT(run_config_fields)};

static const struct field attach_fields[] = {
    ONE_OF(attach, role, roles),
    STRING(attach, name, 1, 64),
    {AT(attach, vcpu), .kind = UINT_OR_NULL, .high = 255, .has_default = true},
    FLAG_OR(attach, resumable, false),
    TOKEN_OR_EMPTY(attach, token),
    {AT(attach, heartbeat), .kind = REAL_OR_NULL, .real_low = 5e-324, .real_high = INFINITY, .has_default = true},
};
static const struct field resume_fields[] = {{AT(resume, token), .kind = BYTES}, INT(resume, received, 0, U64)};
static const struct field resumed_fields[] = {INT(resumed, received, 0, U64)};
static const struct field log_fields[] = {
    INT(log, entry, 0, U64),
    {AT(log, accesses), .kind = ACCESSES, .low = 1, .high = LOG_ACCESSES},
};
static const struct field walk_fields[] = {
    INT(walk, entry, 0, U64), INT(walk, walk, 0, U64), INT(walk, gva, 0, U64), INT(walk, flags, 0, 31)};
static const struct field load_fields[] = {
    INT(load, entry, 0, U64), {AT(load, access), .kind = ACCESS}, STATE(load)};
static const struct field locked_fields[] = {
    INT(locked, entry, 0, U64),
    {AT(locked, access), .kind = ACCESS},
    ONE_OF(locked, op, locked_ops),
    INT_OR(locked, expected, 0, U64, 0),
    STATE(locked),
};
static const struct field exit_fields[] = {
    INT(exit, entry, 0, U64), {AT(exit, reason), .kind = REASON}, STATE(exit)};
static const struct field attached_fields[] = {
    {AT(attached, vcpu), .kind = UINT_OR_NULL, .high = 255},
    INT(attached, incarnation, 0, U64),
    FLAG(attached, vpid),
    {AT(attached, heartbeat), .kind = REAL, .real_low = 5e-324, .real_high = INFINITY},
    INT_OR(attached, pfec_mask, 0, U32, 0),
    INT_OR(attached, pfec_match, 0, U32, 0),
    TOKEN_OR_EMPTY(attached, token),
};
static const struct field entered_fields[] = {
    INT(entered, entry, 0, U64),
    FLAG_OR(entered, flush, false),
    {AT(entered, inject), .kind = STRUCT_OR_NULL, .shape = &injected_shape, .has_default = true},
    {AT(entered, completed), .kind = STRUCT_OR_NULL, .shape = &completed_shape, .has_default = true},
    FLAG_OR(entered, general_protection, false),
    {AT(entered, interrupts), .kind = OCTETS, .low = 32, .high = 255, .has_default = true},
    INT_OR(entered, processor, 0, 255, 0),
    {AT(entered, resume), .kind = NOTHING, .has_default = true},
};
static const struct field walked_fields[] = {
    INT(walked, entry, 0, U64), INT(walked, walk, 0, U64), INT(walked, pfn, 0, U40), INT(walked, level, 1, 3),
    INT(walked, flags, 0, U16)};
static const struct field walk_fault_fields[] = {
    INT(walk_fault, entry, 0, U64), INT(walk_fault, walk, 0, U64), INT(walk_fault, error_code, 0, 31),
    FLAG_OR(walk_fault, misconfig, false)};
static const struct field loaded_fields[] = {INT(loaded, entry, 0, U64), INT(loaded, value, 0, U64)};
static const struct field applied_fields[] = {INT(applied, logs, 0, U32)};
static const struct field kick_fields[] = {INT(kick, entry, 0, U64)};
static const struct field join_fields[] = {
    ONE_OF(join, role, roles), STRING(join, name, 1, 64), STRING_OR(join, endpoint, 0, 1024, ""),
    INT_OR(join, member, 0, U32, 0), TOKEN_OR_EMPTY(join, token)};
static const struct field ready_fields[] = {
    {AT(ready, vcpu), .kind = UINT_OR_NULL, .high = 255, .has_default = true}, TOKEN_OR_EMPTY(ready, token)};
static const struct field progress_fields[] = {
    {AT(progress, counters), .kind = COUNTERS}, FLAG_OR(progress, done, false)};
static const struct field report_fields[] = {
    {AT(report, counters), .kind = COUNTERS},
    {AT(report, histograms), .kind = TEXTS, .has_default = true},
    {AT(report, info), .kind = TEXTS, .has_default = true},
};
static const struct field joined_fields[] = {
    INT(joined, member, 0, U32),
    {AT(joined, config), .kind = STRUCT, .shape = &run_config_shape},
    STRING(joined, mmu_endpoint, 0, 1024),
    {AT(joined, heartbeat), .kind = REAL, .real_low = 5e-324, .real_high = INFINITY},
    TOKEN_OR_EMPTY(joined, run),
    TOKEN_OR_EMPTY(joined, token),
    {AT(joined, vcpu), .kind = UINT_OR_NULL, .high = 255, .has_default = true},
    TOKEN_OR_EMPTY(joined, vcpu_token),
    INT_OR(joined, next_event, 0, U64, 0),
};
static const struct field start_fields[] = {INT(start, vcpus, 1, 256)};
static const struct field finished_fields[] = {
    ONE_OF(finished, verdict, verdicts), STRING_OR(finished, text, 0, 1024, "")};
static const struct field error_fields[] = {
    STRING(error_reply, code, 1, 64), STRING(error_reply, text, 0, 1024), INT_OR(error_reply, seq, 0, U64, 0),
    INT_OR(error_reply, request, 0, U64, 0)};
static const struct field ended_fields[] = {STRING(ended, code, 1, 64), STRING_OR(ended, text, 0, 1024, "")};

#define SHAPE(struct_, tag_) {tag_, sizeof(struct struct_), struct_##_fields, COUNT(struct_##_fields)}
#define EMPTY(tag_) {tag_, 0, NULL, 0}
static const struct shape shapes[TAGS] = {
    [ATTACH] = SHAPE(attach, "attach"),
    [RESUME] = SHAPE(resume, "resume"),
    [ENTER] = EMPTY("enter"),
    [LOG] = SHAPE(log, "log"),
    [WALK] = SHAPE(walk, "walk"),
    [LOAD] = SHAPE(load, "load"),
    [LOCKED] = SHAPE(locked, "locked"),
    [EXIT] = SHAPE(exit, "exit"),
    [DETACH] = EMPTY("detach"),
    [ATTACHED] = SHAPE(attached, "attached"),
    [RESUMED] = SHAPE(resumed, "resumed"),
    [ENTERED] = SHAPE(entered, "entered"),
    [WALKED] = SHAPE(walked, "walked"),
    [WALK_FAULT] = SHAPE(walk_fault, "walk_fault"),
    [LOADED] = SHAPE(loaded, "loaded"),
    [APPLIED] = SHAPE(applied, "applied"),
    [KICK] = SHAPE(kick, "kick"),
    [JOIN] = SHAPE(join, "join"),
    [READY] = SHAPE(ready, "ready"),
    [PROGRESS] = SHAPE(progress, "progress"),
    [REPORT] = SHAPE(report, "report"),
    [JOINED] = SHAPE(joined, "joined"),
    [START] = SHAPE(start, "start"),
    [DRAIN] = EMPTY("drain"),
    [FINISHED] = SHAPE(finished, "finished"),
    [HEARTBEAT] = EMPTY("heartbeat"),
    [ERROR_REPLY] = {"error", sizeof(struct error_reply), error_fields, COUNT(error_fields)},
    [ENDED] = SHAPE(ended, "ended"),
};

#define BIT(tag) (UINT64_C(1) << (tag))
static const struct { uint64_t tags; size_t limit; } directions[DIRECTIONS] = {
    [TO_MMU] = {BIT(ATTACH) | BIT(RESUME) | BIT(ENTER) | BIT(LOG) | BIT(WALK) | BIT(LOAD) | BIT(LOCKED) |
                    BIT(EXIT) | BIT(DETACH) | BIT(HEARTBEAT),
                256 << 10},
    [FROM_MMU] = {BIT(ATTACHED) | BIT(RESUMED) | BIT(ENTERED) | BIT(WALKED) | BIT(WALK_FAULT) | BIT(LOADED) |
                      BIT(APPLIED) | BIT(KICK) | BIT(ERROR_REPLY) | BIT(ENDED) | BIT(HEARTBEAT),
                  8 << 20},
    [TO_COORDINATOR] = {BIT(JOIN) | BIT(READY) | BIT(PROGRESS) | BIT(REPORT) | BIT(HEARTBEAT), 1 << 20},
    [FROM_COORDINATOR] = {BIT(JOINED) | BIT(START) | BIT(DRAIN) | BIT(FINISHED) | BIT(ERROR_REPLY) | BIT(ENDED) |
                              BIT(HEARTBEAT),
                          64 << 10},
};

bool goes(enum direction direction, enum tag tag) { return directions[direction].tags & BIT(tag); }

size_t soft_limit(enum direction direction) { return directions[direction].limit; }

const struct shape *shape_of(enum tag tag) { return &shapes[tag]; }

const struct shape *shape_of_reason(enum reason_tag tag) { return &reason_shapes[tag]; }
