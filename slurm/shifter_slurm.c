/*
 * Shifter's SPANK plugin: options of sbatch, salloc and srun, and what only a plugin can do on a node.
 *
 * What is decided is decided in Python: a program checks options and looks the image up at submission, as the user
 * (shifter/wlm/submit.py); the prolog checks all of it again, as root (shifter/wlm/node.py). This file passes strings on, and
 *  - ends the tasks of a job whose set-up failed, with the line that says why;
 *  - starts the tasks of a job with --ccm by the user's own `shifter`;
 *  - has the sshd of a job adopted by the job's extern step, so that Slurm accounts, limits and ends it;
 *  - where job_container/tmpfs gives a job a /tmp of its own, which does not exist yet while a prolog runs, has the job set
 *    up once more, in it.
 * On a node it reads files of root's below /run/shifter, nothing of the user's environment.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <slurm/slurm.h>
#include <slurm/spank.h>

#include "config.h"

SPANK_PLUGIN(shifter, 1)

#define MAX_ANSWER 65536
#define MAX_LINE 2048
#define PROLOG SHIFTER_PREFIX "/sbin/shifter-slurm-prolog"
#define TASK SHIFTER_PREFIX "/lib/shifter/slurm-task"

/* For pam_slurm_adopt libslurm exports them, but no header does; weak, so that a Slurm without them runs jobs all the same. */
extern int slurm_stepd_connect(const char *directory, const char *node, slurm_step_id_t *step, uint16_t *version) __attribute__((weak));
extern int slurm_stepd_add_extern_pid(int fd, uint16_t version, pid_t pid) __attribute__((weak));

#define DIGITS(number) '0' + (number) / 10 % 10, '0' + (number) % 10
/* Slurm loads a plugin of its own release only; shifterctl doctor looks for this text to say so first. */
__attribute__((used)) static const char BUILT_FOR[] = {
    'b', 'u', 'i', 'l', 't', ' ', 'f', 'o', 'r', ' ', 'S', 'l', 'u', 'r', 'm', ' ', DIGITS(SLURM_VERSION_MAJOR(SLURM_VERSION_NUMBER)), '.',
    DIGITS(SLURM_VERSION_MINOR(SLURM_VERSION_NUMBER)), '.', DIGITS(SLURM_VERSION_MICRO(SLURM_VERSION_NUMBER)), 0};

enum { IMAGE, VOLUME, MODULE, SSHD, CCM, OPTIONS };

static const char *const NAMES[OPTIONS] = {"image", "volume", "module", "sshd", "ccm"};
static char *given[OPTIONS];
static char verdict[MAX_LINE]; /* why the set-up of this job failed; in the child that is to become a task */
static bool inside;            /* the task is to start in the container (--ccm); likewise */

/* --- options ------------------------------------------------------------------------------------------------------ */

static int take_option(int option, const char *value, int remote)
{
    char *joined = NULL;
    if (remote) /* Slurm replays the last value only; on a node the environment and the prolog count */
        return 0;
    if ((option == VOLUME || option == MODULE) && given[option]) {
        if (asprintf(&joined, "%s%c%s", given[option], option == VOLUME ? ';' : ',', value) < 0)
            return -1;
    } else if (!(joined = strdup(option == CCM ? "1" : value)))
        return -1;
    free(given[option]);
    given[option] = joined;
    return 0;
}

/* Slurm keeps the pointers. The second half is for long_options, which a site uses where another plugin has an --image. */
static struct spank_option options[] = {
    {"image", "[TYPE:]TAG", "have this container image on all nodes of the job", 1, IMAGE, take_option},
    {"volume", "FROM:TO[:ro]", "mount FROM of a node on TO of its container; may be repeated", 1, VOLUME, take_option},
    {"module", "NAME[,NAME...]", "modules of Shifter to use; none for none", 1, MODULE, take_option},
    {"sshd", "yes|no|auto", "an sshd in each container; auto: if the nodes are not shared", 1, SSHD, take_option},
    {"ccm", NULL, "run all of the job in a container of the nodes' own root, with ssh between them", 0, CCM, take_option},
    {"shifter.image", "[TYPE:]TAG", "have this container image on all nodes of the job", 1, IMAGE, take_option},
    {"shifter.volume", "FROM:TO[:ro]", "mount FROM of a node on TO of its container; may be repeated", 1, VOLUME, take_option},
    {"shifter.module", "NAME[,NAME...]", "modules of Shifter to use; none for none", 1, MODULE, take_option},
    {"shifter.sshd", "yes|no|auto", "an sshd in each container; auto: if the nodes are not shared", 1, SSHD, take_option},
    {"shifter.ccm", NULL, "run all of the job in a container of the nodes' own root, with ssh between them", 0, CCM, take_option},
};

