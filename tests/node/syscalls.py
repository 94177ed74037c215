"""The few system calls of Linux that nodes are made with, and that Python 3.11 does not have."""

import contextlib
import ctypes
import fcntl
import os
import signal
import struct
import sys
from collections.abc import Iterator

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE, MS_SLAVE, MS_SHARED = 16384, 1 << 18, 1 << 19, 1 << 20
MNT_DETACH = 2
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
ALL_BUT_PID = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
SYS_PIVOT_ROOT = 155 if os.uname().machine == "x86_64" else 41
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_OPENAT2 = 428, 429, 437
OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH = 1, 4
RESOLVE_IN_ROOT = 0x10
NS_GET_MNTNS_ID = 0x8008B705

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    """Return *result* of a system call, or raise its OSError."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2) in this process's namespace."""
    args = (os.fsencode(source), os.fsencode(target), fstype.encode() or None, ctypes.c_ulong(flags), os.fsencode(data))
    check(libc.mount(*args), f"mount {source} on {target}")


def umount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    check(libc.umount2(os.fsencode(target), flags), f"umount {target}")


def bind(source: str, target: str, readonly: bool = False) -> None:
    """Show *source* with all mounts below it at *target*; *readonly* does not hold for those."""
    mount(source, target, flags=MS_BIND | MS_REC)
    if readonly:
        mount("", target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)


def clone_mount(path: str) -> int:
    """A descriptor of a copy of the mount at *path*, which is mounted nowhere yet: it can go to another namespace."""
    return check(libc.syscall(SYS_OPEN_TREE, -1, os.fsencode(path), OPEN_TREE_CLONE | os.O_CLOEXEC), path)


def attach_mount(fd: int, target: str) -> None:
    """Mount what `clone_mount` returned, by itself: nothing of it is propagated from or to where it was."""
    check(libc.syscall(SYS_MOVE_MOUNT, fd, b"", -1, os.fsencode(target), MOVE_MOUNT_F_EMPTY_PATH), target)
    mount("", target, flags=MS_PRIVATE)


def pivot_root(root: str) -> None:
    """Make *root*, a mount point, the root of this namespace, without the old one."""
    os.chdir(root)
    check(libc.syscall(SYS_PIVOT_ROOT, b".", b"."), "pivot_root")
    umount(".", MNT_DETACH)


def unshare(flags: int) -> None:
    """unshare(2)."""
    check(libc.unshare(flags), "unshare")


def setns(fd: int, flags: int) -> None:
    """setns(2): *fd* is a namespace, or a process by its pidfd."""
    check(libc.setns(fd, flags), "setns")


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument."""
    check(libc.prctl(option, value), "prctl")


def die_with_parent() -> None:
    """Have SIGKILL sent to this process when the thread that made it ends."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def network(fd: int | None = None) -> Iterator[int]:
    """Put this thread into network namespace *fd* (None: a new one); yield a descriptor of it, for the caller to close.

    A socket belongs for good to the namespace that it was made in.
    """
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if fd is None:
            unshare(CLONE_NEWNET)
            fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        else:
            setns(fd, CLONE_NEWNET)
        yield fd
    finally:
        setns(own, CLONE_NEWNET)
        os.close(own)


def unshare_as_oldest(flags: int) -> None:
    """unshare(2) such that every mount namespace which is made later gets a greater id.

    The kernel lets a namespace be pinned only where the pinning process's own one has a smaller id (no loops), and
    since 6.18 each CPU hands out ids from a batch of its own. A real node's first namespace has the smallest id of
    all; so must a virtual node's, or pinning fails now and then. Hence: on the CPU whose next id is lowest.
    """
    cpus = os.sched_getaffinity(0)
    if len(cpus) > 1:
        ids = []
        for cpu in cpus:
            os.sched_setaffinity(0, {cpu})
            unshare(CLONE_NEWNS)
            ns = os.open("/proc/self/ns/mnt", os.O_RDONLY)
            ident = bytearray(8)
            try:
                fcntl.ioctl(ns, NS_GET_MNTNS_ID, ident)
            except OSError:  # before 6.12; ids were in order then
                break
            finally:
                os.close(ns)
            ids.append((int.from_bytes(ident, sys.byteorder), cpu))
        if ids:
            os.sched_setaffinity(0, {min(ids)[1]})
    unshare(flags)
    os.sched_setaffinity(0, cpus)


def openat2(dirfd: int, path: str, flags: int, mode: int = 0, resolve: int = RESOLVE_IN_ROOT) -> int:
    """openat2(2): *path* is looked up as if *dirfd* were the root directory."""
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, mode, resolve)
    return check(libc.syscall(SYS_OPENAT2, dirfd, os.fsencode(path), how, len(how)), path)
