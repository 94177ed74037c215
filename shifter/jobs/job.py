"""One job, as a prolog describes it; no workload manager is known here."""

import os
import pwd
from collections.abc import Sequence

from shifter import request
from shifter.errors import UsageError

MAX_NODES = 65536
_BLANKS = {ord(char): " " for char in "\t\r\n"}
MAX_TASKS = 1 << 20
"""Lines of /var/hostsfile; more than any machine has processors, and some tens of megabytes of names."""


class Job:
    """Whose job it is, what image it runs in and where. *ident*: request.UNNAMED_JOB where the node has one slot only."""

    def __init__(
        self,
        ident: str,
        user: str,
        uid: int,
        gid: int,
        groups: tuple[int, ...],
        image: str,
        *,
        volumes: Sequence[str] = (),
        modules: Sequence[str] = (),
        nodes: Sequence[tuple[str, int]] = (),
        restart: int = 0,
        sshd: bool = True,
        home: str = "/",
        authorized: Sequence[bytes] = (),
    ) -> None:
        self.ident = ident
        self.user = user
        self.uid = uid
        self.gid = gid
        self.groups = groups
        self.image = image
        self.volumes = volumes
        self.modules = modules
        self.nodes = nodes
        self.restart = restart
        self.sshd = sshd
        self.home = home
        self.authorized = authorized

    @property
    def title(self) -> str:
        """How messages call it."""
        return "the job without an id" if self.ident == request.UNNAMED_JOB else f"job {self.ident}"

    def hostsfile(self) -> bytes:
        """Return /var/hostsfile: the name of a node once for each of its tasks."""
        return "".join(f"{name}\n" * tasks for name, tasks in self.nodes).encode("ascii")

    def identity(self) -> list[tuple[str, str]]:
        """Return what makes two set-ups the same one: bounded, however many nodes and keys there are."""
        request = [
            ("gid", str(self.gid)),
            ("groups", ",".join(map(str, self.groups))),
            ("restart", str(self.restart)),
            ("image", self.image),
            *(("volume", text) for text in self.volumes),
            *(("module", text) for text in self.modules),
            *(("node", f"{name}/{tasks}") for name, tasks in self.nodes),
            ("sshd", str(int(self.sshd))),
            *(("authorized", key.decode("ascii")) for key in self.authorized),
        ]
        import hashlib  # which loads libcrypto, and taking down needs neither

        digest = hashlib.sha256(repr(request).encode("utf-8")).hexdigest()
        return [("uid", str(self.uid)), ("restart", str(self.restart)), ("digest", digest)]


def parse_ident(text: str) -> str:
    """Return the id of a job; UNNAMED_JOB for none. Raises UsageError."""
    if not text:
        return request.UNNAMED_JOB
    if not request.job_is_valid(text) or text == request.UNNAMED_JOB:
        raise UsageError(f"job id {text!r}: it must be 1 to {request.MAX_JOB} letters, digits and ._-")
    return text


def account(name: str, uid: int | None, gid: int | None) -> tuple[str, int, int, tuple[int, ...], str]:
    """Return (name, uid, gid, groups without 0 and gid, home) of a user by name, uid, or both. Raises UsageError."""
    try:
        entry = pwd.getpwnam(name) if name else pwd.getpwuid(uid if uid is not None else -1)
    except (KeyError, OverflowError):
        raise UsageError(f"user {name or uid}: this node does not know that account") from None
    if uid is not None and entry.pw_uid != uid:
        raise UsageError(f"user {name} has uid {entry.pw_uid} on this node, not {uid}")
    gid = entry.pw_gid if gid is None else gid
    if entry.pw_uid == 0 or gid == 0:
        raise UsageError("uid 0 and gid 0 are refused: a UDI is an ordinary user's")
    groups = set(os.getgrouplist(entry.pw_name, gid)) - {0, gid}
    return entry.pw_name, entry.pw_uid, gid, tuple(sorted(groups)), entry.pw_dir


def parse_nodes(text: str) -> list[tuple[str, int]]:
    """Return (name, tasks) of each node in *text*: names separated by blanks, each with ``/TASKS`` or 1. Raises UsageError."""
    nodes: dict[str, int] = {}
    for word in filter(None, text.translate(_BLANKS).split(" ")):  # str.split() knows 25 more blanks
        name, slash, count = word.partition("/")
        if not _is_host_name(name):
            raise UsageError(f"node {word[:200]!r} is no host name")
        if slash and not (count.isascii() and count.isdigit() and 0 < int(count[:10]) <= MAX_TASKS):
            raise UsageError(f"node {word[:200]!r}: NAME/TASKS, with 1 to {MAX_TASKS} tasks")
        nodes[name] = nodes.get(name, 0) + (int(count) if slash else 1)
    if len(nodes) > MAX_NODES or sum(nodes.values()) > MAX_TASKS:
        raise UsageError(f"more than {MAX_NODES} nodes, or {MAX_TASKS} tasks")
    return list(nodes.items())


def _is_host_name(name: str) -> bool:
    """RFC 952 and 1123, and the underscore that some sites have."""
    labels = name.split(".")
    return len(name) <= 253 and all(
        0 < len(label) <= 63
        and label.isascii()
        and label.replace("-", "").replace("_", "").isalnum()
        and label[0] != "-"
        for label in labels
    )
