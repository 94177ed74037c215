"""Tar archives as layers of an image: read twice, once for what is in them, once for the content that is used."""

import bz2
import gzip
import lzma
import os
import shutil
import stat
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, cast

from shifter.errors import ImageError
from shifter.images import helper
from shifter.images.tree import DIRECTORY, FILE, SYMLINK, Node, Tree

CHUNK = 1 << 20

Advance = Callable[[int], None]
"""Called with a number of bytes that are done."""

Emit = Callable[[Node, IO[bytes]], None]
"""Called with a file and its content, which is to be read before returning."""

_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"
_EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_MAX_EXTENSION = 1 << 20
"""Headers that are read into memory: long names, and attributes."""

_BAD_DATA = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, ArithmeticError, RecursionError)
"""What the decompressors and tarfile raise when they meet bytes that are not what they should be."""

_KINDS = {
    tarfile.CHRTYPE: "character devices",
    tarfile.BLKTYPE: "block devices",
    tarfile.FIFOTYPE: "FIFOs",
}


class _Member(tarfile.TarInfo):
    """A header. tarfile takes a damaged one for the end of the archive, and so would lose the rest in silence."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        try:
            member = super().frombuf(buf, encoding, errors)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise ImageError("damaged header, or no tar archive") from error
        if member.size < 0 or (member.type in _EXTENSIONS and member.size > _MAX_EXTENSION):
            raise ImageError("header with an impossible size")
        return member


class _Counted:
    """A stream that reports, as it is read, how far *raw* has been read, by us or by a decompressor that shares it."""

    def __init__(self, stream: IO[bytes], raw: IO[bytes], advance: Advance) -> None:
        self._stream = stream
        self._raw = raw.fileno()
        self._advance = advance
        self._done = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        position = os.lseek(self._raw, 0, os.SEEK_CUR)
        self._advance(position - self._done)
        self._done = position
        return data


class Layer:
    """A tar file of any compression at *path*; *whiteouts*: ``.wh.`` names remove what lower layers have."""

    def __init__(self, path: str, whiteouts: bool) -> None:
        self.path = path
        self._whiteouts = whiteouts
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{path} is neither a directory nor a regular file")
        self.size = status.st_size

    def scan(self, tree: Tree, number: int, advance: Advance) -> None:
        """Put all members on top of *tree*, as layer *number*; *advance* gets the bytes read of the file.

        Raises ImageError.
        """
        with self._members(advance) as members:
            for index, (_, member) in enumerate(members):
                self._add(tree, member, number, index)

    def all_members(self, test: Callable[[tarfile.TarInfo], bool]) -> bool:
        """Return whether *test* is true of all members, looking no further than the first other. Raises ImageError."""
        with self._members(lambda _: None) as members:
            return all(test(member) for _, member in members)

    def decompress(self, output: str) -> str:
        """Return the path of the file without compression: itself if it has none, else a copy in the new file *output*.

        Raises ImageError, OSError.
        """
        with open(self.path, "rb") as raw:
            if not _compression(raw):
                return self.path
        with _reading(self.path, lambda _: None) as stream, open(output, "xb") as out:
            shutil.copyfileobj(stream, out, CHUNK)
        return output

    def copy(self, wanted: dict[int, Node], emit: Emit) -> None:
        """Call *emit* with each node of *wanted* (index of the member -> node) and its content, in the archive's order.

        Raises ImageError, and what *emit* raises.
        """
        with self._members(lambda _: None) as members:
            for index, (archive, member) in enumerate(members):
                if index in wanted:
                    emit(wanted[index], cast(IO[bytes], archive.extractfile(member)))

    def _add(self, tree: Tree, member: tarfile.TarInfo, layer: int, index: int) -> None:
        name = member.name
        base = name.rstrip("/").rpartition("/")[2]
        if self._whiteouts and base.startswith(_WHITEOUT):
            directory = name.rstrip("/")[: -len(base)]
            if base == _OPAQUE:
                tree.opaque(directory, layer)
            elif not base.startswith(_WHITEOUT * 2):  # aufs' own files, of no meaning
                tree.whiteout(directory + base.removeprefix(_WHITEOUT), layer)
        elif member.isdir():
            tree.add(name, Node(DIRECTORY, member.mode, member.mtime, layer=layer))
        elif member.issym():
            tree.add(name, Node(SYMLINK, 0, member.mtime, target=member.linkname, layer=layer))
        elif member.islnk():
            tree.link(name, member.linkname, layer)
        elif member.isreg():
            tree.add(name, Node(FILE, member.mode, member.mtime, size=member.size, source=(layer, index), layer=layer))
        else:
            tree.left_out[_KINDS.get(member.type, "members of unknown type")] += 1

    @contextmanager
    def _members(self, advance: Advance) -> Iterator[Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]]:
        """Give an iterator over (archive, member), to be used up. Bad data becomes ImageError."""
        with _reading(self.path, advance) as stream:
            yield _iterate(stream)


@contextmanager
def _reading(path: str, advance: Advance) -> Iterator[IO[bytes]]:
    """Give the decompressed content of the file *path*. Bad data, found here or by who reads it, becomes ImageError."""
    try:
        with open(path, "rb") as raw, _decompressed(raw, advance) as stream:
            yield stream
    except ImageError as error:
        raise ImageError(path) from error
    except _BAD_DATA as error:
        raise ImageError(f"{path} is no tar archive, or a damaged one") from error
    except OSError as error:
        if error.errno is not None:  # a real one; gzip and bz2 report bad data as OSError without a number
            raise
        raise ImageError(f"{path} is damaged") from error


def _iterate(stream: IO[bytes]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    with tarfile.open(
        fileobj=stream, mode="r|", tarinfo=_Member, encoding="utf-8", errors="surrogateescape", bufsize=CHUNK
    ) as archive:
        while (member := archive.next()) is not None:
            yield archive, member
            archive.members = []  # type: ignore[attr-defined]  # it would keep every header
    while stream.read(CHUNK):  # up to the checksum at the very end
        pass


def _compression(raw: IO[bytes]) -> str:
    head = os.pread(raw.fileno(), 6, 0)
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")


@contextmanager
def _decompressed(raw: IO[bytes], advance: Advance) -> Iterator[IO[bytes]]:
    """Give the content of *raw*, decompressed by what its first bytes say. Raises ImageError when that fails."""
    compression = _compression(raw)
    if compression == "zstd":
        with _zstd(raw) as stream:
            yield cast(IO[bytes], _Counted(stream, raw, advance))
        return
    counted = cast(IO[bytes], _Counted(raw, raw, advance))
    if compression == "gzip":
        yield cast(IO[bytes], gzip.GzipFile(fileobj=counted, mode="rb"))
    elif compression == "bzip2":
        yield cast(IO[bytes], bz2.BZ2File(counted))
    elif compression == "xz":
        yield cast(IO[bytes], lzma.LZMAFile(counted))
    else:
        yield counted


@contextmanager
def _zstd(raw: IO[bytes]) -> Iterator[IO[bytes]]:
    process = subprocess.Popen(
        ["zstd", "-dc", "--quiet"],
        stdin=raw,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env=helper.ENVIRONMENT,
    )
    assert process.stdout is not None
    try:
        yield process.stdout
        # Who has seen enough stops before the end; only at the end zstd's own verdict counts.
        if not process.stdout.read(1) and process.wait() != 0:
            raise ImageError("zstd could not decompress it")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
