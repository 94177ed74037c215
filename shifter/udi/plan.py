"""The operations that a UDI is made of. Each can say what it does and why, and do it: what is printed is what runs.

``reason`` is the configuration line, option or image that put the operation there. Part of the build path.
"""

import errno
import posix

from shifter import volumes
from shifter.errors import BuildError, ShifterError, describe
from shifter.linux import paths, syscalls
from shifter.linux.identity import Identity
from shifter.udi.assembly import ROOT_ATTRIBUTES, Assembly


class Operation:
    """One step of a plan."""

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason

    def describe(self) -> str:
        """Return one line: what is done, where, and why."""
        raise NotImplementedError

    def execute(self, assembly: Assembly) -> None:
        """Do it. Raises OSError or BuildError."""
        raise NotImplementedError


class Directory(Operation):
    """An empty directory on the UDI's own root."""

    def __init__(self, path: str, reason: str, mode: int = 0o755) -> None:
        super().__init__(path, reason)
        self.mode = mode

    def describe(self) -> str:
        return f"directory {self.path} ({self.reason})"

    def execute(self, assembly: Assembly) -> None:
        assembly.make_directory(self.path, self.mode)


class Symlink(Operation):
    """A symbolic link on the UDI's own root."""

    def __init__(self, path: str, text: str, reason: str) -> None:
        super().__init__(path, reason)
        self.text = text

    def describe(self) -> str:
        return f"symlink {self.path} -> {self.text} ({self.reason})"

    def execute(self, assembly: Assembly) -> None:
        assembly.symlink(self.path, self.text)


class File(Operation):
    """A small generated file, made beside the root and bound, so that it stays when the root is read-only."""

    def __init__(self, path: str, data: bytes, reason: str, mode: int = 0o644) -> None:
        super().__init__(path, reason)
        self.data = data
        self.mode = mode

    def describe(self) -> str:
        return f"file {self.path}, {len(self.data)} bytes ({self.reason})"

    def execute(self, assembly: Assembly) -> None:
        directory, _, name = self.path.rpartition("/")
        parent = assembly.open(directory or "/", posix.O_RDONLY | posix.O_DIRECTORY)
        flags = posix.O_CREAT | posix.O_EXCL | posix.O_WRONLY | posix.O_NOFOLLOW
        fd = posix.open(name, flags, self.mode, dir_fd=parent)
        posix.write(fd, self.data)
        posix.close(fd)
        posix.close(parent)


class ImageDirectory(Operation):
    """The entries of one image directory, each bound at the same path: directories and files, symlinks made anew.

    Names in *skip* and names that exist already are left out: the site's and our own come first.
    """

    def __init__(self, path: str, skip: "tuple[str, ...]", reason: str) -> None:
        super().__init__(path, reason)
        self.skip = skip

    def describe(self) -> str:
        without = f" without {' '.join(self.skip)}" if self.skip else ""
        return f"image content of {self.path}{without}, read-only ({self.reason})"

    def execute(self, assembly: Assembly) -> None:
        base = self.path.rstrip("/")
        for name, kind in assembly.image_entries(self.path):
            if name in self.skip:
                continue
            target = f"{base}/{name}"
            source = paths.open_in_root(assembly.image_root, target, syscalls.O_PATH | posix.O_NOFOLLOW)
            try:
                if kind == paths.S_IFLNK:
                    assembly.symlink(target, posix.readlink("", dir_fd=source))
                    continue
                if kind == paths.S_IFDIR:
                    assembly.make_directory(target)
                else:
                    assembly.make_file(target)
                assembly.attach(assembly.clone_image(source), target)
            finally:
                posix.close(source)


class EtcOverlay(Operation):
    """/etc: generated files above the image's own directory, read-only. Covers files that the image lacks."""

    def __init__(self, files: "list[tuple[str, bytes, int]]", links: "list[tuple[str, str]]", reason: str) -> None:
        super().__init__("/etc", reason)
        self.files = files
        self.links = links

    def describe(self) -> str:
        names = [name for name, _, _ in self.files] + [name for name, _ in self.links]
        return f"/etc of the image below generated {' '.join(names)} ({self.reason})"

    def execute(self, assembly: Assembly) -> None:
        posix.mkdir("etc", 0o755, dir_fd=assembly.generated)
        for name, data, mode in self.files:
            assembly.write_generated(f"etc/{name}", data, mode)
        for name, text in self.links:
            posix.symlink(text, f"etc/{name}", dir_fd=assembly.generated)
        assembly.make_directory("/etc")
        try:
            lower = paths.open_in_root(assembly.image_root, "/etc", syscalls.O_PATH | posix.O_DIRECTORY)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            own = posix.open("etc", syscalls.O_PATH | posix.O_DIRECTORY, dir_fd=assembly.generated)
            mount = syscalls.open_tree(own, "", syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH)
            syscalls.mount_setattr(mount, "", set_attr=syscalls.MOUNT_ATTR_RDONLY)
            posix.close(own)
        else:
            mount = assembly.overlay_mount("etc", lower)
            posix.close(lower)
        assembly.attach(mount, "/etc")


