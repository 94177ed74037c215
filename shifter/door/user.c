/*
 * What the door does as the user, when no privilege is left: working directory, environment, entry point, exec; and the
 * answers for a door that got no privilege in the first place.
 */
#define _GNU_SOURCE
#include "door.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MARKER "/var/shifterConfig.json"
#define MAX_ENV_FILE (1 << 20)
#define FIRST_USER_NAMESPACE 0xEFFFFFFD /* PROC_USER_INIT_INO of the kernel, the same since 3.8 */

extern char **environ;

/* --- environment -------------------------------------------------------------------------------------------------- */

/* The path is one inside of the container. */
static void env_from_file(struct list *env, const char *path)
{
    char *text = malloc(MAX_ENV_FILE + 1);
    size_t size = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (!text || fd < 0)
        die("--env-file %s: %s (the path is one inside of the container)", path, strerror(errno));
    for (ssize_t got; (got = read(fd, text + size, MAX_ENV_FILE + 1 - size)) != 0; size += (size_t)got) {
        if (got < 0)
            die("--env-file %s: %s", path, strerror(errno));
        if (size + (size_t)got > MAX_ENV_FILE)
            die("--env-file %s: larger than %d bytes", path, MAX_ENV_FILE);
    }
    close(fd);
    text[size] = 0;
    env_from_text(env, path, text, size);
}

static void env_named(struct list *env, const char *name, const char *value)
{
    char *assignment;
    if (!value)
        return;
    if (asprintf(&assignment, "%s=%s", name, value) < 0)
        die("out of memory");
    env_set(env, assignment);
}

/* The user's own two sources, in their order. */
static void env_of_user(struct list *env, const struct invocation *asked)
{
    if (asked->env_file)
        env_from_file(env, asked->env_file);
    for (size_t i = 0; i < asked->env.count; i++) {
        if (!is_assignment(asked->env.items[i]))
            die("--env %s: not NAME=VALUE", asked->env.items[i]);
        env_set(env, asked->env.items[i]);
    }
}

static void build_environment(struct list *env, const struct invocation *asked, const struct document *record)
{
    for (char **variable = environ; !asked->clearenv && variable && *variable; variable++)
        if (is_assignment(*variable))
            list_add(env, *variable);
    /* They name libraries of the node, which would be loaded into every program of the image. A site can set them again. */
    env_unset(env, "LD_PRELOAD");
    env_unset(env, "LD_AUDIT");
    env_named(env, "SHIFTER_IMAGEREQUEST", asked->request_text);
    env_named(env, "SHIFTER_IMAGE", field_first(record, "image"));
    env_rules(env, record, true);
    env_of_user(env, asked);
    env_rules(env, record, false);
}

/* --- command ------------------------------------------------------------------------------------------------------ */

static void add_fields(struct list *words, const struct document *record, const char *key)
{
    const char *field, *value;
    size_t length = strlen(key);
    for (size_t position = 0; (field = field_next(record, &position, &value));)
        if (strncmp(field, key, length) == 0 && field[length] == '=')
            list_add(words, value);
}

/*
 * A workload manager starts a copy of the script, in a directory of its own that containers do not have. Then the interpreter
 * reads it from the descriptor: /proc/self/fd/N, which everything that can open a script can open.
 */
static const char *script_name(const struct invocation *asked)
{
    struct stat outside, inside;
    char *name;
    if (asked->script_fd <= 0 || fstat(asked->script_fd, &outside) != 0 ||
        (stat(asked->script, &inside) == 0 && inside.st_dev == outside.st_dev && inside.st_ino == outside.st_ino))
        return asked->script;
    if (fcntl(asked->script_fd, F_SETFD, 0) != 0 || asprintf(&name, "/proc/self/fd/%d", asked->script_fd) < 0)
        die("can't hand over the script: %s", strerror(errno));
    return name;
}

/* shifter-behaviour.md 7.3: entry point E, CMD C and the words of the command line. */
static void choose_command(struct list *words, const struct invocation *asked, const struct document *record)
{
    if (asked->entrypoint_given && asked->entrypoint) {
        list_add(words, asked->entrypoint);
    } else if (asked->entrypoint_given) {
        add_fields(words, record, "entry");
        if (!words->count)
            die("--entrypoint: the image has no entry point; name one: --entrypoint=CMD");
        if (!asked->command[0])
            add_fields(words, record, "cmd");
    } else if (!asked->command[0]) {
        const char *shell = field_first(record, "shell");
        list_add(words, shell ? shell : "/bin/sh");
    }
    for (char **word = asked->command; *word; word++)
        list_add(words, *word == asked->script ? script_name(asked) : *word);
    list_add(words, NULL);
}

