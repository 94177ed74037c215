/* Targets: documents (request, record, site file) with what stands in their fields, image references, environments. */
#include "fuzz.h"

#include <inttypes.h>
#include <limits.h>

#include "config.h"

#define HEAD "shifter=" SHIFTER_BUILD

/* --- documents ---------------------------------------------------------------------------------------------------- */

/* A number, path or id that was understood is printed as it stood there. */
static void check_value(const struct document *document, const char *field, const char *value)
{
    struct watch watch;
    struct source source;
    char *printed;
    unsigned id;
    if (key_is(field, "watch") && parse_watch(value, &watch)) {
        fuzz_asprintf(&printed, "%" PRIu64 ":%" PRIu64 ":%" PRIu64 ":%" PRIu64 ":%" PRIu64 ":%" PRIu64 ":%s", watch.as,
                      watch.device, watch.inode, watch.size, watch.mtime, watch.ctime, watch.path);
        CHECK(strcmp(printed, value) == 0 && watch.as <= MAX_ID && *watch.path == '/');
    }
    if (key_is(field, "source") && parse_source(value, &source)) {
        fuzz_asprintf(&printed, "%" PRIu64 ":%" PRIu64 ":%s", source.device, source.inode, source.path);
        CHECK(strcmp(printed, value) == 0 && *source.path == '/');
    }
    if (key_is(field, "storeUid") && field_first(document, "storeUid") == value && field_id(document, "storeUid", &id)) {
        fuzz_asprintf(&printed, "%u", id);
        CHECK(strcmp(printed, value) == 0);
    }
}

static size_t same_names(const struct list *env, const char *assignment)
{
    size_t length = strcspn(assignment, "=") + 1, found = 0;
    for (size_t i = 0; i < env->count; i++)
        found += strncmp(env->items[i], assignment, length) == 0;
    return found;
}

/* Every variable has a name, and a name that a rule set stands there once. */
static void check_rules(const struct document *document)
{
    struct list env = {0};
    size_t rules = 0, position = 0;
    list_add(&env, "A=1");
    list_add(&env, "PATH=/bin");
    list_add(&env, "A=2");
    env_rules(&env, document, true);
    env_rules(&env, document, false);
    for (const char *field, *value; (field = field_next(document, &position, &value));)
        rules += strncmp(field, "env.", 4) == 0;
    CHECK(env.count <= 3 + rules);
    for (size_t i = 0; i < env.count; i++) {
        CHECK(is_assignment(env.items[i]));
        size_t count = same_names(&env, env.items[i]);
        CHECK(count == 1 || (count == 2 && strncmp(env.items[i], "A=", 2) == 0));
    }
    env_set(&env, "A=3");
    CHECK(same_names(&env, "A=") == 1);
    env_unset(&env, "A");
    CHECK(same_names(&env, "A=") == 0);
}

/* A document that is whole is the sequence of its fields, each with a key, between our build and its kind. */
static void check_fields(const struct document *document, const char *kind)
{
    static struct document copy;
    size_t position = 0, expected = 0;
    const char *last = NULL, *image = NULL;
    open_document(&copy);
    copy.size = 0;
    for (const char *field, *value; (field = field_next(document, &position, &value)); last = field) {
        CHECK(field == document->data + expected && value > field && value[-1] == '=' && position <= document->size);
        expected = position;
        char *key = strndup(field, (size_t)(value - field) - 1);
        CHECK(!strchr(key, '=') && key_is(field, key));
        const char *first = field_first(document, key);
        CHECK(first && first <= value && key_is(first - strlen(key) - 1, key));
        if (!image && strcmp(key, "image") == 0)
            image = value;
        field_add(&copy, key, value);
        (free)(key);
        check_value(document, field, value);
    }
    CHECK(position == document->size && last && key_is(last, "end") && strcmp(last + 4, kind) == 0);
    CHECK(strcmp(document->data, HEAD) == 0 && field_first(document, "image") == image);
    CHECK(copy.size == document->size && memcmp(copy.data, document->data, copy.size) == 0);
}

/* Which kind, and whether the first and the last field are given; then the fields. */
void fuzz_document(struct input input)
{
    static struct document document;
    static const char *const kinds[] = {"record", "site", "request"};
    uint8_t flags = take_byte(&input);
    const char *kind = kinds[flags % 3];
    open_document(&document);
    document.size = 0;
    if (flags & 0x10)
        field_add(&document, "shifter", SHIFTER_BUILD);
    if (input.size < sizeof document.data - 64) {
        memcpy(document.data + document.size, input.data, input.size);
        document.size += input.size;
    }
    if (flags & 0x20)
        field_add(&document, "end", kind);
    close_document(&document);
    if (!document_valid(&document, kind))
        return;
    check_fields(&document, kind);
    check_rules(&document);
}

/* --- references --------------------------------------------------------------------------------------------------- */

