/* See framing.h. Reading comes first, then writing. */
#include "framing.h"

#include <math.h>
#include <string.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))
#define BIT(n) (UINT64_C(1) << (n))

const char version_frame[] = "SMMU/1.1";
static const unsigned spoken_major = 1;

/* --- reading ----------------------------------------------------------------------------------------------------- */

static struct refusal malformed(const char *why) { return (struct refusal){"malformed", why}; }
static const struct refusal fine = {NULL, NULL};

static uint64_t big_endian(const uint8_t *bytes, size_t size)
{
    uint64_t value = 0;
    while (size--)
        value = value << 8 | *bytes++;
    return value;
}

/*
 * Whether these bytes are one MessagePack value. msgpack-c makes room for as many items as an array announces before
 * it looks whether they are there, so lengths are checked first; it bears no more than 32 levels.
 */
static bool is_one_value(const uint8_t *bytes, size_t size)
{
    enum { LEVELS = 30 };
    uint64_t left[LEVELS + 1] = {1};
    size_t level = 0, at = 0;
    for (;;) {
        while (left[level] == 0) {
            if (level-- == 0)
                return at == size;
        }
        left[level]--;
        if (at == size)
            return false;
        uint8_t head = bytes[at++];
        uint64_t payload = 0, items = 0;
        size_t width = 0; /* bytes of a length */
        int per_item = 0; /* 1: it announces items, 2: pairs, 0: bytes */
        if (head >= 0xe0 || head <= 0x7f || head == 0xc0 || head == 0xc2 || head == 0xc3) {
            continue;
        } else if (head <= 0x8f) {
            items = 2u * (head & 0x0fu);
        } else if (head <= 0x9f) {
            items = head & 0x0fu;
        } else if (head <= 0xbf) {
            payload = head & 0x1fu;
        } else if (head >= 0xc4 && head <= 0xc6) {
            width = (size_t)1 << (head - 0xc4);
        } else if (head >= 0xc7 && head <= 0xc9) {
            width = (size_t)1 << (head - 0xc7);
            payload = 1; /* the type of the extension */
        } else if (head >= 0xca && head <= 0xcb) {
            payload = head == 0xca ? 4 : 8;
        } else if (head >= 0xcc && head <= 0xcf) {
            payload = UINT64_C(1) << (head - 0xcc);
        } else if (head >= 0xd0 && head <= 0xd3) {
            payload = UINT64_C(1) << (head - 0xd0);
        } else if (head >= 0xd4 && head <= 0xd8) {
            payload = 1 + (UINT64_C(1) << (head - 0xd4));
        } else if (head >= 0xd9 && head <= 0xdb) {
            width = (size_t)1 << (head - 0xd9);
        } else if (head >= 0xdc && head <= 0xdf) {
            width = head & 1 ? 4 : 2;
            per_item = head <= 0xdd ? 1 : 2;
        } else {
            return false; /* 0xc1 */
        }
        if (size - at < width)
            return false;
        uint64_t length = big_endian(bytes + at, width);
        at += width;
        if (per_item)
            items = length * (uint64_t)per_item;
        else
            payload += length;
        if (size - at < payload || size - at - payload < items)
            return false;
        at += payload;
        if (items) {
            if (level == LEVELS)
                return false;
            left[++level] = items;
        }
    }
}

/* The code points of UTF-8; SIZE_MAX if it is none. */
static size_t code_points(const char *text, size_t size)
{
    size_t count = 0;
    for (size_t at = 0; at < size; count++) {
        uint8_t head = (uint8_t)text[at];
        size_t more = head < 0x80 ? 0 : head >= 0xc2 && head <= 0xdf ? 1 : head >= 0xe0 && head <= 0xef ? 2
                    : head >= 0xf0 && head <= 0xf4 ? 3 : SIZE_MAX;
        if (more == SIZE_MAX || size - at - 1 < more)
            return SIZE_MAX;
        for (size_t i = 1; i <= more; i++)
            if (((uint8_t)text[at + i] & 0xc0) != 0x80)
                return SIZE_MAX;
        uint8_t second = more ? (uint8_t)text[at + 1] : 0;
        bool overlong = (head == 0xe0 && second < 0xa0) || (head == 0xf0 && second < 0x90);
        bool surrogate = head == 0xed && second > 0x9f;
        bool beyond = head == 0xf4 && second > 0x8f;
        if (overlong || surrogate || beyond)
            return SIZE_MAX;
        at += more + 1;
    }
    return count;
}

