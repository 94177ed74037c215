"""The request: what a door asks of the builder, and the canonical form that makes two launches the same UDI.

Environment, command, working directory and entry point are no part of it and never leave the door.
Part of the build path.
"""

from shifter import fields
from shifter.errors import AccessError, FormatError

MAX_GROUPS = 4096
"""More than NFS or Lustre use by a factor of 100; keeps a request below fields.MAX_BYTES."""
MAX_UID = 0xFFFFFFFE
MAX_JOB = 64
UNNAMED_JOB = "_"
"""The one slot of a node for a job that has no id: setupRoot without --job. No id that may be given looks like this."""

_JOB_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-")


class Request:
    """A validated request. ``ref`` is the image as the user named it; ``once`` is set when the UDI must not be shared.

    ``job``: the job that the UDI belongs to, "" for none. ``setup``: it is the job's own one, made by setupRoot; ``check``:
    that one is there, and the image's metadata has to be looked at again.
    ``show``: "steps" for a door that prints each operation, "plan" for one that wants only that, else "".
    """

    __slots__ = (
        "build",
        "check",
        "gid",
        "groups",
        "job",
        "modules",
        "namespace",
        "once",
        "ref",
        "setup",
        "show",
        "uid",
        "volumes",
    )

    def __init__(self, build: str, uid: int, gid: int, groups: "tuple[int, ...]", namespace: int, ref: str) -> None:
        self.build = build
        self.uid = uid
        self.gid = gid
        self.groups = groups
        self.namespace = namespace
        self.once = ""
        self.job = ""
        self.setup = False
        self.check = False
        self.ref = ref
        self.volumes: list[str] = []
        self.modules: list[str] = []
        self.show = ""

    def canonical(self, image: str) -> "list[tuple[str, str]]":
        """Return the fields that begin the record, with the resolved *image* (``ID`` or ``local:PATH``)."""
        head = [
            ("shifter", self.build),
            ("uid", str(self.uid)),
            ("gid", str(self.gid)),
            ("groups", ",".join(map(str, self.groups))),
            ("ns", str(self.namespace)),
        ]
        if self.once:
            head.append(("once", self.once))
        if self.job:
            head.append(("job", self.job))
        head.append(("image", image))
        head += [("volume", text) for text in self.volumes]
        head += [("module", text) for text in self.modules]
        return head

    def key(self, image: str) -> str:
        """Return the name of the UDI's directory: 16 hex digits over the canonical request."""
        return f"{fields.fnv1a64(fields.encode(self.canonical(image))):016x}"


def decode(data: bytes) -> Request:
    """Return the request in *data*, in its one legal order, every value checked.

    Raises FormatError, or AccessError for uid or gid 0.
    """
    items = fields.decode(data, "request")
    position = 0

    def take(key: str) -> str:
        nonlocal position
        if position >= len(items) or items[position][0] != key:
            raise FormatError(f"request without {key!r} at field {position}")
        position += 1
        return items[position - 1][1]

    def peek(key: str) -> bool:
        return position < len(items) and items[position][0] == key

    build = take("shifter")
    uid = fields.number(take("uid"), "uid", MAX_UID)
    gid = fields.number(take("gid"), "gid", MAX_UID)
    if uid == 0 or gid == 0:
        raise AccessError("shifter is for ordinary users: uid 0 and gid 0 are refused")
    text = take("groups")
    groups = tuple(fields.number(part, "groups", MAX_UID) for part in text.split(",")) if text else ()
    if list(groups) != sorted(set(groups)) or 0 in groups or len(groups) > MAX_GROUPS:
        raise FormatError("groups are not sorted, distinct, non-zero and at most 4096")
    request = Request(build, uid, gid, groups, fields.number(take("ns"), "ns"), "")
    if peek("once"):
        request.once = take("once")
        if len(request.once) != 16 or set(request.once) - set("0123456789abcdef"):
            raise FormatError("once is not 16 hex digits")
    if peek("job"):
        request.job = take("job")
        if not job_is_valid(request.job):
            raise FormatError("job: not at most 64 letters, digits and ._-")
    if not request.namespace and not request.once:
        raise FormatError("a namespace without an id can't be shared")
    request.ref = _printable(take("ref"), "image")
    while peek("volume"):
        request.volumes.append(_printable(take("volume"), "volume"))
    while peek("module"):
        request.modules.append(_printable(take("module"), "module"))
    if peek("setup"):
        what = take("setup")
        request.setup, request.check = what == "1", what == "check"
        if not (request.setup or request.check) or not request.job:
            raise FormatError("setup is neither 1 nor check, or without a job")
    if peek("show"):
        request.show = take("show")
        if request.show not in ("steps", "plan"):
            raise FormatError("show is neither steps nor plan")
    if position != len(items):
        raise FormatError(f"unexpected field {items[position][0]!r} in request")
    return request


def job_is_valid(job: str) -> bool:
    """Return whether *job* can be the id of a job: 1 to 64 letters, digits and ``._-``, the first one no ``.`` or ``-``."""
    return 0 < len(job) <= MAX_JOB and set(job) <= _JOB_CHARACTERS and job[0] not in ".-"


def _printable(text: str, what: str) -> str:
    """Return *text*; refuse control characters, which no name of an image, directory or module needs."""
    if not text or (not text.isprintable() and any(ord(char) < 32 or ord(char) == 127 for char in text)):
        raise FormatError(f"{what}: empty, or control characters in it")
    return text
