"""The operations that a UDI is made of. Each can say what it does and why, and do it: what is printed is what runs.

``reason`` is the configuration line, option or image that put the operation there. Part of the build path.
"""

import errno
import posix

from shifter import volumes
from shifter.errors import BuildError, ShifterError, describe
from shifter.linux import paths, syscalls
from shifter.linux.identity import Identity
from shifter.udi.assembly import ABSENT, ROOT_ATTRIBUTES, Assembly, write_new


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
    """A small generated file on the UDI's own root."""

    def __init__(self, path: str, data: bytes, reason: str, mode: int = 0o644) -> None:
        super().__init__(path, reason)
        self.data = data
        self.mode = mode

    def describe(self) -> str:
        return f"file {self.path}, {len(self.data)} bytes ({self.reason})"

    def execute(self, assembly: Assembly) -> None:
        assembly.make_file(self.path, self.data, self.mode)


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
        names = [name for name in assembly.image_entries(self.path) if name not in self.skip]
        if names:
            source = assembly.open_image(self.path, syscalls.O_PATH | posix.O_DIRECTORY)
            assembly.bind_entries(source, names, self.path)
            posix.close(source)


class Etc(Operation):
    """/etc: generated files above the image's own directory, read-only. Covers files that the image lacks."""

    def __init__(self, files: "list[tuple[str, bytes, int]]", links: "list[tuple[str, str]]", reason: str) -> None:
        super().__init__("/etc", reason)
        self.files = files
        self.links = links

    def describe(self) -> str:
        names = [name for name, _, _ in self.files] + [name for name, _ in self.links]
        return f"/etc of the image below generated {' '.join(names)} ({self.reason})"

    def execute(self, assembly: Assembly) -> None:
        assembly.make_directory("/etc")
        layer = assembly.new_layer([])
        for name, data, mode in self.files:
            write_new(assembly.generated, f"{layer}/{name}", data, mode)
        for name, text in self.links:
            posix.symlink(text, f"{layer}/{name}", dir_fd=assembly.generated)
        try:
            lower = assembly.open_image("/etc", posix.O_RDONLY | posix.O_DIRECTORY)
        except OSError as error:
            if error.errno not in ABSENT:
                raise
            assembly.attach_layer(layer, "/etc")
        else:
            assembly.merge(layer, lower, "/etc")
            posix.close(lower)


class Bind(Operation):
    """A directory or file of the node, cloned beforehand in the caller's namespace (*mount*, a detached mount)."""

    def __init__(
        self,
        path: str,
        source: str,
        mount: int,
        flags: str,
        reason: str,
        directory: bool = True,
        identity: "Identity | None" = None,
    ) -> None:
        super().__init__(path, reason)
        self.source = source
        self.mount = mount
        self.flags = flags
        self.directory = directory
        self.identity = identity
        """The user whose volume it is; None: the site's or our own."""

    def describe(self) -> str:
        flags = f" {self.flags}" if self.flags else ""
        return f"bind {self.source} on {self.path}{flags} ({self.reason})"

    def execute(self, assembly: Assembly) -> None:
        try:
            target = self._open_target(assembly)
        except OSError as error:
            raise BuildError(f"{self.path} {_missing(error, self.identity is not None)}") from None
        try:
            resolved = assembly.resolved(target)
            if self.identity is not None:
                refuse_reserved(resolved, self.path)
            elif resolved != self.path:
                refuse_site(resolved, self.path)
            if paths.is_directory(posix.fstat(target).st_mode) != self.directory:
                ours, theirs = ("directory", "a file") if self.directory else ("file", "a directory")
                raise BuildError(
                    f"{self.path} is {theirs} in the container; the {ours} {self.source} can't be mounted on it"
                )
            syscalls.move_mount(self.mount, target, self.path)
        finally:
            posix.close(target)
            posix.close(self.mount)

    def _open_target(self, assembly: Assembly) -> int:
        if self.identity is None:
            return assembly.open(self.path)
        with self.identity:  # the user's own rights decide which target can be reached
            return assembly.open(self.path)


