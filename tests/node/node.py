"""One virtual node: a machine with files, with Shifter's commands, and with a watch over what is left on it."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.node.files import Files
from tests.node.root import BUILD, PREFIX, STAGE, Root, User
from tests.node.syscalls import CLONE_NEWNS, mount, setns
from tests.node.watch import (
    Leak,
    Listener,
    Loop,
    Mount,
    Process,
    describe,
    links,
    listeners,
    loops,
    members,
    mountinfo,
    until,
    wait_for,
)

_COLLECT = f"""
import sys
sys.path.insert(0, "{PREFIX}/libexec/shifter/python")
from shifter import _build
from shifter.udi import inventory
print("\\n".join(inventory.collect(_build.CONF, everything=True)))
"""


class Node(Files):
    """One virtual node.

    shared    `/` is recursively shared, and two other processes hold slave copies of it, as under systemd
    disk      `/images` lies on the disk (EROFS mounts a file directly only there), not on a tmpfs
    devpts    options of `/dev/pts`; the default is a distribution's, `mode=600` some machines'
    proc      options of `/proc`, e.g. `hidepid=2`
    install   the installation to show at /opt/shifter (None: none)
    home      a directory of the host to show at /home; None: the node's own
    images    a directory of the host to show at /images, which is then not the node's to clean up
    hosts     names and addresses for /etc/hosts, its own among them; None: its name is 127.0.1.1
    """

    def __init__(
        self,
        shared: bool = False,
        *,
        name: str = "node1",
        disk: bool = False,
        devpts: str = "gid=5,mode=620,ptmxmode=666",
        proc: str = "",
        install: Path | None = STAGE,
        home: Path | None = None,
        images: Path | None = None,
        hosts: dict[str, str] | None = None,
    ) -> None:
        self._disk = scratch() if disk else None
        self._images = self._disk or images
        self._expected: set[str] = set()
        try:
            super().__init__(Root(name, shared, devpts, proc, install, home, self._images, hosts or {}))
        except BaseException:
            self._remove_disk()
            raise

    def boot(self, sibling: int | None = None) -> None:
        """As Machine's; what it starts with is no leak."""
        super().boot(sibling)
        self._devs = {os.makedev(*map(int, m.dev.split(":"))) for m in self.mounts() if m.fstype == "tmpfs"}
        self.remember()

    def remember(self) -> None:
        """What is there now is the node's own, and no leak."""
        self._base = self._state()
        self._base_processes = {p.pid for p in self.processes()}
        self._base_links = links(self.pid)

    def close(self) -> None:
        """End every process of the node; return when the kernel has taken down its mounts."""
        with loops_freed([self]):
            self.stop()
        self._remove_disk()

    def _remove_disk(self) -> None:
        if self._disk:
            shutil.rmtree(self._disk, ignore_errors=True)
            self._disk = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # -- commands --

    def shifter(self, *args: str, user: str | User = "alice", **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run([f"{PREFIX}/bin/shifter", *args], user, **options)

    def shifterctl(self, *args: str, user: str | User = "root", **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run([f"{PREFIX}/bin/shifterctl", *args], user, **options)

    def shifterimg(self, *args: str, user: str | User = "root", **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run([f"{PREFIX}/bin/shifterimg", *args], user, **options)

    def mount(self, source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
        """Mount in the node; the mount is the test's own, so no leak."""
        self._expected.add(os.path.normpath(target))
        self.call(lambda: mount(source, target, fstype, flags, data))

    # -- what is there --

    def mounts(self, pid: int | None = None) -> list[Mount]:
        """The mounts that PID 1 of the node (or process *pid*, as the host counts) sees."""
        return mountinfo(self.pid if pid is None else pid)

    def store_mounts(self) -> list[Mount]:
        """The mounts of Shifter's store namespace, its root first; none if it is not there."""
        read, write = os.pipe()
        try:
            store = self.open("/run/shifter/store", os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            os.close(read)
            os.close(write)
            return []

        def look() -> None:
            proc = os.open("/proc", os.O_PATH)
            try:
                setns(store, CLONE_NEWNS)
            except OSError:  # an empty file, not a pin
                return
            with os.fdopen(os.open("self/mountinfo", os.O_RDONLY, dir_fd=proc), "rb") as info:
                os.write(write, info.read())
            setns(self._pidfd, CLONE_NEWNS)  # for /bin/true

        try:
            self.call(look)
        finally:
            os.close(write)
            os.close(store)
        with os.fdopen(read, "rb") as pipe:
            mounts = [Mount.parse(line) for line in pipe.read().decode().splitlines()]
        return sorted(mounts, key=lambda m: m.target != "/")

    def processes(self) -> list[Process]:
        """Every live process of the node's PID namespace, PID 1 and the holders of slave copies included."""
        return describe(members("pid", os.readlink(f"/proc/{self.pid}/ns/pid")))

    def listeners(self) -> list[Listener]:
        """Every listening TCP socket of the node's network namespace."""
        return listeners(self.pid)

    def wait_port(self, port: int, timeout: float = 20) -> Listener:
        """Wait until something listens on TCP *port*; from then on the kernel accepts connections to it.

        Nothing is connected: a server that counts its connections, or logs them, is left in peace.
        """

        def found() -> list[Listener]:
            return [one for one in self.listeners() if one.port == port]

        return wait_for(found, timeout)[0]

    def loops(self) -> list[Loop]:
        """Loop devices whose backing file lies on a file system of this node, or of the store that it shares."""
        files = set()
        if self._images:
            files = {(s.st_dev, s.st_ino) for s in (p.stat() for p in self._images.rglob("*") if p.is_file())}
        return [loop for loop in loops() if loop.dev in self._devs or (loop.dev, loop.inode) in files]

    # -- what is left --

    def _state(self) -> dict[int, set[tuple[str, str, str, str]]]:
        """Mounts in each namespace that outlives a command."""
        return {pid: {m.key for m in self.mounts(pid)} for pid in [self.pid, *self.slaves]}

    def left(self) -> list[str]:
        """What is on the node that was not there at first, or the other way round."""
        left = []
        for pid, mounts in self._state().items():
            where = "" if pid == self.pid else " in another mount namespace"
            # The tmpfs of /run/shifter and the pin of the store namespace stay; what was in them must not.
            own = {*self._expected, "/run/shifter", "/run/shifter/store"}
            left += [f"mount{where}: {m}" for m in sorted(mounts - self._base[pid]) if m[0] not in own]
            left += [f"mount gone{where}: {m}" for m in sorted(self._base[pid] - mounts)]
        left += [f"mount in the store namespace: {m.key}" for m in self.store_mounts()[1:]]
        left += [f"loop device: {loop}" for loop in self.loops()]
        left += [f"network interface: {name}" for name in sorted(self._base_links ^ links(self.pid))]
        started = {c.pid for c in self._children}
        return left + [
            f"process: {p}" for p in self.processes() if p.pid not in self._base_processes and p.pid not in started
        ]

    def tidy(self) -> str:
        """End commands of popen() that nobody waited for, with their sessions; `shifterctl gc --all`. Say what it said."""
        for child in self._children:
            if child.pid not in self.slaves and child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if not self.exists(f"{PREFIX}/bin/shifterctl") or not self.exists("/run/shifter"):
            return ""  # nothing was ever built here
        # What `shifterctl gc --all` does, without its command line: half of the time, some thousand times.
        done = self.run(["/usr/bin/python3", "-I", "-S", "-B", "-c", _COLLECT])
        said = f"\ngc --all: exit {done.returncode}\n{done.stdout}{done.stderr}"
        if done.returncode:
            raise Leak(f"{self.name}:{said}")
        return said

    def check_leaks(self, timeout: float = 5) -> None:
        """Take down every UDI (`tidy`); raise Leak unless the node is then as it was at first."""
        said = self.tidy()
        if left := until(self.left, timeout):
            raise Leak(f"left behind in {self.name}:\n  " + "\n  ".join(left) + said)


@contextlib.contextmanager
def loops_freed(nodes: Iterable[Node]) -> Iterator[None]:
    """Wait, at the end of the block which closes *nodes*, until the kernel has freed the loop devices of theirs."""
    held: list[Loop] = []
    for node in nodes:
        if node.running:
            with contextlib.suppress(OSError):
                held += node.loops()
    yield
    if held and (left := until(lambda: sorted(set(loops()) & set(held), key=str), 10)):
        raise Leak(f"loop devices outlive their node: {left}")


def scratch() -> Path:
    """A directory on the disk, for nodes; those of processes that are gone are removed on the way."""
    base = BUILD / "nodes"
    base.mkdir(parents=True, exist_ok=True)
    for old in base.iterdir():
        pid = old.name.split("-")[0]
        if not os.path.exists(f"/proc/{pid}"):
            shutil.rmtree(old, ignore_errors=True)
    new = base / f"{os.getpid()}-{time.monotonic_ns()}"
    new.mkdir(mode=0o755)
    return new
