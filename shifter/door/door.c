/*
 * The door: setuid root. Finds the UDI that the caller asks for, has it built if there is none, enters it, drops every
 * privilege and runs the command.
 *
 * The privileged system calls are in this file and, for the way to the builder, in start.c; fields.c, parse.c and environment.c
 * turn bytes into structures, user.c runs when all is dropped.
 * The rules:
 *  - The effective uid is the caller's, except between raise_privilege() and drop_temporarily().
 *  - The real uid is the caller's until the builder (a child) makes itself root, so no limit of the user is escaped.
 *  - Files that steer the door are opened by descriptor, must belong to root, and are checked before use.
 *  - Nothing of the caller's environment, command or working directory is looked at while privileged.
 *  - enter() is the only way to the command; it drops for good and reads everything back.
 */
#define _GNU_SOURCE
#include "door.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/magic.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/fsuid.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include "config.h"

#define NS_GET_MNTNS_ID _IOR(0xb7, 5, uint64_t) /* linux/nsfs.h, Linux >= 6.11; 64 bits, never reused */
#define NS_GET_NSTYPE _IO(0xb7, 3)
#define NSFS_MAGIC 0x6e736673
#define LOWEST_OWN_FD 10 /* ours stay clear of the descriptors that a caller passes */
#define MAX_GROUPS 4096  /* shifter/request.py */
#define LEAST_FILES 64   /* about 30 are open at once while the builder is started */
#define TRIES 6          /* base made, told that nothing is shared, UDI built, changed meanwhile, built again */

static uid_t caller_uid;
static bool privileged; /* started as setuid root by an ordinary user */

/* --- privilege ---------------------------------------------------------------------------------------------------- */

void raise_privilege(void)
{
    if (seteuid(0) != 0 || geteuid() != 0)
        die("can't become root: %s", strerror(errno));
}

void drop_temporarily(void)
{
    if (seteuid(caller_uid) != 0 || geteuid() != caller_uid)
        die("can't drop privilege: %s", strerror(errno));
}

/* For the Python that prints help: no way back to root from here on. */
static void drop_for_good(void)
{
    raise_privilege();
    if (setresuid(caller_uid, caller_uid, caller_uid) != 0)
        die("can't drop privilege: %s", strerror(errno));
    uid_t real, effective, saved;
    if (getresuid(&real, &effective, &saved) != 0 || real != caller_uid || effective != caller_uid || saved != caller_uid)
        die("privilege was not dropped");
}

/* Help and usage are Python's (shifter/cli/shifter.py), after all privilege is gone. */
_Noreturn void show_usage(const char *kind, const char *text)
{
    if (privileged)
        drop_for_good();
    char *arguments[] = {SHIFTER_PYTHON, "-I", "-B", SHIFTER_LIBEXEC "/shifter_cli.py", (char *)kind, (char *)text, NULL};
    char *environment[] = {"LC_ALL=C.UTF-8", "PATH=/usr/bin:/bin", NULL};
    execve(SHIFTER_PYTHON, arguments, environment);
    if (text) /* inside of a UDI there need not be a Python */
        die("%s", text);
    die("%s: %s; run: make install", SHIFTER_PYTHON, strerror(errno));
}

/* Read a document of root's from DIRECTORY/NAME; returns its descriptor, or -1 if there is none that can be used. */
static int document_open(struct document *document, int directory, const char *name, const char *kind)
{
    struct stat status;
    int fd = openat(directory, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0)
        return -1;
    ssize_t size = -1;
    if (fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && status.st_uid == 0 && !(status.st_mode & 022) && status.st_size <= MAX_DOCUMENT)
        size = read(fd, document->data, sizeof document->data);
    document->size = size > 0 ? (size_t)size : 0;
    if (size != status.st_size || !document_valid(document, kind)) {
        close(fd);
        return -1;
    }
    return fd;
}

/* --- start: descriptors, limits, identity ------------------------------------------------------------------------- */

static void make_standard_fds_valid(void)
{
    for (int fd = 0; fd <= 2; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) != fd)
            _exit(EXIT_SHIFTER); /* else a file of ours would get the number, and messages would be written to it */
}

/* Move a descriptor out of the range that callers use, close-on-exec. */
int high(int fd)
{
    int moved = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, LOWEST_OWN_FD);
    if (fd >= 0)
        close(fd);
    if (moved < 0)
        die("can't open what the launch needs: %s", strerror(errno));
    return moved;
}