def _missing(error: OSError, volume: bool) -> str:
    """Return why a mount point can't be opened, and for a user what to do."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        hint = ": a volume needs an existing directory of the image, the site or /tmp" if volume else ""
        return f"does not exist in the container{hint}"
    if error.errno == errno.ELOOP:
        return "leads through too many symbolic links of the image"
    return f"can't be reached in the container: {error.strerror}"


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
    """Mount points that mounts of the site need and the image lacks.

    On the UDI's own root they are simply made. Inside the image, the nearest existing directory is covered by itself
    and all the new ones. Inside anything else of the node nothing is invented: it must be there.
    """

    def __init__(self, binds: "list[Bind]", reserved: "list[str]") -> None:
        super().__init__(" ".join(bind.path for bind in binds), ", ".join(dict.fromkeys(b.reason for b in binds)))
        self.binds = binds
        self.reserved = reserved
        """Where directories of the node are mounted already."""

    def describe(self) -> str:
        return f"mount points {self.path} ({self.reason})"

    def execute(self, assembly: Assembly) -> None:
        covers: dict[str, tuple[int, list[tuple[str, bool]]]] = {}
        for index, bind in enumerate(self.binds):
            if any(is_below(bind.path, earlier.path) for earlier in self.binds[:index]):
                continue  # in what the earlier one shows, or on it
            self.reason = bind.reason  # what a failure is blamed on
            try:
                posix.close(assembly.open(bind.path))
            except FileNotFoundError:
                self._make(assembly, bind, covers)
            except OSError as error:
                raise BuildError(f"{bind.path} {_missing(error, False)}") from None
        for where in sorted(covers):  # a parent before what is below it, which it would hide
            lower, parts = covers[where]
            assembly.merge(assembly.new_layer(parts, posix.fstat(lower)), lower, where)
            posix.close(lower)

    def _make(self, assembly: Assembly, bind: Bind, covers: "dict[str, tuple[int, list[tuple[str, bool]]]]") -> None:
        parent, rest = self._nearest(assembly, bind.path)
        where = assembly.resolved(parent)
        path = f"{where.rstrip('/')}/{rest}"
        refuse_site(path, bind.path)
        if posix.fstat(parent).st_dev == assembly.root_device:
            assembly.make_directory(path if bind.directory else path.rpartition("/")[0] or "/")
            if not bind.directory:
                assembly.make_file(path)
            posix.close(parent)
        elif any(is_below(where, other) for other in self.reserved):
            raise BuildError(f"{path} does not exist on the node, and is not made inside {where}")
        elif where in covers:
            covers[where][1].append((rest, bind.directory))
            posix.close(parent)
        else:
            covers[where] = (parent, [(rest, bind.directory)])

    @staticmethod
    def _nearest(assembly: Assembly, target: str) -> "tuple[int, str]":
        """Return (descriptor of the nearest existing directory, the rest of the path).

        A symbolic link to nothing is followed, inside the root: /home -> var/home of an image leads to a new /var/home.
        """
        for _ in range(40):
            parts = volumes.components(target)
            for count in range(len(parts) - 1, -1, -1):
                try:
                    fd = assembly.open("/" + "/".join(parts[:count]), syscalls.O_PATH | posix.O_DIRECTORY)
                    break
                except FileNotFoundError:
                    continue
                except NotADirectoryError:
                    raise BuildError(f"{target}: /{'/'.join(parts[:count])} is a file in the container") from None
            rest = parts[count:]
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


def refuse_reserved(resolved: str, asked: str) -> None:
    """Raise BuildError if *resolved*, the target with all symlinks followed, may not be a user's."""
    reason = volumes.user_target_refusal(resolved)
    if reason:
        via = f" (really {resolved})" if resolved != asked else ""
        raise BuildError(f"{asked}{via} can't be a volume's target: {reason}")


def refuse_site(resolved: str, asked: str) -> None:
    """Raise BuildError if a symbolic link of the image leads a site's mount to where no site may mount anything."""
    reason = volumes.site_target_refusal(resolved)
    if reason:
        raise BuildError(f"{asked} is a symbolic link of the image to {resolved}, which can't be a target: {reason}")


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