/* True if an argument of plugstack.conf is one of C Shifter's that mean nothing here: accepted, so that its line still works. */
static bool is_old(const char *argument)
{
    static const char *const old[] = {"shifter_config=", "extern_setup=", "extern_cgroup=", "memory_cgroup=", "enable_ccm=0", "enable_sshd="};
    for (size_t i = 0; i < sizeof old / sizeof *old; i++)
        if (strncasecmp(argument, old[i], strlen(old[i])) == 0)
            return true;
    return false;
}

int slurm_spank_init(spank_t spank, int count, char **arguments)
{
    int long_names = 0;
    bool ccm = false;
    spank_context_t context = spank_context();
    for (int i = 0; i < count; i++) {
        if (strcasecmp(arguments[i], "long_options") == 0 || strcasecmp(arguments[i], "long_options=1") == 0)
            long_names = OPTIONS;
        else if (strcasecmp(arguments[i], "enable_ccm=1") == 0)
            ccm = true;
        else if (!is_old(arguments[i]))
            slurm_error("shifter: plugstack.conf: unknown argument %s", arguments[i]);
        else if (context == S_CTX_SLURMD)
            slurm_info("shifter: plugstack.conf: %s has no meaning any more", arguments[i]);
    }
    if (context != S_CTX_LOCAL && context != S_CTX_ALLOCATOR && context != S_CTX_REMOTE)
        return ESPANK_SUCCESS;
    for (int i = 0; i < (ccm ? OPTIONS : CCM); i++) {
        char name[64];
        /* In a job its options would be replayed before those of the command line: what the job has is in its environment. */
        snprintf(name, sizeof name, "SLURM_SPANK__SLURM_SPANK_OPTION_shifter_%s%s", long_names ? "shifter_" : "", NAMES[i]);
        if (context != S_CTX_REMOTE && getenv("SLURM_JOB_ID"))
            unsetenv(name);
        if (spank_option_register(spank, &options[long_names + i]) != ESPANK_SUCCESS)
            slurm_error("shifter: --%s can't be had: another plugin has it (long_options of plugstack.conf avoids that)", options[long_names + i].name);
    }
    return ESPANK_SUCCESS;
}

/* --- submission: as the user -------------------------------------------------------------------------------------- */

/* Run the program that checks the options; ANSWER becomes its NUL-terminated fields NAME=VALUE. False: it could not be run. */
static bool check_options(bool in_job, char answer[MAX_ANSWER + 1])
{
    char *arguments[6 + OPTIONS] = {SHIFTER_PYTHON, "-I", "-B", SHIFTER_LIBEXEC "/slurm_submit.py", in_job ? "step" : "job"};
    char *environment[] = {"LC_ALL=C.UTF-8", "PATH=/usr/bin:/bin", NULL};
    size_t size = 0;
    int ends[2], status = 0, next = 5;
    for (int i = 0; i < OPTIONS; i++)
        if (given[i] && asprintf(&arguments[next++], "%s=%s", NAMES[i], given[i]) < 0)
            return false;
    if (pipe2(ends, O_CLOEXEC) != 0)
        return false;
    pid_t child = fork();
    if (child == 0) {
        if (dup2(ends[1], 1) == 1)
            execve(SHIFTER_PYTHON, arguments, environment);
        _exit(127);
    }
    close(ends[1]);
    for (ssize_t got; child > 0 && size < MAX_ANSWER && (got = read(ends[0], answer + size, MAX_ANSWER - size)) != 0;)
        if (got > 0)
            size += (size_t)got;
        else if (errno != EINTR)
            break;
    close(ends[0]);
    answer[size] = 0;
    while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    while (next > 5)
        free(arguments[--next]);
    return child > 0 && status == 0 && size > 0 && !answer[size - 1];
}

