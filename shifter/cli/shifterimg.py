"""shifterimg: importing, listing and removing images."""

import grp
import json
import os
import pwd
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from shifter import _build, config
from shifter.cli import text
from shifter.errors import ShifterError, UsageError, describe
from shifter.images import catalog, convert, importer, publish, reference, tags
from shifter.images.layers import Advance
from shifter.images.reference import ImageReference
from shifter.images.store import Store

PROGRAM = "shifterimg"

Acl = tuple[int, ...] | None


@contextmanager
def _progress(label: str, size: int) -> Iterator[Advance]:
    """Show a progress bar of *size* bytes if somebody watches, else nothing."""
    if size == 0 or not sys.stderr.isatty():
        yield lambda count: None
        return
    with click.progressbar(length=size, label=label, file=sys.stderr) as bar:
        yield bar.update


def _ids(what: str, find: Callable[[str], int]) -> Callable[[click.Context, click.Parameter, str | None], Acl]:
    """Return the click callback that makes ids of a comma separated list of names and numbers of *what*."""

    def convert_list(ctx: click.Context, param: click.Parameter, value: str | None) -> Acl:
        if value is None:
            return None
        ids = []
        for item in filter(None, map(str.strip, value.split(","))):
            try:
                ids.append(find(item))
            except KeyError:
                if not (item.isascii() and item.isdigit() and int(item) < 0xFFFFFFFF):
                    raise click.BadParameter(f"there is no {what} {text.escape(item)}") from None
                ids.append(int(item))
        if not ids:
            raise click.BadParameter(f"no {what} in the list")
        return tuple(dict.fromkeys(ids))

    return convert_list


_user_option = click.option(
    "-u",
    "--user",
    "users",
    metavar="LIST",
    callback=_ids("user", lambda name: pwd.getpwnam(name).pw_uid),
    help="Only these users, and --group's, may use the image: names or uids, comma separated.",
)
_group_option = click.option(
    "-g",
    "--group",
    "groups",
    metavar="LIST",
    callback=_ids("group", lambda name: grp.getgrnam(name).gr_gid),
    help="Only members of these groups, and --user's, may use the image: names or gids, comma separated.",
)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_build.VERSION, message=f"{PROGRAM} {_build.VERSION} (build {_build.BUILD})")
@_user_option
@_group_option
@click.pass_context
def cli(ctx: click.Context, users: Acl, groups: Acl) -> None:
    """Look after the image store.

    An image is called TYPE:TAG, for example docker:debian:12 or custom:alice/tool:3; without TYPE it is of the site's
    default type. --user and --group may also stand after the command; they are for import.
    """
    ctx.obj = (users, groups)
    if ctx.invoked_subcommand is None:
        text.write(ctx.get_help() + "\n")


@cli.command("import", short_help="Make an image of a directory or archive.")
@click.argument("source", type=click.Path(exists=True))
@click.argument("tag", metavar="TYPE:TAG")
@click.option("--format", "fmt", type=click.Choice(convert.FORMATS), default="squashfs", show_default=True)
@_user_option
@_group_option
@click.pass_obj
def import_(before: tuple[Acl, Acl], source: str, tag: str, fmt: str, users: Acl, groups: Acl) -> None:
    """Make an image of SOURCE and call it TYPE:TAG; print its identifier.

    SOURCE: a directory with a root file system, a tar file of one (plain, gzip, bzip2, xz, zstd), an archive made by
    `docker save`, `podman save` or skopeo, or an OCI layout directory. ENV, ENTRYPOINT, CMD and WORKDIR of such an
    image are kept. In the image, everything belongs to root and can be read by everybody; setuid and setgid bits,
    extended attributes, device nodes, FIFOs and sockets are left out.

    For the owner of the image store and root.
    """
    with _store() as (store, default_type):
        ref = _reference(tag, default_type)
        if ref.kind not in ("docker", "custom"):
            raise click.BadParameter(f"{text.escape(str(ref))}: only docker: and custom: images have a tag")
        acl = (users if users is not None else before[0], groups if groups is not None else before[1])
        result = importer.import_image(store, source, ref, fmt, acl, _progress)
    for kind, count in sorted(result.left_out.items()):
        print(f"{PROGRAM}: left out: {kind} ({count})", file=sys.stderr)
    text.write(f"{result.identifier}\n")


