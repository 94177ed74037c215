"""Ending everything that runs in UDIs: stopped first, killed by pidfd, until a look at all processes finds nothing."""

import _signal  # type: ignore[import-not-found]
import contextlib
import os
import pwd
import stat
import time
from collections.abc import Iterator

from shifter.errors import FormatError
from shifter.linux import paths, syscalls
from shifter.udi import pins
from shifter.udi.home import mounted_devices

PATIENCE = 10.0
"""Seconds until what is still alive (in an uninterruptible call, or another user's) is reported as left."""


def inside(roots: set[str]) -> Iterator[int]:
    """Yield the PIDs that are in UDIs whose root file systems are *roots* (device numbers).

    Each UDI's root is a tmpfs of its own. It is the root or the working directory of a process, or, of one that made a user
    namespace and there a mount namespace, and went by chroot to a directory of the node, still in its mount table.
    """
    known: dict[str, bool] = {}
    for name in os.listdir("/proc") if roots else ():
        if name.isdigit() and (_stands_in(name, roots) or _holds(name, roots, known)):
            yield int(name)


def _stands_in(pid: str, roots: set[str]) -> bool:
    return any(_device(f"/proc/{pid}/{link}") in roots for link in ("root", "cwd"))


def _holds(pid: str, roots: set[str], known: dict[str, bool]) -> bool:
    """Whether one of *roots* is mounted where a process of another user namespace is. *known*: answers by namespace.

    Raises OSError if the kernel does not let us see it (it has no memory): not to know is not to be sure that nothing is left.
    """
    try:
        if os.readlink(f"/proc/{pid}/ns/user") == os.readlink("/proc/self/ns/user"):
            return False  # only root makes mount namespaces there, and takes root and directory of the process along
        name = os.readlink(f"/proc/{pid}/ns/mnt")
        if name in known:
            return known[name]
        namespace = pins.open_namespace(f"/proc/{pid}/ns/mnt")
    except OSError:
        return False  # it ended
    try:
        known[name] = not _numbers(roots).isdisjoint(mounted_devices(namespace))
    except PermissionError:
        known[name] = False  # of a container that this one may not look into, so nobody of ours could get there
    finally:
        os.close(namespace)
    return known[name]


def _numbers(roots: set[str]) -> set[str]:
    """Return device numbers as mount tables have them."""
    return {f"{os.major(int(root))}:{os.minor(int(root))}" for root in roots if root.isdigit()}


def roots_of_job(ident: str) -> dict[str, int]:
    """Return the roots of UDIs of a job in which processes live, and the uid of each, without any record of them.

    For a /run/shifter that was wiped: what a UDI is for stands in it, in a file of root's on its own root (a tmpfs).
    """
    found: dict[str, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, KeyError, FormatError):
                root, marker = _marker(name)
                if marker.get("job") == ident:
                    found[root] = pwd.getpwnam(str(marker["user"])).pw_uid
    return found


def _marker(pid: str) -> tuple[str, dict[str, object]]:
    """Return the root of the UDI that a process is in, and /var/shifterConfig.json of it.

    The number of the process can be another one's at every moment, so all is read of one opened root.
    Raises OSError, ValueError, FormatError.
    """
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # What it is mounted as, before anything is looked for in it: on a user's dead file system that would never end.
        if paths.mount_entry(root, pid)[-3:-1] != [b"tmpfs", b"udi"]:
            raise FormatError("not in a UDI")
        resolve = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_XDEV
        fd = syscalls.openat2(root, "var/shifterConfig.json", os.O_RDONLY | os.O_NONBLOCK, resolve)
        device = str(os.fstat(root).st_dev)
    finally:
        os.close(root)
    import json  # for who finds a process in a UDI only

    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if status.st_uid != 0 or not stat.S_ISREG(status.st_mode) or status.st_mode & 0o022:
            raise FormatError("not root's")
        marker = json.loads(file.read(1 << 20))
    if not isinstance(marker, dict):
        raise FormatError("no marker")
    return device, marker


def end(roots: set[str], uid: int) -> list[str]:
    """Kill every process of *uid* in UDIs with these *roots*; return a line for each that is still there after PATIENCE.

    Processes of another user are named and left alone: they are not the job's, whoever let them in.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        found = [pid for pid in inside(roots) if pid != os.getpid()]
        ours = [pid for pid in found if _owner(pid) == uid]
        with contextlib.ExitStack() as stack:
            # All are stopped before the first is killed: what forks faster than one by one can be killed would survive.
            fds = [fd for pid in ours if (fd := _open(pid, roots, stack)) is not None]
            for number in (_signal.SIGSTOP, _signal.SIGKILL):
                for fd in fds:
                    with contextlib.suppress(ProcessLookupError):
                        _signal.pidfd_send_signal(fd, number)
        if not found:
            return []
        if not ours or time.monotonic() > deadline:
            left = [pid for pid in inside(roots) if pid != os.getpid()]
            if not left or time.monotonic() > deadline:
                return [f"process {pid} of {_name(_owner(pid))}" for pid in left]
        time.sleep(0.002)


def holders(namespace: int) -> list[str]:
    """Return a line for each other process that holds the mount namespace *namespace*, too, by a descriptor."""
    status = os.fstat(namespace)
    device = str(status.st_dev)
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{name}/fd"):
                path = f"/proc/{name}/fd/{fd}"
                # The device without asking the file's server, which may be dead; then it is one of the kernel's own.
                if int(name) != os.getpid() and _device(path) == device and os.stat(path).st_ino == status.st_ino:
                    found.append(
                        f"process {name} of {_name(_owner(int(name)))} (it holds the namespace as descriptor {fd})"
                    )
                    break
    return found


def _open(pid: int, roots: set[str], stack: contextlib.ExitStack) -> int | None:
    """Return a pidfd of *pid*, if that is still what was found: the number may be another process's by now."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    stack.callback(os.close, fd)
    return fd if _stands_in(str(pid), roots) or _holds(str(pid), roots, {}) else None


def _device(path: str) -> str | None:
    try:
        return str(syscalls.device_number(path))
    except OSError:
        return None  # it ended, or is a zombie


def _owner(pid: int) -> int:
    """Return the real uid of a process, -1 if it has ended. The owner of /proc/PID is root's for who is not dumpable."""
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            return int(next(line for line in status if line.startswith(b"Uid:")).split()[1])
    except (OSError, StopIteration):
        return -1


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return f"uid {uid}"