/*
 * Set a variable of whoever is submitted; NULL takes it away. Tasks of srun have variables of Slurm's own even with
 * --export=NONE, and `shifter` reads them where there are no others; those of a job come to it in the same way.
 */
static bool export_variable(const char *name, const char *value)
{
    char *copy;
    bool done;
    if (asprintf(&copy, "SLURM_SPANK_%s", name) < 0)
        return false;
    if (value)
        done = setenv(name, value, 1) == 0 && (spank_context() != S_CTX_LOCAL || setenv(copy, value, 1) == 0);
    else
        done = unsetenv(name) == 0 && unsetenv(copy) == 0;
    free(copy);
    return done;
}

/* The job has what its options say, and nothing of what was in the environment of who submits it. */
static int export_options(spank_t spank, bool in_job)
{
    static const char *const replaced[] = {"SHIFTER_IMAGE", "SHIFTER_IMAGETYPE", "SHIFTER_IMAGEREQUEST", "SHIFTER_VOLUME", "SHIFTER_MODULE", "SHIFTER_CCM"};
    static char answer[MAX_ANSWER + 1];
    if (!check_options(in_job, answer)) {
        slurm_error("shifter: %s %s failed: is Shifter installed here?", SHIFTER_PYTHON, SHIFTER_LIBEXEC "/slurm_submit.py");
        return ESPANK_ERROR;
    }
    if (strncmp(answer, "error=", 6) == 0) {
        slurm_error("shifter: %s", answer + 6);
        return ESPANK_ERROR;
    }
    for (size_t i = 0; (given[IMAGE] || given[CCM]) && i < sizeof replaced / sizeof *replaced; i++)
        export_variable(replaced[i], NULL);
    for (char *field = answer, *value; *field; field = value + strlen(value) + 1) {
        if (!(value = strchr(field, '=')))
            return ESPANK_ERROR;
        *value++ = 0;
        if (strcmp(field, "note") == 0) {
            slurm_info("shifter: %s", value);
            continue;
        }
        if (!export_variable(field, value) || (!in_job && spank_job_control_setenv(spank, field, value, 1) != ESPANK_SUCCESS)) {
            slurm_error("shifter: %s can't be handed to the job", field);
            return ESPANK_ERROR;
        }
    }
    return ESPANK_SUCCESS;
}

int slurm_spank_init_post_opt(spank_t spank, int count, char **arguments)
{
    (void)count, (void)arguments;
    spank_context_t context = spank_context();
    bool any = given[IMAGE] || given[VOLUME] || given[MODULE] || given[SSHD] || given[CCM];
    if (!any || (context != S_CTX_LOCAL && context != S_CTX_ALLOCATOR))
        return ESPANK_SUCCESS;
    /* srun in a job starts a step of it: the options are for that step's tasks only, the nodes are set up already. */
    if (export_options(spank, context == S_CTX_LOCAL && getenv("SLURM_JOB_ID")) != ESPANK_SUCCESS)
        exit(1); /* srun would go on */
    return ESPANK_SUCCESS;
}

/* --- on the nodes ------------------------------------------------------------------------------------------------- */

/* Read the file NAME of the job below /run/shifter, which other mount namespaces reach through PID 1. False: there is none. */
static bool read_job_file(uint32_t job, const char *name, char *text, size_t room)
{
    static const char *const places[] = {"", "/proc/1/root"};
    for (size_t i = 0; i < 2; i++) {
        char path[128];
        snprintf(path, sizeof path, "%s/run/shifter/jobs/%u/%s", places[i], job, name);
        int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
        if (fd < 0)
            continue;
        struct stat status;
        ssize_t size = fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && status.st_uid == 0 ? read(fd, text, room - 1) : -1;
        close(fd);
        text[size > 0 ? size : 0] = 0;
        return size > 0;
    }
    return false;
}

