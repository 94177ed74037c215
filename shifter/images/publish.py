"""The last step of an import, and the way back: finished files get their names in the store, or lose them."""

import hashlib
import os
import shutil

from shifter.errors import ImageError, ShifterError
from shifter.images import meta as metadata
from shifter.images import scratch, tags
from shifter.images.meta import Meta
from shifter.images.reference import ImageReference
from shifter.images.store import EXTENSIONS, Store

PARTIAL = ".partial-"
"""Prefix of what is not finished, in the store's directory. No identifier begins with a dot."""

_CLAIM = "identifier"
"""File in such a directory: which image its files are being renamed to, and are of no use without a tag."""


def publish(store: Store, partial: str, image: str, meta: Meta, ref: ImageReference) -> str:
    """Make the file *image* (name in the directory *partial*) the image *ref* of the store; return its identifier.

    The identifier is the SHA-256 of the image file followed by its metadata: an image with another ACL or environment
    is another image. An image that is there already is used. Order: contents on disk, metadata, image, tag; so whoever
    finds a tag finds all of it. Raises ImageError, OSError.
    """
    text = metadata.format(meta).encode("utf-8", "surrogateescape")
    private = meta.user_acl is not None or meta.group_acl is not None
    mode = 0o600 if private else 0o644
    with store.account, open(os.path.join(partial, image), "rb") as file:
        os.fchmod(file.fileno(), mode)
        digest = hashlib.file_digest(file, "sha256")
        os.fsync(file.fileno())
    digest.update(text)
    identifier = digest.hexdigest()
    with tags.locked(store):
        if not _usable(store, identifier):
            with store.account:
                _write(os.path.join(partial, "meta"), text, mode)
                _write(os.path.join(partial, _CLAIM), identifier.encode(), 0o600)
                os.rename(os.path.join(partial, "meta"), f"{store.path}/{identifier}.meta")
                os.rename(os.path.join(partial, image), f"{store.path}/{identifier}.{EXTENSIONS[meta.format]}")
            tags.sync(store)
        tags.set_tag(store, ref, identifier)
    return identifier


def clean_up(store: Store) -> None:
    """Remove what interrupted imports have left in the store: their directories, and images that never got their tag.

    Raises ImageError, OSError.
    """

    def withdraw(partial: str) -> None:
        try:
            with store.account, open(os.path.join(partial, _CLAIM), encoding="ascii") as file:
                identifier = file.read()
        except FileNotFoundError:
            return
        with tags.locked(store):
            if not tags.tags_of(store, identifier):
                _remove_image(store, identifier)

    scratch.sweep(store.path, PARTIAL, store.account, withdraw)


def remove(store: Store, ref: ImageReference) -> bool:
    """Remove the tag *ref*, and the image itself when no other tag names it; return whether the image is gone.

    ``id:`` removes an image that has no tag. Raises ImageError when there is no such image, or it has a tag; OSError.
    """
    with tags.locked(store):
        identifier = store.resolve(ref)
        if ref.kind == "id":
            if named := tags.tags_of(store, identifier):
                raise ImageError(f"{ref} is in use as {', '.join(map(str, named))}: remove those")
            if not _remove_image(store, identifier):
                raise ImageError(f"no image {ref}")
            return True
        tags.remove_tag(store, ref)
        if tags.tags_of(store, identifier):
            return False
        _remove_image(store, identifier)
        return True


def _usable(store: Store, identifier: str) -> bool:
    try:
        store.image(identifier).close()
    except ShifterError:
        return False
    return True


def _remove_image(store: Store, identifier: str) -> bool:
    """Remove all files of an image, the metadata last: what is left after a crash can still be removed by its name.

    Returns whether there were any. Raises OSError.
    """
    found = False
    with store.account:
        for extension in (*EXTENSIONS.values(), "meta"):
            path = f"{store.path}/{identifier}.{extension}"
            if not os.path.lexists(path):
                continue
            found = True
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
    tags.sync(store)
    return found


def _write(path: str, data: bytes, mode: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(fd, "wb") as file:
        os.fchmod(fd, mode)  # whatever the umask is
        file.write(data)
        file.flush()
        os.fsync(fd)
