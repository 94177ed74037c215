"""Looking at what is there: mounts, processes, loop devices, listening sockets; and waiting for it."""

import contextlib
import dataclasses
import errno
import fcntl
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

LOOP_GET_STATUS64 = 0x4C05
TCP_LISTEN = "0A"
T = TypeVar("T")


class Leak(AssertionError):
    """Something was left behind."""


@dataclasses.dataclass(frozen=True)
class Mount:
    """One line of mountinfo."""

    id: int
    parent: int
    dev: str
    root: str
    target: str
    options: str
    propagation: str
    fstype: str
    source: str
    super_options: str

    @classmethod
    def parse(cls, line: str) -> "Mount":
        """Take a line of /proc/PID/mountinfo apart."""
        left, _, right = line.partition(" - ")
        ident, parent, dev, root, target, options, *propagation = left.split(" ")
        fstype, source, super_options = right.split(" ", 2)
        return cls(
            int(ident), int(parent), dev, root, target, options, " ".join(propagation), fstype, source, super_options
        )

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What makes it the same mount in another namespace, or at another time."""
        return (self.target, self.fstype, self.source, self.root)


def mountinfo(pid: int | str = "self") -> list[Mount]:
    """The mounts that a process sees."""
    text = Path(f"/proc/{pid}/mountinfo").read_bytes().decode("utf-8", "surrogateescape")
    return [Mount.parse(line) for line in text.split("\n")[:-1]]


@dataclasses.dataclass(frozen=True)
class Process:
    """A live process of a node."""

    pid: int
    """As the host counts."""
    nspid: int
    """As the node counts."""
    uid: int
    comm: str
    cmdline: str


def members(kind: str, namespace: str) -> list[int]:
    """Processes, as the host counts, whose *kind* of namespace (pid, net, ...) is *namespace* (`net:[4026531840]`)."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and os.readlink(f"/proc/{entry}/ns/{kind}") == namespace:
                found.append(int(entry))
    return found


def describe(pids: Iterable[int]) -> list[Process]:
    """Those of *pids* that live."""
    found = []
    for pid in pids:
        try:
            status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            cmdline = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if status["State"][0] not in "ZX":
            nspid = int(status["NSpid"].split()[-1])
            found.append(Process(pid, nspid, int(status["Uid"].split()[0]), status["Name"], cmdline.strip()))
    return found


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop device in use, and what names its backing file."""

    number: int
    dev: int
    inode: int
    name: str


def loops() -> list[Loop]:
    """All loop devices of the machine that have a backing file (loop devices have no namespace)."""
    found = []
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        number = int(entry.parts[3][4:])
        try:
            fd = os.open(f"/dev/loop{number}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            info = bytearray(232)
            fcntl.ioctl(fd, LOOP_GET_STATUS64, info)
            dev, inode = struct.unpack_from("QQ", info)
            # The kernel stores huge_encode_dev(): the same as new_encode_dev() for all real numbers.
            real = os.makedev((dev >> 8) & 0xFFF, (dev & 0xFF) | ((dev >> 12) & 0xFFF00))
            found.append(Loop(number, real, inode, entry.read_text().strip()))
        except OSError as exc:
            if exc.errno not in (errno.ENXIO, errno.ENOENT, errno.ENODEV):
                raise
        finally:
            os.close(fd)
    return found


@dataclasses.dataclass(frozen=True)
class Listener:
    """A listening TCP socket, and who holds it (as the host counts)."""

    address: str
    port: int
    pids: tuple[int, ...]


def listeners(pid: int) -> list[Listener]:
    """Listening TCP sockets of the network namespace that process *pid* is in, in the order of their ports."""
    sockets: dict[str, tuple[str, int]] = {}
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, *_, inode = line.split()[:10]
                if state == TCP_LISTEN:
                    address, _, port = local.partition(":")
                    words = [int(address[at : at + 8], 16) for at in range(0, len(address), 8)]
                    shown = socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words))
                    sockets[f"socket:[{inode}]"] = (shown, int(port, 16))
    # Whoever holds them is looked for afterwards: a socket that is made meanwhile is not in the list.
    holders: dict[str, set[int]] = {name: set() for name in sockets}
    for member in members("net", os.readlink(f"/proc/{pid}/ns/net")):
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{member}/fd"):
                with contextlib.suppress(OSError, KeyError):
                    holders[os.readlink(f"/proc/{member}/fd/{fd}")].add(member)
    found = [Listener(*where, tuple(sorted(holders[name]))) for name, where in sockets.items()]
    return sorted(found, key=lambda one: (one.port, one.address))


def links(pid: int | str = "self") -> set[str]:
    """Names of the network interfaces that a process sees."""
    return {line.split(":")[0].strip() for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]}


def namespaces_held() -> set[str]:
    """Namespaces that this process keeps alive by descriptors."""
    held = set()
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor of the listing itself
            if (target := os.readlink(f"/proc/self/fd/{entry}")).partition(":")[0] in ("mnt", "net", "pid"):
                held.add(target)
    return held


def until(look: Callable[[], list[Any]], timeout: float) -> list[Any]:
    """Call *look* until it finds nothing (the kernel frees mounts and loop devices a moment after the last user)."""
    end = time.monotonic() + timeout
    pause = 0.002
    while found := look():
        if time.monotonic() > end:
            return found
        time.sleep(pause)
        pause = min(pause * 2, 0.1)
    return []


def wait_for(condition: Callable[[], T], timeout: float = 30, pause: float = 0.002) -> T:
    """Return what *condition* finds; *timeout* is only how long a broken program may keep the test."""
    end = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {timeout} s, and still {found!r}"
        time.sleep(pause)
    return found


def job_cgroups() -> list[Path]:
    """The cgroups of jobs' sshds, of all nodes: they share the machine's hierarchies."""
    tops = [m.target for m in mountinfo() if m.fstype == "cgroup2" or "freezer" in m.super_options.split(",")]
    return sorted(path for top in tops for path in Path(top).glob("shifter/job.*"))


def job_cgroups_of(pids: Iterable[int]) -> list[Path]:
    """Those that some of *pids* are in."""
    names = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            names |= {line.rpartition("/")[2] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()}
    return [path for path in job_cgroups() if path.name in names]


def remove_cgroups(paths: list[Path]) -> None:
    """Remove cgroups whose processes have ended, or are about to."""

    def busy() -> list[Path]:
        for path in paths:
            with contextlib.suppress(OSError):
                path.rmdir()
                path.parent.rmdir()
        return [path for path in paths if path.exists()]

    if left := until(busy, 5):
        raise Leak(f"cgroups outlive their node: {left}")