static void choose_directory(const struct invocation *asked, const struct caller *caller, const struct document *record)
{
    const char *home = getenv("HOME"), *wanted = asked->workdir;
    if (asked->workdir_given) {
        if (!wanted && !(wanted = field_first(record, "workdir")))
            die("--workdir: the image has no working directory; name one: --workdir=PATH");
        if (chdir(wanted) != 0)
            die("--workdir %s: %s (the path is one inside of the container)", wanted, strerror(errno));
        return;
    }
    if (caller->cwd && chdir(caller->cwd) == 0)
        return;
    const char *where = home && chdir(home) == 0 ? home : "/";
    if (where != home && chdir("/") != 0)
        die("can't enter /: %s", strerror(errno));
    say("the working directory %s is not there in the container; using %s", caller->cwd ? caller->cwd : "(unreachable)", where);
}

static _Noreturn void execute(struct list *words, struct list *env, const struct caller *caller)
{
    list_add(env, NULL);
    environ = (char **)env->items; /* so that execvp(3) searches the container's PATH */
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &caller->mask, NULL, sizeof caller->mask);
    execvp(words->items[0], (char **)words->items);
    int reason = errno, status = reason == ENOENT || reason == ENOTDIR ? 127 : 126;
    const char *text = strerror(reason), *name = words->items[0];
    if (reason == ENOENT && strchr(name, '/') && access(name, X_OK) == 0)
        text = "it is there, but the program that its #! line or its ELF header names is not";
    else if (reason == ENOENT)
        text = strchr(name, '/') ? "no such file in the container" : "not found on the container's PATH";
    else if (reason == ENOEXEC)
        text = "neither a program for this machine nor a script with a #! line";
    else if (reason == E2BIG)
        text = "arguments and environment together are too long";
    say("%s: %s", name, text);
    _exit(status);
}

/* --- terminal ----------------------------------------------------------------------------------------------------- */

/* The terminals of the node have no name inside. */
bool has_own_devpts(const struct document *record)
{
    const char *devpts = field_first(record, "devpts");
    return devpts && strcmp(devpts, "private") == 0;
}

/*
 * The caller's terminal is on /dev/console, but its descriptors were opened by a name that means nothing here, or another
 * terminal. musl's ttyname(3) knows only that name: open it by the new one.
 */
static void reopen_terminal(void)
{
    struct stat console, status;
    if (stat("/dev/console", &console) != 0)
        return;
    for (int fd = 0; fd <= 2; fd++)
        if (fstat(fd, &status) == 0 && status.st_dev == console.st_dev && status.st_ino == console.st_ino) {
            int again = open("/dev/console", fcntl(fd, F_GETFL) | O_NOCTTY | O_CLOEXEC);
            if (again >= 0) { /* else it is another user's, as after su */
                dup2(again, fd);
                close(again);
            }
        }
}

/* Inside the UDI, everything dropped. */
_Noreturn void run_command(const struct invocation *asked, const struct caller *caller, const struct document *record)
{
    struct list words = {0}, env = {0};
    if (has_own_devpts(record))
        reopen_terminal();
    choose_directory(asked, caller, record);
    build_environment(&env, asked, record);
    choose_command(&words, asked, record);
    execute(&words, &env, caller);
}

/* --- without privilege -------------------------------------------------------------------------------------------- */

/* Read a small file of /proc or of the UDI; returns "" if it can't be. */
static const char *small_file(const char *path, char *text, size_t room)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? 0 : read(fd, text, room - 1);
    if (fd >= 0)
        close(fd);
    text[size > 0 ? size : 0] = 0;
    return text;
}

/* Return whether the marker, a JSON object of plain strings, has that value. A value that needs escapes never matches. */
static bool marker_has(const char *marker, const char *key, const char *value)
{
    char *text;
    if (asprintf(&text, "\"%s\":\"%s\"", key, value) < 0)
        die("out of memory");
    bool found = strstr(marker, text) != NULL;
    free(text);
    return found;
}

static const char *join(const struct list *words, char separator)
{
    size_t size = 1;
    for (size_t i = 0; i < words->count; i++)
        size += strlen(words->items[i]) + 1;
    char *text = need(calloc(1, size)), *end = text;
    for (size_t i = 0; i < words->count; i++) {
        if (i)
            *end++ = separator;
        end = stpcpy(end, words->items[i]);
    }
    return text;
}

