"""What the tests of hostile circumstances share: a builder stopped at a known place, its portrait, and the check after."""

import contextlib
import fcntl
import itertools
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests import node as nodes
from tests.node import PREFIX, Node, wait_for

DOOR = f"{PREFIX}/bin/shifter"
RUN = "/run/shifter"


def builders(node: Node) -> list[int]:
    """Builders of the node, as the host counts: children of PID 1, once they run as root."""
    found = []
    for word in Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            if b"builder.pyc" in Path(f"/proc/{word}/cmdline").read_bytes():
                found.append(int(word))
    return found


def records(node: Node, user: str = "alice") -> set[str]:
    """Keys of the user's UDIs that are complete."""
    return {path.parent.name for path in node.path(f"{RUN}/udi/{node.users[user].uid}").glob("*/record")}


@contextlib.contextmanager
def held_image(node: Node) -> Iterator[None]:
    """Hold the locks of the mounted images: builders stop there, with everything done that the caller's namespace is for."""
    held = [os.open(path, os.O_RDWR | os.O_CLOEXEC) for path in node.path(f"{RUN}/images").iterdir()]
    assert held, "no image is mounted"
    try:
        for fd in held:
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        for fd in held:
            os.close(fd)


def at_lock(pid: int) -> bool:
    """True if the process sleeps in flock(2)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/syscall").read_text().split()[0] == ("73" if os.uname().machine == "x86_64" else "32")
    return False


def stopped_builder(node: Node, door: "subprocess.Popen[str]") -> int:
    """The builder that waits for an image in `held_image`; 0 if the *door* ends without one."""

    def look() -> list[int]:
        return [pid for pid in builders(node) if at_lock(pid)] or ([] if door.poll() is None else [0])

    return wait_for(look)[0]


def portrait(pid: int) -> dict[str, object]:
    """Everything that a process has from who started it."""
    proc = Path(f"/proc/{pid}")
    stat = (proc / "stat").read_text().rpartition(")")[2].split()
    wanted = (
        "Uid Gid Groups Umask SigQ SigPnd ShdPnd SigBlk SigIgn CapInh CapPrm CapEff CapBnd CapAmb NoNewPrivs Seccomp"
    )
    wanted += " TracerPid Cpus_allowed THP_enabled CoreDumping"
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines())
    found: dict[str, object] = {name: status[name] for name in wanted.split() if name in status}
    found["SigQ"] = status["SigQ"].split("/")[1]  # the limit; the count is that of all processes of root
    found["environment"] = (proc / "environ").read_bytes()
    found["arguments"] = (proc / "cmdline").read_bytes()
    found["directories"] = [os.readlink(proc / name) for name in ("cwd", "root", "exe")]
    found["limits"] = (proc / "limits").read_text()
    found["leads its session"] = os.getsid(pid) == pid == os.getpgid(pid)
    found["terminal, nice, policy"] = (stat[4], stat[16], stat[38])
    found["adjusted"] = (proc / "oom_score_adj").read_text()
    found["frozen with"] = [
        line for line in (proc / "cgroup").read_text().splitlines() if "freezer" in line or line.startswith("0::")
    ]
    # Descriptors by kind: the numbers of pipes and namespaces differ each time.
    found["descriptors"] = {
        int(name): re.sub(r"\[.*\]|/images/.*", "", os.readlink(proc / "fd" / name)) for name in os.listdir(proc / "fd")
    }
    return found


_number = itertools.count(1)


def works(node: Node, *users: str) -> None:
    """Launches of these users, one of each built and one joined, are as ever."""
    for user in users:
        volume = f"--volume=/home/{user}:/mnt{'/' * (next(_number) % 2000)}"
        for _ in range(2):
            done = node.shifter("--image=tiny:1", volume, "sh", "-c", "id -u; exit 9", user=user, timeout=20)
            assert (done.returncode, done.stdout, done.stderr) == (9, f"{node.users[user].uid}\n", ""), (user, done)


@contextlib.contextmanager
def untouched(node: Node) -> Iterator[None]:
    """After what is done inside: one collection leaves nothing, and launches of alice and bob work."""
    yield
    wait_for(lambda: not builders(node))
    long_ago = time.time() - 86400
    for path in [*node.path(f"{RUN}/udi").glob("*/*/record"), *node.path(f"{RUN}/images").iterdir()]:
        os.utime(path, (long_ago, long_ago))  # idle for longer than udiIdleTime, without waiting for it
    done = node.shifterctl("gc")
    assert done.returncode == 0 and done.stderr == "", done
    assert nodes.until(node.left, 5) == []
    works(node, "alice", "bob")
