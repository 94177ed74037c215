"""Launching: formats, sharing, what the command finds itself in."""

import pytest

from tests.images import Tree
from tests.node import Node


@pytest.mark.parametrize("fmt", ["squashfs", "erofs", "VFS"])
def test_command_runs_in_the_image(node: Node, image: Tree, fmt: str) -> None:
    node.add_image("docker:tiny:1", image, fmt)
    done = node.shifter("--image=tiny:1", "/bin/sh", "-c", "id -u; id -g; pwd; ls /")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:3] == ["5001", "5001", "/home/alice"]


def test_second_launch_joins_the_first_udi(tiny_node: Node) -> None:
    first = tiny_node.shifter("--image=tiny:1", "readlink", "/proc/self/ns/mnt")
    second = tiny_node.shifter("-v", "--image=docker:tiny:1", "readlink", "/proc/self/ns/mnt")
    assert first.stdout and first.stdout == second.stdout
    assert "built before" in second.stderr


def test_caller_in_another_mount_namespace_gets_a_udi_of_its_own(tiny_node: Node) -> None:
    script = (
        "mount -t tmpfs tmpfs /tmp; chmod 1777 /tmp; echo {0} > /tmp/mine; "
        "setpriv --reuid 5001 --regid 5001 --clear-groups /opt/shifter/bin/shifter --image=tiny:1 cat /tmp/mine"
    )
    for number in range(3):
        done = tiny_node.run(["unshare", "-m", "sh", "-c", script.format(number)])
        assert done.stdout == f"{number}\n", done.stderr
