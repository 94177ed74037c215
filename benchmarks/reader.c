/* Times stat, open, read and close of every file named in LIST, one path a line, after a pass that warms the caches.
 *
 *     reader LIST
 *
 * Prints nanoseconds.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static char names[1 << 20], data[1 << 16];

static long long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void pass(const char *end)
{
    struct stat status;
    for (const char *name = names; name < end; name += strlen(name) + 1) {
        int fd;
        if (stat(name, &status) || (fd = open(name, O_RDONLY | O_CLOEXEC)) < 0)
            err(1, "%s", name);
        while (read(fd, data, sizeof data) > 0)
            ;
        close(fd);
    }
}

int main(int argc, char **argv)
{
    FILE *list = argc == 2 ? fopen(argv[1], "r") : NULL;
    if (!list)
        errx(1, "usage: reader LIST");
    size_t length = fread(names, 1, sizeof names - 1, list);
    if (length == sizeof names - 1)
        errx(1, "%s is too long", argv[1]);
    for (char *c = names; c < names + length; c++)
        if (*c == '\n')
            *c = '\0';
    pass(names + length);
    long long start = now();
    pass(names + length);
    printf("%lld\n", now() - start);
    return 0;
}
