"""What all commands need for printing: escapes, times, tables, one error line."""

import os
import sys
from collections.abc import Callable, Sequence

from shifter.errors import ShifterError, UsageError, describe

MYPY = False
if MYPY:
    import click


def escape(text: str) -> str:
    r"""Return *text* with all that a terminal could act on, or can't show, as ``\xNN``, ``\uNNNN`` or ``\UNNNNNNNN``.

    Names and values come from users; printed as they are, they could rewrite the administrator's screen.
    """
    return "".join(char if char.isprintable() else _escaped(ord(char)) for char in text)


def _escaped(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:  # a byte that was no UTF-8 (surrogateescape)
        code -= 0xDC00
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def duration(seconds: float) -> str:
    """Return a span of time in its largest whole unit: ``45s``, ``12m``, ``3h``, ``2d``. A negative one is ``0s``."""
    whole = max(0, int(seconds))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if whole >= length:
            return f"{whole // length}{unit}"
    return f"{whole}s"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return lines with aligned columns, the last one ragged; all cells are escaped."""
    lines = [list(head), *([escape(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(text) + "\n"


def prepare_streams() -> None:
    """Make standard output and standard error print any text: what the locale can't encode is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def write(text: str) -> None:
    """Print *text* on standard output and flush it. A reader that went away (``| head``) is no error; OSError is."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        if not isinstance(error, BrokenPipeError):
            raise


def fail(program: str, message: str) -> None:
    """Print the one line of an error on standard error: ``PROGRAM: MESSAGE``, escaped. Where it can't be, the status says it."""
    try:
        print(f"{program}: {escape(message)}", file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # the interpreter flushes once more at its end


def guard(program: str, work: Callable[[], int | None]) -> int:
    """Do *work*; return the exit status. Errors are printed here, once."""
    prepare_streams()
    try:
        return work() or 0
    except ShifterError as error:
        fail(program, error.chain())
    except OSError as error:
        fail(program, describe(error))
    except KeyboardInterrupt:
        return 130
    return 1


def run(command: "click.Command", program: str, argv: list[str] | None) -> int:
    """Run *command* with *argv* (None: the process's arguments); return the exit status. Errors are printed here, once."""
    import click  # which the commands of jobs do without

    def work() -> int:
        try:
            status = command.main(args=sys.argv[1:] if argv is None else argv, prog_name=program, standalone_mode=False)
        except click.ClickException as error:
            raise UsageError(error.format_message()) from None
        except click.Abort:
            raise KeyboardInterrupt from None
        return status if isinstance(status, int) else 0

    return guard(program, work)
