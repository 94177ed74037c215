"""Something has run out: space or inodes of /run, processes, mounts. One line says what, and all is well when it is back."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import node as nodes
from tests.node import MS_BIND, MS_PRIVATE, MS_REC, MS_REMOUNT, PREFIX, Node, NodeError, mount, mountinfo
from tests.security.traces import RUN, collect, nothing_left, refused, traces

DOOR = f"{PREFIX}/bin/shifter"


def launch(node: Node, user: str = "alice") -> None:
    done = node.shifter("--image=tiny:1", "/bin/busybox", "id", "-un", user=user)
    assert (done.returncode, done.stdout) == (0, f"{user}\n"), done.stderr


@contextlib.contextmanager
def remounted(node: Node, path: str, full: str, back: str) -> Iterator[None]:
    """The tmpfs at *path* has the limits *full* for a while."""
    node.call(lambda: mount("", path, flags=MS_REMOUNT, data=full))
    try:
        yield
    finally:
        node.call(lambda: mount("", path, flags=MS_REMOUNT, data=back))


def inodes(node: Node, path: str) -> int:
    status = os.statvfs(node.path(path))
    return status.f_files - status.f_ffree


def test_no_inode_in_run(tiny_node: Node) -> None:
    """Not even the directory for the base can be made."""
    with remounted(tiny_node, "/run", f"nr_inodes={inodes(tiny_node, '/run')}", "nr_inodes=100000"):
        refused(tiny_node.shifter("--image=tiny:1", "/bin/true"), RUN, "No space left on device")
    assert not tiny_node.exists(RUN)
    launch(tiny_node)
    nothing_left(tiny_node, traces(tiny_node))


def test_no_inode_for_a_udi(tiny_node: Node) -> None:
    """Each of those that a new UDI needs. A user's first launch was told that the image changes too fast, after six builds."""
    for user in ("alice", "bob"):
        launch(tiny_node, user)
    collect(tiny_node, "--all")
    launch(tiny_node)
    start = traces(tiny_node)
    outcomes = []
    for user in ("alice", "bob"):
        for spare in (0, 1, 2, 3, 4, 8):
            collect(tiny_node, "--all")
            tiny_node.run(["rm", "-rf", f"{RUN}/udi/5002"])
            limit = inodes(tiny_node, RUN) + spare
            with remounted(tiny_node, RUN, f"nr_inodes={limit}", "nr_inodes=100000"):
                done = tiny_node.shifter("--image=tiny:1", "/bin/busybox", "id", "-un", user=user)
            outcomes.append(done.returncode)
            if done.returncode:
                refused(done, RUN, "No space left on device")
                assert not [name for name in traces(tiny_node)["files"] if str(name).endswith(("/ns", "/record"))]
    assert set(outcomes) == {0, 125} and outcomes[0] == outcomes[6] == 125, outcomes
    for user in ("alice", "bob"):
        launch(tiny_node, user)
    tiny_node.run(f"umount {RUN}/udi/5002/*/ns; rm -r {RUN}/udi/5002/[0-9a-f]*")
    nothing_left(tiny_node, start)


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pids() -> Iterator[Path]:
    """A cgroup of our own that limits the number of processes."""
    old = [m.target for m in mountinfo() if m.fstype == "cgroup" and "pids" in m.super_options.split(",")]
    base = Path(old[0] if old else next(m.target for m in mountinfo() if m.fstype == "cgroup2"))
    if not old:
        (base / "cgroup.subtree_control").write_text("+pids")
    group = base / f"shifter-test-{os.getpid()}"
    group.mkdir()
    try:
        yield group
    finally:
        gone(group)


def gone(group: Path) -> None:
    """Remove *group* when its last process has gone: a builder sweeps after its answer."""

    def left() -> list[str]:
        try:
            group.rmdir()
        except OSError:
            return [str(group)]
        return []

    assert nodes.until(left, 10) == []


def test_no_process_to_be_had(tiny_node: Node, pids: Path) -> None:
    """The door's child could be started and the builder not: "it took longer than udiBuildTimeout, or somebody killed it"."""

    def join() -> None:
        (pids / "cgroup.procs").write_text("0")

    launch(tiny_node)
    start = traces(tiny_node)
    for made in (False, True):  # a base
        outcomes = []
        for limit in range(1, 8):
            collect(tiny_node, "--all")
            if not made:
                tiny_node.run(["umount", "-l", RUN], check=True)
            (pids / "pids.max").write_text(str(limit))
            done = tiny_node.run([DOOR, "--image=tiny:1", "/bin/busybox", "id", "-un"], "alice", prepare=join)
            outcomes.append(done.returncode)
            if done.returncode:
                refused(done, "Resource temporarily unavailable")
            else:
                assert done.stdout == "alice\n"
            (pids / "pids.max").write_text("max")
            launch(tiny_node)
        assert outcomes[:2] == [125, 125] and outcomes[-1] == 0, outcomes
    nothing_left(tiny_node, start)


# --- mounts -----------------------------------------------------------------------------------------------------------


def fill(top: str) -> None:
    """Make mounts on *top* until the namespace has as many as the kernel allows (sysctl fs.mount-max)."""
    mount("many", top, "tmpfs")
    mount("", top, flags=MS_PRIVATE)
    for number in range(40):
        os.mkdir(f"{top}/{number}")
    doubled = 0
    with contextlib.suppress(OSError):
        for doubled in range(20):
            mount(top, f"{top}/{doubled}", flags=MS_BIND | MS_REC)
    for number in range(doubled - 1, -1, -1):  # each of these has as many as all before it together
        with contextlib.suppress(OSError):
            mount(f"{top}/{number}", f"{top}/{20 + number}", flags=MS_BIND | MS_REC)
    mount(top, f"{top}/39", flags=MS_BIND)


def test_no_mount_to_be_had(tiny_node: Node) -> None:
    """Neither for a pin nor for the base. The builder also reads such a mount table in no time (it copied it quadratically)."""
    tiny_node.mkdir("/srv/many")
    launch(tiny_node)
    start = traces(tiny_node)
    collect(tiny_node, "--all")
    try:
        with pytest.raises(NodeError, match="No space left on device"):
            tiny_node.call(lambda: fill("/srv/many"))
        refused(tiny_node.shifter("--image=tiny:1", "/bin/true"), RUN, "No space left on device")
        tiny_node.run(f"umount -l {RUN}; while mount --bind /srv/many /srv/many/39 2>/dev/null; do :; done", check=True)
        refused(tiny_node.shifter("--image=tiny:1", "/bin/true"), RUN, "No space left on device")
    finally:
        tiny_node.run(["umount", "-l", "/srv/many"])
    launch(tiny_node)
    nothing_left(tiny_node, start)
