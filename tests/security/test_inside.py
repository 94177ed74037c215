"""From inside of a UDI: nothing of root, of the node, or of another user's UDI can be reached, changed or uncovered."""

import ctypes
import fcntl
import json
import os
import struct
import subprocess
from pathlib import Path

import pytest

from tests import node as nodes
from tests.images import Tree
from tests.node import PREFIX, Node
from tests.node.syscalls import NS_GET_MNTNS_ID
from tests.security.traces import RUN, nothing_left, traces

DOOR = f"{PREFIX}/bin/shifter"
PROBE = Path(__file__).with_name("probe.py")


@pytest.fixture(scope="module")
def python_image(image: Tree, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """An image for the node's /usr, and so its Python."""
    tree = image.copy(tmp_path_factory.mktemp("image") / "python")
    (tree.path / "lib").rmdir()
    for name in ("lib", "lib64"):
        (tree.path / name).symlink_to(f"usr/{name}")
    return tree


@pytest.fixture
def python_node(node: Node, python_image: Tree) -> Node:
    """A node whose UDIs have Python, the probe for alice, and something of bob's."""
    node.add_image("docker:tiny:1", python_image)
    node.conf(siteFs=["/usr:/usr"])
    node.write("/home/alice/v/probe.py", PROBE.read_bytes(), owner="alice")
    node.write("/home/bob/secret/file", "bob's secret", owner="bob")
    return node


def identity(path: Path) -> list[int]:
    """Id and inode of the mount namespace *path*."""
    fd = os.open(path, os.O_RDONLY)
    try:
        ident = bytearray(8)
        fcntl.ioctl(fd, NS_GET_MNTNS_ID, ident)
        return [int.from_bytes(ident, "little"), os.fstat(fd).st_ino]
    finally:
        os.close(fd)


def handle(node: Node, path: str) -> list[int]:
    """Type and bytes of the file handle of *path*."""
    fd = node.open(path, os.O_PATH)
    buffer = ctypes.create_string_buffer(struct.pack("Ii", 128, 0) + bytes(128))
    mount = ctypes.c_int()
    try:
        nodes.check(nodes.libc.name_to_handle_at(fd, b"", buffer, ctypes.byref(mount), 0x1000), "name_to_handle_at")
    finally:
        os.close(fd)
    size, kind = struct.unpack_from("Ii", buffer)
    return [kind, *buffer.raw[8 : 8 + size]]


def in_node(process: "subprocess.Popen[str]") -> int:
    """PID of *process* as the node counts."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    return int(text.split("NSpid:")[1].split("\n")[0].split()[-1])


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "user namespace"])
def test_nothing_of_others_is_reached(python_node: Node, nested: bool) -> None:
    node = python_node
    options = ["--image=tiny:1", "--volume=/home/alice/v:/mnt"]
    assert node.shifter(*options, "/bin/busybox", "true").returncode == 0
    wait = ["/bin/busybox", "sh", "-c", "echo there; exec sleep 60"]
    bob = node.popen([DOOR, "--image=tiny:1", "--volume=/home/bob/secret:/mnt", *wait], "bob")
    processes = [bob, node.popen(wait), node.popen(wait, "alice")]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "there\n"
    start = traces(node)
    [theirs] = [name for name in os.listdir(node.path(f"{RUN}/udi/5002")) if name != "lock"]
    key = node.run("keyctl add user secret value @u", check=True).stdout
    args = {
        "pids": {"root": in_node(processes[1]), "bob": in_node(bob), "init": 1},
        "outside": in_node(processes[2]),
        "namespaces": {
            "store": identity(node.path(f"{RUN}/store")),
            "bob's": identity(node.path(f"{RUN}/udi/5002/{theirs}/ns")),
            "the node's": identity(Path(f"/proc/{node.pid}/ns/mnt")),
        },
        "handles": {"bob's file": handle(node, "/home/bob/secret/file"), "bob's home": handle(node, "/home/bob")},
        "keys": [int(key)],
        "nested": nested,
        "control": False,
    }
    try:
        done = node.shifter(*options, "/usr/bin/python3", "-I", "/mnt/probe.py", json.dumps(args))
        assert done.returncode == 0 and json.loads(done.stdout) == [], done.stdout + done.stderr
        # For root on the node each kind of look does work: so it was not the probe that failed.
        text = json.dumps(args | {"nested": False, "control": True})
        control = json.loads(node.run(["python3", "-I", "/home/alice/v/probe.py", text], cwd="/srv", check=True).stdout)
        looks = {"root of bob", "ns/mnt of bob", "descriptor of bob", "namespace of init", "join root", "bob's listed"}
        looks |= {"store by handle", "bob's file by handle in /home"}  # neighbours: for the first PID namespace only
        assert looks <= set(control), (looks - set(control), control)
    finally:
        node.run(["keyctl", "unlink", key.strip(), "@u"])
        for process in processes:
            process.kill()
            process.wait()
    nothing_left(node, start)


def test_mount_table_names_nothing_of_others(python_node: Node) -> None:
    """Neither where UDIs are put together, nor the store, nor the state of the node, nor what another user has mounted."""
    node = python_node
    for user, volume in (("bob", "/home/bob/secret"), ("alice", "/home/alice/v")):
        done = node.shifter("--image=tiny:1", f"--volume={volume}:/mnt", "/bin/cat", "/proc/self/mountinfo", user=user)
        assert done.returncode == 0, done.stderr
    found = [nodes.Mount.parse(line) for line in done.stdout.splitlines()]
    assert "/mnt" in {mount.target for mount in found}
    words = [word for m in found if m.target != "/opt/udiImage" for word in (m.target, m.source, m.root)]
    assert not [w for w in words if "bob" in w or "shifter/" in w or w.startswith(("/images", "/udi", "/generated"))]
    assert not {mount.target for mount in found} & {RUN, "/udi", "/generated", "/lower", "/directory"}
    ids = {mount.id for mount in found}
    assert [m.target for m in found if m.parent not in ids] == ["/"], "every other mount hangs on one that can be seen"


def test_keyrings_are_the_callers(python_node: Node) -> None:
    """The builder joins a session keyring of its own; the command has the user's, the same as outside."""
    script = "keyctl describe @u; keyctl describe @us; keyctl show @s"
    outside = python_node.run(f"keyctl new_session >/dev/null; {script}", "alice")
    inside = python_node.run(
        f"keyctl new_session > /dev/null; {DOOR} --image=tiny:1 /bin/busybox sh -c '{script}'", "alice"
    )
    assert "_uid.5001" in outside.stdout and inside.returncode == 0, outside.stderr + inside.stderr
    for said in (inside.stdout, outside.stdout):
        assert [line.split()[-1] for line in said.splitlines()[:2]] == ["_uid.5001", "_uid_ses.5001"], said
    assert "_uid.0" not in inside.stdout
