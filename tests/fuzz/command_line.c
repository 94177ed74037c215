/* Targets: the command line with its variables and the interpreter line, and the request that is made of them. */
#include "fuzz.h"

#include "config.h"

#define MAX_WORDS 64

extern char **environ;

struct words {
    char *items[MAX_WORDS + 2];
    int count;
};

struct parsing {
    struct invocation asked;
    struct words *words;
};

static void parse(void *argument)
{
    struct parsing *parsing = argument;
    memset(&parsing->asked, 0, sizeof parsing->asked);
    read_command_line(&parsing->asked, parsing->words->count, parsing->words->items);
}

static bool equal(const char *left, const char *right)
{
    return left && right ? strcmp(left, right) == 0 : left == right;
}

static bool lists_equal(const struct list *left, const struct list *right)
{
    for (size_t i = 0; i < left->count && i < right->count; i++)
        if (strcmp(left->items[i], right->items[i]) != 0)
            return false;
    return left->count == right->count;
}

static void add(struct words *words, const char *option, const char *value)
{
    CHECK(words->count < MAX_WORDS);
    if (value && fuzz_asprintf(&words->items[words->count++], "%s=%s", option, value) >= 0)
        return;
    words->items[words->count++] = (char *)option;
}

/* What was understood, written as options again, must be understood the same. */
static void check_printed(const struct invocation *asked)
{
    static struct words printed;
    struct parsing again = {.words = &printed};
    memset(&printed, 0, sizeof printed);
    printed.items[printed.count++] = "shifter";
    if (asked->image)
        add(&printed, "--image", asked->image);
    for (size_t i = 0; i < asked->volumes.count; i++)
        add(&printed, "--volume", asked->volumes.items[i]);
    for (size_t i = 0; i < asked->modules.count; i++)
        add(&printed, "--module", asked->modules.items[i]);
    for (size_t i = 0; i < asked->env.count; i++)
        add(&printed, "--env", asked->env.items[i]);
    if (asked->env_file)
        add(&printed, "--env-file", asked->env_file);
    if (asked->entrypoint_given)
        add(&printed, "--entrypoint", asked->entrypoint);
    if (asked->workdir_given)
        add(&printed, "--workdir", asked->workdir);
    if (asked->clearenv)
        add(&printed, "-E", NULL);
    if (asked->verbose)
        add(&printed, "-v", NULL);
    add(&printed, "--", NULL);
    for (char **word = asked->command; *word; word++)
        add(&printed, *word, NULL);
    CHECK(survives(parse, &again));
    CHECK(equal(again.asked.image, asked->image) && again.asked.image_given == (asked->image != NULL));
    CHECK(equal(again.asked.request_text, asked->image)); /* an option says both */
    CHECK(lists_equal(&again.asked.volumes, &asked->volumes) && lists_equal(&again.asked.env, &asked->env));
    CHECK(lists_equal(&again.asked.modules, &asked->modules));
    CHECK(equal(again.asked.env_file, asked->env_file));
    CHECK(again.asked.entrypoint_given == asked->entrypoint_given && equal(again.asked.entrypoint, asked->entrypoint));
    CHECK(again.asked.workdir_given == asked->workdir_given && equal(again.asked.workdir, asked->workdir));
    CHECK(again.asked.clearenv == asked->clearenv && again.asked.verbose == asked->verbose);
    char **left = again.asked.command, **right = asked->command;
    while (*left && *right && strcmp(*left, *right) == 0)
        left++, right++;
    CHECK(!*left && !*right);
}

/* No word of an interpreter line is lost, changed or empty; all others stay the same. */
static void check_split(const struct words *words)
{
    char *line = words->items[1], *copy = strcpy(malloc(strlen(line) + 1), line), *given[MAX_WORDS + 2];
    memcpy(given, words->items, sizeof given);
    given[1] = copy;
    int count = words->count;
    char **split = split_words(&count, given);
    int parts = count - words->count + 1;
    CHECK(split[0] == words->items[0] && parts >= 0 && !split[count]);
    for (int i = 0; i < parts; i++) {
        line += strspn(line, " \t");
        size_t length = strcspn(line, " \t");
        CHECK(length && strlen(split[1 + i]) == length && strncmp(split[1 + i], line, length) == 0);
        line += length;
    }
    CHECK(!line[strspn(line, " \t")]);
    for (int i = 2; i < words->count; i++)
        CHECK(split[parts - 1 + i] == words->items[i]);
}

/* Variables (their number is the first byte), then words. */
static bool read_input(struct input *input, struct parsing *parsing)
{
    static char *variables[8];
    size_t count = take_byte(input) % 8, used = 0;
    memset(variables, 0, sizeof variables);
    for (char *word; used < count && (word = take_word(input));)
        variables[used++] = word;
    struct words *words = parsing->words;
    memset(words, 0, sizeof *words);
    words->items[words->count++] = "shifter";
    for (char *word; words->count < MAX_WORDS / 2 && (word = take_word(input));)
        words->items[words->count++] = word;
    char **saved = environ;
    environ = variables;
    bool parsed = survives(parse, parsing);
    environ = saved;
    return parsed;
}

