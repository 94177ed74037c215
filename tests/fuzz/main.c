/*
 * The fuzzer's entry: which target is run says the program's name (options, request, ...). Here is also what stands in for
 * the parts of the door that end the process, and for its memory.
 */
#include "fuzz.h"

#include <sanitizer/asan_interface.h>
#include <setjmp.h>
#include <stdarg.h>

#undef malloc
#undef calloc
#undef realloc
#undef free
#undef asprintf

/* --- memory ------------------------------------------------------------------------------------------------------- */

static void **blocks;
static size_t block_count, block_room;

static void remember(void *memory)
{
    if (block_count == block_room) {
        block_room = block_room ? 2 * block_room : 64;
        blocks = realloc(blocks, block_room * sizeof *blocks);
    }
    CHECK(memory && blocks);
    blocks[block_count++] = memory;
}

void *fuzz_realloc(void *old, size_t size)
{
    size_t index = block_count;
    while (old && index > 0 && blocks[index - 1] != old)
        index--;
    CHECK(!old || index > 0);
    void *memory = realloc(old, size);
    CHECK(memory);
    if (old)
        blocks[index - 1] = memory;
    else
        remember(memory);
    return memory;
}

void *fuzz_calloc(size_t count, size_t size)
{
    void *memory = calloc(count, size);
    remember(memory);
    return memory;
}

void fuzz_free(void *memory)
{
    for (size_t i = block_count; i > 0; i--)
        if (blocks[i - 1] == memory) {
            free(memory);
            blocks[i - 1] = blocks[--block_count];
            return;
        }
    CHECK(!memory);
}

int fuzz_asprintf(char **out, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    int length = vasprintf(out, format, arguments);
    va_end(arguments);
    CHECK(length >= 0);
    remember(*out);
    return length;
}

/* --- the end of the process --------------------------------------------------------------------------------------- */

static jmp_buf way_out;
static char message[2048];

_Noreturn void fuzz_failed(const char *condition, const char *file, int line)
{
    fprintf(stderr, "%s:%d: not true: %s\nmessage: %s\n", file, line, condition, message);
    abort();
}

/* A message is one line, in bounds, of the door's name and printable bytes. */
static void check_message(size_t length, size_t room)
{
    CHECK(length >= strlen("shifter: \n") && length <= room && message[length - 1] == '\n');
    CHECK(strncmp(message, "shifter: ", strlen("shifter: ")) == 0);
    for (size_t i = 0; i + 1 < length; i++)
        CHECK((unsigned char)message[i] >= 32 && message[i] != 127);
    message[length - 1] = 0;
}

static void __attribute__((format(printf, 1, 2))) speak(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    check_message(format_message(message, sizeof message, format, arguments), sizeof message);
    va_end(arguments);
}

_Noreturn void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    check_message(format_message(message, sizeof message, format, arguments), sizeof message);
    va_end(arguments);
    longjmp(way_out, 1);
}

_Noreturn void show_usage(const char *kind, const char *text)
{
    speak("%s: %s", kind, text ? text : ""); /* the door prints the text itself where there is no Python */
    longjmp(way_out, 1);
}

const char *fuzz_message(void)
{
    return message;
}

bool survives(void (*body)(void *), void *argument)
{
    message[0] = 0;
    if (setjmp(way_out) != 0)
        return false;
    body(argument);
    return true;
}

/* --- input -------------------------------------------------------------------------------------------------------- */

uint8_t take_byte(struct input *input)
{
    if (!input->size)
        return 0;
    input->size--;
    return *input->data++;
}

static char *take(struct input *input, size_t length)
{
    char *text = fuzz_calloc(1, length + 1);
    if (length)
        memcpy(text, input->data, length);
    input->data += length;
    input->size -= length;
    return text;
}

char *take_word(struct input *input)
{
    if (!input->size)
        return NULL;
    char *word = take(input, strnlen((const char *)input->data, input->size));
    take_byte(input); /* the NUL */
    return word;
}

char *take_rest(struct input *input)
{
    return take(input, input->size);
}

void close_document(struct document *document)
{
    ASAN_POISON_MEMORY_REGION(document->data + document->size, sizeof document->data - document->size);
}

void open_document(struct document *document)
{
    ASAN_UNPOISON_MEMORY_REGION(document->data, sizeof document->data);
}

/* --- entry -------------------------------------------------------------------------------------------------------- */

static void (*target)(struct input);

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    static const struct {
        const char *name;
        void (*function)(struct input);
    } targets[] = {
        {"options", fuzz_options},     {"request", fuzz_request},         {"document", fuzz_document},
        {"reference", fuzz_reference}, {"environment", fuzz_environment},
    };
    (void)argc;
    const char *slash = strrchr((*argv)[0], '/'), *name = slash ? slash + 1 : (*argv)[0];
    for (size_t i = 0; i < sizeof targets / sizeof *targets; i++)
        if (strcmp(targets[i].name, name) == 0)
            target = targets[i].function;
    CHECK(target);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    target((struct input){data, size});
    while (block_count)
        free(blocks[--block_count]);
    return 0;
}
