/*
 * The door's formats: messages, key=value fields, and what stands in them. No file is opened, no system call made here;
 * every function works on bytes that it is given, and is what the fuzzer and the comparing tests call.
 */
#include "door.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "config.h"

/* --- messages and memory ------------------------------------------------------------------------------------------ */

/* Write "shifter: ", the message, cut where there is no more room, with control characters made harmless, and a newline. */
size_t format_message(char *text, size_t room, const char *format, va_list arguments)
{
    size_t used = (size_t)snprintf(text, room, "shifter: ");
    vsnprintf(text + used, room - used, format, arguments);
    size_t length = strlen(text);
    for (char *c = text; *c; c++)
        if ((unsigned char)*c < 32 || *c == 127)
            *c = '?';
    text[length] = '\n'; /* in place of the NUL */
    return length + 1;
}

void *need(void *memory)
{
    if (!memory)
        die("out of memory");
    return memory;
}

void list_add(struct list *list, const char *item)
{
    list->items = need(realloc(list->items, (list->count + 1) * sizeof *list->items));
    list->items[list->count++] = item;
}

/* --- fields (shifter/fields.py) ----------------------------------------------------------------------------------- */

/* Return the key of the field at *position and move on; the key ends at '='. NULL at the end. */
const char *field_next(const struct document *document, size_t *position, const char **value)
{
    if (*position >= document->size)
        return NULL;
    const char *field = document->data + *position;
    *position += strlen(field) + 1;
    const char *equals = strchr(field, '=');
    *value = equals ? equals + 1 : field + strlen(field);
    return field;
}

bool key_is(const char *field, const char *key)
{
    size_t length = strlen(key);
    return strncmp(field, key, length) == 0 && field[length] == '=';
}

const char *field_first(const struct document *document, const char *key)
{
    const char *field, *value;
    for (size_t position = 0; (field = field_next(document, &position, &value));)
        if (key_is(field, key))
            return value;
    return NULL;
}

void field_add(struct document *document, const char *key, const char *value)
{
    int room = (int)(sizeof document->data - document->size);
    int length = snprintf(document->data + document->size, (size_t)room, "%s=%s", key, value);
    if (length < 0 || length + 1 > room)
        die("the request is too long: fewer volumes or groups, please");
    document->size += (size_t)length + 1;
}

/* A document is whole if it ends with end=KIND and every field has a '='; it begins with our own build. */
bool document_valid(const struct document *document, const char *kind)
{
    if (document->size == 0 || document->data[document->size - 1] != 0)
        return false;
    const char *field, *value, *last = "";
    for (size_t position = 0; (field = field_next(document, &position, &value)); last = field)
        if (!strchr(field, '='))
            return false;
    return key_is(last, "end") && strcmp(last + 4, kind) == 0 && strncmp(document->data, "shifter=" SHIFTER_BUILD, sizeof "shifter=" SHIFTER_BUILD) == 0;
}

/* Return what follows the decimal number that TEXT begins with; NULL if it begins with none in canonical form. */
static const char *take_digits(const char *text, uint64_t *number)
{
    char *end;
    if (*text < '0' || *text > '9' || (*text == '0' && text[1] >= '0' && text[1] <= '9'))
        return NULL;
    errno = 0;
    *number = strtoull(text, &end, 10);
    return errno ? NULL : end;
}

/* Take a decimal number and the colon behind it from *text. */
bool take_number(const char **text, uint64_t *number)
{
    const char *end = take_digits(*text, number);
    if (!end || *end != ':')
        return false;
    *text = end + 1;
    return true;
}

/* Take WATCH from AS:DEV:INO:SIZE:MTIME_NS:CTIME_NS:PATH. */
bool parse_watch(const char *text, struct watch *watch)
{
    if (!take_number(&text, &watch->as) || !take_number(&text, &watch->device) || !take_number(&text, &watch->inode) ||
        !take_number(&text, &watch->size) || !take_number(&text, &watch->mtime) || !take_number(&text, &watch->ctime))
        return false;
    watch->path = text;
    return watch->as <= MAX_ID && *text == '/'; /* a larger number would be cut to the id of somebody else */
}

/* Take SOURCE from DEV:INO:PATH. */
bool parse_source(const char *text, struct source *source)
{
    if (!take_number(&text, &source->device) || !take_number(&text, &source->inode))
        return false;
    source->path = text;
    return *text == '/';
}

/* Find the uid or gid that the first field of that name holds. */
bool field_id(const struct document *document, const char *key, unsigned *id)
{
    const char *text = field_first(document, key);
    uint64_t number;
    const char *rest = text ? take_digits(text, &number) : NULL;
    if (!rest || *rest || number > MAX_ID)
        return false;
    *id = (unsigned)number;
    return true;
}
