"""unsetupRoot: what an epilog runs after a job: everything that setupRoot made ends, and the exit status is the truth."""

import os
import sys

from shifter.cli import text
from shifter.cli.arguments import Option, Parser
from shifter.errors import AccessError
from shifter.jobs import job as jobs
from shifter.jobs import teardown

PARSER = Parser(
    "unsetupRoot",
    "",
    "End everything that runs in the UDIs of a job on this node, and take them down. For root, from an epilog.\n"
    "  Exit status 0 only if nothing is left; it may be called again, and for a job that was never set up.",
    [
        Option("--job", metavar="ID", about="The job's id; without it, the one unnamed slot."),
        Option("--json", about="Print a JSON object about it."),
    ],
)


def _take_down(argv: list[str]) -> int:
    # Epilogs written for C Shifter may give it more, which never meant anything.
    asked = PARSER.parse(argv, lenient=True)
    if asked is None:
        return 0
    if os.geteuid() != 0:
        raise AccessError("only root can take down a job")
    ident = asked.text("--job") or ""
    left = teardown.take_down(jobs.parse_ident(ident))
    if asked.last("--json"):
        import json

        text.write(json.dumps({"job": ident, "left": left}) + "\n")
    for line in left:
        text.fail("unsetupRoot", f"left: {line}")
    return 1 if left else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line *argv* (default: the process's); return the exit status. Errors are printed here, once."""
    return text.guard("unsetupRoot", lambda: _take_down(sys.argv[1:] if argv is None else argv))
