/* What the parts of the door share. */
#ifndef SHIFTER_DOOR_H
#define SHIFTER_DOOR_H

#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/types.h>

#define MAX_DOCUMENT 65536 /* shifter/fields.py: MAX_BYTES */
#define MAX_ID 0xFFFFFFFEu  /* shifter/request.py: MAX_UID; the next one means "no change" to the kernel */
#define EXIT_SHIFTER 125   /* Shifter's own failure, as with env(1), nohup(1) and docker */

/* NUL-terminated key=value fields (shifter/fields.py). */
struct document {
    char data[MAX_DOCUMENT];
    size_t size;
};

struct list {
    const char **items;
    size_t count;
};

/* A file that a record or the site file depends on; all numbers but AS are 0 if there must be none. */
struct watch {
    uint64_t as, device, inode, size, mtime, ctime;
    const char *path;
};

/* The directory behind a volume. */
struct source {
    uint64_t device, inode;
    const char *path;
};

/* What the command line and the environment ask for. */
struct invocation {
    char **command; /* NULL-terminated */
    const char *image, *request_text, *entrypoint, *workdir, *env_file;
    struct list volumes, modules, env, job_hints; /* job_hints: the ids that the environment says the caller's job has */
    const char *script; /* the #! script that was started; NULL: none */
    int script_fd;      /* it, opened outside of the container; 0: not */
    const char *job; /* not asked for, but found by the door: the job that the caller is in */
    bool image_given, volumes_given, modules_given; /* by an option, not by the caller's environment */
    bool entrypoint_given, workdir_given, clearenv, verbose;
};

/* What the caller was before the door changed anything, to be given back to the command. */
struct caller {
    uid_t uid;
    gid_t gid;
    gid_t *groups; /* sorted, distinct, without 0 */
    int group_count;
    mode_t umask;
    uint64_t mask; /* the kernel's sigset_t */
    struct rlimit limits[RLIM_NLIMITS];
    char *cwd; /* NULL: unreachable */
};

/* message.c */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
_Noreturn void die(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* fields.c */
size_t format_message(char *text, size_t room, const char *format, va_list arguments) __attribute__((format(printf, 3, 0)));
void *need(void *memory);
void list_add(struct list *list, const char *item);
const char *field_next(const struct document *document, size_t *position, const char **value);
const char *field_first(const struct document *document, const char *key);
bool key_is(const char *field, const char *key);
void field_add(struct document *document, const char *key, const char *value);
bool document_valid(const struct document *document, const char *kind);
bool take_number(const char **text, uint64_t *number);
bool parse_watch(const char *text, struct watch *watch);
bool parse_source(const char *text, struct source *source);
bool field_id(const struct document *document, const char *key, unsigned *id);

/* environment.c */
bool is_assignment(const char *text);
void env_unset(struct list *env, const char *name);
void env_set(struct list *env, const char *assignment);
void env_from_text(struct list *env, const char *path, char *text, size_t size);
void env_rules(struct list *env, const struct document *record, bool image);

/* parse.c */
enum reference_kind { REFERENCE_OTHER, REFERENCE_RESOLVED, REFERENCE_TAG };

char **split_words(int *argc, char **argv);
bool identifier_valid(const char *text);
bool job_valid(const char *text);
enum reference_kind parse_reference(const char *text, const char *default_kind, char *out, size_t room);
bool same_image(const char *left, const char *right);
void read_command_line(struct invocation *asked, int argc, char **argv);
void make_request(struct document *request, const struct invocation *asked, const struct caller *caller, uint64_t namespace,
                  const char *once, const char *image_key, const char *image);

/* door.c */
void raise_privilege(void);
void drop_temporarily(void);
int high(int fd);
_Noreturn void show_usage(const char *kind, const char *text);

/* start.c */
uint64_t nanoseconds(void); /* CLOCK_MONOTONIC, as the builder's steps */
int run_builder(const struct document *request, int lock, bool verbose, uint64_t started);

/* user.c: everything below runs as the user, for good. */
_Noreturn void run_command(const struct invocation *asked, const struct caller *caller, const struct document *record);
bool has_own_devpts(const struct document *record);
_Noreturn void run_without_privilege(int argc, char **argv, struct caller *caller);
void refuse_user_namespace(void); /* the one of user.c that is called with privilege to be had, but not in force */

#endif
