"""What the builder reads of the host: the user's account, files for the UDI's /etc, how /proc and /dev/pts are mounted.

Everything is read in the caller's own mount namespace, before any other is joined, and every file that was read
becomes a watch of the record. Part of the build path.
"""

import errno
import grp
import posix
import pwd

from shifter.errors import BuildError
from shifter.linux import paths, syscalls

MAX_FILE = 1 << 20
TTY_GID = 5
"""The gid that the container's /etc/group calls ``tty``, as on every distribution that we know."""

_ASKED = (b"/proc", b"/dev/pts", b"/sys/fs/cgroup")
"""Mount points of which ``Host`` is asked."""

Watch = tuple[int, str, "posix.stat_result | None"]


class Account:
    """The user as the host's name service knows it; a uid without an entry gets a name of its own."""

    def __init__(self, uid: int, gid: int) -> None:
        self.uid = uid
        self.gid = gid
        try:
            entry = pwd.getpwuid(uid)
            self.name, self.gecos, self.home, self.shell = entry.pw_name, entry.pw_gecos, entry.pw_dir, entry.pw_shell
        except KeyError:
            self.name, self.gecos, self.home, self.shell = f"uid{uid}", "", "/", ""

    def passwd_line(self, shell: str) -> str:
        """Return the passwd(5) line, with *shell* as the login shell. A field that would forge another field is emptied."""
        parts = (self.name, "x", str(self.uid), str(self.gid), self.gecos, self.home, shell)
        return ":".join("" if ":" in part or "\n" in part else part for part in parts)


class Host:
    """Facts about the node, and the watches that they put on the record."""

    def __init__(self) -> None:
        self.watches: list[Watch] = []
        self._mounts = _mounts_of_interest("/proc/self/mountinfo")

    def read(self, path: str) -> "bytes | None":
        """Return the content of a file of the node, or None when it is missing; watched either way."""
        try:
            fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            self.watches.append((0, path, None))
            return None
        try:
            status = posix.fstat(fd)
            if status.st_mode & paths.S_IFMT != paths.S_IFREG or status.st_size > MAX_FILE:
                raise BuildError(f"{path} is not a regular file of at most {MAX_FILE} bytes")
            self.watches.append((0, path, status))
            return _drain(fd)
        finally:
            posix.close(fd)

    def watch(self, path: str) -> None:
        """Put a watch on *path* without reading it."""
        try:
            self.watches.append((0, path, posix.stat(path)))
        except OSError:
            self.watches.append((0, path, None))

    def mount_options(self, mount_point: str) -> "dict[str, str | None]":
        """Return the file system options of what is mounted on *mount_point*, the topmost if several are stacked.

        Source: proc_pid_mountinfo(5), the fields after the separator. Empty when nothing is mounted there.
        """
        there = [line for line in self._mounts if line.split(" ", 5)[4] == mount_point]
        below = {line.split(" ", 2)[1] for line in there}  # since Linux 6.8 the order of lines says nothing
        for line in there:
            if line.split(" ", 1)[0] not in below:
                options = line.split(" - ", 1)[1].split(" ", 2)[2].split(",")
                pairs = [option.partition("=") for option in options]
                return {name: value if equals else None for name, equals, value in pairs}
        return {}

    def is_mounted(self, path: str) -> bool:
        """True if something is mounted on *path*."""
        return any(line.split(" ", 5)[4] == path for line in self._mounts)


def group_lines(account: Account, groups: "tuple[int, ...]", limit: int) -> "list[str]":
    """Return group(5) lines for the user's groups, *limit* of them at most (0: all), each with the user as only member."""
    lines = []
    gids = (account.gid, *(gid for gid in groups if gid != account.gid))
    for gid in gids[: limit or None]:
        try:
            name = grp.getgrgid(gid).gr_name
        except KeyError:
            name = f"gid{gid}"
        if gid != TTY_GID and not set(name) & set(":\n,"):
            lines.append(f"{name}:x:{gid}:{account.name}")
    return lines


def imported_accounts(names: "list[str]") -> "list[pwd.struct_passwd]":
    """Return the accounts of ``usersToImport``. Raises BuildError for an unknown one."""
    accounts = []
    for name in names:
        try:
            accounts.append(pwd.getpwnam(name))
        except KeyError as error:
            raise BuildError(f"usersToImport names the account {name!r}, which this node does not know") from error
    return accounts


def open_procfs() -> int:
    """Return a directory descriptor of the node's own /proc. Raises BuildError when something else is mounted there."""
    fd = posix.open("/proc", posix.O_RDONLY | posix.O_DIRECTORY | posix.O_CLOEXEC)
    if syscalls.filesystem_magic(fd) != syscalls.PROC_SUPER_MAGIC:
        raise BuildError("/proc is not a proc file system")
    return fd


def _mounts_of_interest(table: str) -> "list[str]":
    """Return the lines of a mount table that anybody asks for here. It can have any size, since users mount by FUSE."""
    found = []
    fd = posix.open(table, posix.O_RDONLY | posix.O_CLOEXEC)
    rest = b""
    while block := posix.read(fd, 65536):  # it comes page by page
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        found += [line.decode("utf-8", "surrogateescape") for line in lines if line.split(b" ", 5)[4] in _ASKED]
    posix.close(fd)
    return found


def _drain(fd: int) -> bytes:
    data = b""
    while len(data) <= MAX_FILE:
        block = posix.read(fd, 65536)
        if not block:
            return data
        data += block
    raise BuildError(f"more than {MAX_FILE} bytes where a small file was expected")
