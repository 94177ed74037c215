/*
 * Parsing for the door: command line, request, image names. Nothing here makes a system call with privilege or opens a
 * file; every function works on bytes that it is given, and is what the fuzzer and the comparing tests call.
 */
#define _GNU_SOURCE
#include "door.h"

#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/stat.h>
#include <unistd.h>

#include "config.h"
#include "options.h"

/* --- command line and environment --------------------------------------------------------------------------------- */

static _Noreturn void usage_error(const char *format, const char *word, int length)
{
    char text[512];
    snprintf(text, sizeof text, format, length, word);
    show_usage("usage", text);
}

static void take_option(struct invocation *asked, enum shifter_option option, const char *value)
{
    switch (option) {
    case OPT_HELP: show_usage("help", NULL);
    case OPT_VERSION: show_usage("version", NULL);
    case OPT_VERBOSE: asked->verbose = true; break;
    case OPT_IMAGE: asked->image_given = true, asked->image = asked->request_text = value; break;
    case OPT_VOLUME:
        if (!asked->volumes_given) /* the command line replaces SHIFTER_VOLUME */
            asked->volumes.count = 0;
        asked->volumes_given = true;
        list_add(&asked->volumes, value);
        break;
    case OPT_ENTRYPOINT: asked->entrypoint_given = true, asked->entrypoint = value; break;
    case OPT_WORKDIR: asked->workdir_given = true, asked->workdir = value; break;
    case OPT_MODULE:
        asked->modules_given = true;
        asked->modules.count = 0;
        list_add(&asked->modules, value);
        break;
    case OPT_ENV: list_add(&asked->env, value); break;
    case OPT_ENV_FILE: asked->env_file = value; break;
    case OPT_CLEARENV: asked->clearenv = true; break;
    }
}

static const struct option_entry *find_option(const char *name, size_t length, char letter)
{
    for (size_t i = 0; i < sizeof OPTION_TABLE / sizeof *OPTION_TABLE; i++) {
        const struct option_entry *entry = &OPTION_TABLE[i];
        if (letter ? entry->short_name == letter : strlen(entry->name) == length && strncmp(entry->name, name, length) == 0)
            return entry;
    }
    return NULL;
}

/* The rules of shifter/options.py. A parse error anywhere wins over --help before it, so options are taken in a second pass. */
static int parse_options(struct invocation *asked, int argc, char **argv, bool take)
{
    int index = 1;
    for (; index < argc; index++) {
        const char *word = argv[index];
        if (word[0] != '-' || word[1] == 0)
            break;
        if (strcmp(word, "--") == 0) {
            index++;
            break;
        }
        if (word[1] == '-') {
            size_t length = strcspn(word + 2, "=");
            const char *value = word[2 + length] ? word + 3 + length : NULL;
            const struct option_entry *entry = find_option(word + 2, length, 0);
            if (!entry)
                usage_error("unknown option '%.*s'", word, (int)length + 2);
            if (entry->argument == ARG_NONE && value)
                usage_error("option '%.*s' takes no value", word, (int)length + 2);
            if (entry->argument == ARG_REQUIRED && !value) {
                if (++index >= argc)
                    usage_error("option '%.*s' needs a value", word, (int)length + 2);
                value = argv[index];
            }
            if (take)
                take_option(asked, entry->id, value);
            continue;
        }
        for (const char *letter = word + 1; *letter; letter++) {
            const struct option_entry *entry = find_option("", 0, *letter);
            if (!entry)
                usage_error("unknown option '%.*s'", word, (int)strlen(word));
            const char *value = NULL;
            if (entry->argument != ARG_NONE && letter[1])
                value = letter + 1;
            if (entry->argument == ARG_REQUIRED && !value) {
                char name[3] = {'-', *letter, 0};
                if (++index >= argc)
                    usage_error("option '%.*s' needs a value", name, 2);
                value = argv[index];
            }
            if (take)
                take_option(asked, entry->id, value);
            if (value)
                break;
        }
    }
    return index;
}

/* Split the second of three or more words at blanks. */
char **split_words(int *argc, char **argv)
{
    char **words = need(calloc(strlen(argv[1]) + (size_t)*argc + 1, sizeof *words)), *rest = argv[1], *word;
    int count = 0;
    words[count++] = argv[0];
    while ((word = strsep(&rest, " \t")))
        if (*word)
            words[count++] = word;
    for (int i = 2; i < *argc; i++)
        words[count++] = argv[i];
    *argc = count;
    return words;
}

