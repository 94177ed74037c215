"""The options of the ``shifter`` command: one table, from which the door, the help and the completions are made.

The door is C and includes what ``python3 -m shifter.options --c-header`` prints; ``parse`` is the same parser
in Python, and a test compares both. The rules:

* Options end at the first word that is none, or after ``--`` (which is dropped). A lone ``-`` is a word.
* No abbreviations: ``--imag`` is unknown. ``--help`` and ``--version`` are options like others: an error after them is
  an error.
* ``--name=value``; where an argument is required also ``--name value``, whatever the next word looks like.
* One-letter options may be joined (``-vE``). A required argument is the rest of the word, else the next word; an
  optional one is the rest of the word, if there is any.
* An empty value (``--image=``) is a value.

A command line that breaks a rule is a UsageError with exactly one of these texts:

* ``unknown option 'WORD'`` - WORD is ``--name`` without its ``=value``, or the whole word of one-letter options
* ``option 'NAME' needs a value`` - NAME is ``--name`` or ``-x``, as it was typed
* ``option 'NAME' takes no value``
"""

import sys

from shifter.errors import UsageError

NONE, REQUIRED, OPTIONAL = "NONE", "REQUIRED", "OPTIONAL"
"""What an option takes. OPTIONAL: only in the same word, ``--name=value`` or ``-xvalue``."""


class Option:
    """One row of the table.

    name: the long name without dashes, by which ``parse`` reports the option; aliases: further long names;
    short: one letter or ``""``; argument: NONE, REQUIRED or OPTIONAL; metavar: the argument's name in the help;
    help: one sentence; repeatable: whether every occurrence counts (else the last one wins).
    """

    def __init__(
        self,
        name: str,
        short: str,
        argument: str,
        metavar: str,
        help: str,
        aliases: "tuple[str, ...]" = (),
        repeatable: bool = False,
    ) -> None:
        self.name = name
        self.short = short
        self.argument = argument
        self.metavar = metavar
        self.help = help
        self.aliases = aliases
        self.repeatable = repeatable


OPTIONS = (
    Option("help", "h", NONE, "", "Show this help and exit."),
    Option("version", "", NONE, "", "Show the version and exit."),
    Option("verbose", "v", NONE, "", "Say on standard error what is done: which UDI is used or built, and why."),
    Option(
        "image",
        "i",
        REQUIRED,
        "[TYPE:]TAG",
        "Run in this image: docker:debian:12. Types: docker, custom, id, local.",
    ),
    Option(
        "volume",
        "V",
        REQUIRED,
        "FROM:TO[:ro][;...]",
        "Mount your directory or file FROM on TO of the container. Replaces SHIFTER_VOLUME.",
        repeatable=True,
    ),
    Option(
        "entrypoint",
        "",
        OPTIONAL,
        "CMD",
        "Run the image's entry point, or CMD in its place, with the words of the command line as arguments.",
        aliases=("entry",),
    ),
    Option("workdir", "w", OPTIONAL, "PATH", "Start in PATH; without a value, in the working directory of the image."),
    Option("module", "m", REQUIRED, "NAME[,NAME...]", "Use these site modules; 'none' for no module at all."),
    Option("env", "e", REQUIRED, "NAME=VALUE", "Set an environment variable of the command.", repeatable=True),
    Option(
        "env-file",
        "",
        REQUIRED,
        "PATH",
        "Set environment variables from a file in the container, one NAME=VALUE a line.",
    ),
    Option("clearenv", "E", NONE, "", "Start from an empty environment instead of the caller's."),
)

_LONG = {name: option for option in OPTIONS for name in (option.name, *option.aliases)}
_SHORT = {option.short: option for option in OPTIONS if option.short}


def parse(argv: "list[str]") -> "tuple[list[tuple[str, str | None]], list[str]]":
    """Return the options of *argv* (without the program's name) in their order, and the words that are left.

    An option is (name, value); its value is None if it has none. Raises UsageError, see the module's docstring.
    """
    found: list[tuple[str, str | None]] = []
    index = 0
    while index < len(argv):
        word = argv[index]
        if word == "-" or not word.startswith("-"):
            break
        index += 1
        if word == "--":
            break
        parse_word = _parse_long if word.startswith("--") else _parse_short
        index = parse_word(argv, index, word, found)
    return found, argv[index:]


def _parse_long(argv: "list[str]", index: int, word: str, found: "list[tuple[str, str | None]]") -> int:
    """Add the option ``--name[=value]`` *word* to *found*; return the index of the next word to look at."""
    typed, equals, text = word.partition("=")
    option = _LONG.get(typed[2:])
    if option is None:
        raise UsageError(f"unknown option '{typed}'")
    value = text if equals else None
    if option.argument == NONE and value is not None:
        raise UsageError(f"option '{typed}' takes no value")
    if option.argument == REQUIRED and value is None:
        if index == len(argv):
            raise UsageError(f"option '{typed}' needs a value")
        value = argv[index]
        index += 1
    found.append((option.name, value))
    return index


def _parse_short(argv: "list[str]", index: int, word: str, found: "list[tuple[str, str | None]]") -> int:
    """Add the joined options ``-xyz`` *word* to *found*; return the index of the next word to look at."""
    for position, letter in enumerate(word[1:], start=2):
        option = _SHORT.get(letter)
        if option is None:
            raise UsageError(f"unknown option '{word}'")
        if option.argument == NONE:
            found.append((option.name, None))
            continue
        value = word[position:] or None
        if value is None and option.argument == REQUIRED:
            if index == len(argv):
                raise UsageError(f"option '-{letter}' needs a value")
            value = argv[index]
            index += 1
        found.append((option.name, value))
        break
    return index


def c_header() -> str:
    """Return the table as a C header: ``struct option_entry`` and ``OPTION_TABLE``; an alias is a row like others."""
    rows = [
        f'    {{"{name}", {_c_char(short)}, ARG_{option.argument}, {_c_id(option)}}},'
        for option in OPTIONS
        for name, short in [(option.name, option.short), *((alias, "") for alias in option.aliases)]
    ]
    return "\n".join(
        [
            "/* Generated from shifter/options.py, which also states the rules of parsing. Do not edit. */",
            "#ifndef SHIFTER_OPTIONS_H",
            "#define SHIFTER_OPTIONS_H",
            "",
            "enum shifter_option {",
            *(f"    {_c_id(option)}," for option in OPTIONS),
            "};",
            "",
            "enum argument_kind { ARG_NONE, ARG_REQUIRED, ARG_OPTIONAL };",
            "",
            "struct option_entry {",
            "    const char *name;",
            "    char short_name; /* 0: none */",
            "    enum argument_kind argument;",
            "    enum shifter_option id;",
            "};",
            "",
            "static const struct option_entry OPTION_TABLE[] = {",
            *rows,
            "};",
            "",
            "#endif",
            "",
        ]
    )


def _c_id(option: Option) -> str:
    return "OPT_" + option.name.upper().replace("-", "_")


def _c_char(letter: str) -> str:
    return f"'{letter}'" if letter else "0"


if __name__ == "__main__":
    if sys.argv[1:] != ["--c-header"]:
        sys.exit("usage: python3 -m shifter.options --c-header")
    sys.stdout.write(c_header())
