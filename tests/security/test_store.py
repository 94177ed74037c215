"""Attacks on the image store, by its disk or by whoever may write there: metadata, tags and image files that are not what
they were, before, during and after a launch. A launch is right or refused in one line; those of other images go on.
"""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from tests.images import Tree
from tests.node import IMAGES, PREFIX, Node
from tests.security.traces import collect, damages, nothing_left, refused, traces

DOOR = f"{PREFIX}/bin/shifter"
META = """FORMAT: squashfs
ENTRY: ['/bin/sh', '-c']
CMD: ['true']
WORKDIR: /srv
USERACL: 5001
ENV: COLOUR=blue
"""


def right_or_refused(node: Node, ref: str = "tiny:1") -> bool:
    """Launch as alice; True if it was right, False if it was refused in one clear line."""
    done = node.shifter(f"--image={ref}", "/bin/busybox", "id", "-u", timeout=20)
    if done.returncode == 0:
        assert (done.stdout, done.stderr) == ("5001\n", "")
        return True
    refused(done)
    return False


def test_damaged_metadata(node: Node, image: Tree) -> None:
    """Each byte changed, each length. Whatever becomes of it, an ACL that is there excludes who is not in it."""
    ident = node.add_image("docker:tiny:1", image)
    path = f"{IMAGES}/{ident}.meta"
    node.write(path, META)
    good = META.encode()
    assert right_or_refused(node)
    refused(node.shifter("--image=tiny:1", "/bin/true", user="bob"), "its ACL names neither you")
    start = traces(node)
    acl = range(good.index(b"\nUSERACL"), good.index(b"ENV: "))  # C Shifter's format: without its line there is no ACL
    for position, bad in damages(good, 3, 14, 6):
        node.write(path, bad)
        right_or_refused(node)
        if len(bad) == len(good) and position not in acl:
            refused(node.shifter("--image=tiny:1", "/bin/true", user="bob"))
    node.write(path, good)
    collect(node, "--all")
    assert right_or_refused(node)
    nothing_left(node, start)


@pytest.mark.parametrize("line", ["USERACL 5001", "USERACLS: 5001", "UserAcl: 5001", "GROUP ACL: 6002", "ACL: 5001"])
def test_misspelt_acl_is_not_no_acl(node: Node, image: Tree, line: str) -> None:
    """A line that was to restrict an image, and did not begin with one of the two words, was skipped: all could have it."""
    ident = node.add_image("docker:tiny:1", image)
    node.write(f"{IMAGES}/{ident}.meta", f"FORMAT: squashfs\n{line}\n")
    for user in ("alice", "bob"):
        refused(node.shifter("--image=tiny:1", "/bin/true", user=user), f"{ident}.meta line 2", "ACL")


TAGS = {
    "climbing": "ln -s ../../etc/passwd {0}",
    "absolute": "ln -s /etc/passwd {0}",
    "to another tag": "ln -s docker:tiny:1 {0}",
    "to the image file": "ln -s {1}.squashfs {0}",
    "to the metadata": "ln -s {1}.meta {0}",
    "to itself": "ln -s docker:odd:1 {0}",
    "long": "ln -s $(head -c 4000 /dev/zero | tr '\\0' x) {0}",
    "bytes that are no text": "ln -s $(printf 'x\\377\\33[2J') {0}",
    "local": "ln -s local:/ {0}",
    "file": "echo {1} > {0}",
    "directory": "mkdir {0}",
    "fifo": "mkfifo {0}",
    "device": "mknod {0} b 7 0",
}


def test_tags_that_name_no_image(node: Node, image: Tree) -> None:
    ident = node.add_image("docker:tiny:1", image)
    assert right_or_refused(node)
    start = traces(node)
    for name, make in TAGS.items():
        node.run(f"cd {IMAGES}/tags; rm -rf docker:odd:1; {make.format('docker:odd:1', ident)}", check=True)
        done = node.shifter("--image=odd:1", "/bin/true", timeout=20)
        message = refused(done)
        assert "image " in message and message[:-1].isprintable(), (name, message)
    nothing_left(node, start)


FILES = {
    "random": "head -c 300000 /dev/urandom > {0}",
    "sparse": "truncate -s 300G {0}",
    "fifo": "mkfifo {0}",
    "directory": "mkdir {0}",
    "device": "mknod {0} b 7 0",
    "memory": "mknod {0} c 1 1",
    "socket": "python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"{0}\")'",
    "symlink": "ln -s /etc/shadow {0}",
    "mount of a user's": "touch {0}; mount --bind /home/alice/mine {0}",
}


