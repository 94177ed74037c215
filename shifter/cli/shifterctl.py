"""shifterctl: what is or would be built on this node, taking it down, and checking udiRoot.conf."""

import json
import os
import subprocess
import time
from typing import Any

import click

from shifter import _build, config
from shifter.cli import text, udi_image
from shifter.errors import AccessError, ShifterError, describe
from shifter.jobs import job as jobs
from shifter.jobs import state
from shifter.udi import inventory
from shifter.wlm import doctor


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_build.VERSION, message=f"shifterctl {_build.VERSION} (build {_build.BUILD})")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Look after the user defined images (UDIs) of this node."""
    if ctx.invoked_subcommand is None:
        text.write(ctx.get_help() + "\n")


@cli.command(short_help="Take down what is idle, too old or broken.")
@click.option("--all", "all_", is_flag=True, help="Take down everything, whatever its age and in use or not.")
@click.option("--keep-images", is_flag=True, help="Leave images mounted that no UDI uses.")
def gc(all_: bool, keep_images: bool) -> None:
    """Take down UDIs that are idle, too old or broken, and unmount images that no UDI uses.

    Processes that run in a UDI go on: it is only not entered again.
    """
    _print_lines(inventory.collect(_build.CONF, everything=all_, keep_images=keep_images))


@cli.command(short_help="List the UDIs of this node.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of objects.")
@click.option("--path", metavar="PATH", help="Only UDIs that have the file system of PATH mounted. For root.")
def ps(as_json: bool, path: str | None) -> None:
    """List the UDIs of this node: root sees all of them, a user their own."""
    if os.geteuid() == 0:
        udis = inventory.udis(os.path.abspath(path) if path is not None else None)
    elif path is None:
        udis = inventory.own_udis(ask_door("--udi-list"))
    else:
        raise AccessError("ps --path: only root can see what is mounted in a UDI")
    rows = [udi.as_dict() for udi in udis]
    if as_json:
        text.write(json.dumps(rows, indent=2) + "\n")
    else:
        text.write(
            text.table(("UID", "JOB", "IMAGE", "BUILT", "USED", "PROCESSES", "VOLUMES"), [_row(row) for row in rows])
        )


@cli.command(short_help="Take down the UDIs that hold PATH.")
@click.argument("path")
def release(path: str) -> None:
    """Take down the UDIs that hold the file system of PATH, so that it can be unmounted."""
    _print_lines(inventory.release(os.path.abspath(path)))


@cli.command(
    short_help="Show what a launch would mount, write and set.", context_settings={"ignore_unknown_options": True}
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of objects.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def plan(as_json: bool, options: tuple[str, ...]) -> None:
    """Show what `shifter OPTIONS` would mount, write and set, in this order, and why; nothing of it is done.

    For the user who calls it; put -- before OPTIONS.
    """
    if os.geteuid() == 0:
        raise AccessError("plan: a launch is an ordinary user's; run it as that user")
    lines = ask_door("--udi-plan", *options).split(b"\n")[:-1]  # other separators can be in names
    operations = [json.loads(line.decode("utf-8", "surrogateescape")) for line in lines]
    if as_json:
        text.write(json.dumps(operations, indent=2) + "\n")
    else:
        text.write("".join(f"{text.escape(step['text'])} ({text.escape(step['reason'])})\n" for step in operations))


@cli.command(short_help="Show what the sshd of a job said.")
@click.option("--job", "ident", metavar="ID", default="", help="The job; without it, the one that has no id.")
def logs(ident: str) -> None:
    """Show what the sshd of a job on this node said: who logged in, and why somebody could not.

    Root sees that of every job, a user that of their own.
    """
    job = jobs.parse_ident(ident)
    data = state.log(job) if os.geteuid() == 0 else ask_door("--udi-log", job)
    text.write("".join(text.escape(line) + "\n" for line in data.decode("utf-8", "surrogateescape").splitlines()))


@cli.group("config", invoke_without_command=True)
@click.pass_context
def config_group(ctx: click.Context) -> None:
    """Check udiRoot.conf, or show what it says."""
    if ctx.invoked_subcommand is None:
        text.write(ctx.get_help() + "\n")


@config_group.command()
@click.argument("file", default=_build.CONF)
def check(file: str) -> None:
    """Check FILE (default: the installed udiRoot.conf) and print what is wrong with it.

    A fault is an error; what is only suspicious on this node is a warning and does not change the exit status.
    """
    settings = _load(file)
    for warning in _warnings(settings):
        text.write(f"warning: {text.escape(warning)}\n")
    text.write(f"{text.escape(file)}: ok\n")


@config_group.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object: key -> value and where it comes from.")
@click.argument("file", default=_build.CONF)
def show(as_json: bool, file: str) -> None:
    """Print every key of FILE (default: the installed udiRoot.conf), its effective value, and where that comes from."""
    settings = _load(file)
    if as_json:
        document = {key: {"value": value, "where": where} for key, value, where in settings.entries()}
        text.write(json.dumps(document, indent=2) + "\n")
        return
    rows = [row for key, value, _ in settings.entries() for row in _rows_of_key(settings, key, value)]
    text.write(text.table(("KEY", "FROM", "VALUE"), rows))


cli.add_command(udi_image.command)
cli.add_command(doctor.command)


def ask_door(*arguments: str) -> bytes:
    """Return what the door prints for the calling user. Raises ShifterError with the door's own reason if it fails."""
    door = f"{_build.PREFIX}/bin/shifter"
    try:
        result = subprocess.run([door, *arguments], capture_output=True, check=False)
    except OSError as error:
        raise ShifterError(f"can't run {describe(error)}") from None
    if result.returncode != 0:
        reason = result.stderr.decode("utf-8", "surrogateescape").partition("\n")[0].removeprefix("shifter: ")
        raise ShifterError(reason or f"{door}: exit status {result.returncode}")
    return result.stdout


