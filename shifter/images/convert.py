"""Making the image file: a clean tar stream for mksquashfs, or a clean directory for mkfs.erofs.

Both get what is in the Tree only, so neither ever sees what a stranger wrote except the contents of files. They run as
the owner of the store, and write into its directory themselves.
"""

import os
import subprocess
import tarfile
from typing import IO

from shifter.errors import ImageError
from shifter.images.helper import Helper, run
from shifter.images.layers import CHUNK, Advance
from shifter.images.sources import Source
from shifter.images.tree import DIRECTORY, SYMLINK, Node, Tree
from shifter.linux.identity import Identity

FORMATS = ("squashfs", "erofs")

_LEVEL = "9"
"""Of zstd. Debian 12, 224 MiB: 9 takes 5.6 s of CPU time and gives 72.6 MB, the default 15 takes 44 s and gives 68.3 MB."""

_BLOCK = 512
_WHAT = "the image could not be made"


class Content:
    """The tree of a *source* in the order in which it is written."""

    def __init__(self, tree: Tree, source: Source) -> None:
        self.tree = tree
        self.source = source
        self.directories: list[tuple[str, Node]] = []
        self.symlinks: list[tuple[str, Node]] = []
        self.links: list[tuple[str, Node]] = []
        self.files: list[Node] = []
        for path, node in tree.walk():
            if node.kind == DIRECTORY:
                self.directories.append((path, node))
            elif node.kind == SYMLINK:
                self.symlinks.append((path, node))
            elif node.path != path:
                self.links.append((path, node))
            else:
                self.files.append(node)
        self.size = sum(node.size for node in self.files)


def make(fmt: str, content: Content, output: str, account: Identity, work: str, advance: Advance) -> None:
    """Write *content* as an image of format *fmt* (FORMATS) to the new file *output*.

    account: who makes it; work: a directory of theirs; advance: gets the bytes that were handed over.
    Raises ImageError, OSError.
    """
    if not content.files and not content.symlinks and not content.directories:
        raise ImageError("there is nothing in it")
    if fmt == "squashfs":
        _squashfs(content, output, account, advance)
    else:
        _erofs(content, output, account, work, advance)


def _squashfs(content: Content, output: str, account: Identity, advance: Advance) -> None:
    root = content.tree.root
    # Not sqfstar, which is the same program: version 4.5.1 refuses every compression level there.
    argv = ["mksquashfs", "-", output, "-tar", "-noappend", "-comp", "zstd", "-Xcompression-level", _LEVEL]
    argv += ["-all-root", "-no-xattrs", "-quiet", "-no-progress"]
    argv += ["-root-mode", f"{root.mode:o}", "-root-time", str(root.mtime)]
    with Helper(argv, account, stdin=subprocess.PIPE) as tool:
        try:
            _write_tar(content, tool.stdin, advance)
            tool.stdin.close()
        except BrokenPipeError:
            tool.finish(_WHAT)
            raise ImageError(f"{_WHAT}: mksquashfs stopped reading") from None
        tool.finish(_WHAT)


def _write_tar(content: Content, out: IO[bytes], advance: Advance) -> None:
    """Write the tar stream. The zero blocks at its end are what tells mksquashfs that it is whole."""

    def emit(node: Node, data: IO[bytes]) -> None:
        assert node.path is not None
        out.write(_header(node.path, node, tarfile.REGTYPE))
        _copy(node, data, out, advance)
        out.write(b"\0" * (-node.size % _BLOCK))

    for path, node in content.directories:
        out.write(_header(path, node, tarfile.DIRTYPE))
    for path, node in content.symlinks:
        out.write(_header(path, node, tarfile.SYMTYPE, node.target))
    content.source.copy(content.files, emit)
    for path, node in content.links:
        assert node.path is not None
        out.write(_header(path, node, tarfile.LNKTYPE, node.path))
    out.write(b"\0" * (2 * _BLOCK))


def _header(path: str, node: Node, kind: bytes, target: str = "") -> bytes:
    """Return the header in GNU's format: names are bytes of any length there, and need no encoding to be declared."""
    member = tarfile.TarInfo(path)
    member.type, member.mode, member.mtime, member.linkname = kind, node.mode, node.mtime, target
    member.size = node.size if kind == tarfile.REGTYPE else 0
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _copy(node: Node, data: IO[bytes], out: IO[bytes], advance: Advance) -> None:
    left = node.size
    while left:
        chunk = data.read(min(CHUNK, left))
        if not chunk:
            raise ImageError(f"{node.path or ''}: its content ends too early")
        out.write(chunk)
        advance(len(chunk))
        left -= len(chunk)


def _erofs(content: Content, output: str, account: Identity, work: str, advance: Advance) -> None:
    top = os.path.join(work, "root")
    _unpack(content, top, account, advance)
    # The files keep their times: Python, for one, compares byte code with the time of its source.
    argv = ["mkfs.erofs", "--quiet", "-zlz4hc", "--all-root", "-x-1", "--preserve-mtime"]
    run([*argv, output, top], _WHAT, account)


def _unpack(content: Content, top: str, account: Identity, advance: Advance) -> None:
    """Make the new directory *top* of *content*, as *account*. Symbolic links come last: none is written through."""
    with account:
        os.mkdir(top, 0o700)
        root = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def emit(node: Node, data: IO[bytes]) -> None:
        assert node.path is not None
        with account:
            fd = os.open(node.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=root)
        with open(fd, "wb") as out:
            _copy(node, data, out, advance)
            out.flush()
            with account:
                os.fchmod(fd, node.mode)
                os.utime(fd, (node.mtime, node.mtime))

    try:
        with account:
            for path, _ in content.directories:
                os.mkdir(path, 0o700, dir_fd=root)
        content.source.copy(content.files, emit)
        with account:
            for path, node in content.links:
                os.link(str(node.path), path, src_dir_fd=root, dst_dir_fd=root)
            for path, node in content.symlinks:
                os.symlink(node.target, path, dir_fd=root)
                os.utime(path, (node.mtime, node.mtime), dir_fd=root, follow_symlinks=False)
            for path, node in reversed(content.directories):
                os.utime(path, (node.mtime, node.mtime), dir_fd=root)
                os.chmod(path, node.mode, dir_fd=root)
            os.utime(root, (content.tree.root.mtime, content.tree.root.mtime))
            os.fchmod(root, content.tree.root.mode)
    finally:
        os.close(root)
