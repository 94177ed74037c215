"""The cgroup of a job's sshd: all that its sessions start is in it, ends with it, and it is gone afterwards."""

from pathlib import Path

import pytest

from tests.node import PREFIX, Node
from tests.system.test_jobs import setup, unsetup, works

HIERARCHIES = {
    "v2": ("true", "true"),
    "freezer of v1": ("umount /sys/fs/cgroup/unified", "mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified"),
    "none": ("mount -t tmpfs tmpfs /sys/fs/cgroup", "umount /sys/fs/cgroup"),
}
"""What takes the others away on a node that has both, and what gives them back."""


@pytest.mark.parametrize("hierarchy", HIERARCHIES)
def test_sessions_are_in_a_cgroup_that_ends(tiny_node: Node, hierarchy: str) -> None:
    tiny_node.run(HIERARCHIES[hierarchy][0], check=True)
    done = setup(tiny_node, "--job", "5")
    assert (done.returncode, done.stderr) == (0, "")
    here = Path(tiny_node.path("/run/shifter/jobs/5/cgroup").read_text())
    pid = tiny_node.path("/run/shifter/jobs/5/sshd").read_text().split()[0]
    assert ("/shifter/job.5." in tiny_node.run(f"cat /proc/{pid}/cgroup").stdout) is (hierarchy != "none")
    session = works(tiny_node, "ssh", "localhost", "cat /proc/self/cgroup")
    assert ("/shifter/job.5." in session) is (hierarchy != "none")
    bomb = "f() { while :; do (sleep 0.01 &); done; }; setsid sh -c 'trap : TERM; sleep 1000' & f & f & f"
    running = tiny_node.popen([f"{PREFIX}/bin/shifter", "ssh", "localhost", bomb], "alice")
    while "sleep" not in works(tiny_node, "ps"):
        pass
    done = unsetup(tiny_node, "--job", "5")
    assert (done.returncode, done.stderr) == (0, "")
    assert running.wait(10) != 0
    assert not here.exists()
    tiny_node.run(HIERARCHIES[hierarchy][1], check=True)


def test_cgroup_of_a_node_that_lost_its_state(tiny_node: Node) -> None:
    """By the processes in it, when /run/shifter was wiped; one of another job's is left alone."""
    for ident, port in (("5", 1204), ("5.1", 1205)):
        tiny_node.conf(sshdPort=port)
        assert setup(tiny_node, "--job", ident).stderr == ""
    of_first, of_second = (Path(tiny_node.path(f"/run/shifter/jobs/{n}/cgroup").read_text()) for n in ("5", "5.1"))
    tiny_node.run("umount /run/shifter/udi/5001/job.*/ns /run/shifter/store; umount -l /run/shifter", check=True)
    assert unsetup(tiny_node, "--job", "5").returncode == 0
    assert not of_first.exists() and of_second.exists()
    assert unsetup(tiny_node, "--job", "5.1").returncode == 0
    assert not of_second.exists()
