"""The image store: ``imagePath`` with its tags, metadata and image files, read as the account that owns it.

On a root-squashed file system root is nobody, so files are opened with the rights of the store's owner (the owner of
the directory ``imagePath`` itself), and image files may be 0600. Root must only be able to ``stat`` that directory: its
parents have to be searchable by everybody. Without root (``shifterimg`` of an ordinary user) everything is read with
the rights that the process has. Part of the build path.
"""

import errno
import posix

from shifter.errors import AccessError, FormatError, ImageError, UsageError
from shifter.images import meta as metadata
from shifter.images import reference
from shifter.linux import paths, syscalls
from shifter.linux.identity import Identity
from shifter.suggest import distance

MYPY = False
if MYPY:
    Watch = tuple[int, str, posix.stat_result]
    Caller = tuple[int, int, "list[int] | tuple[int, ...]"]

TAGS = "tags"
EXTENSIONS = {"squashfs": "squashfs", "erofs": "erofs", "VFS": ""}
"""Format to extension. The directory of a VFS image is called ``ID.``: the dot stays."""

_MAX_META = 1 << 20
_MAX_SUGGESTIONS = 3
_MAX_COMPARED = 100
_FILE_FLAGS = posix.O_RDONLY | posix.O_NOFOLLOW | posix.O_NONBLOCK | posix.O_CLOEXEC


class Image:
    """An opened image. ``fd``: the image file, or the directory of format VFS; the caller of Store.image closes it.

    ``path`` is for messages. ``watches``: (uid to stat as, path, its status) of the metadata file and the image file.
    """

    __slots__ = ("fd", "identifier", "meta", "path", "watches")

    def __init__(self, identifier: str, meta: metadata.Meta, fd: int, path: str, watches: "list[Watch]") -> None:
        self.identifier = identifier
        self.meta = meta
        self.fd = fd
        self.path = path
        self.watches = watches

    def close(self) -> None:
        """Close the image file."""
        posix.close(self.fd)


