"""What ``shifter`` itself prints: help, version and usage errors. The door runs this, after it dropped every privilege.

    shifter_cli.py help | version | usage TEXT

The options are those of shifter.options: one table for the door's parser and for this help.
"""

import sys

import click

from shifter import _build, options
from shifter.cli import text
from shifter.errors import UsageError, describe

FAILURE = 125
"""Exit status of shifter's own failures; 126, 127 and all others belong to the command."""

_ENVIRONMENT = [
    (
        "SHIFTER_IMAGE, SHIFTER_IMAGETYPE",
        "Image and its type, as for --image; without a type, as --image=SHIFTER_IMAGE.",
    ),
    ("SHIFTER_VOLUME, SHIFTER_MODULE", "As --volume and --module, which replace them."),
]
_STATUS = [
    ("125", "Shifter itself failed; one line on standard error says why."),
    ("126, 127", "The command can't be executed, or does not exist in the image."),
    ("other", "The command's own."),
]


class TableOption(click.Option):
    """An option of the table, shown with its argument as the door takes it: ``--workdir[=PATH]``."""

    def __init__(self, row: options.Option) -> None:
        self.row = row
        declarations = [f"--{name}" for name in (row.name, *row.aliases)] + ([f"-{row.short}"] if row.short else [])
        super().__init__(declarations, is_flag=row.argument == options.NONE, multiple=row.repeatable, help=row.help)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """Return the two columns of the help for this option."""
        row = self.row
        names = ", ".join([f"-{row.short}"] * bool(row.short) + [f"--{name}" for name in (row.name, *row.aliases)])
        argument = {options.NONE: "", options.REQUIRED: f" {row.metavar}", options.OPTIONAL: f"[={row.metavar}]"}
        return names + argument[row.argument], row.help


class ShifterCommand(click.Command):
    """``shifter`` for click: its parser is options.parse, so that it accepts exactly what the door accepts."""

    def __init__(self) -> None:
        super().__init__(
            "shifter",
            params=[TableOption(row) for row in options.OPTIONS],
            help="Run COMMAND in a user defined image. Without COMMAND: your shell, if the image has it, else /bin/sh.",
            add_help_option=False,
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Fill the context as click does: the value of every option (a tuple for repeatable ones), and the words left.

        An option given without its optional value is ``""``, one that was not given None. Raises click.UsageError.
        """
        try:
            found, rest = options.parse(args)
        except UsageError as error:
            raise click.UsageError(str(error), ctx) from None
        for option in self.params:
            assert isinstance(option, TableOption) and option.name
            values = [value or "" for name, value in found if name == option.row.name]
            if option.multiple:
                ctx.params[option.name] = tuple(values)
            elif option.is_flag:
                ctx.params[option.name] = bool(values)
            else:
                ctx.params[option.name] = values[-1] if values else None
        ctx.args = rest
        return rest

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Return what follows ``Usage: shifter``."""
        return ["[OPTION]...", "[--]", "[COMMAND [ARGUMENT]...]"]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what follows the options: environment and exit status."""
        with formatter.section("Environment"):
            formatter.write_dl(_ENVIRONMENT)
        with formatter.section("Exit status"):
            formatter.write_dl(_STATUS)
        formatter.write_paragraph()
        formatter.write_text("Images: shifterimg images. Manual: man shifter.")


def help_text() -> str:
    """Return the help of ``shifter``."""
    command = ShifterCommand()
    return command.get_help(click.Context(command, info_name="shifter", max_content_width=100)) + "\n"


def version_text() -> str:
    """Return the line of ``--version``."""
    return f"shifter {_build.VERSION} (build {_build.BUILD})\n"


def main(argv: list[str] | None = None) -> int:
    """Do what the door asks for in *argv* (default: the process's arguments); return the exit status."""
    words = sys.argv[1:] if argv is None else argv
    text.prepare_streams()
    try:
        if words == ["help"]:
            text.write(help_text())
            return 0
        if words == ["version"]:
            text.write(version_text())
            return 0
    except OSError as error:
        text.fail("shifter", f"standard output: {describe(error)}")
        return FAILURE
    text.fail(
        "shifter", " ".join(words[1:]) if words[:1] == ["usage"] else "this program is run by the command shifter"
    )
    print("Try 'shifter --help'.", file=sys.stderr)
    return FAILURE
