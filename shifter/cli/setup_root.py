"""setupRoot: what a prolog runs before a job, to have its UDI ready on this node."""

import _signal  # type: ignore[import-not-found]
import os
import sys
import time

from shifter.cli import text
from shifter.cli.arguments import Arguments, Option, Parser, number
from shifter.errors import AccessError, UsageError, describe
from shifter.images import reference
from shifter.jobs import job as jobs
from shifter.jobs import setup
from shifter.sshd import authorized, secret

PARSER = Parser(
    "setupRoot",
    "TYPE IDENTIFIER|TAG",
    "Set up the user defined image of a job on this node. For root, from the prolog of a workload manager.\n"
    "  Exit status 0: all is there. The same call again changes nothing.",
    [
        Option("-u", "--user", metavar="NAME", about="The job's user."),
        Option("-U", "--uid", metavar="UID", about="The user's id; must fit the name.", check=number(2**32 - 1)),
        Option("-G", "--gid", metavar="GID", about="Group of the job (default: the user's).", check=number(2**32 - 1)),
        Option("-v", "--volume", metavar="FROM:TO[:ro][;...]", about="As shifter --volume."),
        Option("-m", "--module", metavar="NAME[,NAME...]", about="As shifter --module."),
        Option("-N", "--node-spec", metavar="HOST/TASKS...", about="The job's nodes, for /var/hostsfile."),
        Option("--nodes", metavar="FILE", about="The same from a file, - for standard input: one HOST[/TASKS] a line."),
        Option("--job", metavar="ID", about="The job's id; without it, the one unnamed slot."),
        Option("--restart", metavar="NUMBER", about="How often the job was restarted.", check=number(2**31)),
        Option("--sshd", about="An sshd runs in the UDI (default)."),
        Option("--no-sshd", about="None does."),
        Option("-s", "--key", metavar="KEY", about="A further public key that may log in."),
        Option("--authorize", metavar="FILE", about="Further public keys from a file, which is read as the user."),
        Option("-V", "--verbose", about="Say what was done."),
        Option("--json", about="Print a JSON object about it."),
        Option("--from-json", metavar="FILE", about="All about the job, from FILE (- for standard input)."),
    ],
)


def _set_up(argv: list[str]) -> None:
    asked = PARSER.parse(argv)
    if asked is None:
        return
    if os.geteuid() != 0:
        raise AccessError("only root can set up a job")
    # Who ignores it can wait for no child; a prolog may have inherited that.
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
    begin = time.monotonic()

    def elapsed() -> float:
        return round(time.monotonic() - begin, 4)

    described = asked.text("--from-json")
    job = _described(described) if described is not None else _job(asked)
    steps: dict[str, float] = {}
    made = setup.set_up(job, lambda line: text.fail("setupRoot", line), lambda step: steps.update({step: elapsed()}))
    spent = elapsed()
    if asked.last("--json"):
        import json

        ident = asked.text("--job") or "" if described is None else job.ident
        what = {"job": ident, "uid": job.uid, "image": job.image, "made": made}
        text.write(json.dumps({**what, "seconds": spent, "steps": steps}) + "\n")
    elif asked.last("--verbose"):
        done = f"set up in {spent * 1000:.0f} ms" if made else "was set up already"
        text.write(f"{job.title}: {text.escape(job.image)} for {text.escape(job.user)} {done}\n")


def _described(path: str) -> jobs.Job:
    from shifter.wlm import generic  # json takes its time, too

    return generic.read(path)


def _job(asked: Arguments) -> jobs.Job:
    """Return the job that the options describe. Raises UsageError."""
    user, uid = asked.text("--user") or "", asked.number("--uid")
    if not user and uid is None:
        raise UsageError("whose job? -u NAME, or -U UID")
    if len(asked.words) != 2:
        raise UsageError("the image is missing, or there is more: TYPE and IDENTIFIER, or TAG, and nothing else")
    name, uid, gid, groups, home = jobs.account(user, uid, asked.number("--gid"))
    nodes = asked.text("--nodes")
    return jobs.Job(
        jobs.parse_ident(asked.text("--job") or ""),
        name,
        uid,
        gid,
        groups,
        _reference(*asked.words),
        volumes=asked.all("--volume"),
        modules=[name for names in asked.all("--module") for name in names.split(",") if name.lower() != "none"],
        nodes=jobs.parse_nodes(f"{asked.text('--node-spec') or ''} {_read_nodes(nodes) if nodes else ''}"),
        restart=asked.number("--restart") or 0,
        sshd=asked.last("--sshd", "--no-sshd") != "--no-sshd",
        home=home,
        authorized=_keys(secret.Account(uid, gid, groups, home), asked.all("--key"), asked.text("--authorize")),
    )


def _keys(account: secret.Account, keys: list[str], path: str | None) -> list[bytes]:
    """Return the further public keys of -s and --authorize, printed anew."""
    found = authorized.parse_keys("\n".join(keys).encode("utf-8", "surrogateescape"), "-s") if keys else []
    if path:
        found += authorized.parse_keys(secret.key_file(account, path), path)
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
    return text.guard("setupRoot", lambda: _set_up(sys.argv[1:] if argv is None else argv))
