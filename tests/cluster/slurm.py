"""A real Slurm on the nodes of a cluster: slurmctld on the first, slurmd and munged on all of them.

Everything lives in the nodes and ends with them, but for the cgroups: with cgroup v1 each slurmd gets a tree of its own,
made in the host's hierarchies, shown to the node by a cgroup namespace, and removed when the nodes are gone.
slurmd 22.05 ends where v1 and v2 are mixed unless it is told v1; where there is no v1 at all it tracks processes by their
parents (proctrack/linuxproc).
"""

import contextlib
import errno
import functools
import itertools
import os
import pwd
import re
import secrets
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.node import PREFIX, Cluster, Node, User, mount, unshare, wait_for

CLONE_NEWCGROUP = 0x02000000
HIERARCHIES = ("freezer", "memory", "cpuset", "cpu", "cpuacct", "devices")
CGROUPS = Path("/sys/fs/cgroup")
CTLD_PORT = 6817
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
_PATIENCE = re.compile(r"^srun: (Job \d+ step creation temporarily disabled, retrying.*|Step created for .*)\n", re.M)
_numbers = itertools.count()

SITE = """\
ClusterName=lab
SlurmctldHost=node1
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation=/var/lib/slurm/ctld
SlurmdSpoolDir=/var/lib/slurm/d
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldDebug=error
SlurmdDebug=error
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
CompleteWait=0
KillWait=1
MessageTimeout=10
NodeName=node[1-{count}] CPUs=4 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""

SHIFTER = f"""\
Prolog={PREFIX}/sbin/shifter-slurm-prolog
Epilog={PREFIX}/sbin/shifter-slurm-epilog
PrologFlags=Alloc,Contain,DeferBatch
"""

REQUEUE = "AuthInfo=cred_expire=5\n"
"""How long a requeued job has to wait, instead of two minutes: Slurm has forgotten its earlier start then, not before."""

# What slurmd is told even where it uses no cgroup: its own look at what is mounted ends it.
CGROUP_CONF = "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\n"


class Slurm:
    """Slurm on *nodes*, up and idle. *conf*: further lines of slurm.conf (a later one wins); *files*: of /etc/slurm.

    *plain*: as it is before anybody has heard of Shifter.
    """

    def __init__(
        self, nodes: Cluster, conf: str = "", plugin: str = "", files: dict[str, str] | None = None, plain: bool = False
    ) -> None:
        self.nodes = nodes
        self.head = nodes[0]
        self._daemons: dict[tuple[str, str], subprocess.Popen[str]] = {}
        self._cgroup = f"shifter-tests-{os.getpid()}-{next(_numbers)}" if _has_v1() else ""
        self._key = secrets.token_bytes(128)
        proctrack = "cgroup" if self._cgroup else "linuxproc"
        self._files = {
            "slurm.conf": SITE.format(count=len(nodes), proctrack=proctrack) + ("" if plain else SHIFTER) + conf,
            "cgroup.conf": CGROUP_CONF,
            "plugstack.conf": "" if plain else f"required {PREFIX}/lib/shifter/shifter_slurm.so {plugin}\n",
        } | (files or {})
        try:
            for node in nodes:
                self._furnish(node)
            self.start()
            for node in nodes:
                node.remember()
        except BaseException as error:
            error.add_note(self.logs())
            nodes.close()
            self.remove()
            raise

    @property
    def conf(self) -> str:
        """What slurm.conf says."""
        return self._files["slurm.conf"]

    @property
    def has_cgroups(self) -> bool:
        """Slurm has cgroups here, so an extern step that adopts processes."""
        return bool(self._cgroup)

    # -- start and end --

    def start(self) -> None:
        """Start all daemons; return when the nodes are idle."""
        self._start("slurmctld", self.head)
        self.head.wait_port(CTLD_PORT)  # a slurmd whose first call is refused tries again a second later
        for node in self.nodes:
            self._start("slurmd", node)
        self.wait_idle()

    def shut_down(self) -> None:
        """End all daemons as an administrator does."""
        self.run("scontrol", "shutdown", user="root", check=True)
        for daemon in self._daemons.values():
            daemon.wait(30)

    def _furnish(self, node: Node) -> None:
        munge = pwd.getpwnam("munge")
        account = User("munge", munge.pw_uid, munge.pw_gid, "/")
        node.users["munge"] = account
        for directory in ("/run/munge", "/var/lib/munge", "/var/log/munge", "/etc/munge"):
            node.run(["install", "-d", "-m", "711", "-o", "munge", "-g", "munge", directory], check=True)
        node.write("/etc/munge/munge.key", self._key, 0o400, account)
        for directory in ("/var/log/slurm", "/var/lib/slurm/ctld", "/var/lib/slurm/d"):
            node.mkdir(directory)
        for name, text in self._files.items():
            node.write(f"/etc/slurm/{name}", text)
        node.run(["/usr/sbin/munged"], "munge", check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if self._cgroup:
            self._mount_cgroups(node)

    def _start(self, program: str, node: Node) -> None:
        """Start a daemon; a slurmd in the cgroups that are the node's, whose root is then all that it sees."""
        log = node.open(f"/var/log/slurm/{program}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with self._cgroups(node if program == "slurmd" else None) as enter, os.fdopen(log, "ab") as out:
            self._daemons[program, node.name] = node.popen(
                [f"/usr/sbin/{program}", "-D"], prepare=enter, stdout=out, stderr=out
            )

    @contextlib.contextmanager
    def _cgroups(self, node: Node | None) -> Iterator[Callable[[], None] | None]:
        """What a child of this process calls to be in the cgroups of *node*; None where there are none."""
        fds = []
        for kind in HIERARCHIES if self._cgroup else ():
            if node is None:
                break
            directory = CGROUPS / kind / self._cgroup / node.name
            directory.mkdir(parents=True, exist_ok=True)
            for name in ("cpuset.cpus", "cpuset.mems") if kind == "cpuset" else ():
                for made in (directory.parent, directory):
                    (made / name).write_text((CGROUPS / kind / name).read_text())
            fds.append(os.open(directory / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC))

        def enter() -> None:
            for fd in fds:
                os.write(fd, b"0")
            unshare(CLONE_NEWCGROUP)

        try:
            yield enter if fds else None
        finally:
            for fd in fds:
                os.close(fd)

    def _mount_cgroups(self, node: Node) -> None:
        with self._cgroups(node) as enter:

            def show() -> None:
                assert enter
                enter()
                mount("cgroup", str(CGROUPS), "tmpfs", 0, "mode=755")
                for kind in HIERARCHIES:
                    os.mkdir(CGROUPS / kind)
                    mount(kind, str(CGROUPS / kind), "cgroup", 0, kind)

            node.call(show)

    def restart(self, node: Node) -> None:
        """End the slurmd of *node* as a crash would, and start it again; its jobs go on."""
        daemon = self._daemons["slurmd", node.name]
        daemon.kill()
        daemon.wait()
        self._start("slurmd", node)

    def crash(self, node: Node) -> None:
        """Cut the power of *node*, which is not the head."""
        self.nodes.network.plug(node, False)  # nobody hears of the end of its connections
        node.stop()
        self.remove(f"/{node.name}")

    def boot(self, node: Node) -> None:
        """Start *node* again, with an empty spool directory: what it knew of its jobs is gone."""
        self.nodes.boot(node)
        self._furnish(node)
        self._start("slurmd", node)
        node.remember()

    def remove(self, below: str = "") -> None:
        """Remove the cgroups, or those of a node only; when it is closed."""
        for top in CGROUPS.glob(f"*/{self._cgroup}{below}") if self._cgroup else ():
            for directory in sorted((path for path in [top, *top.rglob("*")] if path.is_dir()), reverse=True):
                wait_for(functools.partial(_removed, directory), 10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.nodes.close()
        self.remove()

    # -- use --

    def submit(self, script: str, *options: str, user: str = "alice", env: dict[str, str] | None = None) -> str:
        """Submit *script* (its body; `#SBATCH` lines may begin it) with its output in ~/ID.out; return the job's id."""
        text = script if script.startswith("#!") else f"#!/bin/sh\n{script}"
        done = self.head.run(
            ["sbatch", "--parsable", "-o", "%j.out", *options], user, input=text + "\n", check=True, env=env
        )
        return done.stdout.strip()

    def run(self, *words: str, user: str = "alice", **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command of Slurm's, or any other, as *user* on the head."""
        return self.head.run(words, user, **options)

    def state(self, job: str) -> str:
        """State of a job, as squeue says it: PENDING, RUNNING, COMPLETED, ..."""
        return self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T", user="root", check=True).stdout.strip()

    def output(self, job: str, user: str = "alice") -> str:
        """What the script of a job said, so far; without what srun says where it has to wait for the step before it."""
        path = f"/home/{user}/{job}.out"
        return _PATIENCE.sub("", self.head.read(path)) if self.head.exists(path) else ""

    def wait_state(self, job: str, *states: str) -> str:
        """Wait until a job is in one of *states*."""
        return wait_for(lambda: (state := self.state(job)) in states and state, 60, 0.05) or ""

    def finish(self, job: str, user: str = "alice") -> str:
        """Wait until a job completed and the nodes are idle; return its output. It is an AssertionError if it failed."""
        state = self.wait_state(job, *ENDED)
        assert state == "COMPLETED", f"job {job} is {state}\n{self.output(job, user)}\n{self.logs()}"
        self.wait_idle()
        return self.output(job, user)

    def wait_idle(self) -> None:
        """Wait until every node is idle: no job, no epilog, and none drained, which never becomes idle."""

        def idle() -> bool:
            states = self.run("sinfo", "-h", "-N", "-o", "%T %E", user="root").stdout.splitlines()
            assert not any("drain" in state for state in states), f"{states}\n{self.logs()}"
            return states == ["idle none"] * len(self.nodes)

        wait_for(idle, 60, 0.03)

    def logs(self) -> str:
        """The ends of all logs, for the message of a failed test."""
        return "\n".join(
            f"--- {program} {name}\n" + "\n".join(node.read(f"/var/log/slurm/{program}").splitlines()[-25:])
            for (program, name), node in ((key, self._node(key[1])) for key in self._daemons)
            if node.running
        )

    def _node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)


def _removed(directory: Path) -> bool:
    try:
        directory.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != errno.EBUSY:  # its last process is about to be gone
            raise
        return False
    return True


def _has_v1() -> bool:
    return all(os.access(CGROUPS / kind / "cgroup.procs", os.W_OK) for kind in HIERARCHIES)
