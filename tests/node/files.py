"""The files of a node: read, write, configuration, images."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.images import Tree
from tests.node.machine import Machine
from tests.node.root import CONF, DEFAULT_CONF, IMAGES, User
from tests.node.syscalls import openat2


class Files(Machine):
    """A machine whose files can be read and written from outside."""

    def path(self, path: str) -> Path:
        """*path* of the node as a path of the host (valid while the node lives; absolute symlinks lead astray)."""
        return Path(f"/proc/{self.pid}/root") / path.lstrip("/")

    def open(self, path: str, flags: int, mode: int = 0o644) -> int:
        """A descriptor of *path* in the node; symlinks stay inside."""
        return openat2(self._root_fd, path, flags, mode if flags & os.O_CREAT else 0)

    def write(self, path: str, text: str | bytes, mode: int = 0o644, owner: str | User = "root") -> None:
        """Write a file; missing directories on the way are made, and belong to *owner* too."""
        user = self.user(owner)
        self.mkdir(os.path.dirname(path), owner=owner)
        fd = self.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text)
            os.fchown(file.fileno(), user.uid, user.gid)
            os.fchmod(file.fileno(), mode)

    def mkdir(self, path: str, mode: int = 0o755, owner: str | User = "root") -> None:
        """Make a directory and its parents; what is there already stays as it is."""
        user = self.user(owner)
        try:
            os.close(self.open(path, os.O_PATH | os.O_DIRECTORY))
            return
        except FileNotFoundError:
            self.mkdir(os.path.dirname(path.rstrip("/")), owner=owner)
        parent = self.open(os.path.dirname(path.rstrip("/")), os.O_PATH | os.O_DIRECTORY)
        name = os.path.basename(path.rstrip("/"))
        try:
            os.mkdir(name, dir_fd=parent)
            os.chown(name, user.uid, user.gid, dir_fd=parent)
            os.chmod(f"/proc/self/fd/{parent}/{name}", mode)
        finally:
            os.close(parent)

    def read(self, path: str) -> str:
        with os.fdopen(self.open(path, os.O_RDONLY), "rb") as file:
            return file.read().decode("utf-8", "surrogateescape")

    def exists(self, path: str) -> bool:
        try:
            os.close(self.open(path, os.O_PATH))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def conf(self, text: str | None = None, **settings: str | int | Sequence[str]) -> None:
        """Write udiRoot.conf: *text* as it is, or the default's lines and *settings* (a list: one line per value).

        A setting replaces the default's lines of that name. Defaults: imagePath=/images, siteFs=/home:/home.
        """
        if text is None:
            lines = [line for line in DEFAULT_CONF.splitlines() if line.partition("=")[0] not in settings]
            for key, value in settings.items():
                values = [value] if isinstance(value, str | int) else value
                lines += [f"{key}={item}" for item in values]
            text = "\n".join(lines) + "\n"
        self.write(CONF, text)

    def add_image(
        self,
        tag: str,
        tree: Tree,
        fmt: str = "squashfs",
        *,
        env: Mapping[str, str] | None = None,
        entry: Sequence[str] | None = None,
        cmd: Sequence[str] | None = None,
        workdir: str | None = None,
        user_acl: Sequence[int] = (),
        group_acl: Sequence[int] = (),
        ident: str | None = None,
    ) -> str:
        """Put *tree* into the image store in format *fmt* (squashfs, erofs, VFS) and point *tag* at it.

        *tag* is `[TYPE:]NAME[:TAG]`. Returns the identifier. Nothing of Shifter is used: this is its file format.
        """
        fmt = "VFS" if fmt.lower() == "vfs" else fmt
        tag = normal_tag(tag)
        ident = ident or hashlib.sha256(f"{tag} {fmt} {tree.path}".encode()).hexdigest()
        if fmt == "VFS":
            tree.copy(self.path(f"{IMAGES}/{ident}."))
        else:
            self.write(f"{IMAGES}/{ident}.{fmt}", tree.pack(fmt).read_bytes())
        lines = [f"FORMAT: {fmt}"]
        lines += [f"ENV: {key}={value}" for key, value in (env or {}).items()]
        lines += [f"{key}: {list(value)!r}" for key, value in (("ENTRY", entry), ("CMD", cmd)) if value is not None]
        lines += [f"WORKDIR: {workdir}"] if workdir else []
        acls = (("USERACL", user_acl), ("GROUPACL", group_acl))
        lines += [f"{key}: {','.join(map(str, value))}" for key, value in acls if value]
        self.write(f"{IMAGES}/{ident}.meta", "\n".join(lines) + "\n")
        self.tag_image(tag, ident)
        return ident

    def tag_image(self, tag: str, ident: str) -> None:
        """Point *tag* at image *ident*, atomically."""
        self.mkdir(f"{IMAGES}/tags")
        name = normal_tag(tag).replace("%", "%25").replace("/", "%2F")
        tags = self.open(f"{IMAGES}/tags", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.symlink(ident, f".{name}.new", dir_fd=tags)
            os.rename(f".{name}.new", name, src_dir_fd=tags, dst_dir_fd=tags)
        finally:
            os.close(tags)


def normal_tag(tag: str) -> str:
    """`debian:12` as `docker:debian:12`, `custom:x` as `custom:x:latest`."""
    kind, sep, rest = tag.partition(":")
    if not sep or kind not in ("docker", "custom"):
        kind, rest = "docker", tag
    if ":" not in rest.rsplit("/", 1)[-1]:
        rest += ":latest"
    return f"{kind}:{rest}"
