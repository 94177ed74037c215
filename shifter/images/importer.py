"""``shifterimg import``: from a source to a tag, with nothing half-done left behind at any moment."""

import os
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

from shifter.errors import ImageError, describe
from shifter.images import convert, publish, tags
from shifter.images.layers import Advance
from shifter.images.reference import ImageReference
from shifter.images.scratch import Scratch, sweep
from shifter.images.sources import open_source
from shifter.images.store import Store
from shifter.linux.identity import Identity

Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""Given what is done and how many bytes that will be: a context that gives what to call with each number of bytes."""

_WORK = "shifterimg-"
_SELF = Identity(0, 0)
"""Whoever we are: acting as root changes nothing, and only root can change."""


class Result(NamedTuple):
    """What an import made. left_out: kind of file that no image has -> how many there were."""

    identifier: str
    left_out: Counter[str]


def import_image(
    store: Store,
    source_path: str,
    ref: ImageReference,
    fmt: str,
    acl: tuple[tuple[int, ...] | None, tuple[int, ...] | None],
    progress: Progress,
) -> Result:
    """Import *source_path* into *store* as *ref*; fmt: squashfs or erofs; acl: user and group ids, None for everybody.

    Raises AccessError for those who may not, ImageError and OSError when it fails. The store is then as it was before.
    """
    tags.require_writer(store)
    temporary = os.environ.get("TMPDIR") or "/var/tmp"
    try:
        publish.clean_up(store)
        sweep(temporary, _WORK, _SELF)
        with Scratch(temporary, _WORK, _SELF) as work, Scratch(store.path, publish.PARTIAL, store.account) as partial:
            os.chown(work.path, store.owner, store.group)
            return _import(store, source_path, ref, fmt, acl, progress, work.path, partial.path)
    except OSError as error:
        raise ImageError(f"{source_path} is not imported: {describe(error)}") from None


def _import(
    store: Store,
    source_path: str,
    ref: ImageReference,
    fmt: str,
    acl: tuple[tuple[int, ...] | None, tuple[int, ...] | None],
    progress: Progress,
    work: str,
    partial: str,
) -> Result:
    own = os.path.join(work, "source")
    os.mkdir(own, 0o700)
    source = open_source(source_path, own)
    with progress("reading", source.size) as advance:
        tree = source.scan(advance)
    content = convert.Content(tree, source)
    with progress("packing", content.size) as advance:
        output = os.path.join(partial, "image")
        convert.make(fmt, content, output, store.account, work, advance)
    meta = source.config
    meta.format = fmt
    meta.user_acl, meta.group_acl = acl
    return Result(publish.publish(store, partial, "image", meta, ref), tree.left_out)