static bool is_text(const msgpack_object *object, const char *text)
{
    return object->type == MSGPACK_OBJECT_STR && object->via.str.size == strlen(text) &&
           memcmp(object->via.str.ptr, text, object->via.str.size) == 0;
}

static struct refusal read_uint(const msgpack_object *object, uint64_t low, uint64_t high, uint64_t *value)
{
    if (object->type != MSGPACK_OBJECT_POSITIVE_INTEGER)
        return malformed("no integer, or a negative one");
    if (object->via.u64 < low || object->via.u64 > high)
        return malformed("an integer is out of range");
    *value = object->via.u64;
    return fine;
}

/* `room`: the bytes at `text`; a text may not contain a zero byte here, since C could not tell its end. */
static struct refusal read_text(const msgpack_object *object, uint64_t low, uint64_t high, char *text, size_t room)
{
    if (object->type != MSGPACK_OBJECT_STR)
        return malformed("no string");
    size_t size = object->via.str.size;
    size_t length = code_points(object->via.str.ptr, size);
    if (length == SIZE_MAX)
        return malformed("no UTF-8");
    if (length < low || length > high || size >= room)
        return malformed("a string is too short or too long");
    for (size_t i = 0; i < size; i++)
        text[i] = object->via.str.ptr[i] ? object->via.str.ptr[i] : ' ';
    text[size] = '\0';
    return fine;
}

static struct refusal read_bytes(const msgpack_object *object, struct bytes *bytes)
{
    if (object->type != MSGPACK_OBJECT_BIN)
        return malformed("no byte string");
    if (object->via.bin.size > sizeof bytes->items)
        return malformed("a byte string is too long");
    bytes->there = true;
    bytes->count = object->via.bin.size;
    if (bytes->count)
        memcpy(bytes->items, object->via.bin.ptr, bytes->count);
    return fine;
}

static struct refusal read_choice(const msgpack_object *object, const char *const *names, int *value)
{
    for (int i = 0; names[i]; i++) {
        if (is_text(object, names[i])) {
            *value = i;
            return fine;
        }
    }
    return malformed("not one of the strings that are possible");
}

static struct refusal read_real(const msgpack_object *object, const struct field *field, double *value)
{
    if (object->type == MSGPACK_OBJECT_POSITIVE_INTEGER)
        *value = (double)object->via.u64;
    else if (object->type == MSGPACK_OBJECT_NEGATIVE_INTEGER)
        *value = (double)object->via.i64;
    else if (object->type == MSGPACK_OBJECT_FLOAT32 || object->type == MSGPACK_OBJECT_FLOAT64)
        *value = object->via.f64;
    else
        return malformed("no number");
    if (!isfinite(*value) || *value < field->real_low || *value > field->real_high)
        return malformed("a number is out of range");
    return fine;
}

static struct refusal read_access(const msgpack_object *object, struct access *access)
{
    if (object->type != MSGPACK_OBJECT_ARRAY || object->via.array.size != 5)
        return malformed("no array of five");
    const msgpack_object *items = object->via.array.ptr;
    const struct { uint64_t low, high; uint64_t *value; } members[] = {
        {0, 0xffff, &access->flags},
        {0, UINT64_MAX, &access->gva},
        {0, (UINT64_C(1) << 40) - 1, &access->pfn},
        {1, 8, &access->size},
        {0, UINT64_MAX, &access->value},
    };
    struct refusal refusal = fine;
    for (size_t i = 0; i < COUNT(members) && !refusal.code; i++)
        refusal = read_uint(&items[i], members[i].low, members[i].high, members[i].value);
    return refusal;
}

