"""Setting a job up: what setupRoot does."""

import contextlib
import os
from collections.abc import Callable, Iterator

from shifter import _build, config
from shifter.errors import AccessError, BuildError
from shifter.jobs import builder, cgroup, state, teardown
from shifter.jobs.job import Job
from shifter.request import UNNAMED_JOB
from shifter.sshd import SshError, daemon, hosts
from shifter.udi import pins
from shifter.udi.home import Home


def set_up(job: Job, say: Callable[[str], None], done: Callable[[str], None] = lambda _: None) -> bool:
    """Make the UDI of *job*; return False if it was there already. *say* is told what an administrator should know.

    *done* is called with the name of each step at its end.

    The same job and request again changes nothing; the same id with another user, request or restart count takes the
    earlier one down first (it can't be running any more), except for the unnamed slot, where it is an error.
    Raises ShifterError, OSError; then nothing of the job is left.
    """
    settings = config.load(_build.CONF)
    with Home() as home:
        pins.prepare_base()
        with state.locked(job.ident) as directory:
            before = state.read(directory)
            if before == job.identity() and any(record.get("setup") for record in state.udis(job.ident)):
                return False
            if before is not None and job.ident == UNNAMED_JOB:
                raise AccessError(f"{job.title} of uid {dict(before).get('uid')} is set up here: unsetupRoot it first")
            if before is not None:
                say(f"{job.title} was set up before, for another request, user or restart: taken down first")
            left = teardown.end(job.ident, directory)
            if left:
                raise BuildError(f"{job.title}: left of an earlier set-up: {'; '.join(left)}")
            for name in ("sshd", "log"):
                pins.remove(f"{directory}/{name}")
            try:
                names = [name for name, _ in job.nodes]
                with hosts.Resolver(names) as resolver, _builder(job, home) as udi:
                    sshd = _prepare(job, settings, f"{directory}/{state.SETUP}", resolver, say)
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
                if not teardown.end(job.ident, directory):
                    teardown.forget(directory)
                raise
    return True


def _prepare(
    job: Job, settings: config.Config, directory: str, resolver: hosts.Resolver, say: Callable[[str], None]
) -> daemon.Sshd | None:
    """Write the files that the UDI is to get into *directory*; return the sshd that can be started in it, if there is one."""
    os.makedirs(directory, 0o700, exist_ok=True)
    pins.write_file(f"{directory}/hostsfile", job.hostsfile())
    sshd = None
    try:
        if job.sshd:
            sshd = daemon.Sshd.prepare(job, settings, directory, resolver.addresses, say)
    except SshError as error:
        say(f"no sshd: {error.chain()}")
    names = [name for name, _ in job.nodes]
    pins.write_file(f"{directory}/hosts", hosts.etc_hosts(names, resolver.addresses()))
    return sshd


@contextlib.contextmanager
def _builder(job: Job, home: Home) -> Iterator[builder.Builder]:
    os.makedirs(f"{pins.UDIS}/{job.uid}", 0o700, exist_ok=True)
    lock = os.open(f"{pins.UDIS}/{job.uid}/lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        with builder.Builder(lock, home) as made:
            yield made
    finally:
        os.close(lock)
