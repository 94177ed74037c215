"""Several nodes that see each other: a network between them, and the file systems that a cluster's nodes share.

The network is a bridge in a network namespace of its own, to which no process belongs: this process holds it by a
descriptor. So it ends with this process, and with it all cables, whose other ends are `eth0` of the nodes. Nothing of
it is ever in the host's own network namespace.

What is shared, `/home` and `/images`, is a tmpfs each (`/images` a directory of the disk with `disk=True`), as a
parallel file system would be: made here, seen and kept alive by the nodes only.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

from tests.images import Tree
from tests.node.node import Node, loops_freed, scratch
from tests.node.syscalls import MNT_DETACH, MS_NODEV, MS_NOSUID, mount, network, umount
from tests.node.watch import Leak, until

if TYPE_CHECKING:
    from pyroute2 import IPRoute

BRIDGE = "nodes"
NETWORK = "10.128.0"
MOST = 254


class Network:
    """A bridge, and a cable from it to each node, which is called there as the node is."""

    def __init__(self) -> None:
        with contextlib.ExitStack() as stack:
            with network() as namespace:
                stack.callback(os.close, namespace)
                with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
                    Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
                self._route = stack.enter_context(_route())
            self._route.link("add", ifname=BRIDGE, kind="bridge")
            self._set(BRIDGE, state="up")
            self._end = stack.pop_all()

    def connect(self, node: Node, address: str) -> None:
        """Give *node* an `eth0` with *address* and the network at the other end."""
        for old in self._route.link_lookup(ifname=node.name):  # connections that a dead node could not end hold its end
            self._route.link("del", index=old)
        peer = {"ifname": "eth0", "net_ns_pid": node.pid}
        self._route.link("add", ifname=node.name, kind="veth", peer=peer)
        namespace = os.open(f"/proc/{node.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            with network(namespace), _route() as route:
                (index,) = route.link_lookup(ifname="eth0")
                route.addr("add", index=index, address=address, prefixlen=24)
                route.link("set", index=index, state="up")
        finally:
            os.close(namespace)
        (bridge,) = self._route.link_lookup(ifname=BRIDGE)
        self._set(node.name, state="up", master=bridge)

    def plug(self, node: Node, plugged: bool) -> None:
        """Put the cable of *node* in, or pull it out: its `eth0` keeps its address, and has no carrier."""
        self._set(node.name, state="up" if plugged else "down")

    def links(self) -> set[str]:
        """Names of the interfaces at the bridge's end."""
        return {link.get("ifname") for link in self._route.get_links()}

    def close(self) -> None:
        """Let the kernel take it down."""
        self._end.close()

    def _set(self, name: str, **what: Any) -> None:
        (index,) = self._route.link_lookup(ifname=name)
        self._route.link("set", index=index, **what)


class Cluster(Sequence[Node]):
    """Nodes node1, node2, ... with the same users; options as of Node, for all of them."""

    def __init__(self, count: int, shared: bool = False, *, disk: bool = False, **options: Any) -> None:
        if not 0 < count <= MOST:
            raise ValueError(f"a cluster of {count} nodes: 1 to {MOST} have addresses in {NETWORK}.0/24")
        self.addresses = {f"node{n}": f"{NETWORK}.{n}" for n in range(1, count + 1)}
        self._nodes: list[Node] = []
        self._network: Network | None = None
        self._scratch = scratch()
        try:
            self._network = Network()
            with _shared(self._scratch, disk) as (home, images):
                for name in self.addresses:
                    own: dict[str, Any] = {"name": name, "home": home, "images": images, "hosts": self.addresses}
                    self._nodes.append(Node(shared, **own, **options))
            for node in self._nodes:
                self._connect(node)
            self._links = self._network.links()
        except BaseException:
            self.close()
            raise

    @overload
    def __getitem__(self, index: int) -> Node: ...
    @overload
    def __getitem__(self, index: slice) -> list[Node]: ...
    def __getitem__(self, index: int | slice) -> Node | list[Node]:
        return self._nodes[index]

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def network(self) -> Network:
        """What connects the nodes."""
        assert self._network is not None, "the cluster is closed"
        return self._network

    def add_image(self, tag: str, tree: Tree, fmt: str = "squashfs", **options: Any) -> str:
        """Put *tree* into the store that the nodes share (`Node.add_image`)."""
        return self._nodes[0].add_image(tag, tree, fmt, **options)

    def conf(self, text: str | None = None, **settings: Any) -> None:
        """Write the same udiRoot.conf on every node (`Node.conf`)."""
        for node in self._nodes:
            node.conf(text, **settings)

    def boot(self, node: Node) -> None:
        """Start *node* again after its `stop`, which is a power cut."""
        node.boot(next(other.pid for other in self._nodes if other.running))
        self._connect(node)

    def _connect(self, node: Node) -> None:
        self.network.connect(node, self.addresses[node.name])
        node.remember()

    def check_leaks(self, timeout: float = 5) -> None:
        """As Node's, of all nodes and of the network; of all at once, since they share the images' loop devices."""
        said = "".join(f"\n{node.name}: {node.tidy()}" for node in self._nodes)

        def left() -> list[str]:
            found = [f"{node.name}: {what}" for node in self._nodes for what in node.left()]
            return found + [f"network: {name}" for name in sorted(self._links ^ self.network.links())]

        if found := until(left, timeout):
            raise Leak("left behind:\n  " + "\n  ".join(found) + said)

    def close(self) -> None:
        """End every process of the nodes, and the network; return when the kernel has freed their loop devices."""
        try:
            with loops_freed(self._nodes), contextlib.ExitStack() as stack:
                for node in self._nodes:
                    stack.callback(node.stop)
        finally:
            if self._network:
                self._network.close()
                self._network = None
            shutil.rmtree(self._scratch, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def cluster(count: int, shared: bool = False, **options: Any) -> Cluster:
    """A cluster to use in a `with` statement."""
    return Cluster(count, shared, **options)


@contextlib.contextmanager
def _shared(base: Path, disk: bool) -> Iterator[tuple[Path, Path]]:
    """The directories for /home and /images; file systems of their own only until the nodes have them."""
    with contextlib.ExitStack() as stack:
        for name in ("home", "images"):
            (base / name).mkdir(mode=0o755)
            if name == "home" or not disk:
                mount(name, str(base / name), "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
                stack.callback(umount, str(base / name), MNT_DETACH)
        yield base / "home", base / "images"


def _route() -> "IPRoute":
    """A netlink socket of the network namespace that this thread is in."""
    from pyroute2 import IPRoute  # half a second, which only tests of clusters shall pay

    return IPRoute()
