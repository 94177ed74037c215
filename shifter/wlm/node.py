"""Slurm's prolog and epilog: setting up and taking down, and what becomes of a set-up that failed.

Programs that slurm.conf names, not hooks of the plugin: one that crashes takes no slurmd with it, a site can call it as a
line of its own prolog, and a test can replay any environment into it.

A failure is not the node's by default (``prologFailure=job``): the prolog exits 0, else Slurm drains the node and holds
the job; the reason is kept in /run/shifter/jobs/ID/failed, with which the plugin ends the job's first task. Only when even
that can't be written the node is at fault.
"""

import os
import signal
import syslog
from collections.abc import Mapping

from shifter import _build, config, fields
from shifter.cli import text
from shifter.errors import ShifterError, UsageError, describe
from shifter.jobs import state, teardown
from shifter.jobs.job import Job
from shifter.linux import syscalls
from shifter.udi import pins
from shifter.udi.home import Home
from shifter.wlm import slurm

FAILED = "failed"
SAVED = "slurm"
CCM = "ccm"
"""Files of a job's directory: why its set-up failed, the environment of its prolog, and that its tasks run inside."""


def prolog(environment: Mapping[str, str]) -> int:
    """Set up the job of a prolog; return the exit status."""
    known = {name: environment[name] for name in slurm.BELIEVED if name in environment}
    return _attempt(known, None)


def in_namespace(path: str, ident: str) -> int:
    """Set a job up once more, in the mount namespace that its tasks will have (job_container/tmpfs pins it at *path*).

    The plugin calls it, where the job's own /tmp exists; while the prolog ran, it did not.
    """
    ident = slurm.job_id({"SLURM_JOB_ID": ident})
    namespace = pins.open_namespace(path)
    with Home():
        known = _saved(ident)
    teardown.take_down(ident)
    return _attempt(known, namespace)


def epilog(environment: Mapping[str, str]) -> int:
    """Take down whatever the job of an epilog has here; return 1, so that Slurm drains the node, if something is left."""
    try:
        ident = slurm.job_id(environment)
        left = teardown.take_down(ident)
    except (ShifterError, OSError) as error:
        left, ident = [_line(error)], environment.get("SLURM_JOB_ID", "")[:40]
    for line in left:
        _say(f"job {ident}: left: {line}")
    return 1 if left else 0


def _attempt(known: Mapping[str, str], namespace: int | None) -> int:
    """Set up a job, from *namespace* if it is given; return the exit status of the prolog."""
    try:
        policy = config.load(_build.CONF).prologFailure
    except (ShifterError, OSError):
        policy = "job"  # that the file can't be read is what the set-up will say
    # Who ignores it can wait for no child; a site's prolog may have handed that on.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ident = ""
    try:
        ident = slurm.job_id(known)
        _set_up(ident, known, namespace, policy)
        return 0
    except (ShifterError, OSError) as error:
        reason = _line(error)
    except Exception as error:  # the job's failure, as all others: a node is drained for what nobody foresaw, too
        reason = text.escape(f"internal error: {type(error).__name__}: {error}")
    _say(f"job {ident or '?'}: {reason}")
    if policy == "drain" or not ident:
        return 1
    if policy == "ignore":
        return 0
    try:
        _keep(ident, FAILED, f"{reason}\n".encode())
    except (ShifterError, OSError) as error:
        _say(f"job {ident}: {_line(error)}")
        return 1
    return 0


def _tell_first_node(job: Job, known: Mapping[str, str], reason: str) -> None:
    """Leave the reason where the plugin finds it on the job's first node: what ends here is only what starts here."""
    name = known["SLURMD_NODENAME"]
    if name == job.nodes[0][0]:
        return
    text = f"shifter, start {job.restart}: {name}: {reason}"
    try:
        slurm.tell(
            job.ident, text[: slurm.MAX_COMMENT], config.load(_build.CONF).slurmBinPath, known.get("SLURM_CONF", "")
        )
    except (ShifterError, OSError) as error:
        _say(f"job {job.ident}: {_line(error)}")


def _set_up(ident: str, known: Mapping[str, str], namespace: int | None, policy: str) -> None:
    """Set up the job; with --sshd=yes it fails if there is no sshd. Raises ShifterError, OSError; then nothing is left."""
    job, wish = slurm.job(known, config.load(_build.CONF))
    try:
        lines = [("env", f"{name}={value}") for name, value in known.items()]
        _keep(ident, SAVED, fields.encode([*lines, ("end", SAVED)]))
        with Home():
            pins.remove(f"{pins.JOBS}/{ident}/{FAILED}")
        if namespace is not None:
            syscalls.setns(namespace)
        _build_job(job, wish)
    except (ShifterError, OSError) as error:
        if policy == "job":
            _tell_first_node(job, known, _line(error))
        raise


def _build_job(job: Job, wish: Mapping[str, str]) -> None:
    """Raises ShifterError, OSError; then nothing is left."""
    from shifter.jobs import setup  # half of all modules, and the epilog needs none of them

    said: list[str] = []
    setup.set_up(job, said.append)
    for line in said:
        _say(f"job {job.ident}: {line}")
    if wish["SSHD"] == "yes" and not _has_sshd(job.ident):
        teardown.take_down(job.ident)
        raise UsageError(f"--sshd=yes: {said[-1] if said else 'there is none'}")
    if wish["CCM"]:
        _keep(job.ident, CCM, b"1\n")


def _has_sshd(ident: str) -> bool:
    with Home():
        return os.path.exists(f"{pins.JOBS}/{ident}/sshd")


def _keep(ident: str, name: str, data: bytes) -> None:
    """Write a file of the job's directory. Raises ShifterError, OSError."""
    with Home():
        pins.prepare_base()
        with state.locked(ident) as directory:
            pins.write_file(f"{directory}/{name}", data)


def _saved(ident: str) -> dict[str, str]:
    """Return the environment of the job's prolog. Raises FormatError, OSError."""
    with open(f"{pins.JOBS}/{ident}/{SAVED}", "rb") as file:
        found = fields.decode(file.read(fields.MAX_BYTES + 1), SAVED)
    return {name: value for name, _, value in (text.partition("=") for _, text in found)}


def _line(error: ShifterError | OSError) -> str:
    """Return one line without control characters: it is printed on the user's terminal, too."""
    return text.escape(error.chain() if isinstance(error, ShifterError) else describe(error))


def _say(line: str) -> None:
    """Tell whoever looks after the node: standard error is in slurmd's log only when a prolog fails."""
    syslog.openlog("shifter-slurm", syslog.LOG_PID, syslog.LOG_DAEMON)
    syslog.syslog(syslog.LOG_ERR, text.escape(line))
    text.fail("shifter-slurm", line)
