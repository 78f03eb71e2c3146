/* See guest.h. */
#include "guest.h"

enum { PAGE = 4096, BLOCK_PAGES = 512, SHOOTDOWN_VECTOR = 0xfd, WAKE_VECTOR = 0xfc };
static const uint64_t kernel_base = UINT64_C(0xffff800000000000);

uint64_t beside_vcpus;

/* Pages that hold data only: the last quarter of memory, whole blocks of 2 MiB of it. */
struct pages { uint64_t first_gva, count; };

static struct pages data_pages(uint64_t memory_pages)
{
    uint64_t count = memory_pages / 4 / BLOCK_PAGES * BLOCK_PAGES;
    uint64_t end = memory_pages / BLOCK_PAGES * BLOCK_PAGES;
    uint64_t first = count ? (memory_pages - count + BLOCK_PAGES - 1) / BLOCK_PAGES * BLOCK_PAGES : end - BLOCK_PAGES;
    return (struct pages){kernel_base + PAGE * first, end - first};
}

/* This kernel has no pages to give: its page-fault handler goes on behind the instruction. */
static enum outcome handled(struct touching *touching, enum outcome outcome, bool *certain)
{
    if (outcome != GUEST_FAULT)
        return outcome;
    touching->faults++;
    *certain = false;
    return DONE;
}

static enum outcome check_value(struct vcpu *vcpu, struct touching *touching, uint64_t gva, uint64_t stored,
                                bool *certain)
{
    uint64_t value = 0;
    enum outcome outcome = handled(touching, vcpu_load(vcpu, gva, &value), certain);
    if (outcome == DONE && touching->alone && *certain && value != stored)
        touching->wrong = true;
    return outcome;
}

static enum outcome touch_page(struct vcpu *vcpu, struct touching *touching, uint64_t index, uint64_t page)
{
    uint64_t gva = page + 8 * (touching->round % 512);
    uint64_t stored = 2 * (touching->round * 0x10000 + index); /* bit 0 clear: never a present paging entry */
    uint64_t old = 0;
    bool certain = true;
    /* The first store to a page is often a fault of its own. */
    enum outcome outcome = handled(touching, vcpu_touch(vcpu, gva, 0), &certain);
    if (outcome == DONE)
        outcome = handled(touching, vcpu_store(vcpu, gva, stored), &certain);
    if (outcome == DONE && index % 4 == 3) {
        outcome = check_value(vcpu, touching, gva, stored, &certain);
        if (outcome == DONE)
            outcome = handled(touching, vcpu_locked(vcpu, OP_XADD, gva, 2, 0, &old), &certain);
        if (outcome == DONE && touching->alone && certain && old != stored)
            touching->wrong = true;
        if (outcome == DONE)
            outcome = check_value(vcpu, touching, gva, stored + 2, &certain);
    }
    uint64_t elsewhere = kernel_base + PAGE * ((touching->round * 41 + index * 67) % touching->memory_pages);
    if (outcome == DONE)
        outcome = handled(touching, vcpu_touch(vcpu, elsewhere, 0), &certain);
    if (outcome == DONE && index % 16 == 9) /* kernel memory: a user may not */
        outcome = handled(touching, vcpu_touch(vcpu, gva, ACCESS_USER), &certain);
    if (outcome == DONE && index % 8 == 7)
        outcome = vcpu_invlpg(vcpu, page);
    return outcome;
}

enum outcome touch_pages(struct vcpu *vcpu, struct touching *touching)
{
    struct pages data = data_pages(touching->memory_pages);
    enum outcome outcome = DONE;
    for (uint64_t index = 0; index < touching->count && outcome == DONE; index++) {
        uint64_t page = (touching->first + index) % data.count;
        outcome = touch_page(vcpu, touching, index, data.first_gva + PAGE * page);
    }
    return outcome;
}

/* The words of the kernel's TLB shootdown protocol, in the page behind the tables of the vCPUs' windows. */
static uint64_t word(uint64_t index) { return kernel_base + PAGE * (7 + beside_vcpus) + 8 * index; }

static enum outcome serve_asker(struct vcpu *vcpu, uint64_t asker)
{
    uint64_t mail, acknowledged;
    enum outcome outcome = vcpu_load(vcpu, word(384 + asker), &mail);
    if (outcome != DONE)
        return outcome;
    uint64_t gva = mail >> 24 << 12, pages_to_write = mail >> 12 & 0xf, targets = mail >> 16 & 0xff;
    if (pages_to_write == 0) { /* else it may be left undone */
        uint64_t root = PAGE * (8 + 2 * beside_vcpus); /* of address space 0 */
        outcome = gva ? vcpu_invlpg(vcpu, gva) : vcpu_write_register(vcpu, CR3, root);
    }
    if (outcome == DONE)
        outcome = vcpu_locked(vcpu, OP_XADD, word(320 + asker), 1, 0, &acknowledged);
    if (outcome == DONE && acknowledged + 1 == targets)
        outcome = vcpu_send_ipi(vcpu, asker, WAKE_VECTOR);
    return outcome;
}

enum outcome serve_shootdown(struct vcpu *vcpu, uint64_t vector)
{
    uint64_t pending;
    if (vector != SHOOTDOWN_VECTOR)
        return DONE;
    enum outcome outcome = vcpu_locked(vcpu, OP_XCHG, word(256 + vcpu->number), 0, 0, &pending);
    for (uint64_t asker = 0; asker < beside_vcpus && asker < 64 && outcome == DONE; asker++)
        if (pending >> asker & 1)
            outcome = serve_asker(vcpu, asker);
    return outcome;
}
