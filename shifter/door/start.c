/*
 * Starting the builder: a clean root process that nothing of the caller's can reach, and the conversation with it.
 */
#define _GNU_SOURCE
#include "door.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "config.h"

uint64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* --- a clean process ---------------------------------------------------------------------------------------------- */

/* The builder gets what root may have; where that is refused, what is possible. Called with root's rights. */
static void lift_limits(void)
{
    for (int resource = 0; resource < RLIM_NLIMITS; resource++) {
        struct rlimit limit = {RLIM_INFINITY, RLIM_INFINITY};
        if (resource == RLIMIT_CORE)
            limit.rlim_cur = limit.rlim_max = 0;
        if (resource == RLIMIT_NOFILE)
            limit.rlim_cur = limit.rlim_max = 4096;
        if (resource == RLIMIT_STACK)
            limit.rlim_cur = 8 << 20;
        if (setrlimit(resource, &limit) != 0 && getrlimit(resource, &limit) == 0 && resource != RLIMIT_STACK) {
            limit.rlim_cur = limit.rlim_max;
            setrlimit(resource, &limit);
        }
    }
}

/* Nobody but root may be able to change what is run as root: every directory on the way belongs to root. */
static void check_trusted(const char *path)
{
    char part[PATH_MAX];
    for (const char *end = path; end; end = strchr(end + 1, '/')) {
        struct stat status;
        const char *next = strchr(end + 1, '/');
        snprintf(part, sizeof part, "%.*s", next ? (int)(next - path) : PATH_MAX - 1, path);
        if (lstat(part, &status) != 0)
            die("%s: %s; run: make install", part, strerror(errno));
        if (status.st_uid != 0 || (status.st_mode & 022) || S_ISLNK(status.st_mode))
            die("%s must belong to root, be writable by nobody else, and be no symbolic link", part);
    }
}

static void write_text(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd >= 0) {
        if (write(fd, text, strlen(text)) < 0) {
            /* a refinement, not a condition */
        }
        close(fd);
    }
}

/* Leave a cgroup that the user's job could freeze or throttle while the builder holds a lock that others wait for. */
static void leave_cgroup(void)
{
    char line[4096];
    FILE *table = fopen("/proc/self/cgroup", "re");
    while (table && fgets(line, sizeof line, table)) {
        char *controllers = strchr(line, ':'), *path = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!path || strcmp(path, ":/\n") == 0)
            continue;
        *path = 0;
        if (controllers[1] == 0) {
            write_text("/sys/fs/cgroup/cgroup.procs", "0");
            write_text("/sys/fs/cgroup/unified/cgroup.procs", "0");
        } else if (strstr(controllers, "freezer")) {
            write_text("/sys/fs/cgroup/freezer/cgroup.procs", "0");
        }
    }
    if (table)
        (void)fclose(table);
}

/* Become a clean root process and execute the builder. In the grandchild; never returns. */
static _Noreturn void exec_builder(int request, int answer, int log, int lock)
{
    char number[16] = "-";
    raise_privilege();
    if (setgroups(0, NULL) != 0 || setresgid(0, 0, 0) != 0 || setresuid(0, 0, 0) != 0)
        _exit(EXIT_SHIFTER);
    setsid();
    lift_limits();
    struct sched_param normal = {0};
    syscall(SYS_sched_setscheduler, 0, SCHED_OTHER, &normal); /* by number: musl's function only answers ENOSYS */
    setpriority(PRIO_PROCESS, 0, 0);
    syscall(SYS_ioprio_set, 1, 0, 0);
    cpu_set_t all;
    memset(&all, 0xff, sizeof all);
    sched_setaffinity(0, sizeof all, &all);
    write_text("/proc/self/oom_score_adj", "0");
    syscall(SYS_keyctl, 1 /* KEYCTL_JOIN_SESSION_KEYRING */, NULL);
    leave_cgroup();
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    unsigned long standard[4] = {(unsigned long)SIG_DFL}; /* the kernel's struct; by number: musl hides three signals */
    for (int signal_number = 1; signal_number < _NSIG; signal_number++)
        syscall(SYS_rt_sigaction, signal_number, standard, NULL, sizeof(uint64_t));
    if (chdir("/") != 0 || dup2(request, 0) != 0 || dup2(log, 1) != 1 || dup2(log, 2) != 2 || dup2(answer, 3) != 3)
        _exit(EXIT_SHIFTER);
    if (lock >= 0 && dup2(lock, 4) != 4)
        _exit(EXIT_SHIFTER);
    syscall(SYS_close_range, lock >= 0 ? 5 : 4, ~0U, 0);
    if (lock >= 0)
        snprintf(number, sizeof number, "4");
    umask(022);
    char *arguments[] = {SHIFTER_PYTHON, "-I", "-S", "-B", SHIFTER_LIBEXEC "/builder.pyc", number, NULL}, *environment[] = {"LC_ALL=C", NULL};
    execve(SHIFTER_PYTHON, arguments, environment);
    die("the Python interpreter %s can't be started: %s; run: make install", SHIFTER_PYTHON, strerror(errno));
}

