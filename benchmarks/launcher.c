/* Times commands from fork to exit, as an ordinary user, with nothing of Python inside the measured interval.
 *
 *     launcher UID GID COUNT STEP COMMAND [ARGUMENT...]
 *
 * COUNT 1: drop to UID:GID, run /bin/true once (unmeasured: every sample starts from the same state of the processor),
 * then posix_spawn COMMAND and wait. COUNT > 1: fork COUNT children at once, child number i is UID+i*STEP:GID+i*STEP,
 * and wait for all of them. "{}" in an argument or an environment variable becomes i. The environment is handed on, the
 * command's output goes to stderr. Prints nanoseconds; exits with 1 if a command did not
 * exit with 0.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <grp.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static long long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void become(uid_t uid, gid_t gid)
{
    if (setgroups(1, &gid) || setresgid(gid, gid, gid) || setresuid(uid, uid, uid))
        err(125, "cannot become %u:%u", uid, gid);
}

/* A copy of a vector with every "{}" replaced by the number of the child. */
static char **filled(char **vector, int number)
{
    size_t count = 0;
    while (vector[count])
        count++;
    char **copy = calloc(count + 1, sizeof *copy);
    for (size_t i = 0; copy && i < count; i++) {
        char *mark = strstr(vector[i], "{}");
        if (!mark)
            copy[i] = vector[i];
        else if (asprintf(&copy[i], "%.*s%d%s", (int)(mark - vector[i]), vector[i], number, mark + 2) < 0)
            err(125, "asprintf");
    }
    return copy;
}

static int failed(void)
{
    int status;
    if (wait(&status) < 0)
        err(125, "wait");
    return status != 0;
}

static pid_t spawn(char **argv, char **env)
{
    pid_t pid;
    int error = posix_spawnp(&pid, argv[0], NULL, NULL, argv, env);
    if (error) {
        fprintf(stderr, "%s: %s\n", argv[0], strerror(error));
        exit(125);
    }
    return pid;
}

int main(int argc, char **argv)
{
    if (argc < 6)
        errx(125, "usage: launcher UID GID COUNT STEP COMMAND [ARGUMENT...]");
    uid_t uid = atoi(argv[1]);
    gid_t gid = atoi(argv[2]);
    int count = atoi(argv[3]), step = atoi(argv[4]), failures = 0;
    int out = fcntl(1, F_DUPFD_CLOEXEC, 10);
    if (out < 0 || dup2(2, 1) < 0)
        err(125, "standard output");
    char **command = argv + 5;
    long long start;
    if (count == 1) {
        become(uid, gid);
        char *warm[] = {"/bin/true", NULL}, **env = filled(environ, 0);
        command = filled(command, 0);
        spawn(warm, env);
        failed();
        start = now();
        spawn(command, env);
        failures = failed();
    } else {
        start = now();
        for (int i = 0; i < count; i++) {
            pid_t pid = fork();
            if (pid < 0)
                err(125, "fork");
            if (pid == 0) {
                become(uid + i * step, gid + i * step);
                environ = filled(environ, i);
                command = filled(command, i);
                execvp(command[0], command);
                err(127, "%s", command[0]);
            }
        }
        for (int i = 0; i < count; i++)
            failures += failed();
    }
    long long end = now();
    dprintf(out, "%lld\n", end - start);
    if (failures)
        errx(1, "%d of %d did not exit with 0", failures, count);
    return 0;
}
