/* What the targets of the fuzzer share. */
#ifndef FUZZ_H
#define FUZZ_H

#include "door.h"

#include <stdint.h>
#include <string.h>

/* A property that every input must have; the fuzzer keeps the input of one that has not. */
#define CHECK(condition) ((condition) ? (void)0 : fuzz_failed(#condition, __FILE__, __LINE__))
_Noreturn void fuzz_failed(const char *condition, const char *file, int line);

struct input {
    const uint8_t *data;
    size_t size;
};

uint8_t take_byte(struct input *input);
/* Return the next word, up to a NUL or the end, in memory of exactly its size; NULL if there is none. */
char *take_word(struct input *input);
/* Return all that is left, followed by a NUL, in memory of exactly its size. */
char *take_rest(struct input *input);
/* Make all but the first SIZE bytes of the document unreadable, so that the sanitizer sees who looks at them. */
void close_document(struct document *document);
void open_document(struct document *document);
/* Run BODY; return whether it came to its end. If not, fuzz_message() is what the door would have said. */
bool survives(void (*body)(void *), void *argument);
const char *fuzz_message(void);

/* The targets. */
void fuzz_options(struct input input);
void fuzz_request(struct input input);
void fuzz_document(struct input input);
void fuzz_reference(struct input input);
void fuzz_environment(struct input input);

#endif