/*
 * Inside a UDI `shifter CMD` runs CMD, if no other image is asked for than the one that it is in. What the environment says
 * of image, volumes and modules is how this UDI was asked for.
 */
static _Noreturn void run_inside(struct invocation *asked, const struct caller *caller, const char *marker)
{
    const char *outer = getenv("SHIFTER_IMAGEREQUEST"), *image = getenv("SHIFTER_IMAGE");
    static struct document record;
    struct list words = {0}, env = {0};
    const char *named = asked->image_given ? asked->image : NULL;
    if (named && !same_image(named, outer) && !same_image(named, image) &&
        !marker_has(marker, "identifier", strncmp(named, "id:", 3) == 0 ? named + 3 : named))
        die("this is the inside of a UDI of %s: another image (%s) can't be entered from here", outer ? outer : "another image", named);
    if (asked->volumes_given && !marker_has(marker, "volMap", join(&asked->volumes, ';')))
        die("this is the inside of a UDI: volumes can't be added");
    if (asked->modules_given && strcasecmp(asked->modules.items[0], "none") != 0)
        die("this is the inside of a UDI: modules can't be added");
    if (asked->entrypoint_given && !asked->entrypoint)
        die("--entrypoint: the image's entry point isn't known inside of a UDI; name one: --entrypoint=CMD");
    if (asked->workdir_given && !asked->workdir)
        die("--workdir: the image's working directory isn't known inside of a UDI; name one: --workdir=PATH");
    const struct passwd *account = getpwuid(caller->uid); /* the UDI's own passwd, whose shell is one that the image has */
    if (account && account->pw_shell[0] == '/')
        field_add(&record, "shell", account->pw_shell);
    choose_directory(asked, caller, &record);
    for (char **variable = environ; !asked->clearenv && variable && *variable; variable++)
        list_add(&env, *variable);
    env_of_user(&env, asked);
    choose_command(&words, asked, &record);
    execute(&words, &env, caller);
}

/* Say so and end, in a user namespace other than the node's first: setuid root means nothing outside of it. */
void refuse_user_namespace(void)
{
    static char text[4096];
    char *rest = text;
    struct stat status;
    small_file("/proc/self/uid_map", text, sizeof text); /* first, first outside, count: all ids, mapped to themselves */
    bool mapped = strtoul(rest, &rest, 10) != 0 || strtoul(rest, &rest, 10) != 0 || strtoul(rest, &rest, 10) != 4294967295;
    if (stat("/proc/self/ns/user", &status) == 0 ? status.st_ino != FIRST_USER_NAMESPACE : mapped)
        die("no privilege: this is a user namespace (unshare -U, rootless container); run shifter outside of it");
}

/* The effective uid is not root's: say which of the possible reasons it is. */
_Noreturn void run_without_privilege(int argc, char **argv, struct caller *caller)
{
    static struct invocation asked;
    static char text[4096];
    char path[256] = "";
    struct stat status;
    struct statvfs mount;
    read_command_line(&asked, argc, argv);
    if (caller->uid == 0) {
        refuse_user_namespace();
        die("shifter is for ordinary users: uid 0 and gid 0 are refused (uid 0, gid %u)", (unsigned)caller->gid);
    }
    bool inside = stat(MARKER, &status) == 0 && status.st_uid == 0 && statvfs(MARKER, &mount) == 0 && (mount.f_flag & ST_RDONLY);
    if (inside)
        run_inside(&asked, caller, small_file(MARKER, text, sizeof text));
    ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
    path[length > 0 ? length : 0] = 0;
    if (prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1)
        die("no privilege: no_new_privs is set for this process (by a container, a sandbox or a service manager), so no setuid program works");
    refuse_user_namespace();
    const char *tracer = strstr(small_file("/proc/self/status", text, sizeof text), "TracerPid:");
    if (tracer && strtol(tracer + strlen("TracerPid:"), NULL, 10) != 0)
        die("no privilege: a debugger or strace of an ordinary user traces this process, so the kernel ignores the setuid bit");
    if (stat("/proc/self/exe", &status) == 0 && (status.st_uid != 0 || !(status.st_mode & S_ISUID)))
        die("no privilege: %s is not setuid root any more (mode %04o, uid %u); run, as root: make install", path, (unsigned)(status.st_mode & 07777), (unsigned)status.st_uid);
    if (statvfs("/proc/self/exe", &mount) == 0 && (mount.f_flag & ST_NOSUID))
        die("no privilege: %s is on a file system that is mounted nosuid", path);
    die("no privilege: the kernel ignored the setuid bit of %s", path);
}
