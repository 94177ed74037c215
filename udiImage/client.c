/* ssh, scp and sftp of UDI_IMAGE/bin: three names of this program, which decides who does the work.
 *
 * For a node of the job that is the real program of ours with our configuration, and nothing of the user's is read. For
 * every other host it is the image's own program, and where the image has none, ours with the user's configuration. To
 * know the host, the command line is read by the rules of the real programs: their option letters, getopt without
 * permutation, user@host, ssh://user@host:port, host:path. What can't be understood is left to the real program, which
 * says what is wrong.
 *
 * -J and -o ProxyJump: if a node is among the hops, our ssh must do it, which starts itself for each hop by the name in
 * argv[0], that is this program, which decides again. It hands -F on to that, also where the hop is no node: our own file
 * is left out then. scp and sftp only have to start our ssh (-S). A file that the user names with -F is honoured: ssh takes
 * the last one.
 *
 * Nothing is written, and there is no privilege: it is the user's ssh. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef UDI_IMAGE
#define UDI_IMAGE "/opt/udiImage"
#endif
#define CONFIG UDI_IMAGE "/etc/ssh_config.nodes"
#define NODES UDI_IMAGE "/etc/nodes"
#define OUR_SSH UDI_IMAGE "/bin/ssh"

enum { MAX_HOST = 256 };

/* getopt's strings of OpenSSH 9.2p1 (ssh.c, scp.c, sftp.c). */
static const struct tool {
	const char *name;
	const char *options;
	const char *real;
} TOOLS[] = {
    {"ssh", "1246ab:c:e:fgi:kl:m:no:p:qstvxAB:CD:E:F:GI:J:KL:MNO:PQ:R:S:TVw:W:XYy", UDI_IMAGE "/libexec/ssh.real"},
    {"scp", "12346ABCTdfOpqRrstvD:F:J:M:P:S:c:i:l:o:X:", UDI_IMAGE "/libexec/scp.real"},
    {"sftp", "1246AafhNpqrvCc:D:i:l:o:s:S:b:B:F:J:P:R:X:", UDI_IMAGE "/libexec/sftp.real"},
};

/* The list of nodes: lines in lower case, sorted by their bytes. Not there: no job with an sshd, no nodes. */
static struct {
	const char *text;
	size_t size;
} nodes;