class Bind(Operation):
    """A directory or file of the node, cloned beforehand in the caller's namespace (*mount*, a detached mount)."""

    def __init__(
        self, path: str, source: str, mount: int, flags: str, reason: str, identity: "Identity | None" = None
    ) -> None:
        super().__init__(path, reason)
        self.source = source
        self.mount = mount
        self.flags = flags
        self.identity = identity

    def describe(self) -> str:
        return f"bind {self.source} on {self.path} {self.flags} ({self.reason})"

    def execute(self, assembly: Assembly) -> None:
        if self.identity is None:
            assembly.attach(self.mount, self.path)
            return
        with self.identity:  # the user's own rights decide which target can be reached
            target = assembly.open(self.path)
        try:
            refuse_reserved(assembly.resolved(target), self.path)
            if not paths.is_directory(posix.fstat(target).st_mode):
                raise BuildError(f"{self.path} is not a directory")
            syscalls.move_mount(self.mount, target, self.path)
        finally:
            posix.close(target)
            posix.close(self.mount)


class NewMount(Operation):
    """A new instance of a kernel file system (proc, devpts)."""

    def __init__(self, path: str, fstype: str, options: "dict[str, str | None]", attributes: int, reason: str) -> None:
        super().__init__(path, reason)
        self.fstype = fstype
        self.options = options
        self.attributes = attributes

    def describe(self) -> str:
        text = ",".join(name if value is None else f"{name}={value}" for name, value in self.options.items())
        return f"new {self.fstype} on {self.path} {text} ({self.reason})"

    def execute(self, assembly: Assembly) -> None:
        assembly.attach(syscalls.new_mount(self.fstype, self.options, self.attributes), self.path)


class BindInside(Operation):
    """A file that the UDI has already, bound a second time (the ptmx of a private devpts)."""

    def __init__(self, path: str, source: str, reason: str) -> None:
        super().__init__(path, reason)
        self.source = source

    def describe(self) -> str:
        return f"bind {self.source} of the UDI on {self.path} ({self.reason})"

    def execute(self, assembly: Assembly) -> None:
        source = assembly.open(self.source, syscalls.O_PATH | posix.O_NOFOLLOW)
        mount = syscalls.open_tree(source, "", syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH)
        posix.close(source)
        assembly.attach(mount, self.path)


class MountPoints(Operation):
    """Directories that mounts of the site need and the image lacks.

    On the UDI's own root they are simply made. Inside the image, the nearest existing directory is overlaid, once for
    all of them. Inside another mount of the site nothing is invented: it must be there.
    """

    def __init__(self, targets: "list[str]", reason: str) -> None:
        super().__init__(" ".join(targets), reason)
        self.targets = targets

    def describe(self) -> str:
        return f"mount points {self.path} ({self.reason})"

    def execute(self, assembly: Assembly) -> None:
        overlays: dict[str, list[str]] = {}
        for index, target in enumerate(self.targets):
            if any(is_below(target, earlier) for earlier in self.targets[:index]):
                continue
            try:
                posix.close(assembly.open(target))
            except FileNotFoundError:
                parent, rest = self._nearest(assembly, target)
                device = posix.fstat(parent).st_dev
                where = assembly.resolved(parent)
                posix.close(parent)
                if device == assembly.root_device:
                    assembly.make_directory(f"{where.rstrip('/')}/{rest}")
                elif device == assembly.image_device:
                    overlays.setdefault(where, []).append(rest)
                else:
                    raise BuildError(f"{target} does not exist in the UDI, and can't be made inside {where}") from None
        for where, names in overlays.items():
            assembly.overlay(where, names)

    @staticmethod
    def _nearest(assembly: Assembly, target: str) -> "tuple[int, str]":
        """Return (descriptor of the nearest existing directory, the rest of the path)."""
        parts = target.strip("/").split("/")
        for count in range(len(parts) - 1, -1, -1):
            try:
                fd = assembly.open("/" + "/".join(parts[:count]), syscalls.O_PATH | posix.O_DIRECTORY)
            except FileNotFoundError:
                continue
            rest = parts[count:]
            try:
                link = posix.readlink(rest[0], dir_fd=fd)
            except OSError:
                return fd, "/".join(rest)
            posix.close(fd)
            raise BuildError(
                f"{target}: /{'/'.join(parts[: count + 1])} is a symbolic link of the image to {link!r}, which does not exist"
            )
        raise BuildError(f"{target} has no parent")


def refuse_reserved(resolved: str, asked: str) -> None:
    """Raise BuildError if *resolved*, the target with all symlinks followed, may not be a user's."""
    reason = volumes.user_target_refusal(resolved)
    if reason:
        via = f" (really {resolved})" if resolved != asked else ""
        raise BuildError(f"{asked}{via} can't be a volume's target: {reason}")


def is_below(path: str, ancestor: str) -> bool:
    """True if *path* is *ancestor* or below it, by components."""
    return path == ancestor or ancestor == "/" or path.startswith(ancestor.rstrip("/") + "/")


def clone_for_udi(fd: int, recursive: bool, slave: bool, attributes: int = ROOT_ATTRIBUTES) -> int:
    """Return a detached copy of the mount at *fd*; *attributes* are added to each sub-mount, none is taken away."""
    flags = syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH | (syscalls.AT_RECURSIVE if recursive else 0)
    mount = syscalls.open_tree(fd, "", flags)
    propagation = syscalls.MS_SLAVE if slave else syscalls.MS_PRIVATE
    syscalls.mount_setattr(mount, "", set_attr=attributes, propagation=propagation, recursive=True)
    return mount


def execute(operations: "list[Operation]", assembly: Assembly) -> None:
    """Execute a plan in order. Raises BuildError that says which operation failed and why it was there."""
    for operation in operations:
        try:
            operation.execute(assembly)
        except ShifterError as error:
            raise BuildError(f"{error} ({operation.reason})") from error.__cause__
        except OSError as error:
            raise BuildError(f"{operation.describe()} failed: {describe(error)}") from None