static struct refusal read_accesses(const msgpack_object *object, const struct field *field, struct accesses *list)
{
    if (object->type != MSGPACK_OBJECT_ARRAY || object->via.array.size < field->low ||
        object->via.array.size > field->high)
        return malformed("no array, or too few or too many in it");
    struct refusal refusal = fine;
    list->count = object->via.array.size;
    for (size_t i = 0; i < list->count && !refusal.code; i++)
        refusal = read_access(&object->via.array.ptr[i], &list->items[i]);
    return refusal;
}

static struct refusal read_octets(const msgpack_object *object, const struct field *field, struct octets *list)
{
    if (object->type != MSGPACK_OBJECT_ARRAY || object->via.array.size > MAX_TARGETS)
        return malformed("no array, or too many in it");
    struct refusal refusal = fine;
    list->count = object->via.array.size;
    for (size_t i = 0; i < list->count && !refusal.code; i++)
        refusal = read_uint(&object->via.array.ptr[i], field->low, field->high, &list->items[i]);
    return refusal;
}

static struct refusal read_counters(const msgpack_object *object, struct counters *map)
{
    if (object->type != MSGPACK_OBJECT_MAP || object->via.map.size > MAX_ITEMS)
        return malformed("no map, or too much in it");
    struct refusal refusal = fine;
    map->count = object->via.map.size;
    for (size_t i = 0; i < map->count && !refusal.code; i++) {
        const msgpack_object_kv *pair = &object->via.map.ptr[i];
        refusal = read_text(&pair->key, 0, SIZE_MAX, map->items[i].name, sizeof map->items[i].name);
        if (!refusal.code)
            refusal = read_uint(&pair->val, 0, UINT64_MAX, &map->items[i].value);
    }
    return refusal;
}

static struct refusal read_texts(const msgpack_object *object, struct texts *map)
{
    if (object->type != MSGPACK_OBJECT_MAP || object->via.map.size > MAX_ITEMS)
        return malformed("no map, or too much in it");
    struct refusal refusal = fine;
    map->count = object->via.map.size;
    for (size_t i = 0; i < map->count && !refusal.code; i++) {
        const msgpack_object_kv *pair = &object->via.map.ptr[i];
        refusal = read_text(&pair->key, 0, SIZE_MAX, map->items[i].name, sizeof map->items[i].name);
        if (!refusal.code)
            refusal = read_text(&pair->val, 0, SIZE_MAX, map->items[i].text, sizeof map->items[i].text);
    }
    return refusal;
}

static struct refusal read_struct(const msgpack_object *object, const struct shape *shape, void *to);

static struct refusal read_reason(const msgpack_object *object, struct reason *reason)
{
    if (object->type != MSGPACK_OBJECT_MAP)
        return malformed("no map");
    for (uint32_t i = 0; i < object->via.map.size; i++) {
        if (!is_text(&object->via.map.ptr[i].key, "t"))
            continue;
        for (enum reason_tag tag = 0; tag < REASONS; tag++) {
            if (is_text(&object->via.map.ptr[i].val, shape_of_reason(tag)->tag)) {
                reason->tag = tag;
                return read_struct(object, shape_of_reason(tag), reason);
            }
        }
    }
    return malformed("no reason for an exit");
}

