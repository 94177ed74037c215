"""What a UDI takes of the node: opened, checked and cloned in the caller's mount namespace, before any other is joined.

The site's directories are opened as root, a user's with that user's rights, each once; what is mounted later is the
descriptor's. Part of the build path.
"""

import errno
import posix

from shifter import volumes
from shifter.config import Config
from shifter.errors import AccessError, BuildError, ShifterError, UsageError
from shifter.linux import paths, syscalls
from shifter.linux.identity import Identity
from shifter.udi.assembly import ROOT_ATTRIBUTES
from shifter.udi.binds import Bind, ancestor_in, clone_for_udi, parents_first

MYPY = False
if MYPY:
    from collections.abc import Callable

    from shifter.udi.assembly import Assembly
    from shifter.udi.host import Watch

_FORBIDDEN = (syscalls.PROC_SUPER_MAGIC, syscalls.NSFS_MAGIC)
"""File systems whose files mean something else for the builder than for the user (/proc/self), so never a source."""

MAX_VOLUMES = 128
"""Each is a copy of a whole mount tree: a thousand times "/" of a small node made 26,000 mounts, in one UDI."""


MAX_DIRECTORIES = 2048
"""On the way to the targets of all volumes: the image may lack each of them, and 30,000 fitted into one request."""


class Sources:
    """Everything of the node that goes into one UDI. *step* is told what is being done."""

    def __init__(
        self, config: Config, user: Identity, texts: "list[str]", prefix: str, step: "Callable[[str], None]"
    ) -> None:
        self.config = config
        self.user = user
        self.prefix = prefix
        self.step = step
        self.taken: list[tuple[int, int, str]] = []
        """(device, inode, path) of what was opened as the user; a door opens it again before it enters the UDI."""
        self.watches: "list[Watch]" = []
        self.volumes = [volume for text in texts for volume in volumes.parse_user(text)]
        self._absent: volumes.UserVolume | None = None
        self._shown: dict[str, str] = {}
        """Where in the UDI something of the node is, and what."""
        self._site = {_plain(mount.target): mount for mount in config.siteFs}
        if len(self.volumes) > MAX_VOLUMES:
            raise UsageError(f"volume: {len(self.volumes)} of them; at most {MAX_VOLUMES} are possible")
        self._targets: dict[str, volumes.UserVolume] = {}
        """The volumes by their targets, each once."""
        for volume in self.volumes:
            other = self._targets.setdefault(_plain(volume.target), volume)
            if other is not volume and other != volume:
                raise UsageError(f"volume: {other} and {volume} have the same target")
        directories = sum(target.count("/") for target in self._targets)
        if directories > MAX_DIRECTORIES:
            raise UsageError(
                f"volume: {directories} directories on the way to the targets; at most {MAX_DIRECTORIES} are possible"
            )

    def site(self) -> "list[Bind]":
        """Clone the sources of siteFs, as root: they are the site's."""
        binds: list[Bind] = []
        for mount in self.config.siteFs:
            try:
                source = _open(mount.source, 0)
                directory = paths.is_directory(posix.fstat(source).st_mode)
                attributes = ROOT_ATTRIBUTES | (syscalls.MOUNT_ATTR_RDONLY if "ro" in mount.flags else 0)
                clone = clone_for_udi(source, "rec" in mount.flags, self._slave(mount.flags), attributes)
                posix.close(source)
            except OSError as error:
                raise BuildError(f"siteFs source {mount.source}: {source_fault(error)} ({mount.where})") from None
            flags = " ".join(mount.flags)
            target = _plain(mount.target)
            binds.append(Bind(target, mount.source, clone, flags, f"siteFs at {mount.where}", directory))
            self._shown[target] = mount.source
        return parents_first(binds)

    def users(self) -> "list[Bind]":
        """Open and clone the user's volumes: recursively, so that nothing which a mount hides is uncovered."""
        binds: list[Bind] = []
        found = []
        if not self.volumes:
            return binds
        # One step for all: each is a message that wakes the door. What hangs is among them.
        self.step(f"opening volume {', '.join(volume.source for volume in self.volumes)} as the user")
        with self.user:  # one change of identity for all: it costs as much as a mount
            for target, volume in self._targets.items():
                found.append((target, volume, self._find(volume)))
        slave = self._slave()
        for target, volume, place in found:
            if place is None:
                self._absent = self._absent or volume
                continue
            source, path, origin = place
            directory = self._is_directory(source, path, "volume", BuildError)
            attributes = ROOT_ATTRIBUTES | (syscalls.MOUNT_ATTR_RDONLY if "ro" in volume.flags else 0)
            try:
                clone = clone_for_udi(source, True, slave, attributes)
            except OSError as error:
                raise BuildError(f"volume {volume.source}: {source_fault(error)}") from None
            posix.close(source)
            flags = " ".join(("rec", *volume.flags)) if directory else " ".join(volume.flags)
            reason = f"volume {volume}, {origin}"
            binds.append(Bind(target, path, clone, flags, reason, directory, self.user))
            self._shown[target] = path
        return parents_first(binds)

    def refuse_absent(self, assembly: "Assembly | None") -> None:
        """Raise BuildError if a volume's source is nowhere on the node; it says so if only the image has it."""
        if self._absent is None:
            return
        path = self._absent.source
        if assembly is not None:
            try:
                posix.close(assembly.open_image(path, syscalls.O_PATH))
            except OSError:
                pass
            else:
                raise BuildError(
                    f"volume {path}: only the image has it, and content of an image can't be mounted elsewhere; "
                    "a volume is a directory or file of the node"
                )
        raise BuildError(f"volume {path}: {posix.strerror(errno.ENOENT)}")

    def take_mount_points(self, used: "list[tuple[str, posix.stat_result]]") -> None:
        """Remember the node's directories and files that volumes lie on, (path in the UDI, its status) each.

        Whoever removes one on the node takes the volume off it in the UDI. Called in the caller's namespace.
        """
        for path, status in used:
            above = ancestor_in(path.rpartition("/")[0] or "/", self._shown)
            if above is None:
                continue  # on the image, or on the UDI's own root
            place = _plain(self._shown[above] + path[len(above) :])
            try:
                with self.user:
                    fd = _open(place, syscalls.RESOLVE_NO_MAGICLINKS)
                now = posix.fstat(fd)
                posix.close(fd)
            except OSError:
                continue  # the user does not reach it on the node, where a door would look
            if (now.st_dev, now.st_ino) == (status.st_dev, status.st_ino):
                self.taken.append((now.st_dev, now.st_ino, place))

    def system(self, has_cgroups: bool) -> "list[Bind]":
        """Clone what every UDI has of the node: /dev, /sys, /tmp and /var/tmp, and Shifter itself, if it is in /opt."""
        locked = ROOT_ATTRIBUTES | syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOEXEC
        slave = self._slave()
        wanted = [("/dev", True, syscalls.MOUNT_ATTR_NOSUID, slave), ("/sys", False, locked, False)]
        if has_cgroups:
            wanted.append(("/sys/fs/cgroup", True, locked, False))
        wanted += [("/tmp", True, ROOT_ATTRIBUTES, slave), ("/var/tmp", True, ROOT_ATTRIBUTES, slave)]
        if self.own_opt():
            wanted.append((self.prefix, False, ROOT_ATTRIBUTES | syscalls.MOUNT_ATTR_RDONLY, False))
        binds: list[Bind] = []
        for path, recursive, attributes, propagates in wanted:
            try:
                source = posix.open(path, syscalls.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
            except FileNotFoundError:
                if path == "/var/tmp":
                    continue
                raise
            clone = clone_for_udi(source, recursive, propagates, attributes)
            posix.close(source)
            binds.append(Bind(path, path, clone, "rec" if recursive else "", "every UDI has it"))
            self._shown[path] = path
        return binds

    def udi_image(self) -> "Bind | None":
        """Clone the udiImage, the programs that every UDI has in /opt/udiImage; None if this installation has none."""
        path = self.config.udiImagePath or f"{self.prefix}/libexec/shifter/opt/udiImage"
        try:
            try:
                source = posix.open(path, syscalls.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
            except PermissionError:  # a file system that trusts no root: everybody may read what is there
                with self.user:
                    source = posix.open(path, syscalls.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
        except OSError as error:
            if not self.config.udiImagePath and isinstance(error, FileNotFoundError):
                return None  # built with WITH_SSHD=0
            where = self.config.where("udiImagePath")
            raise BuildError(f"udiImagePath {path}: {source_fault(error)} ({where})") from None
        clone = clone_for_udi(source, False, False, ROOT_ATTRIBUTES | syscalls.MOUNT_ATTR_RDONLY)
        posix.close(source)
        return Bind("/opt/udiImage", path, clone, "ro", f"udiImagePath ({self.config.where('udiImagePath')})")

    def own_opt(self) -> str:
        """Return NAME if Shifter is installed in /opt/NAME, else ""; the image's own /opt/NAME is then not shown."""
        parts = volumes.components(self.prefix)
        return parts[1] if len(parts) == 2 and parts[0] == "opt" else ""

    def open_directory(self, path: str, what: str, kind: "type[ShifterError]") -> int:
        """Open the directory *path* of the caller's namespace with the user's rights, and remember what it was.

        Raises *kind*, or AccessError for what may never be mounted.
        """
        self.step(f"opening {what} {path} as the user")
        try:
            with self.user:
                flags = syscalls.O_PATH | posix.O_DIRECTORY
                fd = syscalls.openat2(syscalls.AT_FDCWD, path, flags, syscalls.RESOLVE_NO_MAGICLINKS)
        except NotADirectoryError:
            raise kind(f"{what} {path}: is not a directory") from None
        except OSError as error:
            raise kind(f"{what} {path}: {source_fault(error)}") from None
        self._is_directory(fd, path, what, kind)
        return fd

    def _slave(self, flags: "tuple[str, ...]" = ()) -> bool:
        if "private" in flags:
            return False
        return "slave" in flags or self.config.mountPropagationStyle == "slave"

    def _find(self, volume: volumes.UserVolume) -> "tuple[int, str, str] | None":
        """Open a volume's source; called as the user. Returns (descriptor, path on the node, where it was found), or None.

        What the site mounts into every UDI comes first, as in C Shifter, whose users name paths as they see them inside.
        """
        asked = _plain(volume.source)
        target = ancestor_in(asked, self._site)
        if target is not None and target != _plain(self._site[target].source):
            mount = self._site[target]
            rest = asked[len(target) :].lstrip("/")
            inside = f"{_plain(mount.source).rstrip('/')}/{rest}".rstrip("/")
            fd = self._open_inside(volume, mount, rest)
            if fd >= 0:
                return fd, inside, f"found inside, by siteFs at {mount.where}"
            self.watches.append((self.user.uid, inside, None))  # it comes first as soon as it is there
        try:
            return _open(volume.source, syscalls.RESOLVE_NO_MAGICLINKS), volume.source, "found on the node"
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BuildError(f"volume {volume.source}: {source_fault(error)}") from None

    def _open_inside(self, volume: volumes.UserVolume, mount: volumes.SiteMount, rest: str) -> int:
        """Open *rest* below the source of *mount*; called as the user; -1 if it is not there.

        A link may not leave that source: inside it would lead to another place than on the node.
        """
        resolve = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_MAGICLINKS
        if "rec" not in mount.flags:
            resolve |= syscalls.RESOLVE_NO_XDEV
        try:
            base = _open(mount.source, syscalls.RESOLVE_NO_MAGICLINKS)
            try:
                return _open(rest or ".", resolve, base)
            finally:
                posix.close(base)
        except (FileNotFoundError, NotADirectoryError):
            return -1
        except OSError as error:
            fault = source_fault(error)
            if error.errno == errno.EXDEV:
                fault = f"a link, or a mount that siteFs at {mount.where} does not show, leads out of {mount.source}"
            raise BuildError(f"volume {volume.source} (on the node {mount.source}/{rest}): {fault}") from None

    def _is_directory(self, fd: int, path: str, what: str, kind: "type[ShifterError]") -> bool:
        """Return whether *fd* is a directory or a file, and remember it. Raises AccessError, *kind* for what is neither."""
        try:
            forbidden = syscalls.filesystem_magic(fd) in _FORBIDDEN
            status = posix.fstat(fd)
        except OSError as error:  # FUSE without allow_other shows nothing to anybody but its owner
            closed = error.errno == errno.EACCES
            hint = "its file system refuses root ({}); mount it with allow_other" if closed else "{}"
            raise kind(f"{what} {path}: {hint.format(error.strerror)}") from None
        if forbidden:
            raise AccessError(f"{what} {path} is on a proc file system, which can't be mounted into a container")
        if status.st_mode & paths.S_IFMT not in (paths.S_IFDIR, paths.S_IFREG):
            raise kind(f"{what} {path}: neither a directory nor a regular file, and only these can be mounted")
        self.taken.append((status.st_dev, status.st_ino, path))
        return paths.is_directory(status.st_mode)


def _open(path: str, resolve: int, base: int = syscalls.AT_FDCWD) -> int:
    """Open the directory or file *path* by O_PATH.

    As a directory first: that is what makes the kernel mount an automount point (openat(2), O_PATH).
    """
    try:
        return syscalls.openat2(base, path, syscalls.O_PATH | posix.O_DIRECTORY, resolve)
    except NotADirectoryError:
        return syscalls.openat2(base, path, syscalls.O_PATH, resolve)


def source_fault(error: OSError) -> str:
    """Return why a path of the node can't be mounted; ELOOP is also what RESOLVE_NO_MAGICLINKS answers."""
    if error.errno == errno.ELOOP:
        return "too many symbolic links, or one of procfs (like /proc/self/fd/N), which would be the builder's"
    if error.errno == errno.EINVAL:
        return "this mount can't be shown elsewhere (it is unbindable)"
    return posix.strerror(error.errno or 0)


def _plain(path: str) -> str:
    """Return the absolute *path* without repeated and trailing slashes."""
    return "/" + "/".join(volumes.components(path))