@pytest.mark.parametrize("fmt", ["squashfs", "erofs", "VFS"])
def test_files_that_are_no_image(node: Node, image: Tree, fmt: str) -> None:
    ident = node.add_image("docker:odd:1", image, fmt)
    node.add_image("docker:tiny:1", image)
    assert right_or_refused(node)
    path = f"{IMAGES}/{ident}.{'' if fmt == 'VFS' else fmt}"
    node.write("/home/alice/mine", image.pack("squashfs").read_bytes(), owner="alice")
    start = traces(node)
    for name, make in FILES.items():
        if (fmt, name) == ("VFS", "directory"):
            continue  # that is what it is
        node.run(f"rm -rf {path}; {make.format(path)}", check=True)
        refused(node.shifter("--image=odd:1", "/bin/true", timeout=20), ident)
        if name.startswith("mount"):
            node.run(["umount", path], check=True)
    collect(node, "--all")  # locks of images that could not be mounted, which otherwise stay for udiIdleTime
    assert right_or_refused(node)
    nothing_left(node, start)


def test_image_file_replaced_during_launches(node: Node, image: Tree, tmp_path: Path) -> None:
    """By rename, as `shifterimg` does it: each launch has one image or the other, whole."""
    ident = node.add_image("docker:tiny:1", image)
    tree = image.copy(tmp_path / "other")
    (tree.path / "etc/issue").write_text("other\n")
    node.write("/images/two", tree.pack("squashfs").read_bytes())
    node.write("/images/one", image.pack("squashfs").read_bytes())
    script = f"cd {IMAGES}; while :; do for i in one two; do cp $i new; mv new {ident}.squashfs; sleep 0.04; done; done"
    mover = node.popen(["sh", "-c", script])
    seen = set()
    try:
        for _ in range(16):
            done = node.shifter("--image=tiny:1", "/bin/busybox", "cat", "/etc/issue", timeout=20)
            seen.add(done.stdout if done.returncode == 0 else refused(done, "changes faster"))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(mover.pid, signal.SIGKILL)
        mover.wait()
    assert {"Tiny\n", "other\n"} & seen and not any("Tiny" in said and "other" in said for said in seen), seen
    collect(node, "--all")
    node.run(["cp", f"{IMAGES}/one", f"{IMAGES}/{ident}.squashfs"], check=True)
    assert right_or_refused(node)
    nothing_left(node, traces(node))


@pytest.mark.parametrize("fmt", ["squashfs", "erofs"])
def test_image_file_damaged_while_it_is_mounted(disk_node: Node, image: Tree, tmp_path: Path, fmt: str) -> None:
    """Its processes get errors. Launches of others, a new one of it, and the collection go on or say why not."""
    node = disk_node
    tree = image.copy(tmp_path / "big")
    (tree.path / "srv/big").write_bytes(os.urandom(1 << 20))
    ident = node.add_image("docker:odd:1", tree, fmt)
    whole = tree.pack(fmt).read_bytes()
    node.add_image("docker:tiny:1", image)
    assert right_or_refused(node)
    start = traces(node)
    for how in ("truncate -s 8192 {0}", "truncate -s 0 {0}", "dd if=/dev/urandom of={0} bs=4096 count=20 conv=notrunc"):
        script = "echo there; read line; cat /srv/big > /dev/null && echo read; cat /usr/lib/hello.txt; true"
        holder = node.popen([DOOR, "--image=odd:1", "/bin/busybox", "sh", "-c", script], "alice", stdin=-1)
        assert holder.stdin and holder.stdout and holder.stdout.readline() == "there\n"
        node.run(f"{how.format(f'{IMAGES}/{ident}.{fmt}')} 2>/dev/null", check=True)
        assert right_or_refused(node), "another image is not concerned"
        right_or_refused(node, "odd:1")
        out, _ = holder.communicate("go on\n", timeout=30)
        assert "read" not in out or how.startswith("dd"), "what is gone is not read"
        collect(node, "--all")
        node.write(f"{IMAGES}/{ident}.{fmt}", whole)
        assert right_or_refused(node, "odd:1")
    collect(node, "--all")
    assert right_or_refused(node)
    nothing_left(node, start)