static struct refusal read_field(const msgpack_object *object, const struct field *field, void *to)
{
    bool null = object->type == MSGPACK_OBJECT_NIL;
    switch (field->kind) {
    case UINT_OR_NULL:
        if (null) {
            *(int64_t *)to = NONE;
            return fine;
        }
        /* fall through */
    case UINT:
        return read_uint(object, field->low, field->high, to);
    case BOOL:
        if (object->type != MSGPACK_OBJECT_BOOLEAN)
            return malformed("no boolean");
        *(bool *)to = object->via.boolean;
        return fine;
    case REAL_OR_NULL:
        if (null) {
            *(double *)to = NONE;
            return fine;
        }
        /* fall through */
    case REAL:
        return read_real(object, field, to);
    case NOTHING:
        *(bool *)to = false;
        return null ? fine : malformed("what this client has not asked for");
    case BYTES_OR_NULL:
        if (null) {
            ((struct bytes *)to)->there = false;
            return fine;
        }
        /* fall through */
    case BYTES:
        return read_bytes(object, to);
    case TEXT:
        return read_text(object, field->low, field->high, to, field->high * 4 + 1);
    case CHOICE_OR_NULL:
        if (null) {
            *(int *)to = NONE;
            return fine;
        }
        /* fall through */
    case CHOICE:
        return read_choice(object, field->names, to);
    case ACCESS:
        return read_access(object, to);
    case ACCESSES:
        return read_accesses(object, field, to);
    case OCTETS:
        return read_octets(object, field, to);
    case COUNTERS:
        return read_counters(object, to);
    case TEXTS:
        return read_texts(object, to);
    case STRUCT_OR_NULL:
        if (null) {
            *(bool *)to = false;
            return fine;
        }
        /* fall through */
    case STRUCT:
        *(bool *)to = true; /* `there` is the first member */
        return read_struct(object, field->shape, to);
    case INSTRUCTION:
        return read_struct(object, field->shape, to);
    case REASON:
        return read_reason(object, to);
    }
    return malformed("a table of this client is wrong");
}

static void set_default(const struct field *field, void *to)
{
    switch (field->kind) {
    case UINT: *(uint64_t *)to = field->fallback; break;
    case UINT_OR_NULL: *(int64_t *)to = NONE; break;
    case BOOL: *(bool *)to = field->fallback; break;
    case REAL: *(double *)to = field->real_fallback; break;
    case REAL_OR_NULL: *(double *)to = NONE; break;
    case NOTHING: *(bool *)to = false; break;
    case BYTES: *(struct bytes *)to = (struct bytes){.there = true}; break;
    case BYTES_OR_NULL: *(struct bytes *)to = (struct bytes){.there = false}; break;
    case TEXT: strcpy(to, field->text_fallback); break;
    case CHOICE: *(int *)to = (int)field->fallback; break;
    case CHOICE_OR_NULL: *(int *)to = NONE; break;
    case OCTETS: ((struct octets *)to)->count = 0; break;
    case TEXTS: ((struct texts *)to)->count = 0; break;
    case STRUCT_OR_NULL: *(bool *)to = false; break;
    default: break;
    }
}

static struct refusal read_struct(const msgpack_object *object, const struct shape *shape, void *to)
{
    if (object->type != MSGPACK_OBJECT_MAP)
        return malformed("no map");
    uint64_t seen = 0;
    bool tag_seen = false;
    for (uint32_t i = 0; i < object->via.map.size; i++) {
        const msgpack_object_kv *pair = &object->via.map.ptr[i];
        if (shape->tag && is_text(&pair->key, "t")) {
            if (tag_seen)
                return malformed("a key is there twice");
            tag_seen = true;
            continue;
        }
        size_t n = 0;
        while (n < shape->count && !is_text(&pair->key, shape->fields[n].name))
            n++;
        if (n == shape->count)
            return malformed("an unknown field");
        if (seen & BIT(n))
            return malformed("a key is there twice");
        seen |= BIT(n);
        struct refusal refusal = read_field(&pair->val, &shape->fields[n], (char *)to + shape->fields[n].at);
        if (refusal.code)
            return refusal;
    }
    for (size_t n = 0; n < shape->count; n++) {
        if (seen & BIT(n))
            continue;
        if (!shape->fields[n].has_default)
            return malformed("a field is missing");
        set_default(&shape->fields[n], (char *)to + shape->fields[n].at);
    }
    return fine;
}

static struct refusal read_body(enum direction direction, const msgpack_object *body, struct message *message)
{
    if (body->type != MSGPACK_OBJECT_MAP)
        return malformed("the body is no map");
    const msgpack_object *name = NULL;
    for (uint32_t i = 0; i < body->via.map.size; i++)
        if (is_text(&body->via.map.ptr[i].key, "t"))
            name = &body->via.map.ptr[i].val;
    if (!name)
        return malformed("the body has no tag");
    for (enum tag tag = 0; tag < TAGS; tag++) {
        if (!is_text(name, shape_of(tag)->tag))
            continue;
        if (!goes(direction, tag))
            return (struct refusal){"unexpected-message", "this message does not go this way"};
        message->tag = tag;
        return read_struct(body, shape_of(tag), &message->attach);
    }
    return malformed("an unknown tag");
}