static int compare_gids(const void *left, const void *right)
{
    gid_t a = *(const gid_t *)left, b = *(const gid_t *)right;
    return a < b ? -1 : a > b;
}

static void save_caller(struct caller *caller)
{
    caller->uid = getuid();
    caller->gid = getgid();
    caller->umask = umask(022);
    int count = getgroups(0, NULL);
    if (count < 0 || count > MAX_GROUPS)
        die("%d supplementary groups; at most %d are supported", count, MAX_GROUPS);
    caller->groups = need(calloc((size_t)count + 1, sizeof(gid_t)));
    count = getgroups(count, caller->groups);
    qsort(caller->groups, count < 0 ? 0 : (size_t)count, sizeof(gid_t), compare_gids);
    for (int i = 0; i < count; i++)
        if (caller->groups[i] != 0 && (caller->group_count == 0 || caller->groups[caller->group_count - 1] != caller->groups[i]))
            caller->groups[caller->group_count++] = caller->groups[i];
    uint64_t broken_pipe = 1ULL << (SIGPIPE - 1) | 1ULL << (SIGXFSZ - 1); /* by number: musl hides that SIGRTMIN is blocked */
    syscall(SYS_rt_sigprocmask, SIG_BLOCK, &broken_pipe, &caller->mask, sizeof caller->mask);
    for (int resource = 0; resource < RLIM_NLIMITS; resource++)
        getrlimit(resource, &caller->limits[resource]);
    caller->cwd = getcwd(NULL, 0);
}

/* The mount that "/" is on and its inode. statx(2) by number: musl has no wrapper and <linux/stat.h> clashes with libc's. */
static void identify_root(uint64_t identity[2])
{
    uint64_t statx_buffer[32] = {0}; /* struct statx: stx_ino at byte 32, stx_mnt_id at byte 144 */
    if (syscall(SYS_statx, AT_FDCWD, "/", AT_SYMLINK_NOFOLLOW, 0x1100 /* STATX_INO | STATX_MNT_ID */, statx_buffer) != 0)
        die("statx: %s", strerror(errno));
    identity[0] = statx_buffer[4];
    identity[1] = statx_buffer[18];
}

/* A caller in a chroot would get out of it by joining a namespace. setns(2) to one's own namespace goes to its root. */
static void refuse_chroot(int own_namespace)
{
    uint64_t before[2], after[2];
    identify_root(before);
    if (setns(own_namespace, CLONE_NEWNS) != 0)
        die("can't check for a chroot: %s", strerror(errno));
    identify_root(after);
    if (before[0] != after[0] || before[1] != after[1])
        die("called in a chroot: a UDI is made from the node's own file system; run shifter outside of the chroot");
}

/* True in the mount namespace of PID 1, where that can be seen. Privileged. */
static bool is_home(int own_namespace)
{
    struct stat own, home;
    return stat("/proc/1/ns/mnt", &home) == 0 && fstat(own_namespace, &own) == 0 && own.st_dev == home.st_dev && own.st_ino == home.st_ino;
}

/* --- records ------------------------------------------------------------------------------------------------------ */

/*
 * Resolve what the user named, without Python: OUT becomes the identifier, or local:PATH. False: the builder shall do it,
 * and say what is wrong with it, if something is. Privileged; reads the tag as the owner of the store.
 */
static bool resolve_image(const struct document *site, const char *text, char *out, size_t room)
{
    const char *kind = field_first(site, "defaultImageType"), *store = field_first(site, "imagePath");
    uid_t owner;
    gid_t group;
    if (!kind || !store || !field_id(site, "storeUid", &owner) || !field_id(site, "storeGid", &group))
        return false;
    enum reference_kind parsed = parse_reference(text, kind, out, room);
    if (parsed != REFERENCE_TAG)
        return parsed == REFERENCE_RESOLVED;
    char path[PATH_MAX];
    if ((size_t)snprintf(path, sizeof path, "%s/tags/%s", store, out) >= sizeof path)
        return false;
    setfsgid(group);
    setfsuid(owner);
    if (setfsuid((uid_t)-1) != (int)owner || setfsgid((gid_t)-1) != (int)group)
        die("can't act as the owner of the image store");
    ssize_t length = readlink(path, out, room - 1);
    setfsuid(0);
    setfsgid(getegid());
    if (setfsuid((uid_t)-1) != 0)
        die("can't become root again");
    if (length <= 0)
        return false;
    out[length] = 0;
    return identifier_valid(out);
}

