"""Virtual nodes: machines of a cluster, made of namespaces, up in some tens of milliseconds, gone without a trace.

A node has its own mount, PID, UTS, IPC and network namespace and a PID 1 of its own. Its root is a tmpfs: the host's
`/usr` (and what links to it) read-only, copies-on-write of the host's `/etc` and `/var`, and everything else its own:
`/run`, `/tmp`, `/var/tmp`, `/home`, `/root`, `/images` (the image store), `/opt/shifter` (the staged installation).

    with Node() as node:
        node.add_image("docker:tiny:1", tiny)
        assert node.shifter("--image=tiny:1", "/bin/true").returncode == 0

Several of them are a cluster: they share `/home` and `/images`, and see each other by name over a network.

    with cluster(3) as nodes:
        nodes.add_image("docker:tiny:1", tiny)
        assert nodes[0].run(["ping", "-c1", "node2"]).returncode == 0

| module     | what                                                                       |
|------------|----------------------------------------------------------------------------|
| `syscalls` | the few system calls that Python does not have                             |
| `root`     | users, and the root file system of a node                                  |
| `machine`  | namespaces: start, end, run something in them                              |
| `files`    | a node's files, configuration, images                                      |
| `watch`    | mounts, processes, loop devices, sockets; waiting                          |
| `node`     | all of that together, and what is left behind                              |
| `terminal` | a pseudo-terminal of a node                                                |
| `cluster`  | several nodes, their network and what they share                           |

`python -m tests.node [shared] [N]` is a shell on a node, to look around.
"""

from tests.node.cluster import Cluster, cluster
from tests.node.files import normal_tag
from tests.node.machine import NodeError
from tests.node.node import Node
from tests.node.root import BUILD, CONF, DEFAULT_CONF, IMAGES, PREFIX, REPO, STAGE, USERS, User
from tests.node.syscalls import (
    CLONE_NEWNS,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_REC,
    MS_REMOUNT,
    NS_GET_MNTNS_ID,
    PR_SET_CHILD_SUBREAPER,
    bind,
    check,
    libc,
    mount,
    network,
    prctl,
    unshare,
)
from tests.node.terminal import Terminal
from tests.node.watch import Leak, Listener, Loop, Mount, Process, loops, mountinfo, until, wait_for

__all__ = [
    "BUILD", "CLONE_NEWNS", "CONF", "DEFAULT_CONF", "IMAGES", "MS_BIND", "MS_NODEV", "MS_NOEXEC", "MS_NOSUID",
    "MS_PRIVATE", "MS_REC", "MS_REMOUNT", "NS_GET_MNTNS_ID", "PREFIX", "PR_SET_CHILD_SUBREAPER", "REPO", "STAGE",
    "USERS", "Cluster", "Leak", "Listener", "Loop", "Mount", "Node", "NodeError", "Process", "Terminal", "User", "bind", "check",
    "cluster", "libc", "loops", "mount", "mountinfo", "network", "normal_tag", "prctl", "unshare", "until", "wait_for",
]  # fmt: skip