static struct refusal read_envelope(enum direction direction, const struct frame *frame, struct envelope *envelope,
                                    struct message *message)
{
    if (frame->size > soft_limit(direction))
        return (struct refusal){"too-large", "the envelope is over the soft limit"};
    if (!is_one_value(frame->data, frame->size))
        return malformed("the envelope is not one MessagePack value");
    msgpack_unpacked unpacked;
    msgpack_unpacked_init(&unpacked);
    size_t offset = 0;
    struct refusal refusal = malformed("the envelope cannot be unpacked");
    if (msgpack_unpack_next(&unpacked, frame->data, frame->size, &offset) == MSGPACK_UNPACK_SUCCESS) {
        const msgpack_object *root = &unpacked.data;
        uint64_t incarnation, number;
        if (root->type != MSGPACK_OBJECT_ARRAY || root->via.array.size != 3) {
            refusal = malformed("the envelope is no array of three");
        } else if (!(refusal = read_uint(&root->via.array.ptr[0], 0, UINT64_MAX, &incarnation)).code &&
                   !(refusal = read_uint(&root->via.array.ptr[1], 0, UINT64_MAX, &number)).code) {
            envelope->incarnation = incarnation;
            envelope->number = number;
            refusal = read_body(direction, &root->via.array.ptr[2], message);
        }
    }
    msgpack_unpacked_destroy(&unpacked);
    return refusal;
}

/* number = "0" / 1*5DIGIT without leading zeros; gives what is behind it, or NULL. */
static const char *read_number(const char *text, const char *end, unsigned *number)
{
    const char *first = text;
    for (*number = 0; text < end && text - first < 5 && *text >= '0' && *text <= '9'; text++)
        *number = *number * 10 + (unsigned)(*text - '0');
    return text == first || (*first == '0' && text - first > 1) ? NULL : text;
}

static bool read_version(const struct frame *frame, struct envelope *envelope)
{
    const char *text = frame->data, *end = text + frame->size;
    if (frame->size < 8 || memcmp(text, "SMMU/", 5) != 0)
        return false;
    text = read_number(text + 5, end, &envelope->major);
    if (!text || text == end || *text != '.')
        return false;
    return read_number(text + 1, end, &envelope->minor) == end;
}

struct refusal decode(enum direction direction, const struct frame *frames, size_t count, struct envelope *envelope,
                      struct message *message)
{
    *envelope = (struct envelope){0};
    if (count != 2)
        return (struct refusal){"bad-part-count", "a message has two frames"};
    if (!read_version(&frames[0], envelope))
        return malformed("no version frame");
    struct refusal refusal = read_envelope(direction, &frames[1], envelope, message);
    if (envelope->major != spoken_major) {
        bool told = !refusal.code && message->tag == ERROR_REPLY &&
                    strcmp(message->error.code, "unsupported-version") == 0;
        if (!told) {
            envelope->incarnation = envelope->number = 0;
            return (struct refusal){"unsupported-version", "another major version"};
        }
    }
    return refusal;
}

/* --- writing ----------------------------------------------------------------------------------------------------- */

static void write_text(msgpack_packer *packer, const char *text)
{
    size_t size = strlen(text);
    msgpack_pack_str(packer, size);
    msgpack_pack_str_body(packer, text, size);
}

static void write_access(msgpack_packer *packer, const struct access *access)
{
    msgpack_pack_array(packer, 5);
    msgpack_pack_uint64(packer, access->flags);
    msgpack_pack_uint64(packer, access->gva);
    msgpack_pack_uint64(packer, access->pfn);
    msgpack_pack_uint64(packer, access->size);
    msgpack_pack_uint64(packer, access->value);
}

static void write_struct(msgpack_packer *packer, const struct shape *shape, const void *from);

