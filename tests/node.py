"""A virtual node: one machine of a cluster, made of namespaces, up in some tens of milliseconds, gone without a trace.

A node has its own mount, PID, UTS, IPC and network namespace and a PID 1 of its own. Its root is a tmpfs: the host's
`/usr` (and what links to it) read-only, copies-on-write of the host's `/etc` and `/var`, and everything else its own:
`/run`, `/tmp`, `/var/tmp`, `/home`, `/root`, `/images` (the image store), `/opt/shifter` (the staged installation).

    with Node() as node:
        node.add_image("docker:tiny:1", tiny)
        assert node.shifter("--image=tiny:1", "/bin/true").returncode == 0

How it ends: PID 1 gets SIGKILL when the thread that made the node dies, and with PID 1 the kernel ends every process of
the node and frees its mounts. So nothing is left even when pytest is killed.

Processes are started in the node by switching this thread's `pid_for_children` and the child's other namespaces: they
are direct children (exact status, signals, no helper in between), and keep the power of real setuid programs.
"""

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import hashlib
import os
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tests.images import Tree

REPO = Path(__file__).resolve().parent.parent
BUILD = REPO / "build"
STAGE = BUILD / "stage"
PREFIX = "/opt/shifter"
IMAGES = "/images"
CONF = "/etc/shifter/udiRoot.conf"
DEFAULT_CONF = f"imagePath={IMAGES}\nsiteFs=/home:/home\n"

# --- system calls ----------------------------------------------------------------------------------------------------

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE, MS_SLAVE, MS_SHARED = 16384, 1 << 18, 1 << 19, 1 << 20
MNT_DETACH = 2
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
ALL_BUT_PID = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET
PR_SET_PDEATHSIG = 1
SYS_PIVOT_ROOT = 155 if os.uname().machine == "x86_64" else 41
SYS_OPENAT2 = 437
RESOLVE_IN_ROOT = 0x10
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
LOOP_GET_STATUS64 = 0x4C05
NS_GET_MNTNS_ID = 0x8008B705

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2) in this process's namespace."""
    args = (os.fsencode(source), os.fsencode(target), fstype.encode() or None, ctypes.c_ulong(flags), os.fsencode(data))
    _check(_libc.mount(*args), f"mount {source} on {target}")


def umount(target: str, flags: int = 0) -> None:
    _check(_libc.umount2(os.fsencode(target), flags), f"umount {target}")


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, flags: int) -> None:
    _check(_libc.setns(fd, flags), "setns")


def _unshare_as_oldest(flags: int) -> None:
    """unshare(2) such that every mount namespace which is made later gets a greater id.

    The kernel lets a namespace be pinned only where the pinning process's own one has a smaller id (no loops), and
    since 6.18 each CPU hands out ids from a batch of its own. A real node's first namespace has the smallest id of
    all; so must a virtual node's, or pinning fails now and then. Hence: on the CPU whose next id is lowest.
    """
    cpus = os.sched_getaffinity(0)
    if len(cpus) > 1:
        ids = []
        for cpu in cpus:
            os.sched_setaffinity(0, {cpu})
            unshare(CLONE_NEWNS)
            ns = os.open("/proc/self/ns/mnt", os.O_RDONLY)
            ident = bytearray(8)
            try:
                fcntl.ioctl(ns, NS_GET_MNTNS_ID, ident)
            except OSError:  # before 6.12; ids were in order then
                break
            finally:
                os.close(ns)
            ids.append((int.from_bytes(ident, sys.byteorder), cpu))
        if ids:
            os.sched_setaffinity(0, {min(ids)[1]})
    unshare(flags)
    os.sched_setaffinity(0, cpus)


def openat2(dirfd: int, path: str, flags: int, mode: int = 0, resolve: int = RESOLVE_IN_ROOT) -> int:
    """openat2(2): *path* is looked up as if *dirfd* were the root directory."""
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, mode, resolve)
    return _check(_libc.syscall(SYS_OPENAT2, dirfd, os.fsencode(path), how, len(how)), path)


def bind(source: str, target: str, readonly: bool = False) -> None:
    mount(source, target, flags=MS_BIND | MS_REC)
    if readonly:
        mount("", target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)