/*
 * A kernel that starts a #! script passes all of the line's arguments as one word: split it at blanks. The script is what
 * was started, and the word after the line's; what was started is the door itself when somebody has the door run a door.
 */
static char **split_interpreter_line(struct invocation *asked, int *argc, char **argv)
{
    struct stat script, door;
    const char *started = (const char *)getauxval(AT_EXECFN);
    if (*argc < 3 || !started || strcmp(started, argv[2]) != 0)
        return argv;
    if (stat(started, &script) == 0 && stat("/proc/self/exe", &door) == 0 && script.st_dev == door.st_dev && script.st_ino == door.st_ino)
        return argv;
    asked->script = argv[2];
    return split_words(argc, argv);
}

static const char *variable(const char *name)
{
    char spank[64];
    snprintf(spank, sizeof spank, "SLURM_SPANK_%s", name);
    const char *value = getenv(name);
    if (!value || !*value)
        value = getenv(spank);
    return value && *value ? value : NULL;
}

/* What batch systems call the id of a job in the environment of its processes; the first is for who has none of these. */
static const char *const JOB_VARIABLES[] = {"SHIFTER_JOB_ID", "SLURM_JOB_ID", "PBS_JOBID"};

void read_command_line(struct invocation *asked, int argc, char **argv)
{
    const char *type = variable("SHIFTER_IMAGETYPE"), *image = variable("SHIFTER_IMAGE"), *value;
    char *pair = NULL;
    asked->request_text = variable("SHIFTER_IMAGEREQUEST");
    if (image && type) {
        pair = need(malloc(strlen(type) + strlen(image) + 2));
        sprintf(pair, "%s:%s", type, image);
        asked->image = pair;
    } else { /* a UDI exports its identifier, without a type, beside the request: there the request is what is meant */
        asked->image = asked->request_text ? asked->request_text : image;
    }
    if ((value = variable("SHIFTER_VOLUME")))
        list_add(&asked->volumes, value);
    if ((value = variable("SHIFTER_MODULE")))
        list_add(&asked->modules, value);
    for (size_t i = 0; i < sizeof JOB_VARIABLES / sizeof *JOB_VARIABLES; i++)
        if ((value = getenv(JOB_VARIABLES[i])) && *value)
            list_add(&asked->job_hints, value);
    argv = split_interpreter_line(asked, &argc, argv);
    parse_options(asked, argc, argv, false);
    asked->command = argv + parse_options(asked, argc, argv, true);
    /* In a job the tag that it was submitted with means what it meant then, and what each of its nodes is set up with. */
    if (asked->image_given && image && type && strcmp(type, "id") == 0 && same_image(asked->image, variable("SHIFTER_IMAGEREQUEST")))
        asked->image = pair;
    if (!asked->request_text)
        asked->request_text = asked->image;
}

/* Return whether two names of an image say the same; a name without a type only equals another one without. */
bool same_image(const char *left, const char *right)
{
    char first[PATH_MAX + 16], second[PATH_MAX + 16];
    if (!right || strcmp(left, right) == 0)
        return right != NULL;
    enum reference_kind kind = parse_reference(left, "docker", first, sizeof first);
    if (kind == REFERENCE_OTHER || kind != parse_reference(right, "docker", second, sizeof second) || strcmp(first, second) != 0)
        return false;
    return parse_reference(left, "custom", first, sizeof first) == kind && parse_reference(right, "custom", second, sizeof second) == kind &&
           strcmp(first, second) == 0;
}

/* --- the request -------------------------------------------------------------------------------------------------- */

/* The canonical request, shifter/request.py. IMAGE_KEY is "image" (resolved) or "ref" (as the user named it). */
void make_request(struct document *request, const struct invocation *asked, const struct caller *caller, uint64_t namespace,
                         const char *once, const char *image_key, const char *image)
{
    char text[64], *groups = need(calloc((size_t)caller->group_count + 1, 12)), *end = groups;
    request->size = 0;
    field_add(request, "shifter", SHIFTER_BUILD);
    snprintf(text, sizeof text, "%u", (unsigned)caller->uid);
    field_add(request, "uid", text);
    snprintf(text, sizeof text, "%u", (unsigned)caller->gid);
    field_add(request, "gid", text);
    for (int i = 0; i < caller->group_count; i++)
        if (caller->groups[i] != caller->gid) /* some that log users in list it twice, and some don't */
            end += sprintf(end, end > groups ? ",%u" : "%u", (unsigned)caller->groups[i]);
    field_add(request, "groups", groups);
    free(groups);
    snprintf(text, sizeof text, "%llu", (unsigned long long)namespace);
    field_add(request, "ns", text);
    if (*once)
        field_add(request, "once", once);
    if (asked->job)
        field_add(request, "job", asked->job);
    field_add(request, image_key, image);
    for (size_t i = 0; i < asked->volumes.count; i++)
        field_add(request, "volume", asked->volumes.items[i]);
    for (size_t i = 0; i < asked->modules.count; i++)
        if (strcasecmp(asked->modules.items[i], "none") != 0)
            field_add(request, "module", asked->modules.items[i]);
}