static bool is_extern(spank_t spank, uint32_t *job)
{
    uint32_t step = 0;
    return spank_get_item(spank, S_JOB_STEPID, &step) == ESPANK_SUCCESS && step == SLURM_EXTERN_CONT && spank_get_item(spank, S_JOB_ID, job) == ESPANK_SUCCESS;
}

/* Where job_container/tmpfs has pinned the mount namespace of the job: .../JOB/.ns. False: it has none. */
static bool find_job_namespace(uint32_t job, char *path, size_t room)
{
    char *line = NULL, end[32];
    size_t size = 0;
    bool found = false;
    FILE *table = fopen("/proc/self/mountinfo", "re");
    int length = snprintf(end, sizeof end, "/%u/.ns", job);
    while (table && !found && getline(&line, &size, table) > 0) {
        char target[PATH_MAX];
        if (!strstr(line, " - nsfs ") || sscanf(line, "%*s %*s %*s %*s %4095s", target) != 1)
            continue;
        size_t all = strlen(target);
        if (all > (size_t)length && all < room && strcmp(target + all - length, end) == 0) {
            memcpy(path, target, all + 1);
            found = true;
        }
    }
    free(line);
    if (table)
        (void)fclose(table);
    return found;
}

/* Have the job set up in the namespace that its tasks will be in. The verdict, if it fails, is kept like the prolog's. */
static void set_up_in_namespace(uint32_t job, const char *namespace)
{
    char number[16], *arguments[] = {PROLOG, "--namespace", (char *)namespace, number, NULL}, *environment[] = {"LC_ALL=C.UTF-8", NULL};
    int status = -1;
    snprintf(number, sizeof number, "%u", job);
    pid_t child = fork();
    if (child == 0) {
        setsid();
        execve(PROLOG, arguments, environment);
        _exit(127);
    }
    while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    if (child < 0 || status != 0)
        slurm_error("shifter: job %u: %s failed (status %x)", job, PROLOG, (unsigned)status);
}