# --- users -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class User:
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

# --- the node --------------------------------------------------------------------------------------------------------

# PID 1: reaps whoever is left to it. Block first: a SIGCHLD that comes before that finds its process in waitpid.
_INIT = """
import posix, _signal
_signal.pthread_sigmask(0, {17})
while 1:
    try:
        while posix.waitpid(-1, 1)[0]:
            pass
    except ChildProcessError:
        pass
    _signal.sigwait({17})
"""


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
    text = Path(f"/proc/{pid}/mountinfo").read_bytes().decode("utf-8", "surrogateescape")
    return [Mount.parse(line) for line in text.split("\n")[:-1]]


@dataclasses.dataclass(frozen=True)
class Process:
    pid: int
    """As the host counts."""
    nspid: int
    """As the node counts."""
    uid: int
    comm: str
    cmdline: str


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


class NodeError(Exception):
    """The node could not be made."""


class Leak(AssertionError):
    """Something was left behind."""


class Node:
    """One virtual node.

    shared    `/` is recursively shared, and two other processes hold slave copies of it, as under systemd
    disk      `/images` lies on the disk (EROFS mounts a file directly only there), not on a tmpfs
    devpts    options of `/dev/pts`; the default is a distribution's, `mode=600` some machines'
    proc      options of `/proc`, e.g. `hidepid=2`
    install   the installation to show at /opt/shifter (None: none)
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
    ) -> None:
        self.shared = shared
        self.name = name
        self.users = dict(USERS)
        self._devpts, self._proc, self._install = devpts, proc, install
        self._children: list[subprocess.Popen[Any]] = []
        self._expected: set[str] = set()
        self._disk: Path | None = None
        self._init: subprocess.Popen[bytes] | None = None
        self._root_fd = self._pidfd = self._pidns = self._own_pidns = -1
        if disk:
            self._disk = _disk_dir()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    # -- start and end --

    def _start(self) -> None:
        self._own_pidns = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._init = self._spawn(
            ["node-init", "-I", "-S", "-c", _INIT], self._become_node, None, executable="/usr/bin/python3", stderr=None
        )
        self._root_fd = os.open(f"/proc/{self.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._pidfd = os.pidfd_open(self.pid)
        self._pidns = os.open(f"/proc/{self.pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self.init_pids = [self.pid]
        self.slaves: list[int] = []
        if self.shared:
            for number in range(2):
                holder = self._popen(
                    ["sleep", "infinity"], self.users["root"], self._become_slave, argv0=f"holder{number}"
                )
                self.slaves.append(holder.pid)
        self._devs = {os.makedev(*map(int, m.dev.split(":"))) for m in self.mounts() if m.fstype == "tmpfs"}
        self._base = self._state()
        self._base_processes = {p.pid for p in self.processes()}

    def _become_node(self) -> None:
        """Runs in the child that will be PID 1, already in the new PID namespace."""
        _check(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL), "prctl")
        os.setsid()
        os.umask(0o022)
        _unshare_as_oldest(ALL_BUT_PID)
        mount("", "/", flags=MS_REC | MS_PRIVATE)
        socket.sethostname(self.name)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
        self._build_root("/tmp")
        os.chdir("/")
        for number in range(1, 65):
            signal.signal(number, signal.SIG_DFL) if number not in (9, 19, 32, 33) else None

    def _build_root(self, root: str) -> None:
        """Mount the node's root on *root* and go there. Any directory will do: it is covered in this namespace only."""
        install = os.open(self._install / "opt/shifter", os.O_PATH) if self._install else -1
        etc = str(self._install / "etc/shifter") if self._install else ""
        examples = {n: Path(etc, n).read_bytes() for n in os.listdir(etc)} if etc and os.path.isdir(etc) else {}
        disk = os.open(self._disk, os.O_PATH) if self._disk else -1
        plain = "mode=755"
        mount("node", root, "tmpfs", 0, plain)
        for entry in os.scandir("/"):
            target = f"{root}/{entry.name}"
            if entry.is_symlink():
                os.symlink(os.readlink(entry.path), target)
            elif entry.name in ("usr", "bin", "sbin") or entry.name.startswith("lib"):
                os.mkdir(target)
                bind(entry.path, target, readonly=True)
        for name in ("dev", "sys"):
            os.mkdir(f"{root}/{name}")
            bind(f"/{name}", f"{root}/{name}")
        for name in (
            "proc",
            "mnt",
            "media",
            "srv",
            "opt",
            "opt/shifter",
            "etc",
            "var",
            "run",
            "tmp",
            "home",
            "root",
            "images",
        ):
            os.mkdir(f"{root}/{name}")
        os.chmod(f"{root}/root", 0o700)
        mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, self._proc)
        for name in ("dev/shm", "dev/pts"):
            while os.path.ismount(f"{root}/{name}"):  # some hosts mount them twice
                umount(f"{root}/{name}", MNT_DETACH)
        mount("tmpfs", f"{root}/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
        mount("devpts", f"{root}/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, f"newinstance,{self._devpts}")
        # The writable halves of /etc and /var lie on a tmpfs that only the overlays themselves still reach.
        scratch = f"{root}/mnt"
        mount("upper", scratch, "tmpfs", 0, plain)
        for name in ("etc", "var"):
            os.mkdir(f"{scratch}/{name}")
            os.mkdir(f"{scratch}/{name}.work")
            layers = f"lowerdir=/{name},upperdir={scratch}/{name},workdir={scratch}/{name}.work"
            mount("overlay", f"{root}/{name}", "overlay", 0, layers)
        umount(scratch, MNT_DETACH)
        mount("tmpfs", f"{root}/run", "tmpfs", MS_NOSUID | MS_NODEV, plain)
        for name in ("tmp", "var/tmp"):
            mount("tmpfs", f"{root}/{name}", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
        mount("home", f"{root}/home", "tmpfs", MS_NOSUID | MS_NODEV, plain)
        if disk >= 0:
            bind(f"/proc/self/fd/{disk}", f"{root}/images")
        else:
            mount("images", f"{root}/images", "tmpfs", MS_NOSUID | MS_NODEV, plain)
        if install >= 0:
            bind(f"/proc/self/fd/{install}", f"{root}/opt/shifter", readonly=True)
        os.mkdir(f"{root}/run/lock")
        os.chmod(f"{root}/run/lock", 0o1777)
        self._write_etc(f"{root}/etc", examples)
        for user in self.users.values():
            if user.uid:
                os.mkdir(root + user.home)
                os.chmod(root + user.home, 0o700)
                os.chown(root + user.home, user.uid, user.gid)
        for fd in (install, disk):
            if fd >= 0:
                os.close(fd)
        os.chdir(root)
        _check(_libc.syscall(SYS_PIVOT_ROOT, b".", b"."), "pivot_root")
        umount(".", MNT_DETACH)
        if self.shared:
            mount("", "/", flags=MS_REC | MS_SHARED)

    def _write_etc(self, etc: str, examples: Mapping[str, bytes]) -> None:
        def system(name: str) -> list[str]:
            """The host's own entries, so that a machine's people never clash with the node's."""
            lines = Path("/etc", name).read_text().splitlines()
            ours = self.users if name == "passwd" else GROUPS
            keep = [line.split(":") for line in lines if line.count(":") >= 3]
            return [":".join(f) for f in keep if f[0] not in ours and (int(f[2]) < 1000 or int(f[2]) == 65534)]

        people = [u for u in self.users.values() if u.uid]
        members = {g: [u.name for u in people if gid in u.groups] for g, gid in GROUPS.items()}
        passwd = ["root:x:0:0:root:/root:/bin/sh", *system("passwd")]
        passwd += [f"{u.name}:x:{u.uid}:{u.gid}:{u.name.title()}:{u.home}:{u.shell}" for u in people]
        group = system("group") + [f"{g}:x:{gid}:{','.join(members[g])}" for g, gid in GROUPS.items()]
        shadow = [f"{line.split(':')[0]}:*:19000:0:99999:7:::" for line in passwd]
        files = {
            "passwd": passwd,
            "group": group,
            "shadow": shadow,
            "hostname": [self.name],
            "hosts": ["127.0.0.1 localhost", f"127.0.1.1 {self.name}"],
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

    def _become_slave(self) -> None:
        """As systemd does for a service with PrivateTmp= and the like."""
        unshare(CLONE_NEWNS)
        mount("", "/", flags=MS_REC | MS_SLAVE)

    def close(self) -> None:
        """End every process of the node; return when the kernel has taken down its mounts. Never fails half-way."""
        loops_held: list[Loop] = []
        if self._init is not None:
            with contextlib.suppress(OSError):
                loops_held = self.loops()
            # First our children: the kernel ends PID 1 only after everyone in the namespace was waited for.
            for child in self._children:
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
            self._init.kill()
            for child in self._children:
                child.wait()
                for pipe in (child.stdin, child.stdout, child.stderr):
                    if pipe:
                        with contextlib.suppress(OSError):
                            pipe.close()
            self._init.wait()
            self._init = None
        for name in ("_root_fd", "_pidfd", "_pidns", "_own_pidns"):
            if getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)
        if self._disk:
            shutil.rmtree(self._disk, ignore_errors=True)
            self._disk = None
        if loops_held and (left := _until(lambda: sorted(set(loops()) & set(loops_held), key=str), 10)):
            raise Leak(f"loop devices outlive node {self.name}: {left}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """PID 1 of the node, as the host counts."""
        assert self._init is not None, "the node is closed"
        return self._init.pid

    # -- run --

    def _spawn(
        self, argv: Sequence[str], prepare: Callable[[], None], pidns: int | None, **popen: Any
    ) -> subprocess.Popen[Any]:
        """Popen in PID namespace *pidns* (None: a new one), after *prepare* in the child, whose failure is told."""
        read, write = os.pipe()

        def child() -> None:
            try:
                prepare()
            except BaseException:
                os.write(write, traceback.format_exc().encode())
                raise

        try:
            if pidns is None:
                unshare(CLONE_NEWPID)
            else:
                setns(pidns, CLONE_NEWPID)
            try:
                popen.setdefault("stdin", subprocess.DEVNULL)
                return subprocess.Popen(argv, preexec_fn=child, **popen)
            finally:
                setns(self._own_pidns, CLONE_NEWPID)
        except subprocess.SubprocessError as exc:
            os.close(write)
            write = -1
            with os.fdopen(os.dup(read), "rb") as pipe:
                raise NodeError(pipe.read().decode()) from exc
        finally:
            os.close(read)
            if write >= 0:
                os.close(write)

    def _popen(
        self,
        argv: Sequence[str] | str,
        user: User,
        prepare: Callable[[], None] | None = None,
        *,
        env: Mapping[str, str] | None = None,
        clean: bool = False,
        cwd: str | None = None,
        groups: Sequence[int] | None = None,
        umask: int = 0o022,
        argv0: str | None = None,
        text: bool = True,
        **popen: Any,
    ) -> subprocess.Popen[Any]:
        words = ["/bin/sh", "-c", argv] if isinstance(argv, str) else [str(word) for word in argv]
        environment = {} if clean else self.login_environment(user)
        environment.update(env or {})
        if argv0:
            popen["executable"], words[0] = shutil.which(words[0]), argv0

        def child() -> None:
            setns(self._pidfd, ALL_BUT_PID)
            os.setsid()
            os.umask(umask)
            if prepare:
                prepare()
            os.setgroups(list(user.groups if groups is None else groups))
            os.setresgid(user.gid, user.gid, user.gid)
            os.setresuid(user.uid, user.uid, user.uid)
            if cwd is not None:
                os.chdir(cwd)
            else:
                try:
                    os.chdir(user.home)
                except OSError:
                    os.chdir("/")

        if text and not popen.pop("binary", False):
            popen |= {"text": True, "encoding": "utf-8", "errors": "surrogateescape"}
        process = self._spawn(words, child, self._pidns, env=environment, **popen)
        self._children = [c for c in self._children if c.poll() is None]
        self._children.append(process)
        return process

    def user(self, user: str | User) -> User:
        return user if isinstance(user, User) else self.users[user]

    def login_environment(self, user: User) -> dict[str, str]:
        """What a login would give; nothing of the environment that pytest runs in."""
        path = "/usr/local/bin:/usr/bin:/bin:/opt/shifter/bin"
        if user.uid == 0:
            path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/opt/shifter/bin"
        home = {"HOME": user.home, "USER": user.name, "LOGNAME": user.name, "SHELL": user.shell}
        return home | {"PATH": path, "LANG": "C.UTF-8"}

    def popen(
        self,
        argv: Sequence[str] | str,
        user: str | User = "root",
        *,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = subprocess.PIPE,
        stderr: int | IO[Any] | None = subprocess.PIPE,
        **options: Any,
    ) -> subprocess.Popen[str]:
        """Start *argv* (a string goes to /bin/sh) in the node. Options as of run(), and Popen's (`pass_fds`, ...).

        The process leads its own session and is a direct child; it ends with the node at the latest.
        """
        return self._popen(argv, self.user(user), stdin=stdin, stdout=stdout, stderr=stderr, **options)

    def run(
        self,
        argv: Sequence[str] | str,
        user: str | User = "root",
        *,
        env: Mapping[str, str] | None = None,
        clean: bool = False,
        cwd: str | None = None,
        input: str | None = None,
        timeout: float = 60,
        check: bool = False,
        groups: Sequence[int] | None = None,
        umask: int = 0o022,
        prepare: Callable[[], None] | None = None,
        **popen: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run *argv* (a string goes to /bin/sh) in the node as *user* and return what it said.

        env      added to a login's environment (`clean=True`: instead of it)
        cwd      default: the user's home, else /
        groups   supplementary groups instead of the user's own
        prepare  called in the child as root, in the node's namespaces, before the change of user (limits, signals, ...)
        check    raise AssertionError, with all that was said, when it fails
        """
        options: dict[str, Any] = {"env": env, "clean": clean, "cwd": cwd, "groups": groups, "umask": umask} | popen
        process = self._popen(
            argv,
            self.user(user),
            prepare,
            stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
            **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options),
        )
        try:
            out, err = process.communicate(input, timeout)
        except subprocess.TimeoutExpired:
            for number in (signal.SIGTERM, signal.SIGKILL):  # strace and the like let go of theirs on SIGTERM
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=1)
            raise
        done = subprocess.CompletedProcess(argv, process.returncode, out, err)
        if check and done.returncode:
            command = argv if isinstance(argv, str) else shlex.join(map(str, argv))
            raise AssertionError(f"{command} as {user}: exit {done.returncode}\n{out}\n{err}")
        return done

    def shifter(self, *args: str, user: str | User = "alice", **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run([f"{PREFIX}/bin/shifter", *args], user, **options)

    def shifterctl(self, *args: str, user: str | User = "root", **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run([f"{PREFIX}/bin/shifterctl", *args], user, **options)

    def shifterimg(self, *args: str, user: str | User = "root", **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run([f"{PREFIX}/bin/shifterimg", *args], user, **options)

    # -- files --

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

    def mount(self, source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
        """Mount in the node; the mount is the test's own, so no leak."""
        self._expected.add(os.path.normpath(target))
        self.call(lambda: mount(source, target, fstype, flags, data))

    def call(self, function: Callable[[], None]) -> None:
        """Run *function* as root in a short-lived process of the node; an exception there is a NodeError here."""

        def prepare() -> None:
            setns(self._pidfd, ALL_BUT_PID)
            function()

        self._spawn(["/bin/true"], prepare, self._pidns).wait()

    # -- images --

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

    # -- what is there, and what is left --

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
        me = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            try:
                if os.readlink(f"/proc/{entry}/ns/pid") != me:
                    continue
                status = dict(line.split(":\t", 1) for line in Path(f"/proc/{entry}/status").read_text().splitlines())
                cmdline = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if status["State"][0] not in "ZX":
                nspid = int(status["NSpid"].split()[-1])
                found.append(Process(int(entry), nspid, int(status["Uid"].split()[0]), status["Name"], cmdline.strip()))
        return found

    def loops(self) -> list[Loop]:
        """Loop devices whose backing file lies on a file system of this node."""
        files = set()
        if self._disk:
            files = {(s.st_dev, s.st_ino) for s in (p.stat() for p in self._disk.rglob("*") if p.is_file())}
        return [loop for loop in loops() if loop.dev in self._devs or (loop.dev, loop.inode) in files]

    def _state(self) -> dict[int, set[tuple[str, str, str, str]]]:
        """Mounts in each namespace that outlives a command."""
        return {pid: {m.key for m in self.mounts(pid)} for pid in [self.pid, *self.slaves]}

    def _left(self) -> list[str]:
        left = []
        for pid, mounts in self._state().items():
            where = "" if pid == self.pid else " in another mount namespace"
            # The tmpfs of /run/shifter and the pin of the store namespace stay; what was in them must not.
            own = {*self._expected, "/run/shifter", "/run/shifter/store"}
            left += [f"mount{where}: {m}" for m in sorted(mounts - self._base[pid]) if m[0] not in own]
            left += [f"mount gone{where}: {m}" for m in sorted(self._base[pid] - mounts)]
        left += [f"mount in the store namespace: {m.key}" for m in self.store_mounts()[1:]]
        left += [f"loop device: {loop}" for loop in self.loops()]
        started = {c.pid for c in self._children}
        left += [
            f"process: {p}" for p in self.processes() if p.pid not in self._base_processes and p.pid not in started
        ]
        return left

    def check_leaks(self, timeout: float = 5) -> None:
        """Take down every UDI (`shifterctl gc --all`); raise Leak unless the node is then as it was at first.

        Commands that a test started with popen() and did not wait for are ended before, with their sessions.
        """
        for child in self._children:
            if child.pid not in self.slaves and child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        said = ""
        if self.exists(f"{PREFIX}/bin/shifterctl"):
            done = self.shifterctl("gc", "--all")
            said = f"\nshifterctl gc --all: exit {done.returncode}\n{done.stdout}{done.stderr}"
            if done.returncode:
                raise Leak(said)
        if left := _until(self._left, timeout):
            raise Leak(f"left behind in {self.name}:\n  " + "\n  ".join(left) + said)


def normal_tag(tag: str) -> str:
    """`debian:12` as `docker:debian:12`, `custom:x` as `custom:x:latest`."""
    kind, sep, rest = tag.partition(":")
    if not sep or kind not in ("docker", "custom"):
        kind, rest = "docker", tag
    if ":" not in rest.rsplit("/", 1)[-1]:
        rest += ":latest"
    return f"{kind}:{rest}"


def _until(look: Callable[[], list[Any]], timeout: float) -> list[Any]:
    """Call *look* until it finds nothing (the kernel frees mounts and loop devices a moment after the last user)."""
    end = time.monotonic() + timeout
    pause = 0.002
    while found := look():
        if time.monotonic() > end:
            return found
        time.sleep(pause)
        pause = min(pause * 2, 0.1)
    return []


def _disk_dir() -> Path:
    """A directory on the disk, for one node; those of processes that are gone are removed on the way."""
    base = BUILD / "nodes"
    base.mkdir(parents=True, exist_ok=True)
    for old in base.iterdir():
        pid = old.name.split("-")[0]
        if not os.path.exists(f"/proc/{pid}"):
            shutil.rmtree(old, ignore_errors=True)
    new = base / f"{os.getpid()}-{time.monotonic_ns()}"
    new.mkdir(mode=0o755)
    return new


@contextlib.contextmanager
def nodes(count: int, **options: Any) -> Iterator[list[Node]]:
    """Several nodes, named node1, node2, ...; independent of each other."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Node(name=f"node{i + 1}", **options)) for i in range(count)]


if __name__ == "__main__":  # a shell in a node, to look around: python -m tests.node [shared]
    with Node(shared="shared" in sys.argv[1:]) as _node:
        print(f"{_node.name}: PID 1 is {_node.pid} on the host; users {', '.join(_node.users)}", file=sys.stderr)
        _node.run("exec setsid -c sh", stdin=None, stdout=None, stderr=None, timeout=86400)