static void open_nodes(void)
{
	int fd = open(NODES, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	struct stat status;
	if (fd < 0)
		return;
	if (fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && status.st_size > 0) {
		void *text = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
		if (text != MAP_FAILED) {
			nodes.text = text;
			nodes.size = (size_t)status.st_size;
		}
	}
	close(fd);
}

/* Compare the line at [line, line + length) with name as memcmp would compare the two as C strings. */
static int compare(const char *line, size_t length, const char *name)
{
	size_t own = strlen(name);
	int order = memcmp(line, name, length < own ? length : own);
	if (order != 0)
		return order;
	return length < own ? -1 : length > own;
}

static bool is_listed(const char *name)
{
	size_t low = 0, high = nodes.size; /* both at the beginning of a line, or at the end */
	while (low < high) {
		size_t start = low + (high - low) / 2;
		while (start > low && nodes.text[start - 1] != '\n')
			start--;
		const char *end = memchr(nodes.text + start, '\n', nodes.size - start);
		size_t length = (end ? (size_t)(end - nodes.text) : nodes.size) - start;
		int order = compare(nodes.text + start, length, name);
		if (order == 0)
			return true;
		if (order > 0)
			high = start;
		else
			low = start + length + (end != NULL);
	}
	return false;
}

/* Whether the length bytes at host, without the brackets that an address may have, are a node of the job. */
static bool is_node(const char *host, size_t length)
{
	char name[MAX_HOST], canonical[INET6_ADDRSTRLEN];
	struct in6_addr six;
	struct in_addr four;
	if (length >= 2 && host[0] == '[' && host[length - 1] == ']') {
		host++;
		length -= 2;
	}
	if (length == 0 || length >= sizeof name)
		return false;
	for (size_t i = 0; i < length; i++) /* ASCII only: nobody calls setlocale */
		name[i] = (char)tolower((unsigned char)host[i]);
	name[length] = '\0';
	if (inet_pton(AF_INET6, name, &six) == 1 && inet_ntop(AF_INET6, &six, canonical, sizeof canonical))
		return is_listed(canonical);
	if (inet_pton(AF_INET, name, &four) == 1 && inet_ntop(AF_INET, &four, canonical, sizeof canonical))
		return is_listed(canonical);
	return is_listed(name);
}

/* SCHEME://[user@]host[:port][/path]; *known says whether text was one. (misc.c: parse_uri) */
static bool is_node_uri(const char *text, const char *scheme, bool *known)
{
	size_t length = strlen(scheme);
	*known = strncmp(text, scheme, length) == 0 && strncmp(text + length, "://", 3) == 0;
	if (!*known)
		return false;
	const char *host = text + length + 3;
	const char *at = strchr(host, '@');
	if (at)
		host = at + 1;
	if (*host == '[') {
		const char *end = strchr(host, ']');
		return end && is_node(host, (size_t)(end + 1 - host));
	}
	return is_node(host, strcspn(host, ":/"));
}

/* What ssh takes for a destination: a URI, or [user@]host. */
static bool is_node_destination(const char *text)
{
	bool known, found = is_node_uri(text, "ssh", &known);
	if (known)
		return found;
	const char *at = strrchr(text, '@');
	const char *host = at ? at + 1 : text;
	return is_node(host, strlen(host));
}

/* The colon that ends the host in [user@]host:path, or NULL. (misc.c: colon) */
static const char *host_end(const char *text)
{
	bool bracket = *text == '[';
	if (*text == ':')
		return NULL;
	for (const char *c = text; *c; c++) {
		if (c[0] == '@' && c[1] == '[')
			bracket = true;
		if (c[0] == ']' && c[1] == ':' && bracket)
			return c + 1;
		if (*c == ':' && !bracket)
			return c;
		if (*c == '/')
			return NULL;
	}
	return NULL;
}

/* What scp and sftp take for a file or directory of another host. sftp takes a bare host too. */
static bool is_node_operand(const char *text, const char *scheme)
{
	bool known, found = is_node_uri(text, scheme, &known);
	if (known)
		return found;
	const char *end = host_end(text);
	if (!end)
		return strcmp(scheme, "sftp") == 0 && is_node_destination(text);
	const char *host = text;
	for (const char *c = text; c < end; c++)
		if (*c == '@')
			host = c + 1;
	return is_node(host, (size_t)(end - host));
}

/* Whether a node is among the hops of -J: [user@]host[:port] or a URI, separated by commas. */
static bool has_node_hop(const char *hops)
{
	char hop[2 * MAX_HOST];
	while (*hops) {
		size_t length = strcspn(hops, ",");
		if (length < sizeof hop) {
			bool known;
			memcpy(hop, hops, length);
			hop[length] = '\0';
			if (is_node_uri(hop, "ssh", &known))
				return true;
			const char *at = strrchr(hop, '@');
			const char *host = at ? at + 1 : hop;
			const char *end = *host == '[' ? strchr(host, ']') : NULL;
			if (!known && is_node(host, end ? (size_t)(end + 1 - host) : strcspn(host, ":")))
				return true;
		}
		hops += length + (hops[length] == ',');
	}
	return false;
}

/* The value of -o "ProxyJump VALUE" or ProxyJump=VALUE, or NULL. */
static const char *proxy_jump(const char *option)
{
	static const char keyword[] = "proxyjump", blank[] = " \t";
	option += strspn(option, blank);
	if (strncasecmp(option, keyword, sizeof keyword - 1) != 0)
		return NULL;
	option += sizeof keyword - 1;
	if (!strchr(" \t=", *option) || !*option)
		return NULL;
	option += strspn(option, blank);
	option += *option == '=';
	return option + strspn(option, blank);
}

/* What the options of a command line say. */
struct command {
	bool hop;     /* a node is among the hops */
	int our_file; /* index of the word -F, if the next word is our own file; else 0 */
};

/* Read options from the word at next on; return the index of the first word that is none. */
static int read_options(int argc, char **argv, const char *options, int next, struct command *found)
{
	while (next < argc) {
		const char *word = argv[next];
		if (word[0] != '-' || !word[1])
			break;
		int at = next++;
		if (strcmp(word, "--") == 0)
			break;
		for (const char *letter = word + 1; *letter; letter++) {
			const char *rule = *letter == ':' ? NULL : strchr(options, *letter);
			if (!rule || rule[1] != ':')
				continue;
			const char *value = letter[1] ? letter + 1 : next < argc ? argv[next++] : NULL;
			if (!value)
				break;
			const char *hops = *letter == 'J' ? value : *letter == 'o' ? proxy_jump(value) : NULL;
			if (hops && has_node_hop(hops))
				found->hop = true;
			if (strcmp(word, "-F") == 0 && strcmp(value, CONFIG) == 0)
				found->our_file = at;
			break;
		}
	}
	return next;
}

static bool same_file(const struct stat *one, const char *path)
{
	struct stat other;
	return stat(path, &other) == 0 && one->st_dev == other.st_dev && one->st_ino == other.st_ino;
}

/* Find the image's own program: where setupRoot put what our link covers in the image, else on the PATH, but not this one. */
static bool find_image_program(const char *name, char *path, size_t size)
{
	char ours[PATH_MAX];
	snprintf(ours, sizeof ours, "%s/bin/%s", UDI_IMAGE, name);
	const char *search = getenv("PATH");
	char first[] = UDI_IMAGE "/image";
	const char *directory = first;
	size_t length = strlen(first);
	while (directory) {
		struct stat status;
		int written = snprintf(path, size, "%.*s/%s", (int)length, directory, name);
		if (length > 0 && *directory == '/' && written > 0 && (size_t)written < size && stat(path, &status) == 0 &&
		    S_ISREG(status.st_mode) && !same_file(&status, ours) && !same_file(&status, "/proc/self/exe") &&
		    access(path, X_OK) == 0)
			return true;
		if (directory == first)
			directory = search ? search : "/usr/local/bin:/usr/bin:/bin";
		else
			directory = directory[length] ? directory + length + 1 : NULL;
		length = directory ? strcspn(directory, ":") : 0;
	}
	return false;
}

/* Execute path as argv0 with the words of before (ended by NULL) and those of argv behind them, without two from skip on. */
static int execute(const char *path, const char *argv0, const char *const *before, int argc, char **argv, int skip)
{
	int count = 0;
	const char **words = calloc((size_t)argc + 4, sizeof *words);
	if (words) {
		words[count++] = argv0;
		while (*before)
			words[count++] = *before++;
		for (int i = 1; i < argc; i++) {
			if (skip > 0 && (i == skip || i == skip + 1))
				continue;
			words[count++] = argv[i];
		}
		execv(path, (char *const *)words);
	}
	(void)fprintf(stderr, "%s: can't execute %s: %s\n", argv0, path, strerror(errno));
	free(words);
	return 255;
}

int main(int argc, char **argv)
{
	static const char *const nothing[] = {NULL}, *const with_config[] = {"-F", CONFIG, NULL},
	                         *const with_our_ssh[] = {"-S", OUR_SSH, NULL};
	char path[PATH_MAX];
	const struct tool *tool = &TOOLS[0];
	const char *name = argc > 0 ? strrchr(argv[0], '/') : NULL;
	name = name ? name + 1 : argc > 0 ? argv[0] : "";
	for (size_t i = 0; i < sizeof TOOLS / sizeof *TOOLS; i++)
		if (strcmp(name, TOOLS[i].name) == 0)
			tool = &TOOLS[i];
	open_nodes();

	struct command command = {false, 0};
	bool node = false, is_ssh = tool == &TOOLS[0];
	int operands = read_options(argc, argv, tool->options, 1, &command);
	if (is_ssh && operands < argc) {
		if (is_node_destination(argv[operands]))
			return execute(tool->real, OUR_SSH, with_config, argc, argv, 0);
		if (strcmp(argv[operands - 1], "--") != 0) /* ssh takes options behind the host too */
			(void)read_options(argc, argv, tool->options, operands + 1, &command);
	} else {
		int last = strcmp(tool->name, "sftp") == 0 && operands < argc ? operands + 1 : argc;
		for (int i = operands; i < last; i++)
			node = node || is_node_operand(argv[i], tool->name);
	}
	/* Without an operand there is no host: -V, -Q and a call for help are answered by what we ship.
	 * The image's ssh gets its bare name: so it starts us, by PATH, for the hops that its user's configuration names. */
	if (!node && !command.hop && operands < argc && find_image_program(tool->name, path, sizeof path))
		return execute(path, tool->name, nothing, argc, argv, command.our_file);
	if (is_ssh)
		return execute(tool->real, OUR_SSH, nothing, argc, argv, command.our_file);
	return execute(tool->real, tool->name, with_our_ssh, argc, argv, 0);
}
