/*
 * Messages of the door, and the end after one. On their own, so that the fuzzer can put its own in their place.
 */
#define _GNU_SOURCE
#include "door.h"

#include <stdarg.h>
#include <unistd.h>

/* Print the message as a line, in one write. */
static void print_message(const char *format, va_list arguments)
{
    char text[2048];
    size_t length = format_message(text, sizeof text, format, arguments);
    if (geteuid() != getuid() && seteuid(getuid()) != 0) /* where it goes to is the caller's choice */
        _exit(EXIT_SHIFTER);
    if (write(2, text, length) < 0) {
        /* nobody to tell */
    }
}

void say(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    print_message(format, arguments);
    va_end(arguments);
}

/* Say it and exit with 125. */
_Noreturn void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    print_message(format, arguments);
    va_end(arguments);
    _exit(EXIT_SHIFTER);
}
