"""A shell on the first node of a cluster, to look around: python -m tests.node [shared] [N]."""

import sys

from tests.node import CLONE_NEWNS, MS_PRIVATE, MS_REC, cluster, mount, unshare

if __name__ == "__main__":
    words = sys.argv[1:]
    unshare(CLONE_NEWNS)  # what the nodes share is mounted here first, and not to be seen by the host
    mount("", "/", flags=MS_REC | MS_PRIVATE)
    with cluster(int(next(filter(str.isdigit, words), "1")), shared="shared" in words) as nodes:
        for node in nodes:
            print(f"{node.name}: PID 1 is {node.pid} on the host, {nodes.addresses[node.name]}", file=sys.stderr)
        nodes[0].popen("exec setsid -c -w sh", stdin=None, stdout=None, stderr=None).wait()
