"""The UDI under construction: its root, and the few primitives that touch it.

Every path inside the new root is opened by ``open`` (the one safe function, linux/paths.py); mounts go from descriptor
to descriptor, so nothing that somebody renames meanwhile is ever followed. Part of the build path.
"""

import errno
import posix

from shifter.errors import BuildError
from shifter.linux import paths, syscalls
from shifter.linux.identity import Identity

ROOT_ATTRIBUTES = syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
LOCKED_ATTRIBUTES = ROOT_ATTRIBUTES | syscalls.MOUNT_ATTR_RDONLY
MAX_ENTRIES = 1024
"""Entries of one image directory that are bound one by one. Real roots have about 20; each costs a mount."""

ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES)
"""Why a directory of the image is taken for one that it does not have; EACCES: it is closed to the user, and stays so."""

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

    def __init__(self, procfs: int, image_root: int, reader: Identity, image_recursive: bool) -> None:
        self.procfs = procfs
        self.image_root = image_root
        self.reader = reader
        """With whose rights the image is looked at: the user's for a directory of theirs, the store's owner's for ours."""
        self.image_recursive = image_recursive
        """The image is a tree of the node, in which mounts may hide what nobody is to see: they come along everywhere."""
        self.root = self._new_tmpfs("/udi", "16m")
        self.generated = self._new_tmpfs("/generated", "16m")
        self.root_device = posix.fstat(self.root).st_dev
        self.mount_points: "list[tuple[str, posix.stat_result]]" = []
        """What volumes were mounted on."""
        self._layers = 0

    def _new_tmpfs(self, where: str, size: str) -> int:
        # nr_inodes: links of an image can make more directories of a volume's target than the user has named
        options: "dict[str, str | None]" = {"source": "udi", "mode": "755", "size": size, "nr_inodes": "8k"}
        mount = syscalls.new_mount("tmpfs", options, ROOT_ATTRIBUTES)
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
        posix.close(self.made_directory(self.root, path, mode))

    @staticmethod
    def made_directory(below: int, path: str, mode: int = 0o755) -> int:
        """Make the directory *path* likewise, below the descriptor *below*, and return a descriptor of it."""
        current = posix.dup(below)
        try:
            for name in filter(None, path.split("/")):
                try:
                    posix.mkdir(name, mode, dir_fd=current)
                except FileExistsError:
                    pass
                step = paths.open_in_root(current, name, syscalls.O_PATH | posix.O_DIRECTORY | posix.O_NOFOLLOW)
                posix.close(current)
                current = step
        except OSError:
            posix.close(current)
            raise
        return current

    @staticmethod
    def make_entry(parent: int, name: str, directory: bool) -> None:
        """Make the directory or empty file *name* in the directory *parent*; what is there already stays as it is."""
        try:
            if directory:
                posix.mkdir(name, 0o755, dir_fd=parent)
            else:
                write_new(parent, name, b"", 0o644)
        except FileExistsError:
            pass

    def make_file(self, path: str, data: bytes = b"", mode: int = 0o644) -> None:
        """Make the file *path* on the root tmpfs; its directory exists."""
        directory, _, name = path.rpartition("/")
        parent = self.open(directory or "/", posix.O_RDONLY | posix.O_DIRECTORY)
        try:
            write_new(parent, name, data, mode)
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

    def new_layer(self, parts: "list[tuple[str, bool]]", like: "posix.stat_result | None" = None) -> str:
        """Make a directory on the tmpfs of generated files that holds *parts*, (relative path, is a directory) each.

        Mode and owner are those of *like*: a merged directory takes them from its topmost layer. Returns its name.
        """
        layer = f"layer{self._layers}"
        self._layers += 1
        posix.mkdir(layer, 0o755, dir_fd=self.generated)
        if like is not None:
            posix.chown(layer, like.st_uid, like.st_gid, dir_fd=self.generated)
            posix.chmod(layer, like.st_mode & 0o1777, dir_fd=self.generated)
        for path, directory in parts:
            names = path.split("/")
            made = layer
            for name in names if directory else names[:-1]:
                made += "/" + name
                try:
                    posix.mkdir(made, 0o755, dir_fd=self.generated)
                except FileExistsError:
                    pass
            if not directory:
                try:
                    write_new(self.generated, f"{layer}/{path}", b"", 0o644)
                except FileExistsError:
                    pass
        return layer

    def attach(self, mount: int, path: str, resolved: bool = False) -> None:
        """Attach the detached *mount* on the existing *path*; both are directories or neither is. Closes *mount*.

        *resolved*: *path* is one that has no link in it. A link that is there now was put there in the meantime.
        """
        target = self.open(path)
        try:
            if resolved and self.resolved(target) != path:
                raise BuildError(f"{path} of the image was exchanged while the UDI was put together")
            if paths.is_directory(posix.fstat(mount).st_mode) != paths.is_directory(posix.fstat(target).st_mode):
                raise BuildError(f"{path}: a directory can't be mounted on a file, nor a file on a directory")
            syscalls.move_mount(mount, target, path)
        finally:
            posix.close(target)
            posix.close(mount)

    def clone_image(self, fd: int) -> int:
        """Return a detached mount of the image entry *fd*."""
        recursive = syscalls.AT_RECURSIVE if self.image_recursive else 0
        return syscalls.open_tree(fd, "", syscalls.OPEN_TREE_CLONE | recursive | syscalls.AT_EMPTY_PATH)

    def open_image(self, path: str, flags: int) -> int:
        """Open *path* of the image, symlinks staying inside, with the reader's rights. Raises OSError."""
        with self.reader:
            return paths.open_in_root(self.image_root, path, flags)

    def image_entries(self, path: str) -> "list[str]":
        """Return the sorted names of the entries of the image directory *path*; none if it is no directory, or closed.

        Raises BuildError for a directory with more than MAX_ENTRIES entries, or a root that the reader may not read.
        """
        try:
            fd = self.open_image(path, posix.O_RDONLY | posix.O_DIRECTORY)
        except OSError as error:
            if error.errno in ABSENT and (path != "/" or error.errno != errno.EACCES):
                return []
            raise unreadable(path, error) from None
        try:
            with self.reader:
                return self._names(fd, path)
        finally:
            posix.close(fd)

    @staticmethod
    def _names(fd: int, path: str) -> "list[str]":
        names = []
        with posix.scandir(fd) as entries:
            for entry in entries:
                names.append(entry.name)
                if len(names) > MAX_ENTRIES:
                    raise BuildError(
                        f"the image has more than {MAX_ENTRIES} entries in {path}; it can't be a root file system"
                    )
        return sorted(names)

    def bind_entries(self, source: int, names: "list[str]", parent: int, target: str) -> None:
        """Show the image entries *names* of the directory *source* in the writable directory *parent*, if not there yet.

        *target* is what that is called in the UDI.
        Directories and files are bound, symlinks made anew; a device, FIFO or socket of an image means nothing here.
        What an entry is, is asked of its descriptor: the tree may be the user's, and change meanwhile.
        """
        for name, entry in self._open_entries(source, names, target):
            kind = posix.fstat(entry).st_mode & paths.S_IFMT
            try:
                if kind == paths.S_IFLNK:
                    posix.symlink(posix.readlink("", dir_fd=entry), name, dir_fd=parent)
                elif kind == paths.S_IFDIR:
                    posix.mkdir(name, 0o755, dir_fd=parent)
                elif kind == paths.S_IFREG:
                    write_new(parent, name, b"", 0o644)
            except FileExistsError:
                kind = 0  # the site's and our own come first
            if kind in (paths.S_IFDIR, paths.S_IFREG):
                mount = self.clone_image(entry)
                made = paths.open_in_root(parent, name, syscalls.O_PATH | posix.O_NOFOLLOW)
                syscalls.move_mount(mount, made, name)
                posix.close(made)
                posix.close(mount)
            posix.close(entry)

    def _open_entries(self, source: int, names: "list[str]", target: str) -> "list[tuple[str, int]]":
        """Open entries of the image directory *source* with the reader's rights, as one change of identity for all."""
        opened = []
        with self.reader:
            for name in names:
                flags = syscalls.O_PATH | posix.O_NOFOLLOW
                try:
                    opened.append((name, syscalls.openat2(source, name, flags, syscalls.RESOLVE_BENEATH)))
                except (FileNotFoundError, PermissionError):
                    pass  # removed meanwhile; or a directory that the user may list and not search
                except OSError as error:
                    raise unreadable(f"{target.rstrip('/')}/{name}", error) from None
        return opened

    def merge(self, layer: str, lower: int, path: str, resolved: bool = False) -> None:
        """Cover *path* of the UDI by the generated *layer* above the image directory *lower* (a descriptor); read-only.

        An image of ours is overlaid. In a tree of the node the entries are bound one by one, each with the mounts below
        it: an overlay would show what those hide. *resolved*: see ``attach``.
        """
        if not self.image_recursive:
            self.attach(self._overlay(layer, lower), path, resolved)
            return
        mount = self._layer_mount(layer)
        self.attach(posix.dup(mount), path, resolved)
        try:
            with self.reader:
                listing = syscalls.openat2(lower, ".", posix.O_RDONLY | posix.O_DIRECTORY, syscalls.RESOLVE_BENEATH)
        except PermissionError:
            names: list[str] = []  # closed to the user, and stays so
        else:
            names = self._names(listing, path)
            posix.close(listing)
        self.bind_entries(lower, names, mount, path)  # not by its path, where the user may have put another one
        syscalls.mount_setattr(mount, "", set_attr=syscalls.MOUNT_ATTR_RDONLY)
        posix.close(mount)

    def attach_layer(self, layer: str, path: str) -> None:
        """Mount the generated directory *layer* on *path*, read-only."""
        mount = self._layer_mount(layer)
        syscalls.mount_setattr(mount, "", set_attr=syscalls.MOUNT_ATTR_RDONLY)
        self.attach(mount, path)

    def _layer_mount(self, layer: str) -> int:
        own = posix.open(layer, syscalls.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC, dir_fd=self.generated)
        try:
            return syscalls.open_tree(own, "", syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH)
        finally:
            posix.close(own)

    def _overlay(self, layer: str, lower: int) -> int:
        """Return a read-only overlay of the generated directory *layer* above the directory *lower* (a descriptor).

        Both lower layers, no upper one: nothing is ever written. Attached at /lower first, since fsconfig strings are
        limited to 255 bytes and a colon in an image's path would end it. Made with the reader's rights, which overlayfs
        keeps and uses whenever it touches a layer.
        """
        self._attach_at(syscalls.open_tree(lower, "", syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH), "/lower")
        options = {"source": "udi", "lowerdir": f"/generated/{layer}:/lower", **OVERLAY_OPTIONS}
        with self.reader:
            return syscalls.new_mount("overlay", options, LOCKED_ATTRIBUTES)

    def become_root(self) -> None:
        """Make the root read-only and pivot into it; what was built around it goes away."""
        syscalls.mount_setattr(self.root, "", set_attr=syscalls.MOUNT_ATTR_RDONLY)
        posix.fchdir(self.root)
        syscalls.pivot_root_here()


def unreadable(path: str, error: OSError) -> BuildError:
    """Return the error for *path* of an image that can't be read."""
    damaged = error.errno in (errno.EIO, errno.EUCLEAN, errno.EOPNOTSUPP, errno.EBADMSG)
    hint = "; the image seems to be damaged: import it again" if damaged else ""
    return BuildError(f"{path} of the image can't be read: {error.strerror}{hint}")


def write_new(directory: int, name: str, data: bytes, mode: int) -> None:
    """Write the new file *name* below the descriptor *directory*, whole; its mode is *mode* whatever the umask."""
    flags = posix.O_CREAT | posix.O_EXCL | posix.O_WRONLY | posix.O_NOFOLLOW | posix.O_CLOEXEC
    fd = posix.open(name, flags, mode, dir_fd=directory)
    try:
        posix.fchmod(fd, mode)
        view = memoryview(data)
        while view:
            view = view[posix.write(fd, view) :]
    finally:
        posix.close(fd)