class Store:
    """An opened image store. ``fd``: the directory (O_PATH); ``owner``, ``group``: whose it is; ``account``: theirs."""

    __slots__ = ("account", "fd", "group", "owner", "path")

    def __init__(self, path: str, fd: int, owner: int, group: int) -> None:
        self.path = path
        self.fd = fd
        self.owner = owner
        self.group = group
        self.account = _account(owner, group)

    @staticmethod
    def open(image_path: str) -> "Store":
        """Open the store in the directory *image_path*.

        Every directory from ``/`` down must belong to root or to the owner of *image_path*, and be writable by nobody
        else. Raises ConfigError naming the directory that is not so, ImageError when there is no store or no way to it.
        """
        try:
            status = posix.stat(image_path)
            with _account(status.st_uid, status.st_gid):
                fd = paths.open_trusted(image_path, (0, status.st_uid), syscalls.O_PATH | posix.O_DIRECTORY)
        except OSError as error:
            hint = "; every directory above it must be searchable by everybody" if error.errno == errno.EACCES else ""
            raise ImageError(f"imagePath {image_path}: {error.strerror}{hint}") from None
        return Store(image_path, fd, status.st_uid, status.st_gid)

    def close(self) -> None:
        """Close the directory."""
        posix.close(self.fd)

    def resolve(self, ref: reference.ImageReference, caller: "Caller | None" = None) -> str:
        """Return the identifier that the tag *ref* points to (``id:`` is its own).

        *caller*: uid, gid and groups of the user who asks; then a missing tag's message names close ones, of images
        that this user may use. Raises ImageError when there is no such tag, UsageError for ``local:``.
        """
        if ref.kind == "local":
            raise UsageError(f"{ref} is a directory, not an image of the store")
        if ref.kind == "id":
            return ref.name
        try:
            with self.account:
                self._check_tags()
                identifier = posix.readlink(f"{TAGS}/{reference.encode_tag(ref)}", dir_fd=self.fd)
        except FileNotFoundError:
            raise ImageError(f"no image {ref}{self._suggestion(ref, caller)}") from None
        except OSError as error:
            raise ImageError(f"image {ref}: tag in {self.path}/{TAGS}: {error.strerror}") from None
        return self._checked(identifier, str(ref))

    def image(self, identifier: str) -> Image:
        """Open the image *identifier*: its metadata, and its file or directory.

        Raises ImageError when it does not exist, can't be read or mounted; AccessError when others than the store's
        owner and root could change it.
        """
        meta, watch = self.read_meta(identifier)
        if meta.format not in EXTENSIONS:
            raise ImageError(f"image {identifier}: format {meta.format} is not mounted: import the image again")
        name = f"{identifier}.{EXTENSIONS[meta.format]}"
        fd, status = self._open(name, identifier, directory=meta.format == "VFS")
        path = f"{self.path}/{name}"
        return Image(identifier, meta, fd, path, [watch, (self.owner, path, status)])

    def read_meta(self, identifier: str) -> "tuple[metadata.Meta, Watch]":
        """Return the metadata of the image *identifier*, and the watch on its file. Raises as :meth:`image` does."""
        name = f"{self._checked(identifier, 'image')}.meta"
        fd, status = self._open(name, identifier, directory=False)
        try:
            data = bytearray()
            while len(data) <= _MAX_META:
                chunk = posix.read(fd, 65536)
                if not chunk:
                    break
                data += chunk
        except OSError as error:
            raise ImageError(f"{self.path}/{name}: {error.strerror}") from None
        finally:
            posix.close(fd)
        path = f"{self.path}/{name}"
        if len(data) > _MAX_META:
            raise ImageError(f"{path} is larger than {_MAX_META} bytes")
        return metadata.parse(data.decode("utf-8", "surrogateescape"), path), (self.owner, path, status)

    def tags(self) -> "list[reference.ImageReference]":
        """Return every tag, sorted by name; files that are no tags (an interrupted rename) are left out.

        Raises ImageError when the directory can't be listed.
        """
        found = []
        try:
            with self.account:
                self._check_tags()
                fd = posix.open(TAGS, _FILE_FLAGS | posix.O_DIRECTORY, dir_fd=self.fd)
                try:
                    names = posix.listdir(fd)
                finally:
                    posix.close(fd)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ImageError(f"{self.path}/{TAGS}: {error.strerror}") from None
        for name in sorted(names):
            try:
                found.append(reference.decode_tag(name))
            except FormatError:
                continue
        return found

    def _check_tags(self) -> None:
        """Refuse a tag directory which others could write to. Raises AccessError, OSError. Run as the account."""
        self._check(posix.stat(TAGS, dir_fd=self.fd, follow_symlinks=False), f"{self.path}/{TAGS}", paths.S_IFDIR)

    def _open(self, name: str, identifier: str, directory: bool) -> "tuple[int, posix.stat_result]":
        path = f"{self.path}/{name}"
        try:
            with self.account:
                fd = posix.open(name, _FILE_FLAGS, dir_fd=self.fd)
        except FileNotFoundError:
            raise ImageError(f"no image {identifier}: {path} does not exist") from None
        except OSError as error:
            reason = "is a symbolic link" if error.errno == errno.ELOOP else error.strerror
            raise ImageError(f"image {identifier}: {path}: {reason}") from None
        try:
            status = posix.fstat(fd)
            self._check(status, path, paths.S_IFDIR if directory else paths.S_IFREG)
        except BaseException:
            posix.close(fd)
            raise
        return fd, status

    def _check(self, status: "posix.stat_result", path: str, kind: int) -> None:
        """Raise ImageError for what is not of *kind*, AccessError if others than the owner and root could change it."""
        if status.st_mode & paths.S_IFMT != kind:
            raise ImageError(f"{path} is not a {'directory' if kind == paths.S_IFDIR else 'regular file'}")
        if status.st_uid not in (0, self.owner):
            raise AccessError(
                f"{path} belongs to uid {status.st_uid}, neither root nor the store's owner: it is not used"
            )
        if status.st_mode & 0o022:
            mode = status.st_mode & 0o7777
            raise AccessError(f"{path} is writable by group or others (mode {mode:04o}): it is not used")

    def _checked(self, identifier: str, what: str) -> str:
        try:
            return reference.check_identifier(identifier)
        except UsageError as error:
            raise ImageError(f"{what} in {self.path}") from error

    def _suggestion(self, ref: reference.ImageReference, caller: "Caller | None") -> str:
        """Return ``; did you mean ...?`` with close tags that *caller* may know of, or nothing."""
        if caller is None or len(ref.name) > _MAX_COMPARED:  # it is compared with each tag, letter by letter
            return ""
        close: "list[str]" = []
        try:
            ranked = sorted((distance(ref.name, tag.name), str(tag), tag) for tag in self.tags() if tag != ref)
        except (ImageError, AccessError):
            return ""
        for how_far, name, tag in ranked:
            if how_far > max(2, len(ref.name) // 3) or len(close) == _MAX_SUGGESTIONS:
                break
            try:
                if self.read_meta(self.resolve(tag))[0].allows(*caller):
                    close.append(name)
            except (ImageError, AccessError):
                continue
        return f"; did you mean {' or '.join(close)}?" if close else ""


def check_access(image: Image, uid: int, gid: int, groups: "list[int] | tuple[int, ...]") -> None:
    """Raise AccessError if the image's ACL excludes the user *uid* with primary group *gid* and *groups*."""
    if not image.meta.allows(uid, gid, groups):
        raise AccessError(f"image {image.identifier}: its ACL names neither you (uid {uid}) nor one of your groups")


def _account(owner: int, group: int) -> Identity:
    """Return the identity to read the store with; without root that is our own: Identity(0, 0) changes nothing."""
    return Identity(owner, group) if posix.geteuid() == 0 else Identity(0, 0)
