"""Clusters of virtual nodes: a network between them, what they share, and that nothing of it stays."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from tests.images import Tree
from tests.node import BUILD, PREFIX, Cluster, Leak, Node, NodeError, cluster, mountinfo, until, wait_for
from tests.node.watch import links, namespaces_held

PORT = 7000

# What a server says: whom it has heard of.
SERVER = f"""
import socket
with socket.create_server(("", {PORT})) as server:
    while True:
        peer, address = server.accept()
        with peer:
            peer.sendall(f"{{socket.gethostname()}} heard {{address[0]}} say ".encode() + peer.recv(64))
"""

CLIENT = f"""
import socket, sys
with socket.create_connection((sys.argv[1], {PORT}), timeout=float(sys.argv[2])) as peer:
    peer.sendall(b"hello")
    print(peer.makefile().read())
"""


@contextlib.contextmanager
def serving(*nodes: Node) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """A server of bob's on each of *nodes*, which accepts connections."""
    servers = {node.name: node.popen(["python3", "-c", SERVER], "bob") for node in nodes}
    try:
        for node in nodes:
            assert node.wait_port(PORT).pids == (servers[node.name].pid,)
        yield servers
    finally:
        for server in servers.values():
            server.kill()
            server.communicate()


def ask(node: Node, name: str, patience: float = 30) -> str:
    """What the server on node *name* answers to alice on *node*."""
    return node.run(["python3", "-c", CLIENT, name, str(patience)], "alice", check=True).stdout.strip()


def leftovers() -> dict[str, object]:
    """What a cluster could leave outside of its nodes, but for processes, which the fixtures watch."""
    return {
        "namespaces": namespaces_held(),
        "links": links(),
        "mounts": {mount.key for mount in mountinfo()},
        "files": {*BUILD.glob(f"nodes/{os.getpid()}-*")},
    }


def test_names_and_addresses(nodes: Cluster) -> None:
    assert [node.name for node in nodes] == ["node1", "node2", "node3"]
    assert len({*nodes.addresses.values()}) == 3
    assert all(ip_address(address) in ip_network("10.0.0.0/8") for address in nodes.addresses.values())
    for node in nodes:
        assert node.run("hostname; cat /etc/hostname").stdout.split() == [node.name] * 2
        interfaces = [line.split()[1:4] for line in node.run("ip -o addr").stdout.splitlines()]
        own = ["eth0", "inet", f"{nodes.addresses[node.name]}/24"]
        # No IPv6 between nodes: a name has one address, and nothing waits for neighbours to be discovered.
        assert [words for words in interfaces if words[0] != "lo"] == [own]
        assert ["lo", "inet", "127.0.0.1/8"] in interfaces


def test_every_node_resolves_every_name(nodes: Cluster) -> None:
    """By its own name service; its own name is the address that the others know, not one of lo."""
    for node in nodes:
        for name, address in nodes.addresses.items():
            assert node.run(["getent", "hosts", name], "alice").stdout.split() == [address, name]
        assert node.run("getent ahostsv4 localhost").stdout.split()[0] == "127.0.0.1"
        assert node.run("getent hosts node4").returncode == 2


def test_users_are_the_same_everywhere(nodes: Cluster) -> None:
    tables = {node.run("getent passwd; getent group; id alice; id bob", check=True).stdout for node in nodes}
    assert len(tables) == 1


def test_nodes_are_apart(nodes: Cluster) -> None:
    """All but what a cluster shares is one node's own."""
    for kind in ("mnt", "pid", "uts", "ipc", "net"):
        assert len({node.run(["readlink", f"/proc/self/ns/{kind}"], check=True).stdout for node in nodes}) == 3
    nodes[0].write("/tmp/x", "1")
    nodes[0].write("/etc/x", "1")
    nodes[0].write("/run/x", "1")
    for name in ("/tmp/x", "/etc/x", "/run/x"):
        assert not nodes[1].exists(name)
    process = nodes[0].popen(["sleep", "1000"])
    assert process.pid in {p.pid for p in nodes[0].processes()}
    assert process.pid not in {p.pid for p in nodes[1].processes()}
    assert "sleep 1000" not in nodes[1].run("ps -eo args").stdout


def test_home_is_shared(nodes: Cluster) -> None:
    """As on a parallel file system: one file, its owner and mode, and its locks are the same on all nodes."""
    nodes[0].run("echo from $(hostname) > file; chmod 600 file", "alice", check=True)
    assert [node.run("cat ~/file", "alice").stdout for node in nodes] == ["from node1\n"] * 3
    assert nodes[1].run("cat /home/alice/file", "bob").returncode != 0
    nodes[2].run("mv file moved", "alice", check=True)
    assert not nodes[0].exists("/home/alice/file")
    assert len({node.run("stat -c %d:%i ~/moved", "alice").stdout for node in nodes}) == 1
    holder = nodes[0].popen("flock moved sh -c 'echo locked; read line'", "alice", stdin=subprocess.PIPE)
    assert holder.stdout and holder.stdout.readline() == "locked\n"
    assert nodes[1].run("flock -n moved true", "alice").returncode == 1
    holder.communicate("\n")
    assert nodes[1].run("flock -n moved true", "alice").returncode == 0


