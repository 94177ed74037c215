"""setupRoot: what a prolog runs before a job, to have its UDI ready on this node."""

import json
import os
import signal
import sys
import time

import click

from shifter import _build
from shifter.cli import text
from shifter.errors import AccessError, UsageError, describe
from shifter.images import reference
from shifter.jobs import job as jobs
from shifter.jobs import setup
from shifter.sshd import secret, trust
from shifter.wlm import generic


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_build.VERSION, message=f"setupRoot {_build.VERSION} (build {_build.BUILD})")
@click.option("-u", "--user", metavar="NAME", default="", help="The job's user.")
@click.option("-U", "--uid", type=click.IntRange(0, 2**32 - 2), help="The user's id; must fit the name.")
@click.option("-G", "--gid", type=click.IntRange(0, 2**32 - 2), help="The group of the job (default: the user's).")
@click.option("-v", "--volume", "volumes", multiple=True, metavar="FROM:TO[:ro][;...]", help="As shifter --volume.")
@click.option("-m", "--module", "modules", multiple=True, metavar="NAME[,NAME...]", help="As shifter --module.")
@click.option("-N", "--node-spec", metavar="HOST/TASKS...", default="", help="The job's nodes, for /var/hostsfile.")
@click.option("--nodes", metavar="FILE", help="The same from a file, - for standard input: one HOST[/TASKS] a line.")
@click.option("--job", "ident", metavar="ID", default="", help="The job's id; without it, the one unnamed slot.")
@click.option("--restart", type=click.IntRange(0, 2**31 - 1), default=0, help="How often the job was restarted.")
@click.option("--sshd/--no-sshd", default=True, help="Whether an sshd runs in the UDI (default: it does).")
@click.option("-s", "--key", "keys", multiple=True, metavar="KEY", help="A further public key that may log in.")
@click.option("--authorize", metavar="FILE", help="Further public keys from a file, which is read as the user.")
@click.option("-V", "--verbose", is_flag=True, help="Say what was done.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object about it.")
@click.option("--from-json", "described", metavar="FILE", help="All about the job, from FILE (- for standard input).")
@click.argument("kind", metavar="TYPE", default="")
@click.argument("image", metavar="IDENTIFIER|TAG", default="")
def cli(
    user: str,
    uid: int | None,
    gid: int | None,
    volumes: tuple[str, ...],
    modules: tuple[str, ...],
    node_spec: str,
    nodes: str | None,
    ident: str,
    restart: int,
    sshd: bool,
    keys: tuple[str, ...],
    authorize: str | None,
    verbose: bool,
    as_json: bool,
    described: str | None,
    kind: str,
    image: str,
) -> None:
    """Set up the user defined image of a job on this node. For root, from the prolog of a workload manager.

    Exit status 0: all is there. The same call again changes nothing.
    """
    if os.geteuid() != 0:
        raise AccessError("only root can set up a job")
    # Who ignores it can wait for no child; a prolog may have inherited that.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    begin = time.monotonic()

    def elapsed() -> float:
        return round(time.monotonic() - begin, 4)

    if described is not None:
        job = generic.read(described)
    else:
        spec = f"{node_spec} {_read_nodes(nodes)}" if nodes else node_spec
        job = _job(user, uid, gid, kind, image)
        job.ident, job.restart, job.sshd = jobs.parse_ident(ident), restart, sshd
        job.volumes, job.nodes = list(volumes), jobs.parse_nodes(spec)
        job.modules = [module for text_ in modules for module in text_.split(",") if module.lower() != "none"]
        job.authorized = _keys(secret.Account(job.uid, job.gid, job.groups, job.home), keys, authorize)
    steps: dict[str, float] = {}
    made = setup.set_up(job, lambda line: text.fail("setupRoot", line), lambda step: steps.update({step: elapsed()}))
    spent = elapsed()
    if as_json:
        what = {"job": job.ident if described else ident, "uid": job.uid, "image": job.image, "made": made}
        text.write(json.dumps({**what, "seconds": spent, "steps": steps}) + "\n")
    elif verbose:
        done = f"set up in {spent * 1000:.0f} ms" if made else "was set up already"
        text.write(f"{job.title}: {text.escape(job.image)} for {text.escape(job.user)} {done}\n")


def _job(user: str, uid: int | None, gid: int | None, kind: str, image: str) -> jobs.Job:
    """Return the job as far as its user and its image make it. Raises UsageError."""
    if not user and uid is None:
        raise UsageError("whose job? -u NAME, or -U UID")
    if not image:
        raise click.UsageError("Missing argument: TYPE and IDENTIFIER, or TAG, of the image")
    name, uid, gid, groups, home = jobs.account(user, uid, gid)
    return jobs.Job("", name, uid, gid, groups, _reference(kind, image), home=home)


def _keys(account: secret.Account, keys: tuple[str, ...], path: str | None) -> list[bytes]:
    """Return the further public keys of -s and --authorize, printed anew."""
    found = trust.parse_keys("\n".join(keys).encode("utf-8", "surrogateescape"), "-s") if keys else []
    if path:
        found += trust.parse_keys(secret.key_file(account, path), path)
    return found


def _reference(kind: str, image: str) -> str:
    """Return the image as a user would name it. Prologs written for C Shifter give the identifier of a tagged image."""
    if kind not in reference.KINDS:
        raise UsageError(f"image type {kind!r}: it must be one of {', '.join(reference.KINDS)}")
    if kind in ("docker", "custom") and len(image) == 64 and set(image) <= set("0123456789abcdef"):
        kind = "id"
    return f"{kind}:{image}"


def _read_nodes(path: str) -> str:
    try:
        with sys.stdin if path == "-" else open(path, encoding="ascii") as file:
            return file.read(1 << 24)
    except UnicodeDecodeError:
        raise UsageError(f"--nodes {path}: it must be ASCII") from None
    except OSError as error:
        raise UsageError(f"--nodes {describe(error)}") from None


def main(argv: list[str] | None = None) -> int:
    """Run the command line *argv* (default: the process's); return the exit status. Errors are printed here, once."""
    return text.run(cli, "setupRoot", argv)