@cli.command(short_help="List images.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of objects.")
def images(as_json: bool) -> None:
    """List the images that you may use; the owner of the image store and root see all."""
    with _store() as (store, _):
        entries = catalog.listing(store, _caller(store))
    if as_json:
        text.write(json.dumps([_entry_object(entry) for entry in entries], indent=2) + "\n")
        return
    rows = [
        (
            str(entry.reference),
            entry.identifier[:12],
            entry.format,
            _size(entry.size),
            _date(entry.imported),
            _note(entry),
        )
        for entry in entries
    ]
    text.write(text.table(("IMAGE", "ID", "FORMAT", "SIZE", "IMPORTED", ""), rows))


@cli.command(short_help="Print the identifier of an image.")
@click.argument("ref", metavar="[TYPE:]TAG")
def lookup(ref: str) -> None:
    """Print the identifier of an image; exit status 1 if there is none that you may use."""
    with _store() as (store, default_type):
        caller = _caller(store)
        identifier = store.resolve(_reference(ref, default_type), caller or (0, 0, []))
        catalog.open_for(store, identifier, caller).close()
    text.write(f"{identifier}\n")


@cli.command(short_help="Show all about an image.")
@click.argument("ref", metavar="[TYPE:]TAG")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def inspect(ref: str, as_json: bool) -> None:
    """Show what the image store knows about an image."""
    with _store() as (store, default_type):
        found = catalog.details(store, _reference(ref, default_type), _caller(store))
    if as_json:
        text.write(json.dumps(found, indent=2) + "\n")
        return
    found["size"], found["imported"] = _size(found["size"]), _date(found["imported"])
    for key, value in found.items():
        for item in value if key == "env" else [value]:
            if item is not None:
                shown = json.dumps(item, ensure_ascii=False) if isinstance(item, list) else str(item)
                text.write(text.escape(f"{key + ':':12}{shown}") + "\n")


@cli.command(short_help="Remove an image.")
@click.argument("ref", metavar="[TYPE:]TAG")
def rm(ref: str) -> None:
    """Remove the name of an image, and the image itself when it has no other name.

    Jobs that use it go on, unless the image store is on a network file system. For the owner of the store and root.
    """
    with _store() as (store, default_type):
        tags.require_writer(store)
        publish.remove(store, _reference(ref, default_type))


@contextmanager
def _store() -> Iterator[tuple[Store, str]]:
    """Give the image store and defaultImageType, as udiRoot.conf says."""
    settings = config.load(_build.CONF)
    store = Store.open(settings.imagePath)
    try:
        yield store, settings.defaultImageType
    finally:
        store.close()


def _caller(store: Store) -> catalog.Caller | None:
    """Return who asks, or None for those to whom nothing is hidden: root and the owner of the store."""
    if os.geteuid() in (0, store.owner):
        return None
    return os.geteuid(), os.getegid(), os.getgroups()


def _reference(value: str, default_type: str) -> ImageReference:
    try:
        ref = reference.parse(value, default_type)
    except UsageError as error:
        raise click.BadParameter(text.escape(error.chain())) from None
    if ref.kind == "local":
        raise click.BadParameter("local: is a directory, not an image of the store")
    return ref


def _entry_object(entry: catalog.Entry) -> dict[str, Any]:
    fields = entry._asdict()
    fields["reference"] = str(entry.reference)
    fields["id"] = fields.pop("identifier")
    return fields


def _note(entry: catalog.Entry) -> str:
    return entry.problem or ("restricted" if entry.restricted else "")


def _size(size: int | None) -> str:
    if size is None:
        return "-"
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _date(seconds: float | None) -> str:
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


class _Stopped(BaseException):
    """A signal asked us to end; everything on the way cleans up."""

    def __init__(self, number: int) -> None:
        self.number = number


def _stop(number: int, frame: Any) -> None:
    raise _Stopped(number)


def main(argv: list[str] | None = None) -> int:
    """Run the command line *argv* (default: the process's); return the exit status. Errors are printed here, once."""
    text.prepare_streams()
    os.umask(0o022)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    run: Callable[..., Any] = cli.main
    try:
        run(args=sys.argv[1:] if argv is None else argv, prog_name=PROGRAM, standalone_mode=False)
        return 0
    except click.ClickException as error:
        text.fail(PROGRAM, error.format_message())
        return error.exit_code
    except ShifterError as error:
        text.fail(PROGRAM, error.chain())
    except OSError as error:
        text.fail(PROGRAM, describe(error))
    except _Stopped as stopped:
        text.fail(PROGRAM, "interrupted; nothing is left behind")
        return 128 + stopped.number
    return 1
