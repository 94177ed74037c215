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
	(void)fprintf(stderr, "shifter: this image has no shell (/bin/sh), so %s; name a program and its words: PROGRAM WORD ...\n", what);
	return 127;
}

int main(int argc, char **argv)
{
	if (argc < 3 || strcmp(argv[1], "-c") != 0)
		return refuse("none can be started");
	const char *special = strpbrk(argv[2], SPECIAL);
	if (special) {
		char what[64];
		(void)snprintf(what, sizeof what, "%s in a command means nothing", *special == '\n' ? "a new line" : (char[]){*special, 0});
		return refuse(what);
	}
	size_t count = 0;
	char **words = calloc(strlen(argv[2]) / 2 + 2, sizeof *words), *rest = argv[2];
	if (!words) {
		(void)fprintf(stderr, "shifter: out of memory\n");
		return 127;
	}
	for (char *word; (word = strtok_r(rest, " \t", &rest));)
		words[count++] = word;
	int status = 0;
	if (count && (strchr(words[0], '=') || words[0][0] == '~')) {
		status = refuse("variables and ~ mean nothing");
	} else if (count) {
		execvp(words[0], words);
		status = errno == ENOENT ? 127 : 126;
		(void)fprintf(stderr, "shifter: %s: %s\n", words[0], errno == ENOENT ? "not found in the container" : strerror(errno));
	}
	free(words);
	return status;
}
