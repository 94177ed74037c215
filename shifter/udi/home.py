"""The home mount namespace, in which everything below /run/shifter is, and what the mount tables of others tell.

Not part of the build path; nor does it need what lists or collects UDIs (inventory.py), which a set-up of a job has no time for.
"""

import contextlib
import os
from collections.abc import Iterator

from shifter.errors import AccessError
from shifter.linux import syscalls
from shifter.udi import pins

MYPY = False
if MYPY:
    from typing import TextIO


class Home:
    """Be in the home mount namespace for a while, and come back. Root only. ``back``: where the process came from."""

    def __enter__(self) -> "Home":
        if os.geteuid() != 0:
            raise AccessError("this needs root")
        self.back = pins.open_namespace("/proc/self/ns/mnt")
        self._directory = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.fd = pins.open_home_namespace()
        syscalls.setns(self.fd)
        return self

    def __exit__(self, *_: object) -> None:
        syscalls.setns(self.back)
        os.fchdir(self._directory)
        for fd in (self.back, self._directory, self.fd):
            os.close(fd)

    @contextlib.contextmanager
    def away(self) -> "Iterator[None]":
        """Be where the process came from, for a while."""
        syscalls.setns(self.back)
        try:
            yield
        finally:
            syscalls.setns(self.fd)


def entries(directory: str) -> "list[str]":
    """Return what is in *directory*; nothing if it is none, or was taken down meanwhile."""
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _mount_table(file: "int | str") -> "TextIO":
    """Open a mount table. Names in it are users': any byte but the line feed and the blank."""
    return open(file, errors="surrogateescape", newline="\n")


def mounted_devices(namespace: int) -> "set[str]":
    """Return the devices (``MAJOR:MINOR``) that are mounted in a mount namespace, also where a process's own root hides them.

    Only who is there sees the whole table. Its root is a place of the kernel's; nothing else in it is looked at.
    """
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    own = pins.open_namespace("/proc/self/ns/mnt")
    try:
        syscalls.setns(namespace)
        try:
            with _mount_table(os.open("self/mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)) as table:
                return {line.split(" ", 3)[2] for line in table}
        finally:
            _go_back(own)
    finally:
        os.close(own)
        os.close(proc)


def _go_back(own: int) -> None:
    """Leave a namespace that may be a user's. If that fails, nothing may go on in it, not even what handles errors."""
    try:
        syscalls.setns(own)
    except OSError:
        os.write(2, b"the kernel did not let this process go back to its own mount namespace\n")
        os._exit(70)