/* --- the image's identifier (shifter/images/reference.py is the specification) ------------------------------------- */

static const char LETTERS[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_";

bool identifier_valid(const char *text)
{
    char allowed[sizeof LETTERS + 2];
    snprintf(allowed, sizeof allowed, "%s.-", LETTERS);
    return *text && *text != '.' && strlen(text) < 256 && text[strspn(text, allowed)] == 0;
}

/* shifter/request.py: job_is_valid. */
bool job_valid(const char *text)
{
    char allowed[sizeof LETTERS + 2];
    snprintf(allowed, sizeof allowed, "%s.-", LETTERS);
    return *text && !strchr(".-", *text) && strlen(text) <= 64 && text[strspn(text, allowed)] == 0;
}

/* Write local:PATH with empty and "." components dropped. */
static bool resolve_local(const char *path, char *out, size_t room)
{
    size_t used = (size_t)snprintf(out, room, "local:");
    if (*path != '/')
        return false;
    for (const char *c = path; *c; c++)
        if ((unsigned char)*c < 32 || *c == 127)
            return false;
    while (*path) {
        size_t length = strcspn(path, "/");
        if (length == 2 && strncmp(path, "..", 2) == 0)
            return false;
        if (length && !(length == 1 && *path == '.')) {
            if (used + length + 2 > room || used + length + 1 > strlen("local:") + PATH_MAX - 1)
                return false;
            used += (size_t)snprintf(out + used, room - used, "/%.*s", (int)length, path);
        }
        path += length + (path[length] == '/');
    }
    if (used == strlen("local:"))
        snprintf(out + used, room - used, "/");
    return true;
}

/*
 * Resolve what the user named as far as that needs no file: an identifier or local:PATH goes to OUT; for a tag, its file
 * name goes there, to be read in the tag store. REFERENCE_OTHER: the builder shall say what is wrong with it.
 */
enum reference_kind parse_reference(const char *text, const char *default_kind, char *out, size_t room)
{
    static const char *const kinds[] = {"docker", "custom", "id", "local"};
    const char *kind = NULL, *name = text, *colon = strchr(text, ':');
    for (size_t i = 0; colon && i < 4; i++)
        if (strlen(kinds[i]) == (size_t)(colon - text) && strncmp(kinds[i], text, strlen(kinds[i])) == 0) {
            kind = kinds[i];
            name = colon + 1;
        }
    for (size_t i = 0; !kind && i < 4; i++)
        if (strcmp(kinds[i], default_kind) == 0) {
            kind = kinds[i];
            break;
        }
    if (!kind)
        return REFERENCE_OTHER;
    text = name;
    if (strcmp(kind, "local") == 0)
        return resolve_local(text, out, room) ? REFERENCE_RESOLVED : REFERENCE_OTHER;
    if (strcmp(kind, "id") == 0)
        return identifier_valid(text) && strlen("id:") + strlen(text) <= NAME_MAX && (size_t)snprintf(out, room, "%s", text) < room
                   ? REFERENCE_RESOLVED
                   : REFERENCE_OTHER;
    char allowed[sizeof LETTERS + 8];
    snprintf(allowed, sizeof allowed, "%s.-+:@/", LETTERS);
    size_t length = strlen(text), used = (size_t)snprintf(out, room, "%s:", kind);
    if (!length || text[strspn(text, allowed)] || !strchr(LETTERS, text[0]) || strchr(":@/", text[length - 1]))
        return REFERENCE_OTHER;
    for (const char *c = text; *c && used < room; c++)
        used += (size_t)snprintf(out + used, room - used, *c == '/' ? "%%2F" : "%c", *c);
    const char *slash = strrchr(text, '/');
    if (used < room && !strchr(text, '@') && !strchr(slash ? slash : text, ':'))
        used += (size_t)snprintf(out + used, room - used, ":latest");
    return used < room && used <= NAME_MAX ? REFERENCE_TAG : REFERENCE_OTHER;
}
