"""The users of a node and its root file system: what it shows of the host, and what it has of its own."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from tests.node.syscalls import (
    CLONE_NEWNS,
    MNT_DETACH,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_REC,
    MS_SHARED,
    attach_mount,
    bind,
    clone_mount,
    mount,
    pivot_root,
    setns,
    umount,
)

REPO = Path(__file__).resolve().parents[2]
BUILD = REPO / "build"
STAGE = BUILD / "stage"
PREFIX = "/opt/shifter"
IMAGES = "/images"
CONF = "/etc/shifter/udiRoot.conf"
DEFAULT_CONF = f"imagePath={IMAGES}\nsiteFs=/home:/home\n"


@dataclasses.dataclass(frozen=True)
class User:
    """A person of the nodes; the same everywhere."""

    name: str
    uid: int
    gid: int
    home: str
    groups: tuple[int, ...] = ()
    shell: str = "/bin/sh"


GROUPS = {"alice": 5001, "bob": 5002, "carol": 5003, "dave": 5004, "proj": 6001, "lab": 6002, "lonely": 6003}

USERS = {
    user.name: user
    for user in (
        User("root", 0, 0, "/root", (0,)),
        User("alice", 5001, 5001, "/home/alice", (6001, 6002)),
        User("bob", 5002, 5002, "/home/bob", (6001,)),
        User("carol", 5003, 5003, "/home/carol"),
        User("dave", 5004, 5004, "/home/dave", (6002,)),
    )
}


@dataclasses.dataclass(frozen=True)
class Root:
    """What a node's root file system is made of (`Node` says what each choice means)."""

    name: str
    shared: bool
    devpts: str
    proc: str
    install: Path | None
    home: Path | None
    images: Path | None
    hosts: dict[str, str]

    def enter(self, place: str, shares: Mapping[str, int]) -> None:
        """Mount all of it on *place* and go there. Any directory will do: it is covered in this namespace only.

        *shares*: what `shares_of` another node returned, where the node is not the first one with that /home.
        """
        # Whatever is shown of the host is opened first: *place* may cover it.
        install = _opened(self.install and self.install / "opt/shifter")
        home, images = _opened(self.home), _opened(self.images)
        etc = str(self.install / "etc/shifter") if self.install else ""
        examples = {n: Path(etc, n).read_bytes() for n in os.listdir(etc)} if etc and os.path.isdir(etc) else {}
        mount("node", place, "tmpfs", 0, "mode=755")
        self._system(place)
        self._own(place)
        for fd, name in ((home, "home"), (images, "images")):
            if name in shares:
                attach_mount(shares[name], f"{place}/{name}")
            elif fd < 0:
                mount(name, f"{place}/{name}", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
            else:
                bind(f"/proc/self/fd/{fd}", f"{place}/{name}")
        if install >= 0:
            bind(f"/proc/self/fd/{install}", f"{place}{PREFIX}", readonly=True)
        for fd in (install, home, images):
            if fd >= 0:
                os.close(fd)
        self._write_etc(f"{place}/etc", examples)
        for user in USERS.values():
            if user.uid and not os.path.exists(place + user.home):  # where nodes share /home, the first one makes them
                os.mkdir(place + user.home)
                os.chmod(place + user.home, 0o700)
                os.chown(place + user.home, user.uid, user.gid)
        pivot_root(place)
        if self.shared:
            mount("", "/", flags=MS_REC | MS_SHARED)

    def _system(self, place: str) -> None:
        """What the node shows of the host: programs, devices, and copies-on-write of /etc and /var."""
        for entry in os.scandir("/"):
            target = f"{place}/{entry.name}"
            if entry.is_symlink():
                os.symlink(os.readlink(entry.path), target)
            elif entry.name in ("usr", "bin", "sbin") or entry.name.startswith("lib"):
                os.mkdir(target)
                bind(entry.path, target, readonly=True)
        for name in ("dev", "sys"):
            os.mkdir(f"{place}/{name}")
            bind(f"/{name}", f"{place}/{name}")
        for name in ("dev/shm", "dev/pts"):
            while os.path.ismount(f"{place}/{name}"):  # some hosts mount them twice
                umount(f"{place}/{name}", MNT_DETACH)
        # The writable halves of /etc and /var lie on a tmpfs that only the overlays themselves still reach.
        scratch = f"{place}/mnt"
        os.mkdir(scratch)
        mount("upper", scratch, "tmpfs", 0, "mode=755")
        for name in ("etc", "var"):
            os.mkdir(f"{place}/{name}")
            os.mkdir(f"{scratch}/{name}")
            os.mkdir(f"{scratch}/{name}.work")
            layers = f"lowerdir=/{name},upperdir={scratch}/{name},workdir={scratch}/{name}.work"
            mount("overlay", f"{place}/{name}", "overlay", 0, layers)
        umount(scratch, MNT_DETACH)

    def _own(self, place: str) -> None:
        """What the node has of its own, but for /home, /images and the installation."""
        names = ("proc", "media", "srv", "opt", PREFIX.lstrip("/"), "run", "tmp", "home", "root", "images")
        for name in names:
            os.mkdir(f"{place}/{name}")
        os.chmod(f"{place}/root", 0o700)
        mount("proc", f"{place}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, self.proc)
        mount("tmpfs", f"{place}/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
        mount("devpts", f"{place}/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, f"newinstance,{self.devpts}")
        mount("tmpfs", f"{place}/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
        for name in ("tmp", "var/tmp"):
            mount("tmpfs", f"{place}/{name}", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
        os.mkdir(f"{place}/run/lock")
        os.chmod(f"{place}/run/lock", 0o1777)

    def _write_etc(self, etc: str, examples: Mapping[str, bytes]) -> None:
        people = [u for u in USERS.values() if u.uid]
        members = {g: [u.name for u in people if gid in u.groups] for g, gid in GROUPS.items()}
        passwd = ["root:x:0:0:root:/root:/bin/sh", *_of_the_host("passwd", USERS)]
        passwd += [f"{u.name}:x:{u.uid}:{u.gid}:{u.name.title()}:{u.home}:{u.shell}" for u in people]
        group = [*_of_the_host("group", GROUPS), *(f"{g}:x:{gid}:{','.join(members[g])}" for g, gid in GROUPS.items())]
        hosts = {"localhost": "127.0.0.1"} | (self.hosts or {self.name: "127.0.1.1"})
        files = {
            "passwd": passwd,
            "group": group,
            "shadow": [f"{line.split(':')[0]}:*:19000:0:99999:7:::" for line in passwd],
            "hostname": [self.name],
            "hosts": [f"{address} {name}" for name, address in hosts.items()],
            "resolv.conf": ["nameserver 127.0.0.1"],
            "nsswitch.conf": ["passwd: files", "group: files", "shadow: files", "hosts: files dns"],
        }
        for name, lines in files.items():
            path = f"{etc}/{name}"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            Path(path).write_text("\n".join(lines) + "\n")
        os.chmod(f"{etc}/shadow", 0o640)
        shutil.rmtree(f"{etc}/shifter", ignore_errors=True)
        os.mkdir(f"{etc}/shifter")
        for name, data in examples.items():
            Path(etc, "shifter", name).write_bytes(data)
        Path(etc, "shifter/udiRoot.conf").write_text(DEFAULT_CONF)


def shares_of(pid: int) -> dict[str, int]:
    """Copies of the mounts that nodes of a cluster share, as the node of PID 1 *pid* has them. For a short-lived process."""
    own, there = (os.open(f"/proc/{one}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC) for one in ("self", pid))
    setns(there, CLONE_NEWNS)
    copies = {name: clone_mount(f"/{name}") for name in ("home", "images")}
    setns(own, CLONE_NEWNS)
    return copies


def _opened(path: Path | None) -> int:
    return -1 if path is None else os.open(path, os.O_PATH)


def _of_the_host(name: str, ours: Mapping[str, object]) -> list[str]:
    """The host's own entries of /etc/*name*, so that a machine's people never clash with the node's."""
    keep = [line.split(":") for line in Path("/etc", name).read_text().splitlines() if line.count(":") >= 3]
    return [":".join(f) for f in keep if f[0] not in ours and (int(f[2]) < 1000 or int(f[2]) == 65534)]
