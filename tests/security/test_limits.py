"""One user against the others: what a user may hold, for how long, and what cannot be blocked."""

import contextlib
import os
import signal
import time

import pytest

from tests.images import Tree
from tests.node import PREFIX, Node
from tests.security.fuse import UserFuse

DOOR = f"{PREFIX}/bin/shifter"


def udis(node: Node, uid: int = 5001) -> list[str]:
    """Directories of the user's UDIs, with or without a record."""
    return [name for name in os.listdir(node.path(f"/run/shifter/udi/{uid}")) if name != "lock"]


@pytest.mark.parametrize("name", ["a\fb", "a\x1cb", "a\u2028b", "a\x85b", "a\rb"])
def test_mount_with_line_separators_in_its_path(tiny_node: Node, name: str) -> None:
    """A user mounts with fusermount where they like: a name split one line of mountinfo, and no build worked any more."""
    tiny_node.mkdir(f"/home/bob/{name}", owner="bob")
    tiny_node.mount("x" + name[1] + "y", f"/home/bob/{name}", "tmpfs")
    done = tiny_node.shifter("--image=tiny:1", "/bin/true")
    assert done.returncode == 0, done.stderr


def test_mount_that_claims_to_be_proc(image: Tree) -> None:
    """A part of a mount's line, after such a separator, was taken for the line of /proc: without hidepid."""
    with Node(proc="hidepid=2") as node:
        node.add_image("docker:tiny:1", image)
        node.mkdir("/home/bob/a\fb", owner="bob")
        node.mount("/proc", "/home/bob/a\fb", "tmpfs", data="size=1m")  # "b rw,relatime - tmpfs /proc rw,size=1024k"
        done = node.shifter("--image=tiny:1", "/bin/ls", "/proc/1")
        assert done.returncode != 0, done.stdout


@pytest.mark.parametrize("name", ["a\rb", b"a\xffb".decode("utf-8", "surrogateescape")])
def test_ps_survives_names_of_mounts(tiny_node: Node, name: str) -> None:
    tiny_node.mkdir(f"/home/bob/v/{name}", owner="bob")
    tiny_node.mount("none", f"/home/bob/v/{name}", "tmpfs")
    assert tiny_node.shifter("--image=tiny:1", "--volume=/home/bob/v:/mnt", "/bin/true", user="bob").returncode == 0
    done = tiny_node.shifterctl("ps")
    assert done.returncode == 0 and "tiny" in done.stdout, done.stdout + done.stderr


def test_many_launches_at_once_keep_the_bound(tiny_node: Node) -> None:
    """The lock went from door to door, so the sweep after each build never got it, and nothing was ever evicted."""
    tiny_node.conf(udiMaxPerUser=4)
    for number in range(24):
        tiny_node.mkdir(f"/home/alice/v{number}", owner="alice")
    launches = [
        tiny_node.popen([DOOR, "--image=tiny:1", f"--volume=/home/alice/v{number}:/mnt", "/bin/true"], "alice")
        for number in range(24)
    ]
    counts = []
    while any(launch.poll() is None for launch in launches):
        with contextlib.suppress(FileNotFoundError):
            counts.append(len(udis(tiny_node)))
        time.sleep(0.01)
    assert [launch.wait() for launch in launches] == [0] * 24
    assert max(counts) <= 4 + 1, counts


def test_builds_that_fail_leave_nothing(tiny_node: Node) -> None:
    """A record that is too long was noticed after the pin was made; such UDIs were not counted, and stayed."""
    deep = "/home/alice/" + "d" * 200 + "/" + "d" * 200
    tiny_node.mkdir(deep, owner="alice")
    volume = ";".join(f"{deep}:/{number}" for number in range(110))
    for number in range(3):
        done = tiny_node.shifter("--image=tiny:1", f"--volume={volume}" + ";" * number, "/bin/true")
        assert done.returncode == 125
    assert udis(tiny_node) == []


def test_number_of_volumes_is_bounded(tiny_node: Node) -> None:
    """Each is a copy of the node's whole mount tree: with a thousand, one UDI had 26,000 mounts."""
    start = time.monotonic()
    done = tiny_node.shifter("--image=tiny:1", "--volume=" + "/:/mnt;" * 3500, "/bin/true")
    assert done.returncode == 125 and "3500 of them; at most 128" in done.stderr, done.stderr
    assert time.monotonic() - start < 2


