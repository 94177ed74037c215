"""Command lines of what runs in front of every job: argparse and click take longer to load than all of it to run.

As getopt_long(3): ``-u NAME``, ``-uNAME``, ``--user NAME``, ``--user=NAME``, letters together, options among the words, ``--``
ends them; no abbreviations.
"""

from collections.abc import Callable, Sequence

from shifter import _build
from shifter.cli import text
from shifter.errors import UsageError


class Option:
    """One option. *names*: as they are typed, the last one long; *metavar*: of its argument, "" if it has none.

    *check*: raises ValueError for an argument that can't be.
    """

    def __init__(self, *names: str, metavar: str = "", about: str = "", check: "Callable[[str], object]" = str) -> None:
        self.names = names
        self.metavar = metavar
        self.about = about
        self.check = check


class Arguments:
    """What was asked for: *given*, options by their long names with their arguments, and *words*; both in their order."""

    def __init__(self) -> None:
        self.given: list[tuple[str, str]] = []
        self.words: list[str] = []

    def last(self, *names: str) -> str | None:
        """Return which of the options *names* was given last."""
        return next((name for name, _ in reversed(self.given) if name in names), None)

    def all(self, name: str) -> list[str]:
        """Return all arguments of an option."""
        return [value for given, value in self.given if given == name]

    def text(self, name: str) -> str | None:
        """Return the last argument of an option, None if there is none."""
        return next(reversed(self.all(name)), None)

    def number(self, name: str) -> int | None:
        """Return the last argument of an option that is a number."""
        value = self.text(name)
        return None if value is None else int(value)


class Parser:
    """The options of *program*, with ``--help`` and ``--version``; *usage*: of its other words; *about*: what it does."""

    def __init__(self, program: str, usage: str, about: str, options: Sequence[Option]) -> None:
        self.program = program
        self.usage = usage
        self.about = about
        self.options = [
            *options,
            Option("--version", about="Print the version."),
            Option("-h", "--help", about="Print this."),
        ]
        self.by_name = {name: option for option in self.options for name in option.names}

    def parse(self, argv: Sequence[str], lenient: bool = False) -> Arguments | None:
        """Return what *argv* asks for; None if that was printed here. *lenient*: what is not known is left out.

        Raises UsageError.
        """
        found = Arguments()
        rest = list(argv)
        while rest:
            word = rest.pop(0)
            if word == "--":
                found.words += rest
                break
            if len(word) < 2 or word[0] != "-":
                found.words.append(word)
                continue
            name, equals, value = word.partition("=") if word.startswith("--") else (word[:2], word[2:], word[2:])
            option = self.by_name.get(name)
            if option is None:
                if lenient:
                    continue
                raise UsageError(f"{text.escape(name)}: there is no such option; {self.program} --help lists them")
            if not option.metavar:
                if equals and word.startswith("--"):
                    raise UsageError(f"{name} takes no argument")
                if equals:
                    rest.insert(0, f"-{value}")
            elif not equals:
                if not rest:
                    raise UsageError(f"{name} needs an argument: {option.metavar}")
                value = rest.pop(0)
            try:
                option.check(value)
            except ValueError as error:
                raise UsageError(f"{name} {text.escape(value[:80])}: {error}") from None
            found.given.append((option.names[-1], value))
        if found.last("--help"):
            text.write(self.help())
        elif found.last("--version"):
            text.write(f"{self.program} {_build.VERSION} (build {_build.BUILD})\n")
        else:
            return found
        return None

    def help(self) -> str:
        """Return what --help prints."""
        heads = [f"{', '.join(option.names)} {option.metavar}".rstrip() for option in self.options]
        lines = [f"  {head:34}  {option.about}" for head, option in zip(heads, self.options, strict=True)]
        usage = f"Usage: {self.program} [OPTIONS] {self.usage}".rstrip()
        return "\n".join([usage, "", f"  {self.about}", "", "Options:", *lines, ""])


def number(below: int) -> "Callable[[str], None]":
    """Return the check of an argument that must be a number from 0 to *below*, without that."""

    def check(value: str) -> None:
        if not (value.isascii() and value.isdigit() and len(value) <= 20 and int(value) < below):
            raise ValueError(f"it must be a number from 0 to {below - 1}")

    return check
