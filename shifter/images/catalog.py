"""What is in the image store, as ``shifterimg images`` and ``inspect`` show it."""

import os
from typing import Any, NamedTuple

from shifter.errors import AccessError, ImageError, ShifterError
from shifter.images import tags
from shifter.images.reference import ImageReference
from shifter.images.store import Image, Store

Caller = tuple[int, int, list[int]]
"""uid, gid and supplementary groups of whoever asks."""

_META = ".meta"


class Entry(NamedTuple):
    """One name of an image. problem: why it can't be used; size: bytes, None for a directory; imported: seconds."""

    reference: ImageReference
    identifier: str
    format: str
    size: int | None
    imported: float | None
    restricted: bool
    problem: str


def listing(store: Store, caller: Caller | None) -> list[Entry]:
    """Return all names, sorted, then images without a tag as ``id:``.

    caller: (uid, gid, groups) who gets to see only what they may use; None: who may change the store sees everything,
    what can't be used included. Raises ImageError when not even the tags can be listed.
    """
    entries = []
    tagged = set()
    for ref in store.tags():
        identifier = tags.names(store, ref)
        if identifier is not None:
            tagged.add(identifier)
            entries.append(_entry(store, ref, identifier, caller))
    for identifier in sorted(_identifiers(store) - tagged):
        entries.append(_entry(store, ImageReference("id", identifier), identifier, caller))
    return [entry for entry in entries if entry is not None]


def details(store: Store, ref: ImageReference, caller: Caller | None) -> dict[str, Any]:
    """Return all there is to know about the image *ref*, ready for JSON.

    Raises ImageError when it does not exist or can't be used, AccessError when *caller* may not use it.
    """
    identifier = store.resolve(ref, caller or (0, 0, ()))
    image = open_for(store, identifier, caller)
    try:
        entry = _describe(image, ref)
    finally:
        image.close()
    meta = image.meta
    return {
        "reference": str(ref),
        "id": identifier,
        "format": meta.format,
        "path": image.path,
        "size": entry.size,
        "imported": entry.imported,
        "env": meta.env,
        "entrypoint": meta.entry,
        "cmd": meta.cmd,
        "workdir": meta.workdir,
        "users": _list(meta.user_acl),
        "groups": _list(meta.group_acl),
    }


def open_for(store: Store, identifier: str, caller: Caller | None) -> Image:
    """Open the image for *caller*. Raises AccessError when its ACL excludes them, else as Store.image."""
    meta, _ = store.read_meta(identifier)
    if caller is not None and not meta.allows(*caller):
        raise AccessError(f"image {identifier}: its ACL names neither you (uid {caller[0]}) nor one of your groups")
    return store.image(identifier)


def _list(acl: tuple[int, ...] | None) -> list[int] | None:
    return None if acl is None else list(acl)


def _entry(store: Store, ref: ImageReference, identifier: str, caller: Caller | None) -> Entry | None:
    try:
        image = open_for(store, identifier, caller)
    except ShifterError as error:
        return None if caller is not None else Entry(ref, identifier, "", None, None, False, error.chain())
    try:
        return _describe(image, ref)
    finally:
        image.close()


def _describe(image: Image, ref: ImageReference) -> Entry:
    status = image.watches[-1][2]
    size = None if image.meta.format == "VFS" else status.st_size
    meta = image.meta
    restricted = meta.user_acl is not None or meta.group_acl is not None
    return Entry(ref, image.identifier, meta.format, size, status.st_mtime, restricted, "")


def _identifiers(store: Store) -> set[str]:
    """Return the identifiers of all metadata files; none if the directory may not be listed."""
    try:
        with store.account:
            fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=store.fd)
            try:
                names = os.listdir(fd)
            finally:
                os.close(fd)
    except PermissionError:
        return set()
    except OSError as error:
        raise ImageError(f"{store.path}: {error.strerror}") from None
    return {name.removesuffix(_META) for name in names if name.endswith(_META) and not name.startswith(".")}