/* In a PID namespace PID 1 can be the user's, in a user namespace and a root of the user's making. Privileged. */
static bool init_is_ours(void)
{
    struct stat ours, theirs;
    return stat("/proc/self/ns/user", &ours) == 0 && stat("/proc/1/ns/user", &theirs) == 0 && ours.st_dev == theirs.st_dev && ours.st_ino == theirs.st_ino;
}

/* Return a descriptor of /run/shifter if its pins can be used from here, else of PID 1's, else -1. Privileged. */
static int open_run(void)
{
    static const char *const places[] = {"/run/shifter", "/proc/1/root/run/shifter"};
    for (int i = 0; i < 2; i++) {
        struct stat status;
        struct statfs type;
        int run = open(places[i], O_PATH | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
        if (run < 0)
            continue;
        if (i > 0 && !init_is_ours()) { /* checked afterwards: nobody leaves a user namespace for the one above it */
            close(run);
            continue;
        }
        int store = openat(run, "store", O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
        bool usable = store >= 0 && fstatfs(store, &type) == 0 && type.f_type == NSFS_MAGIC && fstatfs(run, &type) == 0 &&
                      type.f_type == TMPFS_MAGIC && fstat(run, &status) == 0 && status.st_uid == 0 && !(status.st_mode & 022);
        if (store >= 0)
            close(store);
        if (usable)
            return high(run);
        close(run);
    }
    return -1;
}

/* Check watch=AS:DEV:INO:SIZE:MTIME_NS:CTIME_NS:PATH. Privileged. */
static bool watch_holds(const char *text)
{
    struct watch watch;
    if (!parse_watch(text, &watch))
        return false;
    struct stat now;
    /* Not the fsuid alone: CAP_SYS_PTRACE would be kept, and a link of the user's to /proc/PID/cwd followed with it. */
    if (seteuid((uid_t)watch.as) != 0 || geteuid() != watch.as)
        die("can't act as uid %u: %s", (unsigned)watch.as, strerror(errno));
    int result = stat(watch.path, &now);
    raise_privilege();
    if (result != 0)
        return watch.inode == 0;
    return now.st_dev == watch.device && now.st_ino == watch.inode && (uint64_t)now.st_size == watch.size &&
           (uint64_t)now.st_mtim.tv_sec * 1000000000u + (uint64_t)now.st_mtim.tv_nsec == watch.mtime &&
           (uint64_t)now.st_ctim.tv_sec * 1000000000u + (uint64_t)now.st_ctim.tv_nsec == watch.ctime;
}

/* Check source=DEV:INO:PATH: the directory behind a volume is still the same. As the caller. */
static bool source_holds(const char *text)
{
    struct source source;
    struct stat now;
    if (!parse_source(text, &source))
        return false;
    struct open_how how = {.flags = O_PATH | O_CLOEXEC, .resolve = RESOLVE_NO_MAGICLINKS};
    int fd = (int)syscall(SYS_openat2, AT_FDCWD, source.path, &how, sizeof how);
    bool same = fd >= 0 && fstat(fd, &now) == 0 && now.st_dev == source.device && now.st_ino == source.inode;
    if (fd >= 0)
        close(fd);
    return same;
}

static bool watches_hold(const struct document *document)
{
    const char *field, *value;
    bool hold = true, as_caller = false;
    for (size_t position = 0; hold && (field = field_next(document, &position, &value));) {
        bool source = key_is(field, "source"); /* one after the other in a record: one change of identity for all */
        if (source && !as_caller)
            drop_temporarily();
        if (!source && as_caller)
            raise_privilege();
        as_caller = source;
        if (source)
            hold = source_holds(value);
        else if (key_is(field, "watch"))
            hold = watch_holds(value);
    }
    if (as_caller)
        raise_privilege();
    return hold;
}

/* access(2) asks for the caller instead. Privileged. */
static bool exists(int directory, const char *name)
{
    struct stat status;
    return fstatat(directory, name, &status, AT_SYMLINK_NOFOLLOW) == 0;
}

/*
 * Open the pin of a UDI, and mark its record FILE as used now. Returns the namespace, or -1. Privileged.
 *
 * If the record is still there when the namespace is open, unsetupRoot, which renames it before it looks around, finds
 * this process: as a holder of the namespace, or inside. If not, it may have looked already, and nobody goes in.
 */
static int open_pin(int directory, int file)
{
    struct statfs type;
    int namespace = openat(directory, "ns", O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (namespace < 0)
        return -1;
    if (!exists(directory, "record") || fstatfs(namespace, &type) != 0 || type.f_type != NSFS_MAGIC || ioctl(namespace, NS_GET_NSTYPE) != CLONE_NEWNS) {
        close(namespace);
        return -1;
    }
    if (futimens(file, NULL) != 0)
        die("can't mark the UDI as used: %s", strerror(errno));
    return high(namespace);
}

/* Find a pinned UDI for the canonical request; returns the namespace, or -1. Privileged. */
static int find_udi(int run, const struct document *request, const struct caller *caller, struct document *record)
{
    uint64_t hash = 0xcbf29ce484222325u; /* FNV-1a-64; the bytes themselves are compared below */
    for (size_t i = 0; i < request->size; i++)
        hash = (hash ^ (unsigned char)request->data[i]) * 0x100000001b3u;
    char path[128];
    snprintf(path, sizeof path, "udi/%u/%016llx", (unsigned)caller->uid, (unsigned long long)hash);
    int directory = openat(run, path, O_PATH | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    if (directory < 0)
        return -1;
    int namespace = -1, file = document_open(record, directory, "record", "record");
    if (file >= 0 && record->size > request->size && memcmp(record->data, request->data, request->size) == 0 && watches_hold(record))
        namespace = open_pin(directory, file);
    if (file >= 0)
        close(file);
    close(directory);
    return namespace;
}

/* --- jobs --------------------------------------------------------------------------------------------------------- */

#define UNNAMED_JOB "_" /* shifter/request.py */
#define MAX_JOBS 256

static bool contains(const struct list *list, const char *item)
{
    for (size_t i = 0; i < list->count; i++)
        if (strcmp(list->items[i], item) == 0)
            return true;
    return false;
}

/*
 * Find the job that the caller is in, among those of this user that have a UDI here: one of HINTS, else the one without
 * an id, else the only one if there are no hints. NULL: none, or more than one (in ALL). Privileged.
 */
static const char *choose_job(int run, const struct caller *caller, const struct list *hints, struct list *all)
{
    char path[NAME_MAX + 16];
    snprintf(path, sizeof path, "udi/%u", (unsigned)caller->uid);
    int list = openat(run, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    DIR *entries = list < 0 ? NULL : fdopendir(list);
    const struct dirent *entry;
    while (entries && all->count < MAX_JOBS && (entry = readdir(entries))) {
        if (strncmp(entry->d_name, "job.", 4) != 0 || !job_valid(entry->d_name + 4))
            continue;
        snprintf(path, sizeof path, "%s/record", entry->d_name); /* none: it is being set up, or taken down */
        if (exists(list, path))
            list_add(all, need(strdup(entry->d_name + 4)));
    }
    if (entries)
        closedir(entries);
    for (size_t i = 0; i < hints->count; i++)
        if (contains(all, hints->items[i]))
            return hints->items[i];
    if (contains(all, UNNAMED_JOB))
        return UNNAMED_JOB;
    return hints->count == 0 && all->count == 1 ? all->items[0] : NULL;
}

/* True if the fields KEY of both documents are the same, in number and order. */
static bool same_fields(const struct document *one, const struct document *other, const char *key)
{
    size_t at = 0, there = 0;
    for (;;) {
        const char *value = NULL, *field, *theirs = NULL, *match;
        while ((field = field_next(one, &at, &value)) && !key_is(field, key)) {
        }
        while ((match = field_next(other, &there, &theirs)) && !key_is(match, key)) {
        }
        if (!field || !match)
            return !field && !match;
        if (strcmp(value, theirs) != 0)
            return false;
    }
}

static const char OUTDATED[] = "metadata";

/*
 * Return the namespace of the job's own UDI, if it is what the caller asks for, else -1. It is fixed for the life of the
 * job: only user, groups and access list are looked at again. IMAGE: resolved, or NULL when none is named; without one,
 * volumes and modules are compared only if there are any. DIFFERENCE becomes what is not the same; OUTDATED: the builder
 * has to read the image's metadata again. Privileged.
 */
static int find_job_udi(int run, const struct document *request, const struct caller *caller, const char *job, const char *image,
                        const char **difference, struct document *record)
{
    char path[160];
    static const char *const fixed[] = {"uid", "gid", "groups"}, *const asked[] = {"image", "volume", "module"};
    snprintf(path, sizeof path, "udi/%u/job.%s", (unsigned)caller->uid, job);
    int directory = openat(run, path, O_PATH | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    int namespace = -1, file = directory < 0 ? -1 : document_open(record, directory, "record", "record");
    if (file >= 0) {
        for (size_t i = 0; i < 3; i++)
            if (!same_fields(request, record, fixed[i]))
                *difference = fixed[i];
        for (size_t i = 0; i < 3; i++)
            if ((image || (i > 0 && field_first(request, asked[i]))) && !same_fields(request, record, asked[i]))
                *difference = asked[i];
        if (!*difference && !watches_hold(record))
            *difference = OUTDATED;
        if (!*difference)
            namespace = open_pin(directory, file);
        close(file);
    }
    if (directory >= 0)
        close(directory);
    return namespace;
}

/* --- enter -------------------------------------------------------------------------------------------------------- */

/*
 * A terminal of the host's /dev/pts has no name in one of the UDI's own: put it on /dev/console, for this launch only.
 * Privileged.
 */
static int clone_terminal(const struct document *record)
{
    struct statfs type;
    if (!has_own_devpts(record))
        return -1;
    for (int fd = 0; fd <= 2; fd++)
        if (isatty(fd) && fstatfs(fd, &type) == 0 && type.f_type == DEVPTS_SUPER_MAGIC) { /* others are in /dev, which is the node's */
            int tree = (int)syscall(SYS_open_tree, fd, "", AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
            return tree < 0 ? -1 : high(tree);
        }
    return -1;
}

/* Drop everything, and read back that it is gone: ids, groups, all five capability sets, the way back through exec. */
static void drop_all(const struct caller *caller)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct none[2], now[2];
    memset(none, 0, sizeof none);
    int last = 0;
    while (prctl(PR_CAPBSET_READ, last, 0, 0, 0) >= 0)
        if (prctl(PR_CAPBSET_DROP, last++, 0, 0, 0) != 0)
            die("can't drop a capability: %s", strerror(errno));
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    if (setgroups((size_t)caller->group_count, caller->groups) != 0 || setresgid(caller->gid, caller->gid, caller->gid) != 0 ||
        setresuid(caller->uid, caller->uid, caller->uid) != 0 || syscall(SYS_capset, &header, none) != 0 ||
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        die("can't drop privilege: %s", strerror(errno));
    uid_t uids[3];
    gid_t gids[3], *groups = need(calloc((size_t)caller->group_count + 1, sizeof *groups));
    bool gone = getresuid(&uids[0], &uids[1], &uids[2]) == 0 && getresgid(&gids[0], &gids[1], &gids[2]) == 0 &&
                getgroups(caller->group_count, groups) == caller->group_count && syscall(SYS_capget, &header, now) == 0 &&
                memcmp(now, none, sizeof now) == 0 && prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1 && setfsuid((uid_t)-1) == (int)caller->uid;
    for (int i = 0; i < 3; i++)
        gone = gone && uids[i] == caller->uid && gids[i] == caller->gid;
    for (int i = 0; i < last; i++)
        gone = gone && prctl(PR_CAPBSET_READ, i, 0, 0, 0) == 0 && prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, i, 0, 0) == 0;
    qsort(groups, (size_t)caller->group_count, sizeof *groups, compare_gids);
    gone = gone && memcmp(groups, caller->groups, (size_t)caller->group_count * sizeof *groups) == 0;
    free(groups);
    if (!gone || caller->uid == 0 || caller->gid == 0 || seteuid(0) == 0)
        die("privilege was not dropped completely");
}

static _Noreturn void enter(int namespace, const struct invocation *asked, const struct caller *caller, const struct document *record)
{
    raise_privilege();
    int terminal = clone_terminal(record);
    if (setns(namespace, CLONE_NEWNS) != 0) /* root and cwd are now those of the UDI */
        die("can't enter the UDI: %s", strerror(errno));
    if (terminal >= 0 && unshare(CLONE_NEWNS) == 0)
        syscall(SYS_move_mount, terminal, "", AT_FDCWD, "/dev/console", MOVE_MOUNT_F_EMPTY_PATH);
    for (int resource = 0; resource < RLIM_NLIMITS; resource++)
        setrlimit(resource, &caller->limits[resource]);
    /* setresuid(2) notes that RLIMIT_NPROC is exceeded, and execve(2) then fails, where a plain one of the user would not. */
    struct rlimit processes = {RLIM_INFINITY, RLIM_INFINITY};
    if (setrlimit(RLIMIT_NPROC, &processes) != 0) {
        processes.rlim_cur = processes.rlim_max = caller->limits[RLIMIT_NPROC].rlim_max;
        setrlimit(RLIMIT_NPROC, &processes);
    }
    drop_all(caller);
    if (setrlimit(RLIMIT_NPROC, &caller->limits[RLIMIT_NPROC]) != 0)
        die("can't restore RLIMIT_NPROC: %s", strerror(errno));
    close(namespace);
    if (terminal >= 0)
        close(terminal);
    umask(caller->umask);
    run_command(asked, caller, record);
}

/* --- main --------------------------------------------------------------------------------------------------------- */

/* Write what is for the caller, all of which was read before, without privilege: the descriptor is the caller's choice. */
static _Noreturn void print_and_exit(const char *text, size_t size)
{
    drop_for_good();
    for (size_t done = 0; done < size;) {
        ssize_t written = write(1, text + done, size - done);
        if (written <= 0)
            die("can't write: %s", strerror(errno));
        done += (size_t)written;
    }
    _exit(0);
}

#define MAX_LOG (1u << 18) /* shifter/sshd/daemon.py: LOG_SIZE */

/* shifterctl logs of an ordinary user: what the sshd of the job ID said, if that file is the caller's. */
static _Noreturn void print_log(const struct caller *caller, const char *id)
{
    static char text[MAX_LOG];
    char path[128];
    struct stat status;
    if (!job_valid(id))
        die("'%s' is no id of a job", id);
    snprintf(path, sizeof path, "jobs/%s/log/sshd", id);
    raise_privilege();
    int run = open_run();
    int log = run < 0 ? -1 : openat(run, path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    bool theirs = log >= 0 && fstat(log, &status) == 0 && S_ISREG(status.st_mode) && status.st_uid == caller->uid;
    ssize_t size = theirs ? read(log, text, sizeof text) : -1;
    drop_temporarily();
    if (size < 0)
        die("job %s: you have no sshd of that job on this node", id);
    print_and_exit(text, (size_t)size);
}

/* shifterctl ps of an ordinary user: "KEY USED" and the record of each UDI that is the caller's. */
static _Noreturn void print_own_records(const struct caller *caller)
{
    char path[64], uid[16];
    char *out = NULL;
    size_t size = 0;
    static struct document record;
    FILE *stream = need(open_memstream(&out, &size));
    raise_privilege();
    int run = open_run();
    snprintf(uid, sizeof uid, "%u", (unsigned)caller->uid);
    snprintf(path, sizeof path, "udi/%s", uid);
    int list = run < 0 ? -1 : openat(run, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
    DIR *entries = list < 0 ? NULL : fdopendir(list);
    const struct dirent *entry;
    for (int count = 0; entries && count < 256 && (entry = readdir(entries)); count++) {
        struct stat status;
        int directory = openat(list, entry->d_name, O_PATH | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
        int file = directory < 0 ? -1 : document_open(&record, directory, "record", "record");
        const char *owner = file < 0 ? NULL : field_first(&record, "uid"); /* wherever somebody has put it */
        if (owner && strcmp(owner, uid) == 0 && fstat(file, &status) == 0) {
            int head = fprintf(stream, "%s %lld%c", entry->d_name, (long long)status.st_mtim.tv_sec, 0);
            if (head < 0 || fwrite(record.data, 1, record.size, stream) != record.size)
                die("out of memory");
        }
        if (file >= 0)
            close(file);
        if (directory >= 0)
            close(directory);
    }
    if (fclose(stream) != 0)
        die("out of memory");
    print_and_exit(out, size);
}

/* Take the user's lock, so that one builder runs and the others wait; -1: there is no base to have a lock in. */
static int take_lock(int run, const struct caller *caller)
{
    char path[64];
    if (run < 0)
        return -1;
    raise_privilege();
    snprintf(path, sizeof path, "udi/%u", (unsigned)caller->uid);
    bool there = mkdirat(run, path, 0700) == 0 || errno == EEXIST;
    int directory = there ? openat(run, path, O_PATH | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW) : -1;
    int lock = directory < 0 ? -1 : openat(directory, "lock", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    int fault = errno;
    if (directory >= 0)
        close(directory);
    drop_temporarily();
    if (lock < 0 && fault == ENOENT) /* somebody wiped /run/shifter: the builder makes the base anew */
        return -1;
    if (lock < 0)
        die("/run/shifter/%s can't be written: %s", path, strerror(fault));
    lock = high(lock);
    while (flock(lock, LOCK_EX) != 0)
        if (errno != EINTR)
            die("can't lock: %s", strerror(errno));
    return lock;
}

struct launch {
    struct invocation *asked;
    uint64_t started;
    bool plan; /* shifterctl plan: print what would be done, do nothing */
    bool outdated; /* the UDI of the job, whose record this is, can be entered when its access list has been read again */
    const struct caller *caller;
    uint64_t namespace; /* id of the caller's mount namespace; 0: the kernel has none to give */
    char once[17];      /* random, if the UDI must not be shared */
    struct document site, request, record;
};

/* The UDI becomes nobody else's: its request has a number that no other one has. */
static void do_not_share(struct launch *launch)
{
    uint64_t random;
    if (*launch->once)
        return;
    if (getrandom(&random, sizeof random, 0) != sizeof random)
        die("no random numbers: %s", strerror(errno));
    snprintf(launch->once, sizeof launch->once, "%016llx", (unsigned long long)random);
}

/* The image of a UDI, as a user would name it. */
static const char *image_of(const struct document *record)
{
    const char *image = field_first(record, "image");
    char *name = NULL;
    if (asprintf(&name, "%s%s", image && strchr(image, ':') ? "" : "id:", image ? image : "") < 0)
        die("out of memory");
    return name;
}

/* Find the UDI that a record promises. Returns its namespace, or -1. */
static int look_up(struct launch *launch, int run)
{
    char image[PATH_MAX + 16];
    int namespace = -1;
    launch->outdated = false;
    if (run < 0)
        return -1;
    raise_privilege();
    struct invocation *asked = launch->asked;
    struct list jobs = {0};
    const char *difference = NULL;
    asked->job = choose_job(run, launch->caller, &asked->job_hints, &jobs);
    int file = document_open(&launch->site, run, "site", "site");
    bool named = asked->image && *asked->image, resolved = false;
    if (file >= 0 && watches_hold(&launch->site)) {
        const char *idle = field_first(&launch->site, "udiIdleTime");
        if (!idle || strcmp(idle, "0") == 0)
            do_not_share(launch);
        resolved = named && resolve_image(&launch->site, asked->image, image, sizeof image);
    }
    make_request(&launch->request, asked, launch->caller, launch->namespace, launch->once, "image", resolved ? image : "");
    if (asked->job && (resolved || !named))
        namespace = find_job_udi(run, &launch->request, launch->caller, asked->job, resolved ? image : NULL, &difference, &launch->record);
    launch->outdated = difference == OUTDATED;
    if (namespace < 0 && resolved && !launch->outdated)
        namespace = find_udi(run, &launch->request, launch->caller, &launch->record);
    if (file >= 0)
        close(file);
    drop_temporarily();
    if (launch->outdated)
        return -1;
    if (difference && asked->verbose)
        say("the UDI of job %s is another: not the same %s", asked->job, difference);
    if (namespace < 0 && !named && difference && (strcmp(difference, "volume") == 0 || strcmp(difference, "module") == 0)) {
        asked->image = image_of(&launch->record); /* with other volumes: that of the job, in a UDI of its own */
        return look_up(launch, run);
    }
    if (namespace < 0 && !named && asked->job)
        die("the UDI of job %s %s; name an image (--image)", asked->job,
            difference ? "was made for another group list" : "was taken down meanwhile, or is of another version of Shifter");
    if (namespace < 0 && !named && jobs.count > 1)
        die("jobs %s and %s have a UDI here: say which one by SHIFTER_JOB_ID, or name an image (--image)", jobs.items[0], jobs.items[1]);
    return namespace;
}

static _Noreturn void launch_command(struct launch *launch)
{
    const struct invocation *asked = launch->asked;
    for (int attempt = 0, answer = -1; attempt < TRIES; attempt++) {
        raise_privilege();
        int run = open_run();
        drop_temporarily();
        int namespace = launch->plan ? -1 : look_up(launch, run), lock = -1;
        bool possible = launch->outdated || (asked->image && *asked->image);
        if (namespace < 0 && possible && (lock = take_lock(run, launch->caller)) >= 0 && !launch->plan) {
            namespace = look_up(launch, run); /* another door may have had it built while this one waited */
            if (namespace >= 0)
                flock(lock, LOCK_UN);
        }
        if (namespace >= 0) {
            if (asked->verbose)
                say("%6.1f ms  entering the UDI of %s, built %s", (double)(nanoseconds() - launch->started) / 1e6, field_first(&launch->record, "image"), attempt ? "now" : "before");
            close(run);
            if (lock >= 0)
                close(lock);
            if (answer >= 0)
                close(answer);
            enter(namespace, asked, launch->caller, &launch->record);
        }
        if (!launch->outdated && (!asked->image || !*asked->image))
            show_usage("usage", "no image: use --image=TYPE:TAG, or set SHIFTER_IMAGE");
        const char *image = launch->outdated ? image_of(&launch->record) : asked->image;
        make_request(&launch->request, asked, launch->caller, launch->namespace, launch->once, "ref", image);
        if (launch->outdated)
            field_add(&launch->request, "setup", "check");
        if (launch->plan || asked->verbose)
            field_add(&launch->request, "show", launch->plan ? "plan" : "steps");
        field_add(&launch->request, "end", "request");
        if (answer >= 0)
            close(answer);
        answer = run_builder(&launch->request, lock, asked->verbose, launch->started);
        if (run >= 0)
            close(run);
    }
    die("the image or the configuration changes faster than a UDI can be built; try again");
}

int main(int argc, char **argv)
{
    static struct caller caller;
    static struct invocation asked;
    static struct launch launch = {.asked = &asked, .caller = &caller};
    launch.started = nanoseconds();
    caller_uid = getuid();
    if (geteuid() == 0 && caller_uid != 0) {
        privileged = true;
        drop_temporarily();
    }
    make_standard_fds_valid(); /* musl has done the same before main(), or crashed */
    if (argc < 1)
        die("called without a name");
    save_caller(&caller);
    if (!privileged)
        run_without_privilege(argc, argv, &caller);
    if (privileged && argc == 2 && strcmp(argv[1], "--udi-list") == 0)
        print_own_records(&caller);
    if (privileged && argc == 3 && strcmp(argv[1], "--udi-log") == 0)
        print_log(&caller, argv[2]);
    if (privileged && argc >= 2 && strcmp(argv[1], "--udi-plan") == 0) {
        launch.plan = true;
        argv[1] = argv[0];
        argc--, argv++;
    }
    read_command_line(&asked, argc, argv);
    if (caller.gid == 0)
        die("shifter is for ordinary users: uid 0 and gid 0 are refused (uid %u, gid %u)", (unsigned)caller_uid, (unsigned)caller.gid);
    raise_privilege();
    struct rlimit files = caller.limits[RLIMIT_NOFILE];
    if (files.rlim_cur < LEAST_FILES) {
        files.rlim_cur = LEAST_FILES;
        if (files.rlim_max < LEAST_FILES)
            files.rlim_max = LEAST_FILES;
        if (setrlimit(RLIMIT_NOFILE, &files) != 0)
            die("at most %llu open files are allowed (ulimit -Hn); shifter needs %d", (unsigned long long)caller.limits[RLIMIT_NOFILE].rlim_max, LEAST_FILES);
    }
    drop_temporarily();
    refuse_user_namespace();
    raise_privilege();
    int own = high(open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC));
    struct statfs type;
    if (fstatfs(own, &type) != 0 || type.f_type != NSFS_MAGIC)
        die("/proc is not a proc file system");
    if (ioctl(own, NS_GET_MNTNS_ID, &launch.namespace) != 0)
        launch.namespace = is_home(own); /* 1: the node's own, which lives as long as the node; nothing else has that id here */
    refuse_chroot(own);
    close(own);
    drop_temporarily();
    if (!launch.namespace)
        do_not_share(&launch);
    if (asked.script && (asked.script_fd = open(asked.script, O_RDONLY | O_CLOEXEC)) >= 0)
        asked.script_fd = high(asked.script_fd);
    launch_command(&launch);
}
