"""What comes from the node: binds, and which places are refused. A user's mount point that is missing in a directory of
the node is made with the user's rights; all others are made before (targets.py). Part of the build path.
"""

import errno
import posix

from shifter import volumes
from shifter.errors import BuildError
from shifter.linux import paths, syscalls
from shifter.linux.identity import ROOT, Identity
from shifter.udi.assembly import ROOT_ATTRIBUTES, Assembly
from shifter.udi.plan import Operation

MYPY = False
if MYPY:
    from collections.abc import Collection

MAX_LINKS = 40
"""Symbolic links to nothing that are followed on the way to a mount point; as many as the kernel follows."""


class Bind(Operation):
    """A directory or file of the node, cloned beforehand in the caller's namespace (*mount*, a detached mount)."""

    KIND = "bind"

    def __init__(
        self,
        path: str,
        source: str,
        mount: int,
        flags: str,
        reason: str,
        directory: bool = True,
        user: "Identity | None" = None,
    ) -> None:
        super().__init__(path, reason)
        self.name = path.rpartition("/")[2]
        self.source = source
        self.mount = mount
        self.flags = flags
        self.directory = directory
        self.user = user
        """The user whose volume it is; None: the site's or our own."""
        self.place: tuple[int, str, posix.stat_result] | None = None
        """The target, if Targets has opened it: a descriptor, its path without any link, its status."""

    def text(self) -> str:
        return f"bind {self.source} on {self.path}" + (f" {self.flags}" if self.flags else "")

    def details(self) -> "list[tuple[str, str]]":
        return [("source", self.source), ("flags", self.flags)]

    def execute(self, assembly: Assembly) -> None:
        target, resolved, status = self.place or place_of(assembly, self._open_target(assembly))
        try:
            if self.user is not None:
                refuse_reserved(resolved, self.path)
                assembly.mount_points.append((resolved, status))
            elif resolved != self.path:
                refuse_site(resolved, self.path)
            if paths.is_directory(status.st_mode) != self.directory:
                ours, theirs = ("directory", "a file") if self.directory else ("file", "a directory")
                raise BuildError(
                    f"{self.path} is {theirs} in the container; the {ours} {self.source} can't be mounted on it"
                )
            syscalls.move_mount(self.mount, target, self.path)
        finally:
            posix.close(target)
            posix.close(self.mount)

    def _open_target(self, assembly: Assembly) -> int:
        try:
            with self.user or ROOT:  # a user's own rights decide which target can be reached
                return assembly.open(self.path)
        except FileNotFoundError as error:
            if self.user is None:
                raise BuildError(f"{self.path} {unreachable(error)}") from None
        except OSError as error:
            raise BuildError(f"{self.path} {unreachable(error)}") from None
        return make_as_user(assembly, self.path, self.directory, self.user)


def place_of(assembly: Assembly, target: int) -> "tuple[int, str, posix.stat_result]":
    """Return the descriptor *target*, its path inside the UDI without any link, and its status."""
    return target, assembly.resolved(target), posix.fstat(target)


def nearest(assembly: Assembly, target: str) -> "tuple[int, str]":
    """Return (descriptor of the nearest existing directory above *target*, the rest of the path).

    A symbolic link to nothing is followed, inside the root: /home -> var/home of an image leads to a new /var/home.
    Called with the rights of the one who asks for it. Raises BuildError.
    """
    for _ in range(MAX_LINKS):
        parts = volumes.components(target)
        fd, rest = _descend(assembly, target, parts)
        if ".." in rest:
            break
        try:
            link = posix.readlink(rest[0], dir_fd=fd)
        except OSError:
            return fd, "/".join(rest)
        where = "" if link.startswith("/") else assembly.resolved(fd)
        posix.close(fd)
        target = "/".join((where, link, *rest[1:]))
    raise BuildError(f"{target} leads through symbolic links of the image to nothing")


def _descend(assembly: Assembly, target: str, parts: "tuple[str, ...]") -> "tuple[int, tuple[str, ...]]":
    """Open the nearest existing directory above *parts*; return it and the names below it. Raises BuildError.

    By bisection, the longest first: with 2,000 names that are not there, trying all took a second of root's time.
    """
    found, missing, count = -1, len(parts), len(parts) - 1
    low = -1
    while low + 1 < missing:
        above = "/" + "/".join(parts[:count])
        try:
            fd = assembly.open(above, syscalls.O_PATH | posix.O_DIRECTORY)
        except FileNotFoundError:
            missing = count
        except NotADirectoryError:
            raise BuildError(f"{target}: {above} is a file in the container") from None
        except OSError as error:
            raise BuildError(f"{target}: {above} {unreachable(error)}") from None
        else:
            if found >= 0:
                posix.close(found)
            found, low = fd, count
        count = (low + missing) // 2
    return found, parts[low:]