static void decode_tag(char *tag)
{
    char *to = tag;
    for (const char *from = tag; *from; to++)
        if (strncmp(from, "%2F", 3) == 0)
            *to = '/', from += 3;
        else
            *to = *from++;
    *to = 0;
}

static void check_tag(char *out, size_t room)
{
    char *again = malloc(room);
    CHECK(strlen(out) <= NAME_MAX && !strchr(out, '/') && out[0] != '.');
    CHECK(strncmp(out, "docker:", 7) == 0 || strncmp(out, "custom:", 7) == 0);
    char *name = strcpy(malloc(strlen(out) + 1), out);
    decode_tag(name);
    CHECK(parse_reference(name, "", again, room) == REFERENCE_TAG && strcmp(again, out) == 0);
}

static void check_resolved(const char *out, size_t room)
{
    char *again = malloc(room), *name;
    if (strncmp(out, "local:", 6) != 0) {
        CHECK(identifier_valid(out) && !strpbrk(out, "/:%") && out[0] != '.' && strlen(out) + 3 <= NAME_MAX);
        fuzz_asprintf(&name, "id:%s", out);
        CHECK(parse_reference(name, "", again, room) == REFERENCE_RESOLVED && strcmp(again, out) == 0);
        return;
    }
    const char *path = out + 6;
    size_t length = strlen(path);
    CHECK(path[0] == '/' && length < PATH_MAX && (length == 1 || path[length - 1] != '/'));
    fuzz_asprintf(&name, "%s/", path);
    CHECK(!strstr(path, "//") && !strstr(name, "/./") && !strstr(name, "/../"));
    for (size_t i = 0; i < length; i++)
        CHECK((unsigned char)path[i] >= 32 && path[i] != 127);
    CHECK(parse_reference(out, "", again, room) == REFERENCE_RESOLVED && strcmp(again, out) == 0);
}

/* The kind that is the default, how large the answer may be, how often the rest is repeated; then the name. */
void fuzz_reference(struct input input)
{
    static const char *const kinds[] = {"docker", "custom", "id", "local", "", "Docker"};
    uint8_t flags = take_byte(&input);
    size_t room = flags & 0x80 ? 64 : PATH_MAX + 16, repeat = flags & 0x40 ? 40 : 1;
    char *part = take_word(&input), *tail = take_word(&input);
    size_t length = part ? strlen(part) : 0, used = 0;
    char *text = calloc(repeat * length + (tail ? strlen(tail) : 0) + 1, 1), *out = malloc(room);
    for (size_t i = 0; i < repeat && part; i++, used += length)
        memcpy(text + used, part, length);
    if (tail)
        strcpy(text + used, tail);
    enum reference_kind kind = parse_reference(text, kinds[(flags & 0x3f) % 6], out, room);
    CHECK(kind == REFERENCE_OTHER || strlen(out) < room);
    if (kind == REFERENCE_TAG)
        check_tag(out, room);
    if (kind == REFERENCE_RESOLVED)
        check_resolved(out, room);
}

/* --- environments ------------------------------------------------------------------------------------------------- */

struct reading {
    struct list env;
    char *text;
    size_t size;
};

static void read_text(void *argument)
{
    struct reading *reading = argument;
    env_from_text(&reading->env, "/vars", reading->text, reading->size);
}

static size_t count_lines(const char *text)
{
    size_t lines = 1;
    for (; (text = strchr(text, '\n')); text++)
        lines++;
    return lines;
}

/* The bytes of a file. */
void fuzz_environment(struct input input)
{
    struct reading reading = {.size = input.size}, again = {0};
    reading.text = take_rest(&input);
    size_t lines = count_lines(reading.text), number;
    char *end = reading.text + reading.size;
    bool nul = strlen(reading.text) != reading.size;
    if (!survives(read_text, &reading)) {
        if (nul)
            CHECK(strcmp(fuzz_message(), "shifter: --env-file /vars: NUL byte") == 0);
        else
            CHECK(sscanf(fuzz_message(), "shifter: --env-file /vars line %zu: not NAME=VALUE", &number) == 1 && number <= lines);
        return;
    }
    CHECK(!nul && reading.env.count <= lines);
    again.text = calloc(reading.size + lines + 1, 1);
    for (size_t i = 0; i < reading.env.count; i++) {
        const char *item = reading.env.items[i];
        CHECK(item >= end - reading.size && item < end && is_assignment(item) && *item != '#');
        CHECK(same_names(&reading.env, item) == 1);
        CHECK(!strchr(" \t\r", item[0]) && !strchr(" \t\r", item[strlen(item) - 1]) && !strchr(item, '\n'));
        again.size += (size_t)sprintf(again.text + again.size, "%s\n", item);
    }
    CHECK(survives(read_text, &again) && again.env.count == reading.env.count);
    for (size_t i = 0; i < again.env.count; i++)
        CHECK(strcmp(again.env.items[i], reading.env.items[i]) == 0);
}
