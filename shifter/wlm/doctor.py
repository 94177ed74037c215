"""shifterctl doctor --slurm: looks at what this node's Slurm has of Shifter, and says what to change."""

import glob
import os
import re
import subprocess
from collections.abc import Iterator

import click

from shifter import _build, config
from shifter.cli import text
from shifter.errors import ShifterError, UsageError, describe
from shifter.linux import paths

PLUGIN = f"{_build.PREFIX}/lib/shifter/shifter_slurm.so"
MAX_INCLUDES = 100


@click.command(name="doctor", short_help="Look at this node, and say what to change.")
@click.option("--slurm", is_flag=True, help="Look at Slurm: slurm.conf, plugstack.conf, versions, cgroups.")
@click.option("--quiet", is_flag=True, help="Print nothing but what is wrong; for node health checks.")
def command(slurm: bool, quiet: bool) -> int:
    """Look at this node, and say what to change. Exit status 1 if something is wrong; advice alone does not count.

    As root it sees what slurmd sees.
    """
    if not slurm:
        raise UsageError("doctor: of what? --slurm")
    faults = 0
    for kind, line in examine():
        faults += kind == "wrong"
        if kind == "wrong" or not quiet:
            text.write(f"{kind}: {text.escape(line)}\n")
    return 1 if faults else 0


def examine() -> Iterator[tuple[str, str]]:
    """Yield (ok, advice or wrong, what it is) for everything that matters."""
    try:
        settings = config.load(_build.CONF)
        found = show_config(settings.slurmBinPath)
    except (ShifterError, OSError) as error:
        yield "wrong", error.chain() if isinstance(error, ShifterError) else describe(error)
        return
    yield from _versions(found)
    for key, program in (("Prolog", "shifter-slurm-prolog"), ("Epilog", "shifter-slurm-epilog")):
        yield _perilog(key, found.get(key, ""), f"{_build.PREFIX}/sbin/{program}")
    yield from _flags(found)
    yield from _plugstack(settings, found)
    yield from _sharing(settings, found)


