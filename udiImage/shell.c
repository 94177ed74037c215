/* libexec/shell, the login shell of a user in an image that has none: so that sshd lets them in, and `ssh node program`,
 * scp and rsync work there.
 *
 * It is called as a shell is: `shell -c COMMAND`. A command of plain words is executed, without anything that only a shell
 * could do; for all else it says what is missing. It runs as the user, in the user's own container. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* What a shell would treat as more than a character of a word. "~" and "=" in a word that is not the first mean nothing. */
static const char SPECIAL[] = "|&;<>()$`\\\"'*?[]#!{}\n";

static int refuse(const char *what)
{
	(void)fprintf(stderr, "shifter: this image has no shell, so %s; name a program and its words: PROGRAM WORD ...\n", what);
	return 127;
}

int main(int argc, char **argv)
{
	if (argc < 3 || strcmp(argv[1], "-c") != 0)
		return refuse("none can be started");
	const char *command = argv[2], *special = strpbrk(command, SPECIAL);
	char *words = strdup(command), **program = calloc(strlen(command) / 2 + 2, sizeof *program), *rest = words;
	size_t count = 0;
	if (!words || !program) {
		(void)fprintf(stderr, "shifter: out of memory\n");
		return 127;
	}
	for (char *word; (word = strtok_r(rest, " \t", &rest));)
		program[count++] = word;
	int status;
	if (special) {
		char what[64];
		(void)snprintf(what, sizeof what, "%s in a command means nothing", *special == '\n' ? "a new line" : (char[]){*special, 0});
		status = refuse(what);
	} else if (count == 0) {
		status = 0;
	} else if (strchr(program[0], '=') || program[0][0] == '~') {
		status = refuse("variables and ~ mean nothing");
	} else {
		execvp(program[0], program);
		status = errno == ENOENT ? 127 : 126;
		(void)fprintf(stderr, "shifter: %s: %s\n", program[0], errno == ENOENT ? "not found in the container" : strerror(errno));
	}
	free(program);
	free(words);
	return status;
}
