"""The second audit: each test is named for what broke, and failed before it was mended.

A mount that root makes on a directory of a user's stands for that user's fusermount.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import node as nodes
from tests.images import Tree
from tests.node import IMAGES, MS_PRIVATE, PREFIX, Node, mount
from tests.node.syscalls import MNT_DETACH, umount
from tests.security.fuse import LOOKUP, UserFuse
from tests.security.traces import RUN
from tests.system.mounting import refused, works

# --- names in mount tables -------------------------------------------------------------------------------------------


@pytest.fixture
def named(tiny_node: Node) -> Node:
    """A node on which bob has mounted something, at a place whose name he can change as long as it is there."""
    tiny_node.mkdir("/home/bob/name/m", owner="bob")
    tiny_node.mount("bob", "/home/bob/name/m", "tmpfs")
    return tiny_node


def rename(node: Node, name: str) -> None:
    node.run(["mv", "/home/bob/name", f"/home/bob/{name}"], "bob", check=True)
    node._expected.add(f"/home/bob/{name}/m")


def mount_id(node: Node, target: str) -> int:
    """The id of the topmost mount there."""
    return [entry.id for entry in node.mounts() if entry.target == target][-1]


@pytest.mark.parametrize("name", ["a\r\rb", "a\r{0}\u2003x\u20030:99\rb", "a\r\u2003{0}\rb"])
def test_release_finds_what_it_shall_whatever_users_call_their_mounts(named: Node, name: str) -> None:
    """A carriage return ended a line of the table, and blanks of Unicode its words: bob said on which device /srv/data was."""
    named.mkdir("/srv/data")
    named.mount("data", "/srv/data", "tmpfs")
    named.conf(siteFs=["/home:/home", "/srv/data:/data"])
    works(named, "true")
    rename(named, name.format(mount_id(named, "/srv/data")))
    assert [udi["uid"] for udi in json.loads(named.shifterctl("ps", "--json", "--path", "/srv/data").stdout)] == [5001]
    done = named.shifterctl("release", "/srv/data")
    assert (done.returncode, done.stderr) == (0, "") and "UDI 5001/" in done.stdout, done


def test_base_is_made_anew_whatever_users_call_their_mounts(named: Node) -> None:
    """The same, by number: the builder of a base that was wiped fell over it, for everybody."""
    works(named, "true")
    named.run(f"umount {RUN}/store; rm {RUN}/store", check=True)
    rename(named, f"a\r{mount_id(named, RUN)}\rb")
    works(named, "true")


def test_mount_table_of_any_size(tiny_node: Node) -> None:
    """A thousand FUSE mounts with long names made a table of more than 16 MB: no UDI could be built by anybody."""
    top = "/home/bob/many"
    tiny_node.mkdir(top, owner="bob")

    def fill() -> None:
        mount("many", top, "tmpfs")
        mount("", top, flags=MS_PRIVATE)
        os.mkdir(f"{top}/m")
        for _ in range(1050):  # a backslash is written as four characters
            mount("\\" * 4090, f"{top}/m", "tmpfs")

    try:
        tiny_node.call(fill)
        works(tiny_node, "true")
    finally:
        tiny_node.call(lambda: umount(top, MNT_DETACH))


# --- what is seen with more than the user's rights ----------------------------------------------------------------------


@pytest.fixture
def hidden(image: Tree) -> Iterator[tuple[Node, int]]:
    """A node that hides processes of others, and the PID of one of bob's."""
    with Node(proc="hidepid=2") as node:
        node.add_image("docker:tiny:1", image)
        node.conf(allowLocalChroot=1)
        process = node.popen("cd; mkdir deep; cd deep; mkdir there; echo; exec sleep 1000", "bob")
        assert process.stdout is not None and process.stdout.readline() == "\n"
        yield node, next(p.nspid for p in node.processes() if p.uid == 5002)
        process.kill()
        process.wait()
        node.check_leaks()


@pytest.mark.parametrize("ask", ["--volume=/proc/{0}/fdinfo/{1}:/x", "--image=local:/proc/{0}/task/{2}"])
def test_what_others_have_open_is_not_found_by_what_a_launch_says(hidden: tuple[Node, int], ask: str) -> None:
    """Who acts as the user by fsuid alone keeps CAP_SYS_PTRACE, and so sees what procfs hides from the user."""
    node, pid = hidden
    said = set()
    for there in (True, False):
        descriptor, thread = (1, pid) if there else (77, 4000000)
        said.add(re.sub(r"\d+", "N", refused(node, ask.format(pid, descriptor, thread))))
    assert len(said) == 1, said


def test_watch_of_a_user_follows_no_link_into_other_processes(hidden: tuple[Node, int]) -> None:
    """The door looked at the place that must not exist by fsuid, through /proc/PID/cwd: alice saw what bob has in his home."""
    node, pid = hidden
    node.mkdir("/gpfs/alice", owner="alice")
    node.mkdir("/home/alice/v", owner="alice")
    node.conf(siteFs=["/gpfs:/home"])
    node.run("chmod 755 /gpfs", check=True)
    said = set()
    for name in ("there", "missing"):
        works(node, "true", "--volume=/home/alice/v:/mnt")
        node.run(f"ln -sfn /proc/{pid}/cwd/{name} /gpfs/alice/v", "alice", check=True)
        done = node.shifter("-v", "--image=tiny:1", "--volume=/home/alice/v:/mnt", "true", cwd="/")
        said.add((done.returncode, "built before" in done.stderr))
        node.run("rm /gpfs/alice/v", "alice", check=True)
    assert len(said) == 1, said


