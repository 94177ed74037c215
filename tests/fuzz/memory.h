/*
 * Included before every source of the fuzzer: what the door allocates and never frees, since it ends soon, is freed after
 * each input. It still comes from the sanitizer's allocator, so that what is read or written beyond it is seen.
 */
#ifndef FUZZ_MEMORY_H
#define FUZZ_MEMORY_H

#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>

void *fuzz_realloc(void *old, size_t size);
void *fuzz_calloc(size_t count, size_t size);
void fuzz_free(void *memory);
int fuzz_asprintf(char **out, const char *format, ...) __attribute__((format(printf, 2, 3)));

#define malloc(size) fuzz_realloc(NULL, size)
#define calloc(count, size) fuzz_calloc(count, size)
#define realloc(old, size) fuzz_realloc(old, size)
#define free(memory) fuzz_free(memory)
#define asprintf(...) fuzz_asprintf(__VA_ARGS__)

#endif