def show_config(directory: str) -> dict[str, str]:
    """Return what ``scontrol show config`` says. Raises ShifterError."""
    command = [f"{directory}/scontrol", "show", "config"]
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
    if "SLURM_CONF" in os.environ and os.geteuid() != 0:
        environment["SLURM_CONF"] = os.environ["SLURM_CONF"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        raise ShifterError(f"{describe(error)}; slurmBinPath of udiRoot.conf says where Slurm's programs are") from None
    except subprocess.TimeoutExpired:
        raise ShifterError("scontrol did not answer within 60 s") from None
    if done.returncode != 0:
        raise ShifterError(f"scontrol show config: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    pairs = (line.partition("=") for line in done.stdout.splitlines())
    return {key.strip(): value.strip() for key, equals, value in pairs if equals}


def _versions(found: dict[str, str]) -> Iterator[tuple[str, str]]:
    """A plugin is loaded only by the release that it was built for."""
    version = found.get("SLURM_VERSION", "")
    yield "ok", f"Slurm {version} answers"
    if not os.path.exists(PLUGIN):
        yield "wrong", f"{PLUGIN} is missing: build where Slurm's headers are (libslurm-dev), and make install"
        return
    try:
        os.close(paths.open_trusted(PLUGIN))
    except (ShifterError, OSError) as error:
        yield "wrong", error.chain() if isinstance(error, ShifterError) else describe(error)
    built = _built_for(PLUGIN)
    if built[:2] != tuple(version.split(".")[:2]):
        yield "wrong", f"{PLUGIN} was built for Slurm {'.'.join(built)}, this is {version}: build and install it again"


def _built_for(path: str) -> tuple[str, ...]:
    """Return the version of Slurm that a plugin says it was built for: its text, which the compiler put into it."""
    with open(path, "rb") as file:
        match = re.search(rb"built for Slurm (\d+)\.(\d+)\.(\d+)", file.read(1 << 20))
    return tuple(part.decode() for part in match.groups()) if match else ()


def _perilog(key: str, value: str, program: str) -> tuple[str, str]:
    """The program itself, or a program of the site's that calls it."""
    for name in value.split(","):
        for path in glob.glob(name):
            if os.path.realpath(path) == os.path.realpath(program):
                return "ok", f"{key}={value}"
            try:
                with open(path, "rb") as file:
                    if program.encode() in file.read(1 << 20):
                        return "ok", f"{key}={value}, which calls {program}"
            except OSError:
                continue
    return "wrong", f"slurm.conf: {key}={value}: set it to {program}, or have that called by it"


def _flags(found: dict[str, str]) -> Iterator[tuple[str, str]]:
    flags = {flag.lower() for flag in found.get("PrologFlags", "").split(",")}
    if not flags & {"alloc", "contain"}:
        yield (
            "wrong",
            "slurm.conf: PrologFlags=Alloc,Contain,DeferBatch: without Alloc a node is set up with its first step",
        )
    if "deferbatch" not in flags:
        yield (
            "advice",
            "slurm.conf: PrologFlags=DeferBatch: else a script starts while other nodes are still being set up",
        )
    if "contain" not in flags:
        yield (
            "advice",
            "slurm.conf: PrologFlags=Contain: else sshd and what it starts are not counted and limited by Slurm",
        )
    if found.get("JobContainerType") == "job_container/tmpfs" and "contain" not in flags:
        yield "wrong", "slurm.conf: job_container/tmpfs needs PrologFlags=Contain, or /tmp in containers is the node's"
    tracking = found.get("ProctrackType", "")
    if tracking != "proctrack/cgroup":
        yield "advice", f"slurm.conf: ProctrackType={tracking}: only proctrack/cgroup can take the sshd into the job"


def _plugstack(settings: config.Config, found: dict[str, str]) -> Iterator[tuple[str, str]]:
    path = found.get("PlugStackConfig", "")
    if path in ("", "(null)"):
        path = f"{os.path.dirname(found.get('SLURM_CONF', '/etc/slurm/slurm.conf'))}/plugstack.conf"
    for line in _lines(path, 0):
        words = line.split()
        if (
            len(words) > 1
            and words[0] in ("required", "optional")
            and os.path.realpath(words[1]) == os.path.realpath(PLUGIN)
        ):
            yield "ok", f"{path}: {line}"
            if "enable_ccm=1" in words and not settings.allowLocalChroot:
                yield (
                    "wrong",
                    "udiRoot.conf: allowLocalChroot=0: --ccm, which enable_ccm=1 offers, needs allowLocalChroot=1",
                )
            return
    yield "wrong", f"{path}: add the line: required {PLUGIN}"


def _lines(path: str, depth: int) -> Iterator[str]:
    """Yield the lines of plugstack.conf and of what it includes."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read(1 << 20).splitlines()
    except OSError:
        return
    for line in (line.partition("#")[0].strip() for line in lines):
        if line.startswith("include") and depth < 4:
            for name in sorted(glob.glob(line.removeprefix("include").strip()))[:MAX_INCLUDES]:
                yield from _lines(name, depth + 1)
        elif line:
            yield line


def _sharing(settings: config.Config, found: dict[str, str]) -> Iterator[tuple[str, str]]:
    first, last = settings.sshdPort
    if settings.sharedNodeSshd and first == last:
        yield (
            "wrong",
            f"udiRoot.conf: sharedNodeSshd=1 with the one port {first}: sshdPort={first}-{first + 95} gives each job its own",
        )
    if settings.prologFailure == "job" and not os.path.exists(PLUGIN):
        yield "wrong", f"udiRoot.conf: prologFailure=job: only {PLUGIN} can end a job whose set-up failed"
    if int(re.sub(r"\D.*", "", found.get("PrologEpilogTimeout", "")) or 65534) < settings.udiBuildTimeout:
        yield "advice", f"slurm.conf: PrologEpilogTimeout is below udiBuildTimeout ({settings.udiBuildTimeout} s)"