/* Print what the builder's log pipe holds, its last line only: the end of a traceback says what it is about. */
static _Noreturn void builder_died(int log, const char *step)
{
    char text[8192];
    fcntl(log, F_SETFL, O_NONBLOCK);
    ssize_t size = read(log, text, sizeof text - 1);
    text[size > 0 ? size : 0] = 0;
    while (size > 0 && text[size - 1] == '\n')
        text[--size] = 0;
    char *line = strrchr(text, '\n');
    line = line ? line + 1 : text;
    char *fatal = strstr(text, "Fatal Python error: "); /* what the interpreter says after it is about its threads */
    if (fatal) {
        line = fatal;
        line[strcspn(line, "\n")] = 0;
    }
    if (strstr(text, "bad magic number") || strstr(text, "Bad magic number"))
        die("%s is another Python than Shifter was installed for; run: make install", SHIFTER_PYTHON);
    if (!*text)
        die("the builder was ended while %s: it took longer than udiBuildTimeout, or somebody killed it", step);
    die("the builder failed while %s: %s", step, line);
}

/* Print the plan of `shifterctl plan`, one operation a line, as the caller; this is all that was asked for. */
static _Noreturn void print_plan(const char *plan, size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t written = write(1, plan + done, size - done);
        if (written < 0 && errno != EINTR)
            die("can't write: %s", strerror(errno));
        done += written > 0 ? (size_t)written : 0;
    }
    _exit(0);
}

/* Start the builder, which gets LOCK, and wait for its answer; returns if the UDI, or the base, is there now. */
int run_builder(const struct document *request, int lock, bool verbose, uint64_t started)
{
    int requests[2], answers[2], logs[2];
    check_trusted(SHIFTER_PYTHON);
    check_trusted(SHIFTER_LIBEXEC "/builder.pyc");
    if (pipe2(requests, O_CLOEXEC) != 0 || pipe2(answers, O_CLOEXEC) != 0 || pipe2(logs, O_CLOEXEC) != 0)
        die("can't make a pipe: %s", strerror(errno));
    for (int i = 0; i < 2; i++)
        requests[i] = high(requests[i]), answers[i] = high(answers[i]), logs[i] = high(logs[i]);
    raise_privilege(); /* so that RLIMIT_NPROC of the user does not stop fork(2) */
    pid_t child = fork();
    if (child == 0) {
        pid_t builder = fork(); /* it belongs to init: the user's command gets no child that it did not start */
        if (builder == 0)
            exec_builder(requests[0], answers[1], logs[1], lock);
        _exit(builder < 0 ? errno : 0);
    }
    drop_temporarily();
    if (lock >= 0) /* only the builder holds it now: a door can be stopped, or wait for its terminal */
        close(lock);
    if (child < 0)
        die("can't start the builder: %s", strerror(errno));
    close(requests[0]), close(answers[1]), close(logs[1]);
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    if (WIFEXITED(status) && WEXITSTATUS(status) != 0)
        die("can't start the builder: %s", strerror(WEXITSTATUS(status)));
    for (size_t sent = 0; sent < request->size;) {
        ssize_t size = write(requests[1], request->data + sent, request->size - sent);
        if (size <= 0)
            break;
        sent += (size_t)size;
    }
    close(requests[1]);
    static struct document answer;
    static char step[512] = "starting";
    char *plan = NULL;
    size_t done = 0, planned = 0;
    FILE *lines = need(open_memstream(&plan, &planned));
    for (answer.size = 0;;) {
        ssize_t size = read(answers[0], answer.data + answer.size, sizeof answer.data - answer.size);
        if (size < 0 && errno == EINTR)
            continue;
        if (size <= 0)
            builder_died(logs[0], step);
        answer.size += (size_t)size;
        while (memchr(answer.data + done, 0, answer.size - done)) {
            const char *value, *field = field_next(&answer, &done, &value);
            if (key_is(field, "step")) {
                uint64_t when = 0;
                take_number(&value, &when);
                snprintf(step, sizeof step, "%s", value);
                if (verbose)
                    say("%6.1f ms  %s", (double)(int64_t)(when - started) / 1e6, value);
            } else if (key_is(field, "plan")) {
                if (fputs(value, lines) < 0)
                    die("out of memory");
            } else if (key_is(field, "error")) {
                die("%s", value);
            } else if (key_is(field, "ok") || key_is(field, "again")) {
                close(logs[0]);
                if (fclose(lines) != 0)
                    die("out of memory");
                if (key_is(field, "ok") && planned)
                    print_plan(plan, planned);
                free(plan);
                return answers[0]; /* held until the pin is open: the builder of an unshared UDI waits for its end */
            }
        }
        answer.size -= done; /* what was taken makes room: there is a step for each volume */
        memmove(answer.data, answer.data + done, answer.size);
        done = 0;
    }
}