def make_as_user(assembly: Assembly, path: str, directory: bool, user: Identity) -> int:
    """Make the mount point *path* and its missing parents with the rights of *user*; return a descriptor of it.

    Every step is made in, and opened below, the directory that was opened before: nobody can lead it elsewhere.
    Raises BuildError that says where the user may not make it.
    """
    with user:
        current, rest = nearest(assembly, path)
    where = assembly.resolved(current)
    try:
        refuse_reserved(f"{where.rstrip('/')}/{rest}", path)
        names = rest.split("/")
        with user:
            for name in names[:-1]:
                current = _step(current, name, True)
            return _step(current, names[-1], directory)
    except OSError as error:
        posix.close(current)
        reason = (
            f"{where} is read-only" if error.errno == errno.EROFS else f"you can't make it in {where}: {error.strerror}"
        )
        raise BuildError(f"{path} does not exist in the container, and {reason}") from None
    except BuildError:
        posix.close(current)
        raise


def _step(parent: int, name: str, directory: bool) -> int:
    """Make one directory or file in *parent* and open it; closes *parent* if that went well."""
    try:
        if directory:
            posix.mkdir(name, 0o755, dir_fd=parent)
        else:
            flags = posix.O_CREAT | posix.O_EXCL | posix.O_WRONLY | posix.O_NOFOLLOW | posix.O_CLOEXEC
            posix.close(posix.open(name, flags, 0o644, dir_fd=parent))
    except FileExistsError:
        pass  # by another launch of the same user, at the same time
    made = paths.open_in_root(
        parent, name, syscalls.O_PATH | posix.O_NOFOLLOW | (posix.O_DIRECTORY if directory else 0)
    )
    if not directory and posix.fstat(made).st_mode & paths.S_IFMT != paths.S_IFREG:
        posix.close(made)  # O_PATH opens a symbolic link itself
        raise OSError(errno.EEXIST, posix.strerror(errno.EEXIST))
    posix.close(parent)
    return made


def unreachable(error: OSError) -> str:
    """Return why a mount point can't be opened."""
    if error.errno == errno.ENOENT:
        return "does not exist in the container"
    if error.errno == errno.ENOTDIR:
        return "leads through a file of the container"
    if error.errno == errno.ELOOP:
        return "leads through too many symbolic links of the image"
    return f"can't be reached in the container: {error.strerror}"


def refuse_reserved(resolved: str, asked: str) -> None:
    """Raise BuildError if *resolved*, the target with all symlinks followed, may not be a user's."""
    reason = volumes.user_target_refusal(resolved)
    if reason:
        via = f" (really {resolved})" if volumes.components(resolved) != volumes.components(asked) else ""
        raise BuildError(f"{asked}{via} can't be a volume's target: {reason}")


def refuse_site(resolved: str, asked: str) -> None:
    """Raise BuildError if a symbolic link of the image leads a site's mount to where no site may mount anything."""
    reason = volumes.site_target_refusal(resolved)
    if reason:
        raise BuildError(f"{asked} is a symbolic link of the image to {resolved}, which can't be a target: {reason}")


def ancestor_in(path: str, targets: "Collection[str]") -> "str | None":
    """Return the nearest of *targets* that is *path* or above it, by components; None if there is none."""
    while path not in targets:
        if path == "/":
            return None
        path = path.rpartition("/")[0] or "/"
    return path


def parents_first(binds: "list[Bind]") -> "list[Bind]":
    """Return *binds* ordered by the depth of their targets, so that none hides one that was named before it."""
    return sorted(binds, key=lambda bind: bind.path.count("/"))


def clone_for_udi(fd: int, recursive: bool, slave: bool, attributes: int = ROOT_ATTRIBUTES) -> int:
    """Return a detached copy of the mount at *fd*; *attributes* are added to each sub-mount, none is taken away."""
    flags = syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH | (syscalls.AT_RECURSIVE if recursive else 0)
    mount = syscalls.open_tree(fd, "", flags)
    propagation = syscalls.MS_SLAVE if slave else syscalls.MS_PRIVATE
    syscalls.mount_setattr(mount, "", set_attr=attributes, propagation=propagation, recursive=True)
    return mount
