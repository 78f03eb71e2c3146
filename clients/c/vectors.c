/*
 * Reads messages as lines "DIRECTION FRAME..." from stdin (a direction is 0 to 3 as in messages.h, frames are
 * hexadecimal, an empty one is "-"), and writes for each a JSON object: {"code": ...} if it is refused, else
 * {"incarnation", "number", "body", "again": the envelope as this client encodes the message}. check_vectors.py
 * compares that with the golden vectors.
 */
#include "framing.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void print_text(const char *text)
{
    putchar('"');
    for (; *text; text++) {
        if (*text == '"' || *text == '\\')
            putchar('\\');
        if ((unsigned char)*text < 0x20)
            printf("\\u%04x", *text);
        else
            putchar(*text);
    }
    putchar('"');
}

static void print_access(const struct access *access)
{
    printf("[%" PRIu64 ",%" PRIu64 ",%" PRIu64 ",%" PRIu64 ",%" PRIu64 "]", access->flags, access->gva, access->pfn,
           access->size, access->value);
}

static void print_struct(const struct shape *shape, const void *from);

static void print_field(const struct field *field, const void *from)
{
    switch (field->kind) {
    case UINT:
        printf("%" PRIu64, *(const uint64_t *)from);
        break;
    case UINT_OR_NULL:
        if (*(const int64_t *)from == NONE)
            printf("null");
        else
            printf("%" PRId64, *(const int64_t *)from);
        break;
    case BOOL:
        printf(*(const bool *)from ? "true" : "false");
        break;
    case REAL_OR_NULL:
        if (*(const double *)from == NONE) {
            printf("null");
            break;
        }
        /* fall through */
    case REAL:
        printf("%.17g", *(const double *)from);
        break;
    case NOTHING:
        printf("null");
        break;
    case BYTES_OR_NULL:
        if (!((const struct bytes *)from)->there) {
            printf("null");
            break;
        }
        /* fall through */
    case BYTES:
        printf("{\"$bin\":\"");
        for (size_t i = 0; i < ((const struct bytes *)from)->count; i++)
            printf("%02x", ((const struct bytes *)from)->items[i]);
        printf("\"}");
        break;
    case TEXT:
        print_text(from);
        break;
    case CHOICE:
    case CHOICE_OR_NULL:
        if (*(const int *)from == NONE)
            printf("null");
        else
            print_text(field->names[*(const int *)from]);
        break;
    case ACCESS:
        print_access(from);
        break;
    case ACCESSES: {
        const struct accesses *list = from;
        for (size_t i = 0; i < list->count; i++) {
            putchar(i ? ',' : '[');
            print_access(&list->items[i]);
        }
        putchar(']'); /* a log is never empty */
        break;
    }
    case OCTETS: {
        const struct octets *list = from;
        putchar('[');
        for (size_t i = 0; i < list->count; i++)
            printf("%s%" PRIu64, i ? "," : "", list->items[i]);
        putchar(']');
        break;
    }
    case COUNTERS: {
        const struct counters *map = from;
        putchar('{');
        for (size_t i = 0; i < map->count; i++) {
            if (i)
                putchar(',');
            print_text(map->items[i].name);
            printf(":%" PRIu64, map->items[i].value);
        }
        putchar('}');
        break;
    }
    case TEXTS: {
        const struct texts *map = from;
        putchar('{');
        for (size_t i = 0; i < map->count; i++) {
            if (i)
                putchar(',');
            print_text(map->items[i].name);
            putchar(':');
            print_text(map->items[i].text);
        }
        putchar('}');
        break;
    }
    case STRUCT_OR_NULL:
        if (!*(const bool *)from) {
            printf("null");
            break;
        }
        /* fall through */
    case STRUCT:
    case INSTRUCTION:
        print_struct(field->shape, from);
        break;
    case REASON:
        print_struct(shape_of_reason(((const struct reason *)from)->tag), from);
        break;
    }
}

static void print_struct(const struct shape *shape, const void *from)
{
    putchar('{');
    if (shape->tag) {
        printf("\"t\":");
        print_text(shape->tag);
    }
    for (size_t n = 0; n < shape->count; n++) {
        if (n || shape->tag)
            putchar(',');
        print_text(shape->fields[n].name);
        putchar(':');
        print_field(&shape->fields[n], (const char *)from + shape->fields[n].at);
    }
    putchar('}');
}

/* The bytes of a frame, in memory of exactly their size, so that a sanitizer sees what is read beyond. */
static struct frame parse_frame(const char *hex)
{
    size_t size = strcmp(hex, "-") == 0 ? 0 : strlen(hex) / 2;
    unsigned char *data = malloc(size ? size : 1);
    for (size_t i = 0; i < size; i++) {
        char digits[3] = {hex[2 * i], hex[2 * i + 1], '\0'};
        data[i] = (unsigned char)strtoul(digits, NULL, 16);
    }
    return (struct frame){data, size};
}

static void answer(enum direction direction, const struct frame *frames, size_t count)
{
    static struct message message;
    struct envelope envelope;
    struct refusal refusal = decode(direction, frames, count, &envelope, &message);
    if (refusal.code) {
        printf("{\"code\":\"%s\",\"incarnation\":%" PRIu64 ",\"number\":%" PRIu64 "}\n", refusal.code,
               envelope.incarnation, envelope.number);
        return;
    }
    printf("{\"incarnation\":%" PRIu64 ",\"number\":%" PRIu64 ",\"body\":", envelope.incarnation, envelope.number);
    print_struct(shape_of(message.tag), &message.attach);
    printf(",\"again\":\"");
    msgpack_sbuffer *bytes = encode(envelope.incarnation, envelope.number, &message);
    for (size_t i = 0; bytes && i < bytes->size; i++)
        printf("%02x", (unsigned char)bytes->data[i]);
    if (bytes)
        msgpack_sbuffer_free(bytes);
    printf("\"}\n");
}

int main(void)
{
    char *line = NULL;
    size_t room = 0;
    while (getline(&line, &room, stdin) > 0) {
        enum { MOST = 8 };
        struct frame frames[MOST];
        size_t count = 0;
        char *rest = NULL, *word = strtok_r(line, " \n", &rest);
        enum direction direction = (enum direction)atoi(word ? word : "0");
        while (count < MOST && (word = strtok_r(NULL, " \n", &rest)))
            frames[count++] = parse_frame(word);
        answer(direction, frames, count);
        for (size_t i = 0; i < count; i++)
            free((void *)frames[i].data);
    }
    free(line);
    return 0;
}