def test_every_node_talks_to_every_node(nodes: Cluster) -> None:
    with serving(*nodes):
        for node in nodes:
            for name in nodes.addresses:
                assert ask(node, name) == f"{name} heard {nodes.addresses[node.name]} say hello"


def test_containers_talk_by_the_names_of_their_nodes(nodes: Cluster, image: Tree) -> None:
    """The image is in the shared store; a UDI is in its node's network and knows the names of the others."""
    nodes.add_image("docker:tiny:1", image)
    shifter = [f"{PREFIX}/bin/shifter", "--image=tiny:1"]
    # By here-documents: from a slow pipe nc has nothing to send before the other side has finished, which ends it.
    script = f"nc -l -p {PORT} <<END\n$(hostname)\nEND\nhostname"
    server = nodes[1].popen([*shifter, "sh", "-c", script], "alice", stdout=subprocess.PIPE)
    listener = nodes[1].wait_port(PORT)
    assert len(listener.pids) == 1
    assert os.readlink(f"/proc/{listener.pids[0]}/ns/mnt") != os.readlink(f"/proc/{nodes[1].pid}/ns/mnt")
    done = nodes[0].run(
        [*shifter, "sh", "-c", f"nc node2 {PORT} <<END\n$(hostname)\nEND\nhostname"], "alice", check=True
    )
    assert done.stdout.split() == ["node2", "node1"]
    said, err = server.communicate(timeout=30)
    assert (said.split(), err) == (["node1", "node2"], "")
    assert nodes[2].shifter("--image=tiny:1", "hostname", check=True).stdout == "node3\n"


def test_node_without_its_cable(nodes: Cluster) -> None:
    """Nobody reaches it, the others go on; with the cable back it is as before."""
    first, second, third = nodes
    with serving(second, third):
        nodes.network.plug(second, False)
        wait_for(lambda: "NO-CARRIER" in second.run("ip link show eth0").stdout)
        with pytest.raises(AssertionError, match=r"TimeoutError|No route to host"):
            ask(first, "node2", patience=0.2)
        with pytest.raises(AssertionError, match=r"TimeoutError|No route to host"):
            ask(second, "node3", patience=0.2)
        assert ask(first, "node3").startswith("node3 heard")
        assert ask(second, "node2").startswith("node2 heard")
        nodes.network.plug(second, True)
        assert ask(first, "node2").startswith("node2 heard")
        assert ask(second, "node3").startswith("node3 heard")


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_images_are_shared(image: Tree, disk: bool) -> None:
    """One file, mounted by each node for itself, and taken down by each; the loop devices are of both."""
    before = leftovers()
    with cluster(2, disk=disk) as nodes:
        ident = nodes.add_image("docker:tiny:1", image)
        nodes.conf(udiIdleTime=60)
        for node in nodes:
            assert node.exists(f"/images/{ident}.squashfs")
            assert node.shifter("--image=tiny:1", "hostname", check=True).stdout == f"{node.name}\n"
        assert len(nodes[0].loops()) == 2
        assert nodes[0].loops() == nodes[1].loops()
        nodes[0].shifterctl("gc", "--all", check=True)
        assert len(nodes[1].store_mounts()) == 2
        nodes.check_leaks()
        assert nodes[1].loops() == []
        nodes[1].shifter("--image=tiny:1", "true", check=True)
    assert leftovers() == before


def test_nothing_of_a_cluster_is_seen_outside_or_stays() -> None:
    before = leftovers()
    with cluster(2, shared=True, install=None) as nodes:
        during = leftovers()
        assert (during["links"], during["mounts"]) == (before["links"], before["mounts"])
        inside = {os.readlink(f"/proc/{node.pid}/ns/net") for node in nodes}
        held = namespaces_held()
    assert leftovers() == before
    assert len(inside) == 2 and not inside & held  # a node's ends with its processes, whatever this one does


def test_cable_of_a_node_goes_with_the_node() -> None:
    with cluster(3, install=None) as nodes:
        assert nodes.network.links() == {"lo", "nodes", "node1", "node2", "node3"}
        nodes[1].close()
        gone = {"lo", "nodes", "node1", "node3"}
        assert until(lambda: sorted(nodes.network.links() - gone), 10) == []
        assert nodes.network.links() == gone
        with serving(nodes[2]):
            assert ask(nodes[0], "node3").startswith("node3 heard")


def test_leaks_are_found_on_every_node() -> None:
    with cluster(2, install=None) as nodes:
        nodes.check_leaks(0.1)
        nodes[0].run("ip link add extra type veth peer name other", check=True)
        nodes[1].run("mkdir /x; mount -t tmpfs x /x; setsid sleep 77 >/dev/null 2>&1 &", check=True)
        with pytest.raises(Leak) as caught:
            nodes.check_leaks(0.1)
        message = str(caught.value)
        assert "node1: network interface: extra" in message and "node1: network interface: other" in message
        assert "node2: mount: ('/x', 'tmpfs'" in message and "node2: process: " in message and "sleep 77" in message


def test_failed_start_leaves_nothing() -> None:
    before = leftovers()
    with pytest.raises(NodeError, match="No such file"):
        cluster(2, install=Path("/no/such/installation"))
    with pytest.raises(ValueError, match="255 nodes"):
        cluster(255)
    assert leftovers() == before
