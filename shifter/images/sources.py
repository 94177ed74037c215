"""What an image can be imported from: a directory, a tar file, an OCI or docker archive, an OCI layout."""

import os
import re
import stat
import tarfile
from typing import Protocol

from shifter.errors import ImageError
from shifter.images import oci
from shifter.images.layers import Advance, Emit, Layer
from shifter.images.meta import Meta
from shifter.images.tree import DIRECTORY, FILE, SYMLINK, Node, Tree
from shifter.linux import syscalls

_BENEATH = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
_LEFT_OUT = {
    stat.S_IFCHR: "character devices",
    stat.S_IFBLK: "block devices",
    stat.S_IFIFO: "FIFOs",
    stat.S_IFSOCK: "sockets",
}
_ARCHIVE_MEMBER = re.compile(
    r"(oci-layout|index\.json|manifest\.json|repositories|blobs(/.*)?|[0-9a-f]{64}(\.json|\.tar|/.*)?)/?", re.DOTALL
)
"""Every member of what ``docker save`` and ``skopeo copy`` write; a root file system has others, soon."""


class Source(Protocol):
    """Where an image comes from. ``size``: bytes that scan() reads; ``config``: ENV, ENTRYPOINT and so on, if any."""

    size: int
    config: Meta

    def scan(self, advance: Advance) -> Tree:
        """Return the tree, reporting bytes as they are read. Raises ImageError, OSError."""

    def copy(self, files: list[Node], emit: Emit) -> None:
        """Call *emit* for each of *files*, in whatever order is the fastest. Raises ImageError, OSError."""


class Directory:
    """A root file system as a directory. Other file systems mounted below it are left out (their mount points stay)."""

    size = 0

    def __init__(self, path: str) -> None:
        self.path = path
        self.config = Meta()
        self._root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def scan(self, advance: Advance) -> Tree:
        """See Source."""
        tree = Tree()
        root = os.fstat(self._root)
        tree.root = Node(DIRECTORY, root.st_mode, root.st_mtime)
        linked: dict[tuple[int, int], Node] = {}
        pending = [("", tree.root)]
        while pending:
            path, node = pending.pop()
            fd = self._open(path or ".", os.O_RDONLY | os.O_DIRECTORY)
            try:
                if os.fstat(fd).st_dev != root.st_dev:
                    tree.left_out["mounted file systems"] += 1
                    continue
                for name in os.listdir(fd):
                    child_path = f"{path}/{name}" if path else name
                    child = self._node(name, fd, child_path, tree, linked)
                    if child is not None:
                        node.children[name] = child
                        if child.kind == DIRECTORY:
                            pending.append((child_path, child))
            finally:
                os.close(fd)
        return tree

    def copy(self, files: list[Node], emit: Emit) -> None:
        """See Source."""
        for node in files:
            path = str(node.source)
            with open(self._open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY), "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode) or status.st_size != node.size:
                    raise ImageError(f"{self.path}/{path} changed while it was read")
                emit(node, file)

    def _node(self, name: str, fd: int, path: str, tree: Tree, linked: dict[tuple[int, int], Node]) -> Node | None:
        """Return the node of *name* in the directory *fd*; None for what no image has."""
        status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        inode = (status.st_dev, status.st_ino)
        if inode in linked:
            return linked[inode]
        if stat.S_ISDIR(status.st_mode):
            return Node(DIRECTORY, status.st_mode, status.st_mtime)
        if stat.S_ISLNK(status.st_mode):
            node = Node(SYMLINK, 0, status.st_mtime, target=os.readlink(name, dir_fd=fd))
        elif stat.S_ISREG(status.st_mode):
            node = Node(FILE, status.st_mode, status.st_mtime, size=status.st_size, source=path)
        else:
            tree.left_out[_LEFT_OUT.get(stat.S_IFMT(status.st_mode), "files of unknown type")] += 1
            return None
        if status.st_nlink > 1:
            linked[inode] = node
        return node

    def _open(self, path: str, flags: int) -> int:
        try:
            return syscalls.openat2(self._root, path, flags, _BENEATH)
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{self.path}/{path}") from None


class Layers:
    """Tar files on top of each other: the layers of an OCI image, or a single plain tar file."""

    def __init__(self, paths: list[str], whiteouts: bool, config: Meta) -> None:
        self.config = config
        self._layers = [Layer(path, whiteouts) for path in paths]
        self.size = sum(layer.size for layer in self._layers)

    def scan(self, advance: Advance) -> Tree:
        """See Source."""
        tree = Tree()
        for number, layer in enumerate(self._layers):
            layer.scan(tree, number, advance)
        return tree

    def copy(self, files: list[Node], emit: Emit) -> None:
        """See Source."""
        wanted: list[dict[int, Node]] = [{} for _ in self._layers]
        for node in files:
            assert isinstance(node.source, tuple)
            number, index = node.source
            wanted[number][index] = node
        for layer, nodes in zip(self._layers, wanted, strict=True):
            if nodes:
                layer.copy(nodes, emit)


def open_source(path: str, work: str) -> Source:
    """Return what *path* is, as a source; *work* is an empty private directory for what has to be converted first.

    Raises ImageError when it is nothing that can be imported, OSError.
    """
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "oci-layout")):
            return Directory(path)
        kind = "oci"
    else:
        kind = _archive_kind(path)
    if not kind:
        return Layers([path], whiteouts=False, config=Meta())
    if kind != "oci":  # skopeo can't read some compressed archives
        path = Layer(path, whiteouts=False).decompress(os.path.join(work, "archive"))
    layers, config = oci.unpack_archive(kind, path, work)
    return Layers(layers, whiteouts=True, config=config)


def _archive_kind(path: str) -> str:
    """Return skopeo's name of the kind of archive at *path*; ``""`` for a plain tar file of a root file system."""
    found: set[str] = set()

    def look(member: tarfile.TarInfo) -> bool:
        name = member.name.removeprefix("./")
        found.add(name)
        return name in ("", ".") or _ARCHIVE_MEMBER.fullmatch(name) is not None

    if not Layer(path, whiteouts=False).all_members(look):
        return ""
    if "oci-layout" in found:
        return "oci-archive"
    return "docker-archive" if "manifest.json" in found else ""
