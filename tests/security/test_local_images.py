"""``local:DIR`` as an image: root makes a root file system of a directory that a user named."""

from pathlib import Path

import pytest

from tests.images import Tree
from tests.node import Node


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
