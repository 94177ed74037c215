"""Opening paths safely: the one function for everything inside a user's root, and ownership checks up to ``/``.

Part of the build path.
"""

import posix

from shifter.errors import ConfigError
from shifter.linux import syscalls

S_IFMT, S_IFDIR, S_IFREG, S_IFLNK = 0o170000, 0o040000, 0o100000, 0o120000


def open_in_root(root: int, path: str, flags: int = syscalls.O_PATH) -> int:
    """Open *path* as a process chrooted into the directory *root* would, whatever symlinks the image has planted.

    Absolute and ``..`` symlinks stay inside; magic links (procfs) are refused. Raises OSError.
    """
    return syscalls.openat2(root, path, flags, syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS)


def is_directory(mode: int) -> bool:
    """True if *mode* (st_mode) is a directory's."""
    return mode & S_IFMT == S_IFDIR


def is_link(mode: int) -> bool:
    """True if *mode* (st_mode) is a symbolic link's."""
    return mode & S_IFMT == S_IFLNK


def is_program(mode: int) -> bool:
    """True if *mode* (st_mode) is that of a regular file which somebody may execute."""
    return mode & S_IFMT == S_IFREG and mode & 0o111 != 0


def open_trusted(path: str, owners: "tuple[int, ...]" = (0,), flags: int = posix.O_RDONLY) -> int:
    """Open the absolute *path* and return the descriptor, if nobody but *owners* could have changed what is there.

    Every directory from ``/`` down and the file itself must belong to one of *owners* and not be writable by group or
    others (a sticky directory may: /tmp's rule does not let strangers rename what is not theirs). Symlinks are followed
    only when an owner made them. Checked on the opened descriptors.
    Raises ConfigError naming the component that is wrong, OSError when something can't be opened.
    """
    pending = [part for part in path.split("/") if part and part != "."][::-1]
    walked: "list[tuple[int, str]]" = [(posix.open("/", syscalls.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC), "/")]
    links = 0
    try:
        _check(posix.fstat(walked[0][0]), "/", owners + (0,))
        while pending:
            name = pending.pop()
            if name == "..":
                if len(walked) > 1:
                    posix.close(walked.pop()[0])
                continue
            parent, where = walked[-1]
            here = where.rstrip("/") + "/" + name
            how = flags | posix.O_NOFOLLOW if not pending else syscalls.O_PATH | posix.O_NOFOLLOW
            status = posix.stat(name, dir_fd=parent, follow_symlinks=False)
            if status.st_mode & S_IFMT == S_IFLNK:
                links += 1
                if links > 40:
                    raise ConfigError(f"{path}: too many symbolic links")
                _check(status, here, owners)
                target = posix.readlink(name, dir_fd=parent)
                if target.startswith("/"):
                    while len(walked) > 1:
                        posix.close(walked.pop()[0])
                pending += [part for part in target.split("/") if part and part != "."][::-1]
                continue
            fd = posix.open(name, how | posix.O_CLOEXEC, dir_fd=parent)
            walked.append((fd, here))
            _check(posix.fstat(fd), here, owners)
        return walked.pop()[0]
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        for fd, _ in walked:
            posix.close(fd)


def read(path: str) -> bytes:
    """Return all of a file; for those of procfs, which have no size. Raises OSError."""
    fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        data = bytearray()
        while block := posix.read(fd, 65536):
            data += block
        return bytes(data)
    finally:
        posix.close(fd)


def mount_entry(fd: int, process: str = "self") -> "list[bytes]":
    """Return the fields of the mount that *fd* is on, from the mount table of *process*, [] if it has no such mount.

    Source: proc(5), /proc/PID/mountinfo and /proc/PID/fdinfo. Raises OSError.
    """
    (mount,) = (line.split()[1] for line in read(f"/proc/self/fdinfo/{fd}").splitlines() if line.startswith(b"mnt_id:"))
    # Not splitlines(): a carriage return can be part of a user's name.
    for line in read(f"/proc/{process}/mountinfo").split(b"\n"):
        if line.startswith(mount + b" "):
            return line.split(b" ")
    return []


def _check(status: "posix.stat_result", here: str, owners: "tuple[int, ...]") -> None:
    if status.st_uid not in owners:
        raise ConfigError(f"{here} belongs to uid {status.st_uid}; it must belong to {_names(owners)}")
    kind = status.st_mode & S_IFMT
    sticky_directory = kind == S_IFDIR and status.st_mode & 0o1000
    if kind != S_IFLNK and status.st_mode & 0o022 and not sticky_directory:
        raise ConfigError(
            f"{here} is writable by group or others (mode {status.st_mode & 0o7777:04o}); run: chmod go-w {here}"
        )


def _names(owners: "tuple[int, ...]") -> str:
    return " or ".join("root" if uid == 0 else f"uid {uid}" for uid in owners)