void fuzz_options(struct input input)
{
    static struct words words;
    struct parsing parsing = {.words = &words};
    bool parsed = read_input(&input, &parsing);
    if (words.count >= 3)
        check_split(&words);
    if (!parsed) {
        const char *said = fuzz_message();
        CHECK(strncmp(said, "shifter: usage: ", 16) == 0 || strcmp(said, "shifter: help: ") == 0 || strcmp(said, "shifter: version: ") == 0);
        CHECK(words.count > 1);
        return;
    }
    const struct invocation *asked = &parsing.asked;
    CHECK(asked->command > words.items && asked->command <= words.items + words.count);
    CHECK(asked->volumes.count <= (size_t)words.count && asked->env.count < (size_t)words.count && asked->modules.count <= 1);
    CHECK(!asked->request_text == !asked->image);
    char *empty[] = {NULL}, **saved = environ;
    environ = empty;
    check_printed(asked);
    environ = saved;
}

/* --- request ------------------------------------------------------------------------------------------------------ */

struct making {
    struct caller caller;
    struct invocation asked;
    uint64_t namespace;
    const char *once, *key, *image;
};

static struct document request;

static void make(void *argument)
{
    struct making *making = argument;
    make_request(&request, &making->asked, &making->caller, making->namespace, making->once, making->key, making->image);
    field_add(&request, "end", "request");
}

static uint64_t take_integer(struct input *input, int bytes)
{
    uint64_t number = 0;
    while (bytes-- > 0)
        number = number << 8 | take_byte(input);
    return number;
}

static const char *expect(size_t *position, const char *key)
{
    const char *value, *field = field_next(&request, position, &value);
    CHECK(field && key_is(field, key));
    return value;
}

/* All that went into the request stands in it, in its order, and nothing else. */
static void check_request(const struct making *making)
{
    size_t position = 0;
    char number[24];
    CHECK(request.size <= MAX_DOCUMENT && document_valid(&request, "request"));
    CHECK(strcmp(expect(&position, "shifter"), SHIFTER_BUILD) == 0);
    snprintf(number, sizeof number, "%u", (unsigned)making->caller.uid);
    CHECK(strcmp(expect(&position, "uid"), number) == 0);
    snprintf(number, sizeof number, "%u", (unsigned)making->caller.gid);
    CHECK(strcmp(expect(&position, "gid"), number) == 0);
    const char *groups = expect(&position, "groups");
    for (int i = 0; i < making->caller.group_count; i++) {
        int length = snprintf(number, sizeof number, i ? ",%u" : "%u", (unsigned)making->caller.groups[i]);
        CHECK(strncmp(groups, number, (size_t)length) == 0);
        groups += length;
    }
    CHECK(!*groups);
    snprintf(number, sizeof number, "%llu", (unsigned long long)making->namespace);
    CHECK(strcmp(expect(&position, "ns"), number) == 0);
    if (*making->once)
        CHECK(strcmp(expect(&position, "once"), making->once) == 0);
    CHECK(strcmp(expect(&position, making->key), making->image) == 0);
    for (size_t i = 0; i < making->asked.volumes.count; i++)
        CHECK(strcmp(expect(&position, "volume"), making->asked.volumes.items[i]) == 0);
    for (size_t i = 0; i < making->asked.modules.count; i++)
        if (strcasecmp(making->asked.modules.items[i], "none") != 0)
            CHECK(strcmp(expect(&position, "module"), making->asked.modules.items[i]) == 0);
    CHECK(strcmp(expect(&position, "end"), "request") == 0 && position == request.size);
}

/* Numbers, then words: the image (seldom repeated until it is too long for a request), a module, volumes. */
void fuzz_request(struct input input)
{
    struct making making = {.once = "", .key = "image"};
    uint8_t flags = take_byte(&input), groups = take_byte(&input), step = take_byte(&input);
    bool many = flags >> 4 == 15;
    if (flags & 1)
        making.once = "0123456789abcdef";
    if (flags & 2)
        making.key = "ref";
    making.namespace = flags & 4 ? take_integer(&input, 8) : take_byte(&input);
    making.caller.uid = (uid_t)take_integer(&input, 4);
    making.caller.gid = (gid_t)take_integer(&input, 4);
    making.caller.groups = calloc((size_t)groups + 1, sizeof(gid_t));
    for (; making.caller.group_count < (many ? groups : groups % 16); making.caller.group_count++)
        making.caller.groups[making.caller.group_count] = (gid_t)(making.caller.group_count + 1) * (step << 16 | 1u);
    const char *word = take_word(&input), *module = take_word(&input);
    size_t length = word ? strlen(word) : 0, repeat = many ? 1024 : 1;
    char *image = calloc(length * repeat + 1, 1);
    for (size_t i = 0; i < repeat && word; i++)
        memcpy(image + i * length, word, length);
    making.image = image;
    if (module)
        list_add(&making.asked.modules, module);
    while (making.asked.volumes.count < MAX_WORDS && (word = take_word(&input)))
        list_add(&making.asked.volumes, word);
    if (survives(make, &making))
        check_request(&making);
    else
        CHECK(strstr(fuzz_message(), "the request is too long") && request.size <= MAX_DOCUMENT);
}
