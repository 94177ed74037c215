"""Taking a job down: what unsetupRoot does. Nothing of what only a set-up needs is loaded for it."""

import contextlib
import errno
import os
import time

from shifter.jobs import cgroup, processes, state
from shifter.udi import pins, records
from shifter.udi.home import Home, entries

PATIENCE = 1.0
"""Seconds that a door may take from opening the namespace of a UDI until it is inside; that is microseconds of its own."""


def take_down(ident: str) -> list[str]:
    """End and unpin everything of a job; return what is left, with who holds it. Idempotent. Raises OSError."""
    with Home():
        if not pins.base_ready():
            return _end_processes(ident, processes.roots_of_job(ident), set())
        with state.locked(ident) as directory:
            left = end(ident, directory)
            if not left:
                forget(directory)
    return left


def end(ident: str, directory: str) -> list[str]:
    """With the job's lock held. First nobody new comes in, then what is inside ends, then the pins go.

    Pins and records stay until then: the next unsetupRoot finds what is left, also if this one is killed on the way.
    """
    # First: a builder that outlived its setupRoot takes its UDI back when it finds this gone (udi/build.py: _refuse_ended_job).
    pins.remove(f"{directory}/{state.SETUP}")
    pins.remove(f"{directory}/state")
    found = _close(ident)
    roots = {record.get("root"): record.uid for record in found} | processes.roots_of_job(ident)
    left = _end_processes(ident, roots, state.cgroups(directory)) + _wait_for_holders(found)
    if not left:  # what was a door on its way in at the first look can be inside now
        left = _end_processes(ident, roots, set())
    if left:
        return left
    for record in found:
        pins.remove_udi(record.directory)
    # A set-up that was killed: a directory without a record has nothing that anybody could have entered.
    for uid in entries(pins.UDIS):
        debris = f"{pins.UDIS}/{uid}/{pins.JOB_UDI}{ident}"
        if os.path.lexists(debris):
            pins.remove_udi(debris)
    return left


def _close(ident: str) -> list[records.Record]:
    """Let no door into the UDIs of a job any more, and return all that it has.

    The job's own goes first: a builder of another one looks, when it has published that, whether the job's is still there.
    What it published before is found by the second look.
    """
    for _ in range(2):
        for record in sorted(state.udis(ident), key=lambda record: not record.get("setup")):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{record.directory}/record", f"{record.directory}/{pins.ENDED}")
    return state.udis(ident)


def forget(directory: str) -> None:
    """Remove the directory of a job of which nothing is left, with its lock."""
    try:
        pins.remove(directory)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:  # somebody has come for the same job, and made the lock anew
            raise


def _end_processes(ident: str, roots: dict[str, int], cgroups: set[str]) -> list[str]:
    """End all processes of a job: *roots* of its UDIs with their owners, *cgroups* of its sshd. Return what is left."""
    cgroups = cgroups | cgroup.of_processes(ident, processes.inside(set(roots)))
    for path in cgroups:
        cgroup.end(path)
    left: list[str] = []
    for owner in sorted(set(roots.values())):
        left += processes.end({root for root, uid in roots.items() if uid == owner}, owner)
    return left + [f"cgroup {path}" for path in sorted(cgroups) if not cgroup.remove(path)]


def _wait_for_holders(found: list[records.Record]) -> list[str]:
    """Return a line for each process that holds a namespace of a job. A door that is on its way in does for a moment."""
    deadline = time.monotonic() + PATIENCE
    while (holders := [line for record in found for line in _holders(record)]) and time.monotonic() < deadline:
        time.sleep(0.002)
    return holders


def _holders(record: records.Record) -> list[str]:
    try:
        namespace = pins.open_namespace(f"{record.directory}/ns")
    except OSError:
        return []
    try:
        return processes.holders(namespace)
    finally:
        os.close(namespace)
