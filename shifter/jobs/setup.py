"""Setting a job up and taking it down: what setupRoot and unsetupRoot do."""

import contextlib
import os
from collections.abc import Callable, Iterator

from shifter import _build, config
from shifter.errors import AccessError, BuildError
from shifter.jobs import builder, cgroup, processes, state
from shifter.jobs.job import Job
from shifter.request import UNNAMED_JOB
from shifter.sshd import SshError, daemon, hosts
from shifter.udi import inventory, pins, records


def set_up(job: Job, say: Callable[[str], None], done: Callable[[str], None] = lambda _: None) -> bool:
    """Make the UDI of *job*; return False if it was there already. *say* is told what an administrator should know.

    *done* is called with the name of each step at its end.

    The same job and request again changes nothing; the same id with another user, request or restart count takes the
    earlier one down first (it can't be running any more), except for the unnamed slot, where it is an error.
    Raises ShifterError, OSError; then nothing of the job is left.
    """
    settings = config.load(_build.CONF)
    with inventory.Home() as home:
        pins.prepare_base()
        with state.locked(job.ident) as directory:
            before = state.read(directory)
            if before == job.identity() and any(record.get("setup") for record in state.udis(job.ident)):
                return False
            if before is not None and job.ident == UNNAMED_JOB:
                raise AccessError(f"{job.title} of uid {dict(before).get('uid')} is set up here: unsetupRoot it first")
            if before is not None:
                say(f"{job.title} was set up before, for another request, user or restart: taken down first")
            left = _take_down(job.ident, directory)
            if left:
                raise BuildError(f"{job.title}: left of an earlier set-up: {'; '.join(left)}")
            try:
                with _builder(job, home) as udi:
                    sshd = _prepare(job, settings, f"{directory}/{state.SETUP}", say)
                    done("names and keys")
                    udi.build(job, settings.udiBuildTimeout)
                done("UDI")
                pins.remove(f"{directory}/{state.SETUP}")
                if sshd:
                    group = cgroup.propose(job.ident)
                    state.keep_cgroup(directory, group)
                    sshd.start(job.ident, directory, cgroup.make(group))
                    done("sshd")
                state.write(directory, job)
            except BaseException:
                if not _take_down(job.ident, directory):
                    pins.remove(directory)
                raise
    return True


def _prepare(job: Job, settings: config.Config, directory: str, say: Callable[[str], None]) -> "daemon.Sshd | None":
    """Write the files that the UDI is to get into *directory*; return the sshd that can be started in it, if there is one."""
    os.makedirs(directory, 0o700, exist_ok=True)
    pins.write_file(f"{directory}/hostsfile", job.hostsfile())
    names = [name for name, _ in job.nodes]
    sshd = None
    with hosts.Resolver(names) as resolver:
        try:
            if job.sshd:
                sshd = daemon.Sshd.prepare(job, settings, directory, resolver.addresses, say)
        except SshError as error:
            say(f"no sshd: {error.chain()}")
        pins.write_file(f"{directory}/hosts", hosts.etc_hosts(names, resolver.addresses()))
    return sshd


@contextlib.contextmanager
def _builder(job: Job, home: "inventory.Home") -> Iterator[builder.Builder]:
    os.makedirs(f"{pins.UDIS}/{job.uid}", 0o700, exist_ok=True)
    lock = os.open(f"{pins.UDIS}/{job.uid}/lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        with builder.Builder(lock, home) as made:
            yield made
    finally:
        os.close(lock)


def take_down(ident: str) -> list[str]:
    """End and unpin everything of a job; return what is left, with who holds it. Idempotent. Raises OSError."""
    with inventory.Home():
        if not pins.base_ready():
            return _end(ident, processes.roots_of_job(ident), set())
        with state.locked(ident) as directory:
            left = _take_down(ident, directory)
            if not left:
                pins.remove(directory)
    return left


def _take_down(ident: str, directory: str) -> list[str]:
    """With the job's lock held. First nobody new comes in, then what is inside ends, then the pins go.

    Pins and records stay until then: the next unsetupRoot finds what is left, also if this one is killed on the way.
    """
    found = state.udis(ident)
    left: list[str] = []
    pins.remove(f"{directory}/state")
    for record in found:
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{record.directory}/record", f"{record.directory}/{records.ENDED}")
    roots = {record.get("root"): record.uid for record in found} | processes.roots_of_job(ident)
    left += _end(ident, roots, state.cgroups(directory))
    for record in found:
        left += _holders(record)
    if left:
        return left
    for record in found:
        pins.remove_udi(record.directory)
    # A set-up that was killed: a directory without a record has nothing that anybody could have entered.
    for uid in inventory.entries(pins.UDIS):
        debris = f"{pins.UDIS}/{uid}/{pins.JOB_UDI}{ident}"
        if os.path.lexists(debris):
            pins.remove_udi(debris)
    pins.remove(f"{directory}/{state.SETUP}")
    return left


def _end(ident: str, roots: dict[str, int], cgroups: set[str]) -> list[str]:
    """End all processes of a job: *roots* of its UDIs with their owners, *cgroups* of its sshd. Return what is left."""
    cgroups = cgroups | cgroup.of_processes(ident, processes.inside(set(roots)))
    for path in cgroups:
        cgroup.end(path)
    left: list[str] = []
    for owner in sorted(set(roots.values())):
        left += processes.end({root for root, uid in roots.items() if uid == owner}, owner)
    return left + [f"cgroup {path}" for path in sorted(cgroups) if not cgroup.remove(path)]


def _holders(record: records.Record) -> list[str]:
    try:
        namespace = pins.open_namespace(f"{record.directory}/ns")
    except OSError:
        return []
    try:
        return processes.holders(namespace)
    finally:
        os.close(namespace)
