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


def test_interface_of_the_sshd(nodes: Cluster, image: Tree) -> None:
    """Its addresses only; a node without it has no sshd, and says so."""
    nodes.conf(sshdInterface="eth0")
    nodes.add_image("docker:tiny:1", image)
    for node in nodes[:2]:
        setup(node, "--job", "17")
    assert [(one.address, one.port) for one in nodes[1].listeners()] == [(nodes.addresses["node2"], 1204)]
    assert inside(nodes[0], "ssh", "node2", "hostname") == "node2\n"
    nodes.conf(sshdInterface="ib0")
    done = nodes[2].run([SETUP, "-u", "alice", "--job", "17", "docker", "tiny:1"])
    assert (done.returncode, done.stderr) == (
        0,
        "setupRoot: no sshd: sshdInterface=ib0: this node has no such interface\n",
    )
    for node in nodes:
        assert node.run([UNSETUP, "--job", "17"]).returncode == 0


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


def test_ssh_in_the_slot_without_a_job(tiny_node: Node) -> None:
    setup_root = [SETUP, "-u", "alice", "-N", "node1/1", "docker", "tiny:1"]
    done = tiny_node.run(setup_root)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert inside(tiny_node, "ssh", "node1", "hostname; env | grep -c SHIFTER_JOB || :") == "node1\n0\n"
    assert tiny_node.run([UNSETUP]).returncode == 0
