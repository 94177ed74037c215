"""``local:DIR`` as an image: root makes a root file system of a directory that a user named."""

from pathlib import Path

import pytest

from tests.images import Tree
from tests.node import PREFIX, Node
from tests.security.test_volumes import swapping


@pytest.fixture
def local_node(tiny_node: Node) -> Node:
    tiny_node.conf(allowLocalChroot=1)
    return tiny_node


def bobs_image(node: Node, image: Tree, closed: str, mode: int) -> str:
    """An image in bob's home, of which alice can name every directory, but not enter *closed*."""
    node.path("/home/bob").chmod(0o711)
    image.copy(node.path("/home/bob/img"))
    where = f"/home/bob/img/{closed}".rstrip("/")
    node.write(f"{where}/secret.txt", "bob's secret\n", 0o644)
    node.path(where).chmod(mode)
    return "local:/home/bob/img"


@pytest.mark.parametrize("closed", ["", "etc", "var", "opt"])
@pytest.mark.parametrize("mode", [0o700, 0o711, 0o744])
def test_closed_directory_stays_closed(local_node: Node, image: Tree, closed: str, mode: int) -> None:
    """Entries were listed and bound one by one by root, so the mode of the directory that held them did not count."""
    name = bobs_image(local_node, image, closed, mode)
    done = local_node.shifter(f"--image={name}", "/bin/busybox", "cat", f"/{closed}/secret.txt".replace("//", "/"))
    assert "bob's secret" not in done.stdout
    assert done.returncode != 0


def test_home_of_another_user_is_no_image(local_node: Node) -> None:
    local_node.write("/home/bob/.netrc.bak", "password\n", 0o644)
    local_node.path("/home/bob").chmod(0o700)
    done = local_node.shifter("--image=local:/home/bob", "/bin/true")
    assert done.returncode == 125 and "ermission denied" in done.stderr, done.stderr


def test_own_image_works(local_node: Node, image: Tree) -> None:
    image.copy(local_node.path("/home/alice/img"))
    done = local_node.shifter("--image=local:/home/alice/img", "/bin/cat", "/etc/os-release")
    assert done.returncode == 0 and "tiny" in done.stdout, done.stderr


def test_overlay_below_reads_as_the_user(local_node: Node, image: Tree) -> None:
    """The kernel reads the lower layers of an overlay as whoever mounted it; what the mode says still counts."""
    tree = local_node.path("/home/bob/img")
    name = bobs_image(local_node, image, "", 0o755)
    (tree / "etc/sub").mkdir(mode=0o700)
    (tree / "etc/sub/secret").write_text("x")
    (tree / "etc/mine").write_text("y")
    (tree / "etc/mine").chmod(0o600)
    done = local_node.shifter(f"--image={name}", "/bin/sh", "-c", "cat /etc/os-release; ls /etc/sub; cat /etc/mine")
    assert "tiny" in done.stdout and "secret" not in done.stdout and "y" not in done.stdout.splitlines()
    assert Path(tree).is_dir()


@pytest.mark.soak
def test_directory_that_is_swapped_while_it_is_covered(local_node: Node, image: Tree, counts: dict[str, int]) -> None:
    """It was covered, and filled, by its name: the user had /etc covered by what is theirs, by a link at the right moment."""
    image.copy(local_node.path("/home/alice/tree"))
    local_node.run("mkdir -p tree/a/b/c; touch tree/a/b/mine; ln -s /etc tree/a/link", cwd="/home/alice", check=True)
    local_node.run("chown -R alice: /home/alice/tree; mkdir /srv/v", check=True)
    said = ("exchanged while the UDI was put together", "can't be a volume's target", "does not exist in the container")
    with swapping(local_node, "/home/alice/tree/a/b", "/home/alice/tree/a/link"):
        for number in range(counts["builds while a path is swapped"]):
            options = ["--image=local:/home/alice/tree", f"--volume=/srv/v:/a/b/new{number}"]
            done = local_node.shifter(
                *options, "sh", "-c", "ls /etc/mine 2>/dev/null; grep -c ' /etc ' /proc/self/mountinfo"
            )
            assert done.stdout in ("1\n", ""), done
            assert done.returncode == 0 or any(text in done.stderr for text in said), done


EXCHANGED = f"""
import posix, sys
sys.path.insert(0, "{PREFIX}/libexec/shifter/python")
from shifter.errors import BuildError
from shifter.linux.identity import ROOT
from shifter.udi.assembly import Assembly
for name in ("udi", "generated", "lower"):
    posix.mkdir("/" + name)
assembly = Assembly(posix.open("/proc", posix.O_RDONLY), posix.open("/srv", posix.O_RDONLY), ROOT, sys.argv[1] == "local")
for path in ("/etc", "/a", "/a/b"):
    assembly.make_directory(path)
lower, found = assembly.open("/a/b"), assembly.resolved(assembly.open("/a/b"))
posix.rename("/udi/a/b", "/udi/a/old")
posix.symlink("/etc", "/udi/a/b")
try:
    assembly.merge(assembly.new_layer([("new", True)]), lower, found, resolved=True)
except BuildError as error:
    print(error)
print(posix.listdir("/udi/etc"))
"""


@pytest.mark.parametrize("kind", ["local", "directory"])
def test_cover_of_a_directory_that_is_a_link_by_now(tiny_node: Node, kind: str) -> None:
    done = tiny_node.run(["unshare", "-m", "/usr/bin/python3", "-I", "-S", "-B", "-c", EXCHANGED, kind], check=True)
    assert done.stdout == "/a/b of the image was exchanged while the UDI was put together\n[]\n"
    tiny_node.run("rmdir /udi /generated /lower", check=True)
