"""The sshd in every container of a job: `ssh node2` inside lands inside, for that user alone."""

import subprocess

from tests.images import Tree
from tests.node import PREFIX, Cluster, Node

SETUP, UNSETUP = f"{PREFIX}/sbin/setupRoot", f"{PREFIX}/sbin/unsetupRoot"
NODES = "node1/1 node2/1 node3/1"


def setup(node: Node, *args: str, user: str = "alice") -> subprocess.CompletedProcess[str]:
    done = node.run([SETUP, "-u", user, "-N", NODES, *args, "docker", "tiny:1"])
    assert (done.returncode, done.stderr) == (0, ""), done
    return done


def inside(node: Node, *command: str, user: str = "alice") -> str:
    done = node.shifter(*command, user=user)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def test_names_of_the_nodes_are_in_etc_hosts(nodes: Cluster, image: Tree) -> None:
    """Whatever name service the node has: inside there is only what stands in files, and DNS."""
    nodes.add_image("docker:tiny:1", image)
    here = nodes[0]
    setup(here, "--job", "17", "--no-sshd")
    lines = inside(here, "cat", "/etc/hosts").partition("# The nodes of the job.\n")[2].splitlines()
    assert lines == [f"{address} {name}" for name, address in nodes.addresses.items()]
    assert here.run([UNSETUP, "--job", "17"]).returncode == 0


def test_ssh_from_node_to_node(nodes: Cluster, image: Tree) -> None:
    nodes.add_image("docker:tiny:1", image)
    for node in nodes:
        setup(node, "--job", "17")
    for here in nodes:
        for there in nodes:
            assert inside(here, "ssh", there.name, "hostname; id -un; cat /var/hostsfile /usr/lib/hello.txt") == (
                f"{there.name}\nalice\nnode1\nnode2\nnode3\nhello from the image\n"
            )
    for node in nodes:
        done = node.run([UNSETUP, "--job", "17"])
        assert (done.returncode, done.stderr) == (0, ""), done
        assert node.listeners() == []
