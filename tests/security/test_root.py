"""What runs as root, and as whom: the door between its steps, the builder's own state, and what happens when a change of
identity is refused or an error comes that nobody foresaw.
"""

import os
import re
from pathlib import Path

import pytest

from shifter.udi.binds import _step
from shifter.udi.host import Account
from tests.images import Tree
from tests.node import MS_BIND, PREFIX, Node
from tests.security.test_state import request_of
from tests.security.traces import refused

DOOR = f"{PREFIX}/bin/shifter"
PYTHON = f"{PREFIX}/libexec/shifter/python"

# --- the door --------------------------------------------------------------------------------------------------------

NOT_AS_ROOT = {"write", "writev", "execve", "flock", "getcwd", "getgroups", "umask", "chdir", "wait4"}
"""What the door does for its caller, or where the caller decides how long it takes and where it goes to."""

LAUNCHES = {
    "launch": f"{DOOR} --image=tiny:1 true",
    "missing": f"{DOOR} --image=missing:1 true",
    "help": f"{DOOR} --help",
    "list": f"{DOOR} --udi-list",
    "chroot": f"{DOOR} --image=tiny:1 true",
}


def done_as_root(trace: str) -> set[str]:
    """The names of the system calls in *trace*, of strace, that were made with effective uid 0 by a setuid-root program."""
    root, found = True, set()
    for line in trace.splitlines()[1:]:  # the first one starts the program
        name, _, rest = line.partition("(")
        change = re.match(r"(-?\d+), (-?\d+), (-?\d+)\) += 0", rest) if name == "setresuid" else None
        if change and change[2] != "-1":
            root = change[2] == "0"
        elif root:
            found.add(name)
    return found


@pytest.mark.parametrize("how", LAUNCHES)
def test_what_the_door_does_as_root(tiny_node: Node, how: str) -> None:
    """Effective uid 0 is for the calls that need it: a launch that builds, one that joins, and what ends before either."""
    script = f"strace -qq -u alice -o /tmp/trace {LAUNCHES[how]}"
    if how == "chroot":
        script = f"mkdir -p /mnt/root; mount --rbind / /mnt/root; exec chroot /mnt/root {script}"
    if how == "list":
        assert tiny_node.shifter("--image=tiny:1", "true").returncode == 0  # else there is nothing to write
    for _ in range(2):
        done = tiny_node.run(["unshare", "-m", "sh", "-c", script])
        assert done.returncode == (125 if how in ("missing", "chroot") else 0), done.stderr
        trace = tiny_node.read("/tmp/trace")
        assert "setresuid(-1, 5001, -1)" in trace
        assert ("open" in done_as_root(trace)) == (how != "help"), trace
        assert not done_as_root(trace) & NOT_AS_ROOT, trace


@pytest.mark.parametrize("what", ["source", "tag", "watch"])
def test_refused_change_of_identity_ends_it(tiny_node: Node, what: str) -> None:
    """Without CAP_SETUID setfsuid(2) does nothing, and says nothing: root would look for the user, or for the store's owner."""
    tiny_node.write("/home/bob/vault/file", "secret\n")
    tiny_node.path("/home/bob").chmod(0o700)
    ident = os.readlink(tiny_node.path("/images/tags/docker:tiny:1"))
    image = f"id:{ident}" if what == "watch" else "tiny:1"
    volume = ["--volume=/home/bob/vault:/mnt"] if what == "source" else []
    if what != "source":
        tiny_node.run("chown -R carol: /images", check=True)
    setpriv = ["setpriv", "--reuid", "5001", "--regid", "5001", "--clear-groups"]
    launch = [DOOR, f"--image={image}", *volume, "cat", "/mnt/file"]
    assert "secret" not in tiny_node.run([*setpriv, *launch]).stdout
    done = tiny_node.run([*setpriv, "--bounding-set", "-setuid", *launch])
    words = {
        "source": "did not let the builder act as another account",
        "tag": "can't act as the owner of the image store",
        "watch": "as uid 5003",
    }
    refused(done, words[what])


