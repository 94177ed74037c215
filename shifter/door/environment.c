/*
 * Environments as lists of NAME=VALUE: what the rules of a record and the lines of a file make of one. No file is opened
 * and no system call made here; the fuzzer calls every function.
 */
#define _GNU_SOURCE
#include "door.h"

#include <stdio.h>
#include <string.h>

static size_t name_length(const char *assignment)
{
    return strcspn(assignment, "=");
}

static const char *env_value(const struct list *env, const char *name, size_t length)
{
    for (size_t i = 0; i < env->count; i++)
        if (strncmp(env->items[i], name, length) == 0 && env->items[i][length] == '=')
            return env->items[i] + length + 1;
    return NULL;
}

/* Remove every variable of that name: a caller may have passed it twice. */
void env_unset(struct list *env, const char *name)
{
    size_t length = name_length(name), kept = 0;
    for (size_t i = 0; i < env->count; i++)
        if (strncmp(env->items[i], name, length) != 0 || env->items[i][length] != '=')
            env->items[kept++] = env->items[i];
    env->count = kept;
}

/* Set a variable in its place; a second one of that name, which some shells would see instead, goes. */
void env_set(struct list *env, const char *assignment)
{
    size_t length = name_length(assignment), kept = 0;
    bool placed = false;
    for (size_t i = 0; i < env->count; i++) {
        bool same = strncmp(env->items[i], assignment, length) == 0 && env->items[i][length] == '=';
        if (!same)
            env->items[kept++] = env->items[i];
        else if (!placed)
            env->items[kept++] = assignment;
        placed = placed || same;
    }
    env->count = kept;
    if (!placed)
        list_add(env, assignment);
}

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" /* of a login on Debian, and more */

/* Set NAME to OLD:NEW (append) or NEW:OLD; an unset or empty one is just set, but PATH has a default. */
static void env_join(struct list *env, const char *assignment, bool append)
{
    size_t length = name_length(assignment);
    const char *old = env_value(env, assignment, length), *added = assignment + length + 1;
    char *joined = (char *)assignment;
    if ((!old || !*old) && length == strlen("PATH") && strncmp(assignment, "PATH", length) == 0)
        old = DEFAULT_PATH;
    if (old && *old && asprintf(&joined, "%.*s=%s:%s", (int)length, assignment, append ? old : added, append ? added : old) < 0)
        die("out of memory");
    env_set(env, joined);
}

/* Return whether TEXT is NAME=VALUE with a name. */
bool is_assignment(const char *text)
{
    return strchr(text, '=') && text[0] != '=';
}

/*
 * Set what the SIZE bytes at TEXT say (a NUL follows them): lines of NAME=VALUE; blank lines and # comments are skipped.
 * The environment keeps pointers into TEXT. PATH is for messages.
 */
void env_from_text(struct list *env, const char *path, char *text, size_t size)
{
    if (strlen(text) != size)
        die("--env-file %s: NUL byte", path);
    char *line;
    for (int number = 1; (line = strsep(&text, "\n")); number++) {
        line += strspn(line, " \t\r");
        for (size_t end = strlen(line); end && strchr(" \t\r", line[end - 1]); end--)
            line[end - 1] = 0;
        if (*line == 0 || *line == '#')
            continue;
        if (!is_assignment(line))
            die("--env-file %s line %d: not NAME=VALUE", path, number);
        env_set(env, line);
    }
}

/* Apply the record's env.* fields: the image's, or all others. */
void env_rules(struct list *env, const struct document *record, bool image)
{
    const char *field, *value;
    for (size_t position = 0; (field = field_next(record, &position, &value));) {
        if (strncmp(field, "env.", 4) != 0 || (strncmp(field, "env.image=", 10) == 0) != image)
            continue;
        if (strncmp(field + 4, "unset=", 6) == 0)
            env_unset(env, value);
        /* An image may have a bare name: it says nothing. A default is for what neither user nor image has. */
        else if (!is_assignment(value) || (strncmp(field + 4, "default=", 8) == 0 && env_value(env, value, name_length(value))))
            continue;
        else if (strncmp(field + 4, "append=", 7) == 0)
            env_join(env, value, true);
        else if (strncmp(field + 4, "prepend=", 8) == 0)
            env_join(env, value, false);
        else
            env_set(env, value);
    }
}
