"""unsetupRoot: what an epilog runs after a job: everything that setupRoot made ends, and the exit status is the truth."""

import json
import os

import click

from shifter import _build
from shifter.cli import text
from shifter.errors import AccessError
from shifter.jobs import job as jobs
from shifter.jobs import setup


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "ignore_unknown_options": True, "allow_extra_args": True}
)
@click.version_option(_build.VERSION, message=f"unsetupRoot {_build.VERSION} (build {_build.BUILD})")
@click.option("--job", "ident", metavar="ID", default="", help="The job's id; without it, the one unnamed slot.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object about it.")
def cli(ident: str, as_json: bool) -> int:
    """End everything that runs in the UDIs of a job on this node, and take them down. For root, from an epilog.

    Exit status 0 only if nothing is left; it may be called again, and for a job that was never set up.
    """
    if os.geteuid() != 0:
        raise AccessError("only root can take down a job")
    left = setup.take_down(jobs.parse_ident(ident))
    if as_json:
        text.write(json.dumps({"job": ident, "left": left}) + "\n")
    for line in left:
        text.fail("unsetupRoot", f"left: {line}")
    return 1 if left else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line *argv* (default: the process's); return the exit status. Errors are printed here, once."""
    return text.run(cli, "unsetupRoot", argv)