/* The state and start time of a process; 0: it is not there. PID alone could be another process's by now. */
static unsigned long long start_time(long pid)
{
    char path[64], text[1024];
    snprintf(path, sizeof path, "/proc/%ld/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    text[size > 0 ? size : 0] = 0;
    const char *rest = strrchr(text, ')'); /* field 2 is the name, which may hold anything; 22 is the start time */
    for (int field = 2; rest && field < 22; field++)
        rest = strchr(rest + 1, ' ');
    return rest ? strtoull(rest, NULL, 10) : 0;
}

/* Put the job's sshd, of which nothing has been forked yet, into the extern step. It is the job's all the same if that fails. */
static void adopt_sshd(uint32_t job)
{
    char text[64];
    char *rest;
    uint16_t version = 0;
    slurm_step_id_t step = {.job_id = job, .step_id = SLURM_EXTERN_CONT, .step_het_comp = NO_VAL};
    if (!read_job_file(job, "sshd", text, sizeof text))
        return;
    long pid = strtol(text, &rest, 10);
    unsigned long long started = strtoull(rest, NULL, 10);
    if (pid <= 1 || !started || start_time(pid) != started)
        return;
    int fd = slurm_stepd_connect && slurm_stepd_add_extern_pid ? slurm_stepd_connect(NULL, NULL, &step, &version) : -1;
    if (fd < 0 || slurm_stepd_add_extern_pid(fd, version, (pid_t)pid) != SLURM_SUCCESS)
        slurm_error("shifter: job %u: the extern step does not take the sshd (pid %ld)", job, pid);
    if (fd >= 0)
        close(fd);
}

int slurm_spank_task_post_fork(spank_t spank, int count, char **arguments)
{
    (void)count, (void)arguments;
    char namespace[PATH_MAX], text[MAX_LINE];
    uint32_t job;
    if (!is_extern(spank, &job))
        return ESPANK_SUCCESS;
    if (find_job_namespace(job, namespace, sizeof namespace) && read_job_file(job, "slurm", text, sizeof text))
        set_up_in_namespace(job, namespace);
    adopt_sshd(job);
    return ESPANK_SUCCESS;
}

/*
 * A script that spans nodes is ended for the failure of any of them, which its prolog left with the job (shifter/wlm/node.py):
 * what was known when the prologs were done. Only administrators can write there.
 */
static void read_failure_elsewhere(spank_t spank, uint32_t job)
{
    uint32_t step = 0;
    job_info_msg_t *answer = NULL;
    char start[64], text[MAX_LINE], nodes[16] = "";
    if (spank_get_item(spank, S_JOB_STEPID, &step) != ESPANK_SUCCESS || step != SLURM_BATCH_SCRIPT ||
        spank_getenv(spank, "SLURM_JOB_NUM_NODES", nodes, sizeof nodes) != ESPANK_SUCCESS || strcmp(nodes, "1") == 0 || !read_job_file(job, "slurm", text, sizeof text))
        return;
    if (slurm_load_job(&answer, job, SHOW_ALL) != SLURM_SUCCESS || !answer)
        return;
    for (uint32_t i = 0; i < answer->record_count; i++) {
        const slurm_job_info_t *found = &answer->job_array[i];
        int length = snprintf(start, sizeof start, "shifter, start %u: ", (unsigned)found->restart_cnt);
        if (found->job_id == job && found->admin_comment && strncmp(found->admin_comment, start, (size_t)length) == 0)
            snprintf(verdict, sizeof verdict, "%.1500s\n", found->admin_comment + length);
    }
    slurm_free_job_info_msg(answer);
}

int slurm_spank_task_init_privileged(spank_t spank, int count, char **arguments)
{
    (void)count, (void)arguments;
    char text[8];
    uint32_t job;
    if (spank_get_item(spank, S_JOB_ID, &job) != ESPANK_SUCCESS || read_job_file(job, "failed", verdict, sizeof verdict))
        return ESPANK_SUCCESS;
    inside = read_job_file(job, "ccm", text, sizeof text) && !is_extern(spank, &job);
    read_failure_elsewhere(spank, job);
    return ESPANK_SUCCESS;
}

/*
 * Have TASK started in the task's place, which then starts it in the container. Not executed from here: Slurm still has to
 * run TaskProlog and to set the user's limits. The array is the one that slurmstepd executes; its first word alone is ours.
 */
static int start_inside(spank_t spank)
{
    int count = 0;
    static char command[] = TASK;
    char **words = NULL;
    uint32_t step = 0;
    if (spank_get_item(spank, S_JOB_ARGV, &count, &words) != ESPANK_SUCCESS || count < 1 || !words || !words[0] ||
        spank_get_item(spank, S_JOB_STEPID, &step) != ESPANK_SUCCESS || spank_setenv(spank, "SHIFTER_TASK", words[0], 1) != ESPANK_SUCCESS ||
        spank_setenv(spank, "SHIFTER_TASK_IS_SCRIPT", step == SLURM_BATCH_SCRIPT ? "1" : "", 1) != ESPANK_SUCCESS) {
        dprintf(2, "shifter: --ccm: slurmstepd does not say what the task is\n");
        return ESPANK_ERROR;
    }
    words[0] = command;
    return ESPANK_SUCCESS;
}

/* As the user, with the task's own descriptors: the job ends as a command ends that failed, and the node is not to blame. */
int slurm_spank_task_init(spank_t spank, int count, char **arguments)
{
    (void)count, (void)arguments;
    char job[16], leader[16];
    uint32_t number;
    if (verdict[0]) {
        dprintf(2, "shifter: %s", verdict);
        _exit(1);
    }
    /* SLURM_JOB_ID is the first component's in all of a heterogeneous job, and each component was set up as a job of its own. */
    if (spank_get_item(spank, S_JOB_ID, &number) == ESPANK_SUCCESS && snprintf(job, sizeof job, "%u", number) > 0 &&
        spank_getenv(spank, "SLURM_JOB_ID", leader, sizeof leader) == ESPANK_SUCCESS && strcmp(job, leader) != 0)
        spank_setenv(spank, "SHIFTER_JOB_ID", job, 1);
    return inside ? start_inside(spank) : ESPANK_SUCCESS;
}
