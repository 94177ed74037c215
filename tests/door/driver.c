/*
 * The door's parsing (fields.c, parse.c) as a server for the comparing tests: one case on stdin, one answer on stdout.
 *
 *     case:   count, then that often (length, bytes); the first one names what is to be done, see main()
 *     answer: wait status, length, bytes: NUL-terminated lines
 *
 * All numbers are uint32_t of this machine. Each case runs in a child of its own, since parsing may end the process.
 */
#define _GNU_SOURCE
#include "door.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

struct word {
    char *data; /* followed by a NUL */
    uint32_t size;
};

_Noreturn void show_usage(const char *kind, const char *text)
{
    printf("%s%c%s%c", kind, 0, text ? text : "", 0);
    fflush(stdout);
    _exit(0);
}

static void print_field(const char *key, const char *value)
{
    printf("%s%s%s%c", key, value ? "=" : "", value ? value : "", 0);
}

static void print_list(const char *key, const struct list *list)
{
    for (size_t i = 0; i < list->count; i++)
        print_field(key, list->items[i]);
}

static void do_options(char **argv, int argc)
{
    static struct invocation asked;
    read_command_line(&asked, argc, argv);
    if (asked.image)
        print_field("image", asked.image);
    if (asked.request_text)
        print_field("request", asked.request_text);
    print_list("volume", &asked.volumes);
    print_list("module", &asked.modules);
    print_list("env", &asked.env);
    if (asked.env_file)
        print_field("env-file", asked.env_file);
    if (asked.entrypoint_given)
        print_field("entrypoint", asked.entrypoint);
    if (asked.workdir_given)
        print_field("workdir", asked.workdir);
    if (asked.clearenv)
        print_field("clearenv", NULL);
    if (asked.verbose)
        print_field("verbose", NULL);
    for (char **word = asked.command; *word; word++)
        print_field("word", *word);
}

static void do_reference(const char *text, const char *kind)
{
    char out[PATH_MAX + 16];
    static const char *const names[] = {"other", "resolved", "tag"};
    enum reference_kind parsed = parse_reference(text, kind, out, sizeof out);
    print_field(names[parsed], parsed == REFERENCE_OTHER ? NULL : out);
}

static void do_document(const struct word *bytes, const char *kind)
{
    /* On the heap and no larger than it must be, so that the sanitizer sees what is read beyond it. */
    size_t head = offsetof(struct document, data), whole = head + bytes->size, with_size = sizeof(struct document);
    struct document *document = need(malloc(whole > with_size ? whole : with_size));
    memset(document->data, 'x', sizeof document->data);
    document->size = bytes->size > MAX_DOCUMENT ? MAX_DOCUMENT : bytes->size;
    memcpy(document->data, bytes->data, document->size);
    bool valid = document_valid(document, kind);
    print_field(valid ? "valid" : "invalid", NULL);
    if (!valid)
        return;
    const char *field, *value;
    for (size_t position = 0; (field = field_next(document, &position, &value));)
        print_field(field, NULL);
    const char *first = field_first(document, "uid");
    print_field("first", first ? first : "(none)");
    free(document);
}

/* uid gid namespace once image_key image groups(comma separated) nvolumes volume... module... */
static void do_request(struct word *words, uint32_t count)
{
    static struct invocation asked;
    static struct caller caller;
    static struct document request;
    caller.uid = (uid_t)strtoul(words[0].data, NULL, 10);
    caller.gid = (gid_t)strtoul(words[1].data, NULL, 10);
    caller.groups = need(calloc(words[6].size + 1, sizeof(gid_t)));
    for (char *text = words[6].data, *number; (number = strsep(&text, ","));)
        if (*number)
            caller.groups[caller.group_count++] = (gid_t)strtoul(number, NULL, 10);
    uint32_t volumes = (uint32_t)strtoul(words[7].data, NULL, 10);
    for (uint32_t i = 8; i < count; i++)
        list_add(i - 8 < volumes ? &asked.volumes : &asked.modules, words[i].data);
    make_request(&request, &asked, &caller, strtoull(words[2].data, NULL, 10), words[3].data, words[4].data, words[5].data);
    if (strcmp(words[4].data, "ref") == 0)
        field_add(&request, "end", "request");
    fwrite(request.data, 1, request.size, stdout);
}

static void do_number(const char *text)
{
    uint64_t number = 0;
    const char *rest = text;
    char out[32] = "";
    if (take_number(&rest, &number))
        snprintf(out, sizeof out, "%llu", (unsigned long long)number);
    print_field(*out ? "number" : "none", *out ? out : NULL);
    print_field(rest, NULL);
}

static void run_case(struct word *words, uint32_t count)
{
    char **argv = need(calloc((size_t)count + 1, sizeof *argv));
    for (uint32_t i = 0; i < count; i++)
        argv[i] = words[i].data;
    if (strcmp(argv[0], "options") == 0) { /* number of variables, variables, words */
        uint32_t variables = (uint32_t)strtoul(argv[1], NULL, 10);
        clearenv();
        for (uint32_t i = 0; i < variables; i++)
            putenv(argv[2 + i]);
        argv[1 + variables] = "shifter";
        do_options(argv + 1 + variables, (int)(count - 1 - variables));
    } else if (strcmp(argv[0], "reference") == 0) {
        do_reference(argv[1], argv[2]);
    } else if (strcmp(argv[0], "document") == 0) {
        do_document(&words[1], argv[2]);
    } else if (strcmp(argv[0], "request") == 0) {
        do_request(words + 1, count - 1);
    } else if (strcmp(argv[0], "number") == 0) {
        do_number(argv[1]);
    }
    free(argv);
}

static bool read_exactly(void *memory, size_t size)
{
    return fread(memory, 1, size, stdin) == size;
}

int main(void)
{
    uint32_t count;
    static char answer[1 << 22];
    while (read_exactly(&count, sizeof count)) {
        struct word *words = need(calloc((size_t)count + 1, sizeof *words));
        for (uint32_t i = 0; i < count; i++) {
            if (!read_exactly(&words[i].size, sizeof words[i].size))
                return 1;
            words[i].data = need(calloc(1, (size_t)words[i].size + 1));
            if (!read_exactly(words[i].data, words[i].size))
                return 1;
        }
        int pipes[2], status = 0;
        if (pipe(pipes) != 0)
            return 1;
        pid_t child = fork();
        if (child == 0) {
            dup2(pipes[1], 1);
            dup2(pipes[1], 2);
            close(pipes[0]);
            close(pipes[1]);
            run_case(words, count);
            fflush(stdout);
            _exit(0);
        }
        close(pipes[1]);
        uint32_t size = 0;
        for (ssize_t got; (got = read(pipes[0], answer + size, sizeof answer - size)) > 0;)
            size += (uint32_t)got;
        close(pipes[0]);
        if (child < 0 || waitpid(child, &status, 0) != child)
            return 1;
        uint32_t head[2] = {(uint32_t)status, size};
        fwrite(head, sizeof head, 1, stdout);
        fwrite(answer, 1, size, stdout);
        fflush(stdout);
        for (uint32_t i = 0; i < count; i++)
            free(words[i].data);
        free(words);
    }
    return 0;
}