def _row(udi: dict[str, Any]) -> tuple[str, ...]:
    """Return the columns of a UDI for people: how it was asked for, and times as ages."""
    now = time.time()
    ages = [text.duration(now - udi[key]) + " ago" for key in ("built", "used")]
    image = udi["ref"] or udi["image"]
    job = (udi["job"] or "-") + (" (ended)" if udi["ended"] else "")
    return str(udi["uid"]), job, image, *ages, str(len(udi["pids"])), ";".join(udi["volumes"])


def _load(file: str) -> config.Config:
    """Load a configuration: root's as the builder does, a file of the caller's own as if it were root's."""
    uid = os.geteuid()
    return config.load(os.path.abspath(file), (0,) if uid == 0 or file == _build.CONF else (0, uid))


def _warnings(settings: config.Config) -> list[str]:
    """Return what is legal but suspicious: keys without meaning, directories that this node does not have."""
    found = [f"{where}: {key} has no meaning any more and is ignored" for key, where in settings.ignored]
    if not os.path.isdir(settings.imagePath):
        found.append(f"{settings.where('imagePath')}: imagePath {settings.imagePath} is not a directory here")
    for mount in settings.siteFs:
        if not os.path.isdir(mount.source):
            found.append(f"{mount.where}: siteFs {mount.source} is not a directory here")
    return found


def _rows_of_key(settings: config.Config, key: str, value: object) -> list[tuple[str, str, str]]:
    """Return the rows of one key: what every line adds to a list, or the one effective value."""
    if isinstance(value, list) and key in settings.settings:
        return [(key, str(setting), setting.value) for setting in settings.settings[key]]
    shown = "" if value == [] else str(int(value)) if isinstance(value, bool) else str(value)
    return [(key, settings.where(key), shown)]


def _print_lines(lines: list[str]) -> None:
    text.write("".join(text.escape(line) + "\n" for line in lines))


def main(argv: list[str] | None = None) -> int:
    """Run the command line *argv* (default: the process's); return the exit status."""
    return text.run(cli, "shifterctl", argv)
