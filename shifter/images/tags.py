"""Changing the tag store, and the lock on all changes of the image store. Everything here acts as the store's owner."""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from shifter.errors import AccessError, ImageError
from shifter.images import reference
from shifter.images.reference import ImageReference
from shifter.images.store import TAGS, Store

_LOCK = ".lock"
_NEW = ".new-"


def require_writer(store: Store) -> None:
    """Raise AccessError unless this process may change the store: it runs as the store's owner, or as root."""
    if os.geteuid() not in (0, store.owner):
        raise AccessError(f"only uid {store.owner}, which owns the image store {store.path}, and root may do that")


@contextmanager
def locked(store: Store) -> Iterator[None]:
    """Keep other changes of the store away, on all nodes whose file system has flock(2). Raises OSError."""
    with store.account:
        fd = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=store.fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def set_tag(store: Store, ref: ImageReference, identifier: str) -> None:
    """Let *ref* name the image *identifier*, whatever it named before: atomically, and lasting. The store is locked.

    Raises ImageError for a reference that can't be a tag, OSError.
    """
    if ref.kind not in ("docker", "custom"):
        raise ImageError(f"{ref} can't be a tag: docker: and custom: can")
    reference.check_identifier(identifier)
    with store.account:
        try:
            os.mkdir(TAGS, 0o755, dir_fd=store.fd)
        except FileExistsError:
            pass
        with _directory(store, TAGS) as tags:
            for name in os.listdir(tags):
                if name.startswith(_NEW):  # of a process that died here: nobody else holds the lock
                    os.unlink(name, dir_fd=tags)
            new = _NEW + secrets.token_hex(8)
            os.symlink(identifier, new, dir_fd=tags)
            os.rename(new, reference.encode_tag(ref), src_dir_fd=tags, dst_dir_fd=tags)
            os.fsync(tags)


def remove_tag(store: Store, ref: ImageReference) -> None:
    """Remove the tag *ref*. The store is locked. Raises ImageError when there is none, OSError."""
    with store.account, _directory(store, TAGS) as tags:
        try:
            os.unlink(reference.encode_tag(ref), dir_fd=tags)
        except FileNotFoundError:
            raise ImageError(f"no image {ref}") from None
        os.fsync(tags)


def tags_of(store: Store, identifier: str) -> list[ImageReference]:
    """Return the tags that name the image *identifier*. Raises ImageError when the tags can't be read."""
    return [ref for ref in store.tags() if names(store, ref) == identifier]


def names(store: Store, ref: ImageReference) -> str | None:
    """Return what the tag *ref* names, whether that exists or not; None for no tag, or one that can't be read."""
    try:
        return store.resolve(ref)
    except ImageError:
        return None


def sync(store: Store) -> None:
    """Make sure that what was renamed in the store's directory stays there if the machine stops now."""
    with store.account, _directory(store, ".") as fd:
        os.fsync(fd)


@contextmanager
def _directory(store: Store, name: str) -> Iterator[int]:
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=store.fd)
    try:
        yield fd
    finally:
        os.close(fd)
