"""What the node knows of its jobs: /run/shifter/jobs/ID, with a lock, and what the job's set-up was made of.

Everything here runs in the home mount namespace (udi/home.py: Home).
"""

import contextlib
import os
from collections.abc import Iterator

from shifter import fields
from shifter.errors import AccessError, FormatError
from shifter.jobs.job import Job
from shifter.linux import syscalls
from shifter.udi import pins, records
from shifter.udi.home import Home, entries

SETUP = "setup"
"""The directory of a job with the files that its UDI is to get; it goes when the UDI is there."""

LOG_BYTES = 256 << 10
"""Size of the file system that only holds the log of the sshd: who connects in a loop fills that, and nothing else."""


@contextlib.contextmanager
def locked(ident: str) -> Iterator[str]:
    """Hold the lock of a job; gives its directory. One setupRoot or unsetupRoot at a time works on it."""
    directory = f"{pins.JOBS}/{ident}"
    while True:
        os.makedirs(directory, 0o700, exist_ok=True)
        try:
            lock = os.open(f"{directory}/lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # whoever takes the job down was between the two
        syscalls.flock(lock, syscalls.LOCK_EX, "lock")
        if pins.is_same_file(lock, f"{directory}/lock"):
            break
        os.close(lock)  # whoever held it took the job down
    try:
        yield directory
    finally:
        os.close(lock)


def write(directory: str, job: Job) -> None:
    """Remember the set-up that is complete now."""
    pins.write_file(f"{directory}/state", fields.encode([*job.identity(), ("end", "job")]))


def read(directory: str) -> list[tuple[str, str]] | None:
    """Return what was remembered, None if no set-up is complete."""
    try:
        with open(f"{directory}/state", "rb") as file:
            return fields.decode(file.read(fields.MAX_BYTES + 1), "job")
    except (OSError, FormatError):
        return None


def keep_cgroup(directory: str, path: str) -> None:
    """Remember the cgroup of the job's sshd, before it is made: a set-up can be killed at any point."""
    pins.write_file(f"{directory}/cgroup", path.encode("utf-8", "surrogateescape"))


def cgroups(directory: str) -> set[str]:
    """Return the cgroups that were remembered."""
    try:
        with open(f"{directory}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            return {file.read()} - {""}
    except OSError:
        return set()


def log(ident: str) -> bytes:
    """Return what the sshd of a job said on this node; root only. Raises AccessError if there is none."""
    with Home():
        try:
            with open(f"{pins.JOBS}/{ident}/log/sshd", "rb") as file:
                return file.read(LOG_BYTES)
        except OSError:
            raise AccessError(f"job {ident}: it has no sshd on this node") from None


def udis(ident: str) -> list[records.Record]:
    """Return the records of all UDIs of a job: its own, and those that were built on demand inside of it.

    Also of those that an earlier unsetupRoot began to take down.
    """
    found = []
    for uid in entries(pins.UDIS):
        for key in entries(f"{pins.UDIS}/{uid}"):
            directory = f"{pins.UDIS}/{uid}/{key}"
            for name in ("record", pins.ENDED) if key != "lock" else ():
                record = records.read(directory, name)
                if record is not None and record.get("job") == ident:
                    found.append(record)
    return found
