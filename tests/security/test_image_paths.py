"""What an image has at every path that root opens or makes in it: links out, loops, FIFOs, devices, sockets, files,
directories, in each format. Nothing of the node is reached or changed; the launch is right, or one line refuses it.

The paths are those of shifter/udi: `Builder._plan` (what a UDI has of its own or of the node, and mount points on the way
to siteFs), `Etc` (files that lie above the image's), `Builder._shell`, and `image_mounts._read_ahead` (loader, C library).
tests/system/test_odd_images.py looks at single ones of them more closely.
"""

import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SOAK
from tests.images import Tree
from tests.node import Node
from tests.security.traces import collect, nothing_left, refused, traces

TOPS = ("etc", "dev", "proc", "sys", "tmp", "var", "run", "opt", "lib", "lib64", "usr/lib")
"""Directories; what is below them is the image's no more."""
LEAVES = (
    "etc/passwd", "etc/group", "etc/hosts", "etc/resolv.conf", "etc/nsswitch.conf", "etc/shadow", "etc/gshadow", "etc/mtab",
    "etc/localtime", "etc/machine-id", "dev/pts", "dev/ptmx", "dev/console", "dev/shm", "proc/self", "sys/fs", "var/tmp",
    "var/spool", "var/empty", "var/run", "var/shifterConfig.json", "opt/udiImage", "opt/shifter", "home/alice", "bin/login-shell",
    "lib64/ld-linux-x86-64.so.2", "lib64/libc.so.6", "lib/x86_64-linux-gnu/libc.so.6",
    "lib/ld-linux-x86_64.so.1", "lib/ld-musl-x86_64.so.1",
)  # fmt: skip
TARGETS = ("home", "srv/site")
"""Mount points of the site: what can't be one is refused."""
MARKER = "/srv/marker"


def socket_at(path: Path) -> None:
    """Bind a socket; by a short name, since its address has room for 107 bytes."""
    here = os.open(path.parent, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{here}/{path.name}")
    finally:
        os.close(here)


def opposite(path: Path, was_directory: bool) -> None:
    """A file where a directory is expected, and the other way round."""
    if was_directory:
        path.write_text("a file\n")
    else:
        (path / "sub").mkdir(parents=True)


KINDS: dict[str, Callable[[Path, bool], object]] = {
    "absolute link": lambda path, _: path.symlink_to(MARKER),
    "climbing link": lambda path, _: path.symlink_to("../" * 12 + MARKER.lstrip("/")),
    "link to a file": lambda path, _: path.symlink_to(f"{MARKER}/secret"),
    "link to what is missing": lambda path, _: path.symlink_to(f"{MARKER}/new"),
    "link to procfs": lambda path, _: path.symlink_to("/proc/1/root" + MARKER),
    "loop": lambda path, _: path.symlink_to(path.name),
    "fifo": lambda path, _: os.mkfifo(path),
    "device": lambda path, _: os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5)),
    "disk": lambda path, _: os.mknod(path, 0o666 | stat.S_IFBLK, os.makedev(7, 0)),
    "socket": lambda path, _: socket_at(path),
    "opposite": opposite,
}


FEW = ("absolute link", "fifo", "device", "opposite")
"""Kinds that are also packed every day: after the mount the builder does not know what format it was."""


@pytest.fixture(scope="module")
def images(image: Tree, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tree]:
    """For each kind three images, which have it in the place of all paths of TOPS, of LEAVES, and of TARGETS."""
    made = {}
    base = tmp_path_factory.mktemp("images")
    image = image.copy(base / "small")
    for place in ("bin", "usr/bin"):  # copied and packed many times
        for link in (image.path / place).iterdir():
            if link.is_symlink() and link.name != "sh":
                link.unlink()
    for number, (kind, make) in enumerate(KINDS.items()):
        for what, names in (("tops", TOPS), ("leaves", LEAVES), ("targets", TARGETS)):
            tree = image.copy(base / f"{number}-{what}")
            for name in names:
                path = tree.path / name
                was_directory = (
                    path.is_dir() or what != "leaves" or path.name in ("pts", "shm", "fs", "spool", "empty", "run")
                )
                if path.is_dir():
                    shutil.rmtree(path)
                path.unlink(missing_ok=True)
                path.parent.mkdir(parents=True, exist_ok=True)
                make(path, was_directory)
            if (
                SOAK or kind in FEW
            ):  # Tree.pack finds it; to compress the same busybox each time would take most of the time
                quick = ["-noI", "-noD", "-noF", "-noX", "-no-xattrs", "-no-progress", "-quiet"]
                out = tree.path.with_name(f"{tree.path.name}.squashfs")
                subprocess.run(["mksquashfs", str(tree.path), str(out), *quick], check=True, stdout=subprocess.DEVNULL)
            made[f"{kind} in place of {what}"] = tree
    return made


def node_files(node: Node) -> list[tuple[str, int, int, int]]:
    """Everything on the node that an image could lead root to, and when it was changed last."""
    found = []
    for top in ("/srv", "/opt", "/home", "/root", "/media", "/mnt", "/run/lock", "/var/tmp"):
        for where, directories, files in os.walk(node.path(top)):
            for name in [".", *directories, *files]:
                status = os.lstat(os.path.join(where, name))
                found.append((os.path.join(where, name), status.st_mode, status.st_uid, status.st_ctime_ns))
    return found + [(name, 0, 0, 0) for name in sorted(os.listdir(node.path("/")))]


SCRIPT = """
set -- /etc /var /opt /home /lib /lib64 /usr/lib /run /tmp /srv/site
busybox id -un
busybox grep -c :5001: /etc/passwd
for path in "$@" /etc/* /var/* /opt/* /home/* /lib64/*; do
  test -e $path/secret && echo reached through $path
  test -f $path -a -r $path && busybox grep -l 'the secret of the node' $path
done 2>/dev/null
true
"""


@pytest.mark.parametrize("fmt", ["squashfs", "erofs", "VFS"])
def test_whatever_is_at_paths_of_root(node: Node, image: Tree, images: dict[str, Tree], fmt: str) -> None:
    node.write(f"{MARKER}/secret", "the secret of the node\n")
    node.mkdir("/srv/site")
    passwd = node.read("/etc/passwd").replace(":/home/alice:/bin/sh", ":/home/alice:/bin/login-shell")
    node.write("/etc/passwd", passwd)
    node.conf(siteFs=["/home:/home", "/srv/site:/srv/site", "/srv/site:/var/spool/site"], devpts="private")
    node.add_image("docker:tiny:1", image)
    assert node.shifter("--image=tiny:1", "/bin/true").returncode == 0
    start = traces(node)
    before = node_files(node)
    for name, tree in images.items():
        if fmt != "VFS" and not name.startswith(FEW) and not SOAK:
            continue
        node.add_image("docker:odd:1", tree, fmt)
        done = node.shifter("--image=odd:1", "/bin/busybox", "sh", "-c", SCRIPT, timeout=30)
        if done.returncode and name.endswith("targets"):
            assert "/home" in refused(done) or "/srv/site" in done.stderr, (name, done.stderr)
        else:
            assert (done.returncode, done.stdout) == (0, "alice\n1\n"), (name, done.stdout, done.stderr)
        assert node_files(node) == before, name
    collect(node, "--all")
    assert node.shifter("--image=tiny:1", "/bin/true").returncode == 0
    nothing_left(node, start)
