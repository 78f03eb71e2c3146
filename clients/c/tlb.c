/* See tlb.h. */
#include "tlb.h"

#include <stdlib.h>
#include <string.h>

static unsigned shift_of(uint64_t level) { return 12 + 9 * (unsigned)(level - 1); }

bool tlb_use(struct tlb *tlb, uint64_t processor)
{
    if (!tlb->banks[processor])
        tlb->banks[processor] = calloc(1, sizeof *tlb->banks[processor]);
    tlb->bank = tlb->banks[processor];
    return tlb->bank != NULL;
}

void tlb_empty(struct tlb *tlb) { memset(tlb->bank->entries, 0, sizeof tlb->bank->entries); }

void tlb_drop(struct tlb *tlb, uint64_t gva)
{
    for (uint64_t level = 1; level <= TLB_LEVELS; level++) {
        uint64_t page = gva >> shift_of(level);
        struct translation *set = tlb->bank->entries[level - 1][page % TLB_SETS];
        for (size_t way = 0; way < TLB_WAYS; way++)
            if (set[way].page == page)
                set[way].valid = false;
    }
}

static bool permits(uint64_t flags, uint64_t access)
{
    if (access & ACCESS_WRITE && !(flags & MAY_WRITE && flags & DIRTY))
        return false;
    if (access & ACCESS_USER && !(flags & MAY_USER))
        return false;
    if (access & ACCESS_FETCH && (!(flags & MAY_FETCH) || (flags & SMEP && !(access & ACCESS_USER))))
        return false;
    return true;
}

const struct translation *tlb_find(const struct tlb *tlb, uint64_t gva, uint64_t access)
{
    for (uint64_t level = 1; level <= TLB_LEVELS; level++) {
        uint64_t page = gva >> shift_of(level);
        const struct translation *set = tlb->bank->entries[level - 1][page % TLB_SETS];
        for (size_t way = 0; way < TLB_WAYS; way++)
            if (set[way].valid && set[way].page == page && permits(set[way].flags, access))
                return &set[way];
    }
    return NULL;
}

const struct translation *tlb_insert(struct tlb *tlb, uint64_t gva, const struct walked *walked)
{
    uint64_t page = gva >> shift_of(walked->level);
    struct translation *set = tlb->bank->entries[walked->level - 1][page % TLB_SETS];
    size_t way = tlb->bank->victim++ % TLB_WAYS;
    for (size_t i = 0; i < TLB_WAYS; i++)
        if (!set[i].valid || set[i].page == page)
            way = i;
    set[way] = (struct translation){true, page, walked->pfn, walked->level, walked->flags};
    for (size_t i = 0; i < TLB_WAYS; i++) /* one translation of a page */
        if (i != way && set[i].page == page)
            set[i].valid = false;
    return &set[way];
}

uint64_t translation_frame(const struct translation *translation, uint64_t gva)
{
    uint64_t pages = (UINT64_C(1) << (shift_of(translation->level) - 12)) - 1;
    return translation->pfn + ((gva >> 12) & pages);
}

void tlb_free(struct tlb *tlb)
{
    for (size_t i = 0; i < PROCESSORS; i++)
        free(tlb->banks[i]);
    memset(tlb, 0, sizeof *tlb);
}
