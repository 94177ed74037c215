"""Directories for what is not finished: removed at the end, and after a SIGKILL by whoever makes the next one.

A directory ``NAME`` has a file ``NAME.lock`` beside it which its owner holds locked. The kernel lets go of the lock
when that process ends, however it ends: a lock that somebody else can get belongs to nobody.
"""

import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Callable
from typing import Any

from shifter.linux.identity import Identity

_LOCK = ".lock"


class Scratch:
    """An empty directory ``path``, 0700, below *base*; use it in a ``with``. *account*: whose it is."""

    def __init__(self, base: str, prefix: str, account: Identity) -> None:
        self._account = account
        with account:
            while True:
                self.path = os.path.join(base, f"{prefix}{os.getpid()}-{secrets.token_hex(4)}")
                self._lock = os.open(self.path + _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                if _take(self._lock, self.path + _LOCK):
                    break
                os.close(self._lock)  # a sweep was between our two calls, and has removed the file
            os.mkdir(self.path, 0o700)

    def __enter__(self) -> "Scratch":
        return self

    def __exit__(self, *_: Any) -> None:
        with self._account:
            _remove(self.path)
        os.close(self._lock)


def sweep(base: str, prefix: str, account: Identity, before: Callable[[str], None] = lambda path: None) -> None:
    """Remove what processes that are gone have left in *base*; *before* gets each directory first. Raises OSError."""
    with account:
        names = [name for name in os.listdir(base) if name.startswith(prefix) and name.endswith(_LOCK)]
    for name in names:
        path = os.path.join(base, name)
        with account:
            try:
                fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                continue  # just removed, or a stranger's (in a TMPDIR that is shared)
        try:
            status = os.fstat(fd)
            ours = stat.S_ISREG(status.st_mode) and status.st_uid == (account.uid or os.geteuid())
            if ours and _take(fd, path):
                before(path.removesuffix(_LOCK))
                with account:
                    _remove(path.removesuffix(_LOCK))
        finally:
            os.close(fd)


def _take(fd: int, path: str) -> bool:
    """Lock *fd* and return True if that is still the file at *path*; False if somebody holds it or it is gone."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.ENOENT):
            return False
        raise


def _remove(path: str) -> None:
    """Remove the directory *path*, then its lock: the other way round, a directory could stay that no sweep finds."""
    if os.path.lexists(path):
        shutil.rmtree(path)
    os.unlink(path + _LOCK)