def test_command_that_gives_up_nothing_itself(node: Node, image: Tree, tmp_path: Path) -> None:
    """Busybox, which is all that other images have here, drops an effective uid of root by itself, and so hides one."""
    tree = image.copy(tmp_path / "tree")
    (tree.path / "lib").rmdir()
    for name in ("lib", "lib64"):
        (tree.path / name).symlink_to(f"usr/{name}")
    node.add_image("docker:tiny:1", tree)
    node.conf(siteFs=["/usr:/usr"])
    for _ in range(2):  # built, joined
        words = ["/usr/bin/grep", "-E", "^(Uid|Gid|Groups|Cap)", "/proc/self/status"]
        done = node.shifter(
            "--image=tiny:1", *words, cwd="/"
        )  # a message, of a directory that is missing, drops it, too
        assert done.returncode == 0, done.stderr
        lines = dict(line.split(":\t") for line in done.stdout.splitlines())
        assert lines["Uid"].split() == lines["Gid"].split() == ["5001"] * 4 and lines["Groups"].split() == [
            "6001",
            "6002",
        ]
        assert all(int(value, 16) == 0 for key, value in lines.items() if key.startswith("Cap"))


# --- the builder -----------------------------------------------------------------------------------------------------

UNTRUSTED = {
    "directory of a user": "chown alice {}",
    "directory that a group writes": "chmod g+w {}",
    "file of a user": "chown alice {}/builder.pyc",
    "file that all write": "chmod o+w {}/builder.pyc",
    "link": "mv {0}/builder.pyc {0}/real; ln -s real {0}/builder.pyc",
}


def test_what_is_run_as_root_belongs_to_root(tiny_node: Node) -> None:
    for name, change in UNTRUSTED.items():
        tiny_node.run(f"rm -rf /srv/python; cp -a {PYTHON} /srv/python", check=True)
        tiny_node.run(change.format("/srv/python"), check=True)
        tiny_node.mount("/srv/python", PYTHON, flags=MS_BIND)
        done = tiny_node.shifter("--image=tiny:1", "true")
        assert "must belong to root" in refused(done), name
        tiny_node.run(["umount", PYTHON], check=True)


def test_unforeseen_error_is_one_line(tiny_node: Node) -> None:
    """The interpreter would look for source files, to print them, in whatever root the builder is in by then."""
    assert tiny_node.shifter("--image=tiny:1", "true").returncode == 0
    script = f"exec /usr/bin/python3 -I -S -B {PYTHON}/builder.pyc no-number 3>&1"
    text = request_of(tiny_node).decode("utf-8", "surrogateescape")
    done = tiny_node.run(["sh", "-c", script], env={"LC_ALL": "C"}, clean=True, input=text, cwd="/")
    assert done.stdout.startswith("error=internal error: ValueError: "), (done.stdout, done.stderr)
    assert (done.returncode, done.stderr) == (1, "")


def test_account_that_forges_another() -> None:
    """Names and comments come from the name service of the node, where users may change theirs."""
    account = Account(4000000001, 4000000001)
    account.gecos, account.home = "x\nroot2::0:0::/:/bin/sh", "/home/x:/bin/evil"
    assert account.passwd_line("/bin/sh") == "uid4000000001:x:4000000001:4000000001:::/bin/sh"


# --- mount points that are made --------------------------------------------------------------------------------------


def test_nothing_is_made_where_the_system_is(tiny_node: Node, image: Tree) -> None:
    """By a link in a user's home to a directory of the node in which they could make something."""
    tiny_node.run("ln -s /dev/shm shm", "alice", cwd="/home/alice", check=True)
    tiny_node.run("chmod 1777 /dev/shm", check=True)
    tiny_node.mkdir("/srv/a")
    refused(tiny_node.shifter("--image=tiny:1", "--volume=/srv/a:/home/alice/shm/new", "true"), "belongs to the system")
    assert not tiny_node.exists("/dev/shm/new")


def test_step_that_is_swapped_for_a_link(tmp_path: Path) -> None:
    """A name that was made, and is a link when it is opened: it is not followed, wherever it leads to."""
    (tmp_path / "other").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "name").symlink_to("other")
    (tmp_path / "name2").symlink_to("file")
    for name, directory in (("name", True), ("name2", False)):
        parent = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
        with pytest.raises(OSError):
            os.close(_step(parent, name, directory))
        os.close(parent)