def test_many_steps_of_a_build_are_read_to_their_end(tiny_node: Node) -> None:
    """The door took its full buffer for the builder's end, said so, and left the builder to itself, with the lock."""
    deep = "/home/alice/" + "d" * 234 + "/" + "d" * 234
    tiny_node.mkdir(deep, owner="alice")
    done = tiny_node.shifter(
        "--image=tiny:1", "--volume=" + ";".join(f"{deep}:/{number}" for number in range(128)), "/bin/true"
    )
    assert done.returncode == 125 and "bytes of fields" in done.stderr, done.stderr


def test_stopped_door_blocks_nobody_else(tiny_node: Node, image: Tree) -> None:
    tiny_node.conf(udiIdleTime="1")
    tiny_node.add_image("docker:other:1", image)
    assert tiny_node.shifter("--image=other:1", "/bin/true", user="carol").returncode == 0
    assert tiny_node.shifter("--image=tiny:1", "/bin/true").returncode == 0
    # As a door of alice's that is stopped between taking the lock and starting the builder, which is hard to hit.
    door = tiny_node.popen(["flock", "--no-fork", "/run/shifter/udi/5001/lock", "sh", "-c", "echo held; exec sleep 60"])
    assert door.stdout and door.stdout.readline() == "held\n"
    try:
        assert tiny_node.shifter("--image=tiny:1", "/bin/true", user="bob").returncode == 0
        time.sleep(2.2)
        start = time.monotonic()
        assert tiny_node.shifterctl("gc").returncode == 0
        assert time.monotonic() - start < 5
        # The root, and the image of alice's UDI.
        assert len(tiny_node.store_mounts()) <= 2, tiny_node.store_mounts()
        assert udis(tiny_node, 5002) == udis(tiny_node, 5003) == []
    finally:
        door.kill()
        door.wait()


def test_stopped_doors_of_unshared_udis_hold_one_builder(tiny_node: Node) -> None:
    """With udiIdleTime=0 each builder waits for its door. A user could stop a thousand doors, and so keep as many builders."""
    tiny_node.conf(udiIdleTime="0")
    assert tiny_node.shifter("--image=tiny:1", "/bin/true").returncode == 0
    doors = []
    for _ in range(4):
        before = {p.pid for p in tiny_node.processes() if "builder.pyc" in p.cmdline}
        doors.append(tiny_node.popen([DOOR, "--image=tiny:1", "/bin/sleep", "0"], "alice"))
        for _ in range(100):
            if {p.pid for p in tiny_node.processes() if "builder.pyc" in p.cmdline} - before:
                break
        doors[-1].send_signal(signal.SIGSTOP)
        time.sleep(0.4)
    builders = [p for p in tiny_node.processes() if "builder.pyc" in p.cmdline]
    for door in doors:
        door.kill()
        door.wait()
    assert len(builders) <= 1, builders


def test_images_that_nobody_needs_are_bounded(node: Node, image: Tree) -> None:
    """A loop over all images of the store mounted them all, for udiIdleTime."""
    ident = node.add_image("docker:tiny:0", image)
    for number in range(70):
        node.path(f"/images/x{number}.squashfs").write_bytes(node.path(f"/images/{ident}.squashfs").read_bytes())
        node.path(f"/images/x{number}.meta").write_text("FORMAT: squashfs\n")
    script = "for i in $(seq 0 69); do /opt/shifter/bin/shifter --image=id:x$i /bin/true || exit; done"
    node.run(script, "alice", check=True)
    time.sleep(0.5)
    assert len(node.store_mounts()) - 1 <= 64


def test_root_on_a_dead_file_system_does_not_stop_gc(tiny_node: Node) -> None:
    """gc asks for the root directory of every process; one on a user's FUSE that is silent held it, and every sweep, forever."""
    fuse = UserFuse({})
    tiny_node.mkdir("/srv/fuse")
    tiny_node.mount("x", "/srv/fuse", "fuse", data=fuse.options(5001))
    holder = tiny_node.popen(
        ["python3", "-c", "import os, time; os.chroot('/srv/fuse'); print('there', flush=True); time.sleep(60)"]
    )
    try:
        assert holder.stdout and holder.stdout.readline() == "there\n"
        fuse.patience = dict.fromkeys(range(64), 0)
        assert tiny_node.shifter("--image=tiny:1", "/bin/true").returncode == 0
        for command in ("gc", "ps"):
            done = tiny_node.run(["timeout", "-s", "KILL", "8", f"{PREFIX}/bin/shifterctl", command], timeout=20)
            assert done.returncode == 0, (command, done.stderr)
    finally:
        holder.kill()
        holder.wait()
        fuse.end()
        tiny_node.run(["umount", "-l", "/srv/fuse"])
