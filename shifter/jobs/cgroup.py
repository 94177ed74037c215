"""The cgroup of a job's sshd and of all that starts below it: whatever a session forks, it ends at one stroke.

Only where no workload manager takes the sshd into a cgroup of its own (then ours is empty), and only for what comes in by
ssh: `shifter` never moves a process out of the cgroup that it was started in. A node without a usable hierarchy does
without: processes are found by their root all the same (processes.py), just not all at one moment.

Version 2 has ``cgroup.kill``; of version 1 the freezer does, in which nobody can fork while they are killed one by one
(cgroups(7), Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/freezer-subsystem.rst). It lies at the top of the hierarchy and
not below the prolog's own cgroup: to restart the service that runs prologs must end nobody's job.
"""

import _signal  # type: ignore[import-not-found]
import contextlib
import os
import time
from collections.abc import Iterable

PARENT = "shifter"
FREEZE_TIME = 2.0
"""Seconds until a freezer that does not freeze (a task in an uninterruptible call) is used as it is."""


def propose(ident: str) -> str:
    """Return the directory of a cgroup to be made for the sshd of a job; "" if this node has no hierarchy for it.

    The name is not the job's alone: containers that share one hierarchy can have jobs of the same id.
    """
    top = _hierarchy()
    return f"{top}/{PARENT}/job.{ident}.{os.urandom(4).hex()}" if top else ""


def make(path: str) -> str:
    """Make a cgroup that `propose` returned; return it, or "" where that can't be."""
    if not path:
        return ""
    try:
        os.makedirs(path, 0o755)
    except OSError:
        return ""
    if not os.path.exists(f"{path}/cgroup.procs"):  # something else is mounted over the hierarchy
        os.removedirs(path)
        return ""
    return path


def enter(path: str) -> None:
    """Move this process into a cgroup that `make` returned. Raises OSError."""
    if path:
        _write(f"{path}/cgroup.procs", "0")


def of_processes(ident: str, pids: Iterable[int]) -> set[str]:
    """Return the cgroups of a job that some of *pids* are in: for who has lost what `propose` returned."""
    top = _hierarchy()
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cgroup", errors="surrogateescape") as table:
            for line in table:
                name = line.rstrip("\n").rpartition("/")[2]
                if top and line.partition("/")[2].startswith(f"{PARENT}/job.{ident}.") and _is_ours(name, ident):
                    found.add(f"{top}/{PARENT}/{name}")
    return found


def end(path: str) -> None:
    """Kill every process in a cgroup; one that is not there has none."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.exists(f"{path}/cgroup.kill"):
            _write(f"{path}/cgroup.kill", "1")
        else:
            _kill_frozen(path)


def remove(path: str) -> bool:
    """Remove a cgroup; return False if somebody is still in it. The common parent goes with the last one."""
    deadline = time.monotonic() + FREEZE_TIME
    while True:
        try:
            os.rmdir(path)
            break
        except FileNotFoundError:
            break
        except OSError:  # EBUSY: what was killed is not gone yet
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(path))
    return True


def _kill_frozen(path: str) -> None:
    try:
        deadline = time.monotonic() + FREEZE_TIME
        _write(f"{path}/freezer.state", "FROZEN")
        while _read(f"{path}/freezer.state").strip() != "FROZEN" and time.monotonic() < deadline:
            time.sleep(0.001)
        for pid in _read(f"{path}/cgroup.procs").split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), _signal.SIGKILL)
    finally:
        _write(f"{path}/freezer.state", "THAWED")


def _is_ours(name: str, ident: str) -> bool:
    """True if `propose` could have given that name for the job: ids can have dots."""
    return len(name) == len(f"job.{ident}.") + 8


def _hierarchy() -> str:
    """Return where the hierarchy of version 2, else the freezer of version 1, is mounted; "" for neither."""
    found = ""
    with open("/proc/self/mountinfo", errors="surrogateescape", newline="\n") as table:
        for line in table:
            words = line.rstrip("\n").split(" ")
            if words[-3] == "cgroup2":
                return words[4]
            if words[-3] == "cgroup" and "freezer" in words[-1].split(","):
                found = words[4]
    return found


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)  # never made: these files are the kernel's
    try:
        os.write(fd, text.encode("ascii"))
    finally:
        os.close(fd)
