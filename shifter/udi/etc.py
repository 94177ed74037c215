"""The generated files of a UDI's /etc. They describe the node and its user, and lie above whatever the image has there.

``/etc/localtime`` and ``/etc/machine-id`` are the node's: the processes run on that machine, and log its time; an image's
``TZ`` variable still wins. ``/etc/shadow`` and ``/etc/gshadow`` are empty. Part of the build path.
"""

from shifter.udi.host import Account, Host, group_lines, imported_accounts

MYPY = False
if MYPY:
    from shifter.config import Config
    from shifter.request import Request

NSSWITCH = "\n".join(
    [
        *(
            f"{name}: files"
            for name in ("passwd", "group", "shadow", "gshadow", "services", "protocols", "rpc", "ethers", "networks")
        ),
        *(f"{name}: files" for name in ("netmasks", "netgroup", "publickey", "bootparams", "automount", "aliases")),
        "hosts: files dns",
        "",
    ]
)


class EtcFiles:
    """The generated files, collected in the caller's mount namespace, where the name service and the node's files are.

    *tty_gid*: the group of new terminals, None if they have the user's own. *nodes*: the lines of hosts(5) for the nodes of
    a job. Raises BuildError when the node lacks what it must have.
    """

    def __init__(
        self,
        config: "Config",
        request: "Request",
        host: Host,
        account: Account,
        tty_gid: "int | None",
        nodes: bytes,
    ) -> None:
        self._account = account
        self._passwd = ["root:x:0:0:root:/root:/sbin/nologin"]
        for entry in imported_accounts(config.usersToImport):
            if entry.pw_uid not in (0, account.uid):
                fields = (
                    entry.pw_name,
                    "x",
                    str(entry.pw_uid),
                    str(entry.pw_gid),
                    entry.pw_gecos,
                    entry.pw_dir,
                    entry.pw_shell,
                )
                self._passwd.append(":".join(fields))
        groups = [
            "root:x:0:",
            *([] if tty_gid is None else [f"tty:x:{tty_gid}:"]),
            *group_lines(account, request.groups, config.maxGroupCount),
            "nogroup:x:65534:",
        ]
        self._files = [
            ("group", _text(groups), 0o644),
            ("shadow", b"", 0o644),
            ("gshadow", b"", 0o644),
            ("nsswitch.conf", NSSWITCH.encode("ascii"), 0o644),
        ]
        for name in ("hosts", "resolv.conf", "localtime", "machine-id"):
            data = host.read(f"/etc/{name}")
            if name == "hosts" and nodes:
                data = (data or b"") + b"\n# The nodes of the job.\n" + nodes
            if data is not None:
                self._files.append((name, data, 0o644))

    def names(self) -> "list[str]":
        """Return the names of the files."""
        return ["passwd", *(name for name, _, _ in self._files)]

    def files(self, shell: str) -> "list[tuple[str, bytes, int]]":
        """Return (name, content, mode) of every file, the user's login shell being *shell*."""
        nobody = "nobody:x:65534:65534:nobody:/nonexistent:/sbin/nologin"
        passwd = [*self._passwd, self._account.passwd_line(shell), nobody]
        return [("passwd", _text(passwd), 0o644), *self._files]


def _text(lines: "list[str]") -> bytes:
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")
