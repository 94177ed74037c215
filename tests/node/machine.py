"""A machine of its own, made of namespaces: how it starts and ends, and how processes get into it.

It has a mount, PID, UTS, IPC and network namespace and a PID 1. How it ends: PID 1 gets SIGKILL when the thread that
made the node dies, and with PID 1 the kernel ends every process of the node and frees its mounts. So nothing is left
even when pytest is killed.

Processes are started in it by switching this thread's `pid_for_children` and the child's other namespaces: they are
direct children (exact status, signals, no helper in between), and keep the power of real setuid programs.
"""

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tests.node.root import USERS, Root, User, shares_of
from tests.node.syscalls import (
    ALL_BUT_PID,
    CLONE_NEWNS,
    CLONE_NEWPID,
    MS_PRIVATE,
    MS_REC,
    MS_SLAVE,
    die_with_parent,
    mount,
    setns,
    unshare,
    unshare_as_oldest,
)
from tests.node.watch import job_cgroups_of, members, remove_cgroups

SIOCSIFFLAGS, IFF_UP = 0x8914, 1

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


class NodeError(Exception):
    """The node could not be made, or not be entered."""


class Machine:
    """The namespaces of one node, furnished as *root* says."""

    def __init__(self, root: Root) -> None:
        self.name, self.shared = root.name, root.shared
        self._made_of = root
        self.users = dict(USERS)
        self.slaves: list[int] = []
        self._children: list[subprocess.Popen[Any]] = []
        self._init: subprocess.Popen[bytes] | None = None
        self._root_fd = self._pidfd = self._pidns = self._own_pidns = -1
        try:
            self.boot()
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """PID 1 of the node, as the host counts."""
        assert self._init is not None, "the node is closed"
        return self._init.pid

    @property
    def running(self) -> bool:
        """The node has not been closed."""
        return self._init is not None

    def user(self, user: str | User) -> User:
        """A user by name; a User is taken as it is."""
        return user if isinstance(user, User) else self.users[user]

    # -- start and end --

    def boot(self, sibling: int | None = None) -> None:
        """Start it; after `stop` once more, with nothing of what it had of its own, as a node without a disk starts.

        *sibling*: PID 1 of a running node, whose /home and /images are this one's too.
        """
        self.slaves.clear()
        self._children.clear()
        self._own_pidns = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        argv = ["node-init", "-I", "-S", "-c", _INIT]
        self._init = self._spawn(argv, lambda: self._become(sibling), None, executable="/usr/bin/python3", stderr=None)
        self._root_fd = os.open(f"/proc/{self.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._pidfd = os.pidfd_open(self.pid)
        self._pidns = os.open(f"/proc/{self.pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        for number in range(2 if self.shared else 0):
            argv = ["sleep", "infinity"]
            holder = self._popen(argv, self.users["root"], self._become_slave, argv0=f"holder{number}")
            self.slaves.append(holder.pid)

    def _become(self, sibling: int | None) -> None:
        """Runs in the child that will be PID 1, already in the new PID namespace."""
        die_with_parent()
        os.setsid()
        os.umask(0o022)
        shares = {} if sibling is None else shares_of(sibling)
        unshare_as_oldest(ALL_BUT_PID)
        mount("", "/", flags=MS_REC | MS_PRIVATE)
        socket.sethostname(self.name)
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            # On lo only: what nodes do between them shall not wait for neighbour discovery, nor be interrupted by it.
            Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
        self._made_of.enter("/tmp", shares)
        os.chdir("/")
        for number in range(1, 65):
            signal.signal(number, signal.SIG_DFL) if number not in (9, 19, 32, 33) else None

    def _become_slave(self) -> None:
        """As systemd does for a service with PrivateTmp= and the like."""
        unshare(CLONE_NEWNS)
        mount("", "/", flags=MS_REC | MS_SLAVE)

    def stop(self) -> None:
        """End every process of the node; return when all of them are gone. May be called again.

        The cgroups in which jobs run that nobody took down go with them.
        """
        if self._init is not None:
            cgroups = job_cgroups_of(members("pid", os.readlink(f"/proc/{self._init.pid}/ns/pid")))
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
            remove_cgroups(cgroups)
        for name in ("_root_fd", "_pidfd", "_pidns", "_own_pidns"):
            if getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)

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

    def call(self, function: Callable[[], None]) -> None:
        """Run *function* as root in a short-lived process of the node; an exception there is a NodeError here."""

        def prepare() -> None:
            setns(self._pidfd, ALL_BUT_PID)
            function()

        self._spawn(["/bin/true"], prepare, self._pidns).wait()
