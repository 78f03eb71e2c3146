/* A TLB (docs/PROTOCOL.md, "The TLB", "Walks"): a bank for each physical processor, each of bounded size. */
#ifndef SMMU_TLB_H
#define SMMU_TLB_H

#include "messages.h"

enum { TLB_SETS = 128, TLB_WAYS = 4, TLB_LEVELS = 3, PROCESSORS = 256 };

struct translation { bool valid; uint64_t page, pfn, level, flags; };
struct tlb_bank { struct translation entries[TLB_LEVELS][TLB_SETS][TLB_WAYS]; unsigned victim; };
struct tlb { struct tlb_bank *banks[PROCESSORS], *bank; };

/* From now on it is the TLB of this processor. False: no memory. */
bool tlb_use(struct tlb *tlb, uint64_t processor);
void tlb_empty(struct tlb *tlb);
/* Drops what there is for an address, of all sizes. */
void tlb_drop(struct tlb *tlb, uint64_t gva);
/* A translation that permits the access, or NULL. */
const struct translation *tlb_find(const struct tlb *tlb, uint64_t gva, uint64_t access);
/* Keeps what a walk brought. */
const struct translation *tlb_insert(struct tlb *tlb, uint64_t gva, const struct walked *walked);
/* The 4 KiB frame of an address that this translates. */
uint64_t translation_frame(const struct translation *translation, uint64_t gva);
void tlb_free(struct tlb *tlb);

#endif
