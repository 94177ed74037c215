/* Linked into the programs of the sshd, by `-Wl,--wrap=execve,--wrap=execv`: a session has the container's environment.
 *
 * setupRoot starts the sshd by `shifter`. So what the sshd was given as its environment is what every command of this UDI
 * is given, and a session must have it too; OpenSSH itself begins each session with an empty one. SetEnv in a file would
 * not do: a value may hold a newline.
 *
 * The sshd's own code sees none of it: an image's environment is nothing that a server should be steered by (TZ, TMPDIR,
 * SSH_AUTH_SOCK, ...). It is kept aside from before main() on, handed on where sshd executes itself for a connection, and
 * put below what sshd sets and the client sends where it executes the session's shell. */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef DEFAULT_PATH
#define DEFAULT_PATH "/usr/bin:/bin:/usr/sbin:/sbin" /* --with-default-path, OpenSSH's own default */
#endif
#define LOGIN_PATH "SHIFTER_LOGIN_PATH" /* shifter/udi/session.py: PROFILE */

extern char **environ;

/* The linker's names: it turns a call of execve into one of __wrap_execve, and __real_execve into libc's. */
int real_execve(const char *path, char *const argv[], char *const env[]) __asm__("__real_execve");
int wrap_execve(const char *path, char *const argv[], char *const env[]) __asm__("__wrap_execve");
int wrap_execv(const char *path, char *const argv[]) __asm__("__wrap_execv");

static char *nothing[] = {NULL};
static char **container = nothing;

__attribute__((constructor)) static void keep_environment(void)
{
	container = environ;
	environ = nothing;
}

static size_t count(char *const *env)
{
	size_t found = 0;
	while (env[found])
		found++;
	return found;
}

/* The variable of env that has the name of assignment (all before its "="), or NULL. */
static char *find(char *const *env, const char *assignment)
{
	size_t length = strcspn(assignment, "=");
	for (; *env; env++)
		if (strncmp(*env, assignment, length) == 0 && (*env)[length] == '=')
			return *env;
	return NULL;
}

/* What sshd sets without having been asked to: the PATH that it was built with, and where mail would be. */
static bool is_made_up(const char *assignment)
{
	return strncmp(assignment, "MAIL=", 5) == 0 || (strcmp(assignment, "PATH=" DEFAULT_PATH) == 0 && find(container, assignment));
}

/* The environment of a session. Never freed: a program takes the place of this one. */
static char *const *merge(char *const *session, bool login)
{
	size_t used = 0;
	char **merged = calloc(count(container) + count(session) + 2, sizeof *merged);
	if (!merged)
		return session;
	for (char *const *variable = session; *variable; variable++)
		if (!is_made_up(*variable))
			merged[used++] = *variable;
	for (char *const *variable = container; *variable; variable++)
		if (!find(merged, *variable)) /* the rest of merged is NULL */
			merged[used++] = *variable;
	/* /etc/profile of many images sets PATH anew: a file of ours in profile.d takes it from here. */
	char *path = login && access("/etc/profile", R_OK) == 0 ? find(merged, "PATH=") : NULL;
	if (path) {
		size_t size = strlen(path) + sizeof LOGIN_PATH;
		char *saved = malloc(size);
		if (saved) {
			(void)snprintf(saved, size, "%s%s", LOGIN_PATH, path + strlen("PATH"));
			merged[used] = saved;
		}
	}
	return merged;
}

int wrap_execve(const char *path, char *const argv[], char *const env[])
{
	return real_execve(path, argv, merge(env, argv[0] && argv[0][0] == '-'));
}

/* sshd executes itself: for a connection, and when it reads its configuration again. */
int wrap_execv(const char *path, char *const argv[])
{
	return real_execve(path, argv, container);
}
