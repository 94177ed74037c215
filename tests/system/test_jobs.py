"""setupRoot and unsetupRoot: a job's UDI is there before the job, is its only one, and nothing of it is left behind."""

import json
import subprocess
import time

import pytest

from tests.node import PREFIX, Node

SETUP, UNSETUP = f"{PREFIX}/sbin/setupRoot", f"{PREFIX}/sbin/unsetupRoot"


def setup(node: Node, *args: str, user: str = "alice", image: str = "tiny:1", **options: object) -> subprocess.CompletedProcess[str]:
    return node.run([SETUP, "-u", user, *args, "docker", image], **options)  # type: ignore[arg-type]


def unsetup(node: Node, *args: str) -> subprocess.CompletedProcess[str]:
    return node.run([UNSETUP, *args])


def works(node: Node, *args: str, **options: object) -> str:
    done = node.shifter(*args, **options)  # type: ignore[arg-type]
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def test_job_from_beginning_to_end(tiny_node: Node) -> None:
    done = setup(tiny_node, "--job", "17", "-N", "node1/2 node2/1", "-V")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("job 17: docker:tiny:1 for alice set up in ")
    namespace = works(tiny_node, "readlink", "/proc/self/ns/mnt")
    assert works(tiny_node, "--image=tiny:1", "readlink", "/proc/self/ns/mnt") == namespace
    assert works(tiny_node, "cat", "/var/hostsfile") == "node1\nnode1\nnode2\n"
    assert works(tiny_node, "id", "-un") == "alice\n"
    (udi,) = json.loads(tiny_node.shifterctl("ps", "--json").stdout)
    assert udi["key"] == "job.17"
    sleeper = tiny_node.popen([f"{PREFIX}/bin/shifter", "sleep", "1000"], "alice")
    while not json.loads(tiny_node.shifterctl("ps", "--json").stdout)[0]["pids"]:
        time.sleep(0.05)
    assert unsetup(tiny_node, "--job", "17").returncode == 0
    assert sleeper.wait(10) == -9
    assert json.loads(tiny_node.shifterctl("ps", "--json").stdout) == []
    assert not tiny_node.exists("/run/shifter/jobs/17")
    assert "no image" in tiny_node.shifter("true").stderr
    assert unsetup(tiny_node, "--job", "17").returncode == 0
