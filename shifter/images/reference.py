"""How a user names an image. This text is the specification: the door implements the same in C, a test compares both.

``parse(TEXT, DEFAULT)``, in this order, on bytes (Python: surrogateescape), refusing at the first step that fails:

1. KIND and NAME. If TEXT has a ``:`` and what precedes the first one is exactly ``docker``, ``custom``, ``id`` or
   ``local``, that is KIND and what follows that ``:`` is NAME. Else KIND is DEFAULT, which must be one of these four,
   and NAME is all of TEXT.
2. NAME must not be empty.
3. KIND ``docker`` and ``custom``:
   a. every byte is one of ``A-Z a-z 0-9 _ . - + : @ /``;
   b. the first byte is one of ``A-Z a-z 0-9 _``; the last byte is none of ``: @ /``;
   c. if NAME has no ``@`` and no ``:`` after its last ``/``, ``:latest`` is appended.
   KIND ``id``: every byte is one of ``A-Z a-z 0-9 _ . -``; the first byte is not ``.``.
   KIND ``local``:
   a. the first byte is ``/``;
   b. no byte is below 0x20 or equal to 0x7f;
   c. NAME is split at ``/``; empty components and ``.`` are dropped; a component ``..`` is refused;
   d. NAME becomes ``/`` followed by the components joined by ``/``.
4. Length. ``docker``, ``custom`` and ``id``: ``KIND:NAME`` with every ``/`` counted as three bytes (and ``%``, which
   can't occur) is at most 255 bytes, so that it fits a file name. ``local``: NAME is at most 4095 bytes.

A tag is the file name ``KIND:NAME`` with ``%`` written ``%25`` and ``/`` written ``%2F``; nothing else is escaped.
Part of the build path.
"""

from shifter.errors import FormatError, UsageError

KINDS = ("docker", "custom", "id", "local")

_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_")
_TAG_CHARACTERS = _LETTERS | frozenset(".-+:@/")
_ID_CHARACTERS = _LETTERS | frozenset(".-")
_MAX_FILE_NAME = 255
_MAX_PATH = 4095


class ImageReference:
    """The kind and name of an image, in canonical form: equal references name the same image. Made by :func:`parse`."""

    __slots__ = ("kind", "name")

    def __init__(self, kind: str, name: str) -> None:
        self.kind = kind
        self.name = name

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"

    def __repr__(self) -> str:
        return f"ImageReference({self.kind!a}, {self.name!a})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImageReference) and (self.kind, self.name) == (other.kind, other.name)

    def __hash__(self) -> int:
        return hash((self.kind, self.name))


def parse(text: str, default_type: str = "docker") -> ImageReference:
    """Return the reference that *text* names; *default_type* (``defaultImageType``) is the kind when *text* has none.

    Raises UsageError, whose text names the character or component that is refused; nothing is ever corrected silently.
    """
    kind, colon, name = text.partition(":")
    if not colon or kind not in KINDS:
        kind, name = default_type, text
        if kind not in KINDS:
            raise UsageError(f"image {_show(text)}: no type (docker, custom, id or local), and no defaultImageType")
    if not name:
        raise UsageError("no image name" if not text else f"image {_show(text)} has no name")
    if kind == "local":
        return ImageReference(kind, _local_path(name))
    if kind == "id":
        check_identifier(name)
    else:
        name = _tag_name(name, kind)
    reference = ImageReference(kind, name)
    encode_tag(reference)
    return reference


def check_identifier(identifier: str) -> str:
    """Return *identifier* if it is one (step 3, ``id``), so safe as a part of a file name. Raises UsageError."""
    for character in identifier:
        if character not in _ID_CHARACTERS:
            raise UsageError(f"image identifier {_show(identifier)}: the character {character!a} is not allowed")
    if not identifier or identifier[0] == ".":
        what = "start with a dot" if identifier else "be empty"
        raise UsageError(f"image identifier {_show(identifier)} must not {what}")
    return identifier


def encode_tag(reference: ImageReference) -> str:
    """Return the file name of *reference* in the tag store. Raises UsageError when it is too long for one."""
    encoded = str(reference).replace("%", "%25").replace("/", "%2F")
    if len(encoded.encode("utf-8", "surrogateescape")) > _MAX_FILE_NAME:
        raise UsageError(f"image name {_show(reference.name)} is too long")
    return encoded


def decode_tag(file_name: str) -> ImageReference:
    """Return the reference whose tag is *file_name*. Raises FormatError for a name that encode_tag never writes."""
    kind, _, encoded = file_name.partition(":")
    try:
        reference = parse(f"{kind}:{encoded.replace('%2F', '/').replace('%25', '%')}", "")
        if encode_tag(reference) == file_name:
            return reference
    except UsageError as error:
        raise FormatError(f"{_show(file_name)} is not a tag") from error
    raise FormatError(f"{_show(file_name)} is not a tag")


def _tag_name(name: str, kind: str) -> str:
    for character in name:
        if character not in _TAG_CHARACTERS:
            raise UsageError(f"image {_show(name)}: the character {character!a} is not allowed in a {kind} name")
    if name[0] not in _LETTERS:
        raise UsageError(f"image {_show(name)} must start with a letter, a digit or '_'")
    if name[-1] in ":@/":
        raise UsageError(f"image {_show(name)}: nothing follows the last '{name[-1]}'")
    if "@" not in name and ":" not in name[name.rfind("/") + 1 :]:
        name += ":latest"
    return name


def _local_path(path: str) -> str:
    if path[0] != "/":
        raise UsageError(f"image local:{_show(path)}: the path must be absolute")
    for character in path:
        if character < " " or character == "\x7f":
            raise UsageError(f"image local:{_show(path)}: control characters are not allowed")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise UsageError(f"image local:{_show(path)}: '..' is not allowed")
    path = "/" + "/".join(parts)
    if len(path.encode("utf-8", "surrogateescape")) > _MAX_PATH:
        raise UsageError(f"image local:{_show(path)} is too long")
    return path


def _show(text: str) -> str:
    """Return *text* quoted for a message: control and non-ASCII characters escaped, cut after 80 characters."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")
