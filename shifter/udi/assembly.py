"""The UDI under construction: its root, and the few primitives that touch it.

Every path inside the new root is opened by ``open`` (the one safe function, linux/paths.py); mounts go from descriptor
to descriptor, so nothing that somebody renames meanwhile is ever followed. Part of the build path.
"""

import errno
import posix

from shifter.errors import BuildError
from shifter.linux import paths, syscalls

ROOT_ATTRIBUTES = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
LOCKED_ATTRIBUTES = ROOT_ATTRIBUTES | syscalls.MOUNT_ATTR_RDONLY
MAX_ENTRIES = 1024
"""Entries of one image directory that are bound one by one. Real roots have about 20; each costs a mount."""

OVERLAY_OPTIONS: "dict[str, str | None]" = {
    # Nothing in an image may make overlayfs look elsewhere; these are the documented off switches.
    "redirect_dir": "nofollow",
    "index": "off",
    "metacopy": "off",
    "xino": "off",
}


class Assembly:
    """The new root (a tmpfs), the image's own root, and a second tmpfs with what is generated for this UDI.

    Made in a private copy of the store namespace, where ``/udi``, ``/generated`` and ``/lower`` are mount points that
    vanish with the old root; so nothing of the construction is visible inside.
    """

    def __init__(self, procfs: int, image_root: int, image_recursive: bool) -> None:
        self.procfs = procfs
        self.image_root = image_root
        self.image_device = posix.fstat(image_root).st_dev
        self.image_clone = syscalls.OPEN_TREE_CLONE | (syscalls.AT_RECURSIVE if image_recursive else 0)
        self.root = self._new_tmpfs("/udi", "16m")
        self.generated = self._new_tmpfs("/generated", "16m")
        self.root_device = posix.fstat(self.root).st_dev
        self._layers = 0

    def _new_tmpfs(self, where: str, size: str) -> int:
        mount = syscalls.new_mount("tmpfs", {"source": "udi", "mode": "755", "size": size}, ROOT_ATTRIBUTES)
        self._attach_at(mount, where)
        return mount

    def _attach_at(self, mount: int, where: str) -> None:
        target = posix.open(where, syscalls.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
        syscalls.move_mount(mount, target, where)
        posix.close(target)

    def open(self, path: str, flags: int = syscalls.O_PATH) -> int:
        """Open *path* as seen inside the UDI. Raises OSError."""
        return paths.open_in_root(self.root, path, flags)

    def resolved(self, fd: int) -> str:
        """Return the path inside the UDI that *fd* really is, after all symlinks."""
        path = posix.readlink(f"self/fd/{fd}", dir_fd=self.procfs)
        if path != "/udi" and not path.startswith("/udi/"):
            raise BuildError(f"{path!r} is not inside the UDI")
        return path[len("/udi") :] or "/"

    def make_directory(self, path: str, mode: int = 0o755) -> None:
        """Make the directory *path* and its missing parents on the root tmpfs; an existing one stays as it is."""
        current = posix.dup(self.root)
        try:
            for name in path.strip("/").split("/"):
                try:
                    posix.mkdir(name, mode, dir_fd=current)
                except FileExistsError:
                    pass
                step = paths.open_in_root(current, name, syscalls.O_PATH | posix.O_DIRECTORY | posix.O_NOFOLLOW)
                posix.close(current)
                current = step
        finally:
            posix.close(current)

    def make_file(self, path: str) -> None:
        """Make the empty file *path* on the root tmpfs, to be mounted on; its directory exists."""
        directory, _, name = path.rpartition("/")
        parent = self.open(directory or "/", posix.O_RDONLY | posix.O_DIRECTORY)
        try:
            posix.close(
                posix.open(name, posix.O_CREAT | posix.O_EXCL | posix.O_WRONLY | posix.O_NOFOLLOW, 0o644, dir_fd=parent)
            )
        finally:
            posix.close(parent)

    def symlink(self, path: str, text: str) -> None:
        """Make a symlink on the root tmpfs; its directory exists."""
        directory, _, name = path.rpartition("/")
        parent = self.open(directory or "/", posix.O_RDONLY | posix.O_DIRECTORY)
        try:
            posix.symlink(text, name, dir_fd=parent)
        finally:
            posix.close(parent)

    def write_generated(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Write a file on the tmpfs of generated files; *path* is relative and its directory exists."""
        flags = posix.O_CREAT | posix.O_EXCL | posix.O_WRONLY | posix.O_NOFOLLOW
        fd = posix.open(path, flags, mode, dir_fd=self.generated)
        try:
            posix.fchmod(fd, mode)
            posix.write(fd, data)
        finally:
            posix.close(fd)

    def attach(self, mount: int, path: str) -> None:
        """Attach the detached *mount* on the existing *path*; both are directories or neither is. Closes *mount*."""
        target = self.open(path)
        try:
            if paths.is_directory(posix.fstat(mount).st_mode) != paths.is_directory(posix.fstat(target).st_mode):
                raise BuildError(f"{path}: a directory can't be mounted on a file, nor a file on a directory")
            syscalls.move_mount(mount, target, path)
        finally:
            posix.close(target)
            posix.close(mount)

    def clone_image(self, fd: int) -> int:
        """Return a detached mount of the image entry *fd*."""
        return syscalls.open_tree(fd, "", self.image_clone | syscalls.AT_EMPTY_PATH)

    def image_entries(self, path: str) -> "list[tuple[str, int]]":
        """Return (name, st_mode type bits) of the entries of the image directory *path*; none if it is no directory.

        Raises BuildError for a directory with more than MAX_ENTRIES entries.
        """
        try:
            fd = paths.open_in_root(self.image_root, path, posix.O_RDONLY | posix.O_DIRECTORY)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES):
                return []
            raise
        found = []
        try:
            with posix.scandir(fd) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        kind = paths.S_IFLNK
                    elif entry.is_dir(follow_symlinks=False):
                        kind = paths.S_IFDIR
                    elif entry.is_file(follow_symlinks=False):
                        kind = paths.S_IFREG
                    else:
                        continue  # a device, FIFO or socket of an image means nothing on this node
                    found.append((entry.name, kind))
                    if len(found) > MAX_ENTRIES:
                        raise BuildError(
                            f"the image has more than {MAX_ENTRIES} entries in {path}; it can't be a root file system"
                        )
        finally:
            posix.close(fd)
        return sorted(found)

    def overlay(self, path: str, names: "list[str]") -> None:
        """Cover the image directory *path* by itself plus the new, empty directories *names* (relative paths)."""
        layer = f"layer{self._layers}"
        self._layers += 1
        posix.mkdir(layer, dir_fd=self.generated)
        lower = self.open(path, syscalls.O_PATH | posix.O_DIRECTORY)
        # The merged directory takes its mode and owner from the topmost layer.
        posix.chmod(layer, posix.fstat(lower).st_mode & 0o1777, dir_fd=self.generated)
        for name in names:
            made = layer
            for part in name.split("/"):
                made = f"{made}/{part}"
                try:
                    posix.mkdir(made, 0o755, dir_fd=self.generated)
                except FileExistsError:
                    pass
        self.attach(self.overlay_mount(layer, lower), path)
        posix.close(lower)

    def overlay_mount(self, layer: str, lower: int) -> int:
        """Return a read-only overlay of the generated directory *layer* above the directory *lower* (a descriptor).

        Both lower layers, no upper one: nothing is ever written. Attached at /lower first, since fsconfig strings are
        limited to 255 bytes and a colon in an image's path would end it.
        """
        self._attach_at(syscalls.open_tree(lower, "", syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH), "/lower")
        options = {"source": "udi", "lowerdir": f"/generated/{layer}:/lower", **OVERLAY_OPTIONS}
        return syscalls.new_mount("overlay", options, LOCKED_ATTRIBUTES)

    def become_root(self) -> None:
        """Make the root read-only and pivot into it; what was built around it goes away."""
        syscalls.mount_setattr(self.root, "", set_attr=syscalls.MOUNT_ATTR_RDONLY)
        posix.fchdir(self.root)
        syscalls.pivot_root_here()
