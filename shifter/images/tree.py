"""A root file system in memory: names, modes and where each file's content is. What an image is made of, and made safe.

Archives come from strangers. Here their members meet nothing but this tree: a name with ``..`` is refused, a symbolic
link on the way leads to a place inside the tree, and what comes out has every name once, below directories that are
nothing else. Only directories, regular files and symbolic links exist; modes lose setuid and setgid and gain what
everybody needs to read the image (``a+rX``); owners and extended attributes are not kept at all.
"""

from collections import Counter
from collections.abc import Iterator

from shifter.errors import ImageError

DIRECTORY, FILE, SYMLINK = "directory", "file", "symlink"

_MAX_LINKS = 40
_MAX_PATH = 4095
_MAX_NAME = 255
_MAX_TIME = 0xFFFFFFFF
"""squashfs has 32 bits for a time, unsigned."""


class Node:
    """A file, directory or symbolic link.

    mode: permission bits as they will be in the image; source: what the reader of the content knows it by; layer: which
    layer brought it; path: set by Tree.walk, the first name of a file that has several.
    """

    __slots__ = ("children", "kind", "layer", "mode", "mtime", "path", "size", "source", "target")

    def __init__(
        self,
        kind: str,
        mode: int,
        mtime: float,
        *,
        size: int = 0,
        target: str = "",
        source: object = None,
        layer: int = 0,
    ) -> None:
        self.kind = kind
        self.mode = permissions(kind, mode)
        self.mtime = max(0, min(_MAX_TIME, int(mtime)))
        self.size = size
        self.target = target
        self.source = source
        self.layer = layer
        self.children: dict[str, Node] = {}
        self.path: str | None = None


def permissions(kind: str, mode: int) -> int:
    """Return the permission bits that a node of *kind* with st_mode *mode* gets in an image."""
    if kind == SYMLINK:
        return 0o777
    if kind == DIRECTORY:
        return (mode & 0o1777) | 0o555
    return (mode & 0o777) | (0o555 if mode & 0o111 else 0o444)


class Tree:
    """The root directory, ``left_out`` (kind -> number of members that no image has), and how to change and walk it."""

    def __init__(self) -> None:
        self.root = Node(DIRECTORY, 0o755, 0)
        self.left_out: Counter[str] = Counter()

    def add(self, name: str, node: Node) -> None:
        """Put *node* at *name*. What was there before goes, except that a directory keeps what is in it.

        Raises ImageError for a name that no file can have, or below something that is no directory.
        """
        parts = split(name)
        if not parts:
            if node.kind == DIRECTORY:
                self.root.mode, self.root.mtime = node.mode, node.mtime
            return
        parent = self._directory(parts[:-1], name, node.layer)
        before = parent.children.get(parts[-1])
        if before is not None and before.kind == node.kind == DIRECTORY:
            node.children = before.children
        parent.children[parts[-1]] = node

    def link(self, name: str, target: str, layer: int = 0) -> None:
        """Make *name* another name of the file or symbolic link *target*. Raises ImageError when that is neither."""
        parts, target_parts = split(name), split(target)
        where = self._find(target_parts[:-1])
        node = where.children.get(target_parts[-1]) if where is not None and target_parts else None
        if node is None or node.kind == DIRECTORY or not parts:
            raise ImageError(f"{name} is a hard link to {target}, which is no file of this image")
        self._directory(parts[:-1], name, layer).children[parts[-1]] = node

    def whiteout(self, name: str, layer: int) -> None:
        """Remove what layers below *layer* have at *name*; nothing there is no error."""
        parts = split(name)
        parent = self._find(parts[:-1])
        node = parent.children.get(parts[-1]) if parent is not None and parts else None
        if parent is None or node is None:
            return
        _strip(node, layer)
        if node.layer < layer and not node.children:
            del parent.children[parts[-1]]

    def opaque(self, name: str, layer: int) -> None:
        """Remove what layers below *layer* have in the directory *name*."""
        node = self._find(split(name))
        if node is not None:
            _strip(node, layer)

    def walk(self) -> Iterator[tuple[str, Node]]:
        """Yield path (relative, without the root itself) and node, sorted, directories before what is in them.

        A file with several names is yielded for each; ``node.path`` is the first one. Raises ImageError for a path that
        is too long for any program.
        """
        pending = [(name, self.root.children[name]) for name in sorted(self.root.children, reverse=True)]
        while pending:
            path, node = pending.pop()
            if len(path.encode("utf-8", "surrogateescape")) > _MAX_PATH:
                raise ImageError(f"the path {path[:60]}... is too long")
            if node.path is None:
                node.path = path
            yield path, node
            pending += [(f"{path}/{name}", node.children[name]) for name in sorted(node.children, reverse=True)]

    def _find(self, parts: list[str]) -> Node | None:
        """Return the directory at *parts*, or None."""
        try:
            return self._directory(parts, "", None)
        except ImageError:
            return None

    def _directory(self, parts: list[str], name: str, layer: int | None) -> Node:
        """Return the directory at *parts*, following symbolic links as a process chrooted into the tree would.

        Missing ones are made as of *layer*, unless that is None. Raises ImageError: no directory, or a loop.
        """
        walked = [self.root]
        pending = parts[::-1]
        links = 0
        while pending:
            part = pending.pop()
            if part == "..":
                if len(walked) > 1:
                    walked.pop()
                continue
            node = walked[-1].children.get(part)
            if node is None:
                if layer is None:
                    raise ImageError("not there")
                node = walked[-1].children[part] = Node(DIRECTORY, 0o755, 0, layer=layer)
            if node.kind == SYMLINK:
                links += 1
                if links > _MAX_LINKS:
                    raise ImageError(f"{name} lies behind a loop of symbolic links")
                if node.target.startswith("/"):
                    del walked[1:]
                pending += [piece for piece in node.target.split("/") if piece not in ("", ".")][::-1]
            elif node.kind == DIRECTORY:
                walked.append(node)
            else:
                raise ImageError(f"{name} lies below {part}, which is a file")
        return walked[-1]


def split(name: str) -> list[str]:
    """Return the components of a member's *name*; a leading ``/`` or ``./`` is dropped, as tar does.

    Raises ImageError for ``..`` and for names no file can have.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    for part in parts:
        if part == "..":
            raise ImageError(f"{name[:200]}: a name with '..' would leave the image")
        if "\0" in part or len(part.encode("utf-8", "surrogateescape")) > _MAX_NAME:
            raise ImageError(f"{name[:200]}: no file can have this name")
    return parts


def _strip(top: Node, layer: int) -> None:
    """Remove below *top* what is of lower layers, except directories that hold something of *layer*."""
    order = [top]
    for node in order:
        order += [child for child in node.children.values() if child.kind == DIRECTORY]
    for node in reversed(order):
        node.children = {name: child for name, child in node.children.items() if child.layer >= layer or child.children}
