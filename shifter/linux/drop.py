"""Becoming a user: groups, ids, capabilities, no_new_privs, all read back. For a child that was just forked.

With `_ctypes` and not python-prctl: that one has no capset(2) of a whole set and no read-back in one place, needs a
compiler and libcap where it is installed, and these are five calls.
"""

import fcntl
import posix

from shifter.errors import ShifterError
from shifter.linux import syscalls

LAST_DESCRIPTOR = 1 << 20
"""More than a process can have by Linux' default of fs.nr_open."""


class DropError(ShifterError):
    """The kernel did not let a process become the user completely."""


def become(uid: int, gid: int, groups: "tuple[int, ...]") -> None:
    """Make this process one of the user *uid* with *gid* and *groups*, without a way back.

    Group 0 is left out of *groups*. Every capability set is empty afterwards, no_new_privs is set, and nobody but root can
    trace the process or read its memory, which may still hold what its parent knows. Raises DropError, also for uid or gid
    0, or OSError; the process must end then.
    """
    if uid <= 0 or gid <= 0:
        raise DropError(f"uid {uid}, gid {gid}: nothing is run for uid 0 or gid 0")
    for capability in _bounding():
        syscalls.prctl(syscalls.PR_CAPBSET_DROP, capability)
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    log_in(uid, gid, groups)
    _verify(
        uid,
        ("bounding set", _bounding(), []),
        ("no_new_privs", syscalls.prctl(syscalls.PR_GET_NO_NEW_PRIVS, 0), 1),
    )


def log_in(uid: int, gid: int, groups: "tuple[int, ...]") -> None:
    """As `become`, but as a login does it: setuid programs still work. For who executes `shifter`, which takes the rest."""
    if uid <= 0 or gid <= 0:
        raise DropError(f"uid {uid}, gid {gid}: nothing is run for uid 0 or gid 0")
    wanted = sorted({group for group in groups if group > 0})
    syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_CLEAR_ALL)
    posix.setgroups(wanted)
    posix.setresgid(gid, gid, gid)
    posix.setresuid(uid, uid, uid)
    syscalls.capset_none()
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    # Ambient capabilities are a subset of the permitted ones (capabilities(7)), so they need no look of their own.
    _verify(
        uid,
        ("user ids", posix.getresuid(), (uid, uid, uid)),
        ("group ids", posix.getresgid(), (gid, gid, gid)),
        ("groups", sorted(set(posix.getgroups()) - {gid}), sorted(set(wanted) - {gid})),
        ("fsuid", syscalls.setfsuid(-1), uid),
        ("fsgid", syscalls.setfsgid(-1), gid),
        ("capabilities", syscalls.capget(), (0, 0, 0)),
    )


def keep_only(*kept: int) -> "list[int]":
    """Close every descriptor above 2 but *kept*; return the numbers, all of them at least 10, that these have afterwards.

    A child that hangs would hold locks and pipes of ours: who waits for the end of setupRoot's output would wait for it.
    They are close-on-exec.
    """
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in kept]
    first = 3
    for fd in [*sorted(moved), LAST_DESCRIPTOR]:
        posix.closerange(first, fd)
        first = fd + 1
    return moved


def _bounding() -> "list[int]":
    """Return the numbers of the capabilities in the bounding set."""
    found = []
    for capability in range(64):
        try:
            if syscalls.prctl(syscalls.PR_CAPBSET_READ, capability):
                found.append(capability)
        except OSError:  # EINVAL: beyond the last one that this kernel knows
            break
    return found


def _verify(uid: int, *held: "tuple[str, object, object]") -> None:
    """Raise DropError unless the kernel says of each thing what was asked for: (name, what it is, what it must be)."""
    for what, have, want in held:
        if have != want:
            raise DropError(f"could not become uid {uid}: {what} are {have}, not {want}")