def test_who_acts_as_a_user_has_no_capability_that_counts_for_files(tiny_node: Node) -> None:
    """Seen by a builder that waits for the user's file system. CAP_SYS_RESOURCE made mount points beyond all quotas."""
    tiny_node.mkdir("/home/alice/fuse", owner="alice")
    tiny_node._expected.add("/home/alice/fuse")
    daemon = UserFuse({LOOKUP: 0})
    launch = None
    try:
        tiny_node.call(lambda: mount("alice", "/home/alice/fuse", "fuse", data=daemon.options(5001)))
        launch = tiny_node.popen(
            [f"{PREFIX}/bin/shifter", "--image=tiny:1", "--volume=/home/alice/fuse/x:/x", "true"], "alice"
        )
        assert nodes.until(lambda: [] if LOOKUP in daemon.asked else [1], 20) == []
        [builder] = [process.pid for process in tiny_node.processes() if "builder.pyc" in process.cmdline]
        status = Path(f"/proc/{builder}/status").read_text()
        assert "\nUid:\t0\t0\t0\t5001\n" in status
        assert "\nCapEff:\t0000000000200000\n" in status  # CAP_SYS_ADMIN
    finally:
        daemon.end()
        if launch:
            launch.communicate()
        tiny_node.run(["umount", "-l", "/home/alice/fuse"])


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_directories_of_volumes_are_bounded(tiny_node: Node) -> None:
    """30,000 of them fitted into one request: 30 MB of the kernel's memory in one UDI, outside of the user's cgroup."""
    volumes = [f"--volume=/tmp:/{name}{'/a' * 1900}" for name in "bcdefghijklm"]
    assert "22812 directories on the way to the targets; at most 2048 are possible" in refused(tiny_node, *volumes)


def test_links_of_an_image_to_very_deep_directories(node: Node, image: Tree, tmp_path: Path) -> None:
    """The same behind short names."""
    tree = image.copy(tmp_path / "linked")
    for number in range(6):
        os.symlink(f"{number}" + "/a" * 1900, tree.path / f"link{number}")
    node.add_image("docker:tiny:1", tree)
    message = refused(node, *(f"--volume=/tmp:/link{number}/x" for number in range(6)))
    assert "No space left on device" in message


def test_image_with_very_many_words(node: Node, image: Tree) -> None:
    """The list was copied once for each word: 20 s of root's time for one launch."""
    node.add_image("docker:tiny:1", image, cmd=["a"] * 170_000)
    node.conf(udiBuildTimeout=10)
    assert "at most 65536 are allowed" in refused(node)


def test_misspelt_name_in_a_store_with_many_tags(tiny_node: Node) -> None:
    """Each tag was compared with it, letter by letter: minutes of root's time for one launch."""

    def tag() -> None:
        for number in range(400):
            os.symlink("0", f"{IMAGES}/tags/docker:{'b' * 230}{number}:1")

    tiny_node.call(tag)
    tiny_node.conf(udiBuildTimeout=10)
    done = tiny_node.shifter("--image=" + "a" * 240, "true")
    assert (done.returncode, "no image" in done.stderr) == (125, True), done


# --- plan -------------------------------------------------------------------------------------------------------------


def planned(node: Node, *options: str) -> list[dict[str, str]]:
    done = node.shifterctl("plan", "--json", "--", "--image=tiny:1", *options, user="alice")
    assert (done.returncode, done.stderr) == (0, ""), done
    assert node.shifterctl("plan", "--", "--image=tiny:1", *options, user="alice").returncode == 0
    steps: list[dict[str, str]] = json.loads(done.stdout)
    return steps


def test_plan_with_names_that_are_no_text(tiny_node: Node) -> None:
    """A traceback: it was decoded strictly."""
    name = os.fsdecode(b"/home/alice/\xff")
    tiny_node.mkdir(name, owner="alice")
    assert name in [step.get("source") for step in planned(tiny_node, f"--volume={name}:/mnt")]


@pytest.mark.parametrize("value", ["a\u2028b", "a\x85b", "a\x7fb"])
def test_plan_with_line_separators_of_an_image(node: Node, image: Tree, value: str) -> None:
    """A traceback: such a character ended the line."""
    node.add_image("docker:tiny:1", image, env={"A": value})
    assert [step["value"] for step in planned(node) if step.get("field") == "env.image"] == [f"A={value}"]


def test_plan_of_long_operations(tiny_node: Node) -> None:
    """A traceback: an operation of more than 4,000 characters was cut."""
    targets = [f"/{'d' * 200}{number}" for number in range(60)]
    steps = planned(tiny_node, *(f"--volume=/tmp:{target}" for target in targets))
    assert [step["path"] for step in steps if step["do"] == "bind"][-60:] == targets
    assert all(target in next(step["text"] for step in steps if step["do"] == "mount-points") for target in targets)


# --- volumes ----------------------------------------------------------------------------------------------------------


def test_volume_whose_mount_point_was_removed_is_mounted_again(tiny_node: Node) -> None:
    """The kernel detaches what is mounted on a directory that somebody removes, and every later launch went without it."""
    tiny_node.write("/home/alice/data/file", "own\n", owner="alice")
    tiny_node.mkdir("/home/shared", mode=0o777)
    for place in ("/tmp/on", "/home/shared/on"):
        volume = f"--volume=/home/alice/data:{place}"
        assert works(tiny_node, f"cat {place}/file", volume) == "own\n"
        tiny_node.run(["rmdir", place], "bob" if "shared" in place else "alice", check=True)
        assert works(tiny_node, f"cat {place}/file", volume) == "own\n"