static void write_field(msgpack_packer *packer, const struct field *field, const void *from)
{
    switch (field->kind) {
    case UINT:
        msgpack_pack_uint64(packer, *(const uint64_t *)from);
        break;
    case UINT_OR_NULL:
        if (*(const int64_t *)from == NONE)
            msgpack_pack_nil(packer);
        else
            msgpack_pack_int64(packer, *(const int64_t *)from);
        break;
    case BOOL:
        if (*(const bool *)from)
            msgpack_pack_true(packer);
        else
            msgpack_pack_false(packer);
        break;
    case REAL_OR_NULL:
        if (*(const double *)from == NONE) {
            msgpack_pack_nil(packer);
            break;
        }
        /* fall through */
    case REAL:
        msgpack_pack_double(packer, *(const double *)from);
        break;
    case NOTHING:
        msgpack_pack_nil(packer);
        break;
    case BYTES_OR_NULL:
        if (!((const struct bytes *)from)->there) {
            msgpack_pack_nil(packer);
            break;
        }
        /* fall through */
    case BYTES: {
        const struct bytes *bytes = from;
        msgpack_pack_bin(packer, bytes->count);
        msgpack_pack_bin_body(packer, bytes->items, bytes->count);
        break;
    }
    case TEXT:
        write_text(packer, from);
        break;
    case CHOICE:
    case CHOICE_OR_NULL:
        if (*(const int *)from == NONE)
            msgpack_pack_nil(packer);
        else
            write_text(packer, field->names[*(const int *)from]);
        break;
    case ACCESS:
        write_access(packer, from);
        break;
    case ACCESSES: {
        const struct accesses *list = from;
        msgpack_pack_array(packer, list->count);
        for (size_t i = 0; i < list->count; i++)
            write_access(packer, &list->items[i]);
        break;
    }
    case OCTETS: {
        const struct octets *list = from;
        msgpack_pack_array(packer, list->count);
        for (size_t i = 0; i < list->count; i++)
            msgpack_pack_uint64(packer, list->items[i]);
        break;
    }
    case COUNTERS: {
        const struct counters *map = from;
        msgpack_pack_map(packer, map->count);
        for (size_t i = 0; i < map->count; i++) {
            write_text(packer, map->items[i].name);
            msgpack_pack_uint64(packer, map->items[i].value);
        }
        break;
    }
    case TEXTS: {
        const struct texts *map = from;
        msgpack_pack_map(packer, map->count);
        for (size_t i = 0; i < map->count; i++) {
            write_text(packer, map->items[i].name);
            write_text(packer, map->items[i].text);
        }
        break;
    }
    case STRUCT_OR_NULL:
        if (!*(const bool *)from) {
            msgpack_pack_nil(packer);
            break;
        }
        /* fall through */
    case STRUCT:
    case INSTRUCTION:
        write_struct(packer, field->shape, from);
        break;
    case REASON:
        write_struct(packer, shape_of_reason(((const struct reason *)from)->tag), from);
        break;
    }
}

static void write_struct(msgpack_packer *packer, const struct shape *shape, const void *from)
{
    msgpack_pack_map(packer, shape->count + (shape->tag != NULL));
    if (shape->tag) {
        write_text(packer, "t");
        write_text(packer, shape->tag);
    }
    for (size_t n = 0; n < shape->count; n++) {
        write_text(packer, shape->fields[n].name);
        write_field(packer, &shape->fields[n], (const char *)from + shape->fields[n].at);
    }
}

msgpack_sbuffer *encode(uint64_t incarnation, uint64_t number, const struct message *message)
{
    msgpack_sbuffer *buffer = msgpack_sbuffer_new();
    if (!buffer)
        return NULL;
    msgpack_packer packer;
    msgpack_packer_init(&packer, buffer, msgpack_sbuffer_write);
    msgpack_pack_array(&packer, 3);
    msgpack_pack_uint64(&packer, incarnation);
    msgpack_pack_uint64(&packer, number);
    write_struct(&packer, shape_of(message->tag), &message->attach);
    return buffer;
}
