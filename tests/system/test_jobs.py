"""setupRoot and unsetupRoot: a job's UDI is there before the job, is its only one, and nothing of it is left behind."""

import json
import subprocess
import time

import pytest

from tests.images import Tree
from tests.node import PREFIX, Node
from tests.security.fuse import LOOKUP, UserFuse

SETUP, UNSETUP = f"{PREFIX}/sbin/setupRoot", f"{PREFIX}/sbin/unsetupRoot"


def setup(
    node: Node, *args: str, user: str = "alice", image: str = "tiny:1", **options: object
) -> subprocess.CompletedProcess[str]:
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


def udis(node: Node) -> list[str]:
    return [udi["key"] for udi in json.loads(node.shifterctl("ps", "--json").stdout)]


def test_the_same_again_changes_nothing(tiny_node: Node) -> None:
    for verdict in ("set up in", "was set up already", "was set up already"):
        done = setup(tiny_node, "--job", "5", "-V", "-v", "/tmp:/mnt")
        assert done.returncode == 0 and verdict in done.stdout, done
    namespace = works(tiny_node, "readlink", "/proc/self/ns/mnt")
    done = setup(tiny_node, "--job", "5", "-V", "-v", "/tmp:/mnt")
    assert works(tiny_node, "readlink", "/proc/self/ns/mnt") == namespace
    assert unsetup(tiny_node, "--job", "5").returncode == 0


@pytest.mark.parametrize("change", [["-v", "/tmp:/mnt"], ["--restart", "1"], ["-N", "node1/3"]])
def test_another_request_takes_the_old_one_down(tiny_node: Node, change: list[str]) -> None:
    assert setup(tiny_node, "--job", "5").returncode == 0
    sleeper = tiny_node.popen([f"{PREFIX}/bin/shifter", "sleep", "1000"], "alice")
    done = setup(tiny_node, "--job", "5", *change)
    assert done.returncode == 0
    assert "job 5 was set up before, for another request, user or restart: taken down first" in done.stderr
    assert sleeper.wait(10) != 0
    assert udis(tiny_node) == ["job.5"]
    assert unsetup(tiny_node, "--job", "5").returncode == 0


def test_unnamed_slot(tiny_node: Node) -> None:
    assert setup(tiny_node).returncode == 0
    assert works(tiny_node, "id", "-un") == "alice\n"
    assert setup(tiny_node).returncode == 0
    for done in (setup(tiny_node, user="bob"), setup(tiny_node, "-v", "/tmp:/mnt")):
        assert done.returncode == 1 and "unsetupRoot it first" in done.stderr
    assert setup(tiny_node, "--job", "8", user="bob").returncode == 0
    assert unsetup(tiny_node).returncode == 0
    assert udis(tiny_node) == ["job.8"]
    assert unsetup(tiny_node, "--job", "8").returncode == 0


def test_two_jobs_of_one_user(tiny_node: Node) -> None:
    for job in ("5", "6"):
        assert setup(tiny_node, "--job", job, "-N", f"node{job}/1").returncode == 0
    done = tiny_node.shifter("cat", "/var/hostsfile")
    assert done.returncode == 125 and "have a UDI here: say which one by SHIFTER_JOB_ID" in done.stderr
    for name in ("SLURM_JOB_ID", "SHIFTER_JOB_ID", "PBS_JOBID"):
        assert works(tiny_node, "cat", "/var/hostsfile", env={name: "6"}) == "node6\n"
    # Of a job without a UDI here, nothing is guessed.
    done = tiny_node.shifter("true", env={"SLURM_JOB_ID": "7"})
    assert done.returncode == 125
    assert unsetup(tiny_node, "--job", "5").returncode == 0
    assert works(tiny_node, "cat", "/var/hostsfile") == "node6\n"
    assert unsetup(tiny_node, "--job", "6").returncode == 0


def test_another_image_or_volume_in_a_job(tiny_node: Node, image: Tree) -> None:
    """A UDI of its own, which goes with the job."""
    tiny_node.add_image("docker:other:1", image, "VFS")
    assert setup(tiny_node, "--job", "5").returncode == 0
    done = tiny_node.shifter("-v", "--image=other:1", "true")
    assert done.returncode == 0 and "the UDI of job 5 is another: not the same image" in done.stderr
    done = tiny_node.shifter("-v", "--image=tiny:1", "--volume=/tmp:/mnt", "true")
    assert done.returncode == 0 and "not the same volume" in done.stderr
    assert len(udis(tiny_node)) == 3
    sleeper = tiny_node.popen([f"{PREFIX}/bin/shifter", "--image=other:1", "sleep", "1000"], "alice")
    tiny_node.shifter("--image=other:1", "true", check=True)
    assert unsetup(tiny_node, "--job", "5").returncode == 0
    assert sleeper.wait(10) == -9
    assert udis(tiny_node) == []


def test_job_is_never_reaped(tiny_node: Node) -> None:
    tiny_node.conf(udiIdleTime=1, udiMaxAge=1, udiMaxPerUser=1)
    assert setup(tiny_node, "--job", "5").returncode == 0
    for number in range(3):
        tiny_node.shifter("--image=tiny:1", f"--volume=/tmp:/mnt{number}", "true", check=True)
    time.sleep(2.1)
    tiny_node.shifterctl("gc", check=True)
    assert udis(tiny_node) == ["job.5"]
    assert unsetup(tiny_node, "--job", "5").returncode == 0


STUBBORN = {
    "ignores signals": "trap '' TERM INT HUP; while :; do sleep 1; done",
    "stopped": "kill -STOP $$; sleep 1000",
    "another namespace and session": "setsid unshare -Urm sh -c 'sleep 1000' & wait",
    "working directory in a volume": "cd /mnt; sleep 1000",
    "forks": "f() { sleep 1000 & sleep 1000 & sleep 1000 & (f2 &) ; }; f2() { while :; do (sleep 0.01 &); done; }; f; f2",
}


def test_zombies_are_not_left_of_a_job(tiny_node: Node) -> None:
    """A process that ended while it was looked at had made every zombie one of the job's processes, for ten seconds."""
    assert setup(tiny_node, "--job", "5", "--no-sshd").returncode == 0
    churn = "while :; do sh -c : & done"
    running = tiny_node.popen([f"{PREFIX}/bin/shifter", "sh", "-c", churn], "alice")
    zombie = tiny_node.popen(["sh", "-c", "kill -KILL $$"], "alice")  # nobody waits for it
    while not json.loads(tiny_node.shifterctl("ps", "--json").stdout)[0]["pids"]:
        time.sleep(0.02)
    done = unsetup(tiny_node, "--job", "5")
    assert (done.returncode, done.stderr) == (0, "")
    assert (running.wait(10), zombie.wait(10)) == (-9, -9)


@pytest.mark.parametrize("kind", STUBBORN)
def test_everything_ends_with_the_job(tiny_node: Node, kind: str) -> None:
    assert setup(tiny_node, "--job", "5", "-v", "/tmp:/mnt").returncode == 0
    running = tiny_node.popen([f"{PREFIX}/bin/shifter", "sh", "-c", STUBBORN[kind]], "alice")
    while not json.loads(tiny_node.shifterctl("ps", "--json").stdout)[0]["pids"]:
        time.sleep(0.02)
    time.sleep(0.1)
    done = unsetup(tiny_node, "--job", "5")
    assert (done.returncode, done.stderr) == (0, "")
    assert running.wait(10) == -9
    assert udis(tiny_node) == []


def test_who_holds_the_namespace_is_named(tiny_node: Node) -> None:
    assert setup(tiny_node, "--job", "5").returncode == 0
    held = tiny_node.popen("exec 7< /run/shifter/udi/5001/job.5/ns; echo ready; exec sleep 1000")
    assert held.stdout is not None and held.stdout.readline() == "ready\n"
    for _ in range(2):  # the second knows it, too
        done = unsetup(tiny_node, "--job", "5")
        assert done.returncode == 1
        assert "of root (it holds the namespace as descriptor 7)" in done.stderr
    held.kill()
    held.communicate()
    assert unsetup(tiny_node, "--job", "5").returncode == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-u", "alice", "docker", "missing:1"], "missing:1"),
        (["-u", "nobody-here", "docker", "tiny:1"], "does not know that account"),
        (["-u", "root", "docker", "tiny:1"], "uid 0 and gid 0 are refused"),
        (["-u", "alice", "-U", "5002", "docker", "tiny:1"], "user alice has uid 5001 on this node, not 5002"),
        (["docker", "tiny:1"], "whose job?"),
        (["-u", "alice", "weird", "tiny:1"], "image type 'weird'"),
        (["-u", "alice", "docker"], "the image is missing"),
        (["-u", "alice", "--job", "../x", "docker", "tiny:1"], "job id '../x'"),
        (["-u", "alice", "-N", "a b/0", "docker", "tiny:1"], "node 'b/0': NAME/TASKS"),
        (["-u", "alice", "-N", "a\";x", "docker", "tiny:1"], "is no host name"),
        (["-u", "alice", "-v", "/tmp:/etc", "docker", "tiny:1"], "belongs to the system"),
        (["-u", "alice", "-v", "/nowhere:/x", "docker", "tiny:1"], "volume /nowhere: No such file"),
        (["-u", "alice", "-m", "gpu", "docker", "tiny:1"], "none configured"),
    ],
)  # fmt: skip
def test_refused(tiny_node: Node, args: list[str], message: str) -> None:
    done = tiny_node.run([SETUP, *args])
    assert done.returncode != 0 and done.stdout == ""
    assert message in done.stderr and "Traceback" not in done.stderr
    assert udis(tiny_node) == []
    assert tiny_node.run("ls /run/shifter/jobs 2>/dev/null").stdout == ""


def test_command_line_of_older_prologs(tiny_node: Node) -> None:
    ident = tiny_node.run("readlink /images/tags/*", check=True).stdout.split("/")[-1].strip()
    done = tiny_node.run(
        [SETUP, "docker", "-U", "5001", "-G", "5001", ident, "-u", "alice", "-N", "n1/1 n2/2", "-m", "none"]
    )
    assert done.returncode == 0, done.stderr
    assert works(tiny_node, "cat", "/var/hostsfile") == "n1\nn2\nn2\n"
    assert tiny_node.run([UNSETUP, "whatever"]).returncode == 0


def test_only_root(tiny_node: Node) -> None:
    for program in (SETUP, UNSETUP):
        done = tiny_node.run([program, "docker", "tiny:1"], "alice")
        assert done.returncode == 1 and "only root" in done.stderr


def test_metadata_that_changed(node: Node, image: Tree) -> None:
    """The access list of the image counts for every launch of the job; any other change of its metadata does no harm."""
    ident = node.add_image("docker:closed:1", image, user_acl=[5001])
    assert setup(node, "--job", "5", image="closed:1").returncode == 0
    namespace = works(node, "readlink", "/proc/self/ns/mnt")
    node.write(f"/images/{ident}.meta", "FORMAT: squashfs\nUSERACL: 5001,5003\n")
    for args in ([], ["--image=closed:1"], ["--volume=/tmp:/mnt"]):
        assert (works(node, *args, "readlink", "/proc/self/ns/mnt") == namespace) is not bool(
            args and "volume" in args[0]
        )
    node.write(f"/images/{ident}.meta", "FORMAT: squashfs\nUSERACL: 5003\n")
    for args in ([], ["--image=closed:1"]):
        done = node.shifter(*args, "true")
        assert done.returncode == 125 and "its ACL names neither you" in done.stderr, done
    assert unsetup(node, "--job", "5").returncode == 0
    done = setup(node, "--job", "5", image="closed:1")
    assert done.returncode == 1


def test_where_nothing_is_shared(node: Node, image: Tree) -> None:
    """udiIdleTime=0 is about UDIs that are built on demand: a job's UDI is there all the same, and entered."""
    node.conf(udiIdleTime=0)
    node.add_image("docker:tiny:1", image)
    assert setup(node, "--job", "5").returncode == 0
    namespace = works(node, "readlink", "/proc/self/ns/mnt")
    assert works(node, "--image=tiny:1", "readlink", "/proc/self/ns/mnt") == namespace
    assert udis(node) == ["job.5"]
    assert unsetup(node, "--job", "5").returncode == 0


def test_wiped_while_a_job_runs(tiny_node: Node) -> None:
    """unsetupRoot ends what it can find; what was set up is gone with /run/shifter."""
    assert setup(tiny_node, "--job", "5").returncode == 0
    tiny_node.run("umount /run/shifter/udi/5001/job.5/ns /run/shifter/store; umount -l /run/shifter", check=True)
    assert unsetup(tiny_node, "--job", "5").returncode == 0
    assert "no image" in tiny_node.shifter("true").stderr


def test_ten_thousand_nodes(tiny_node: Node) -> None:
    """What a set-up was made of is remembered in a document that holds 64 KiB; the names alone are more."""
    names = [f"node{number:05}" for number in range(10_000)]
    tiny_node.write("/tmp/nodes", "".join(f"{name}/2\n" for name in names))
    for verdict in ("set up in", "was set up already"):
        done = setup(tiny_node, "--job", "5", "--no-sshd", "--nodes", "/tmp/nodes", "-V")
        assert (done.returncode, done.stderr) == (0, "") and verdict in done.stdout, done
    assert works(tiny_node, "cat", "/var/hostsfile").split() == [name for name in names for _ in range(2)]
    assert unsetup(tiny_node, "--job", "5").returncode == 0


def test_port_that_somebody_has(tiny_node: Node) -> None:
    """No sshd for that job, said so; the job runs."""
    script = "import socket, time; s = socket.create_server(('', 1204)); print('ready', flush=True); time.sleep(1000)"
    server = tiny_node.popen(["/usr/bin/python3", "-c", script], "bob")
    assert server.stdout is not None and server.stdout.readline() == "ready\n"
    done = setup(tiny_node, "--job", "5")
    assert done.returncode == 0 and done.stderr.startswith("setupRoot: no sshd: port 1204 is in use"), done
    assert works(tiny_node, "id", "-un") == "alice\n"
    assert unsetup(tiny_node, "--job", "5").returncode == 0
    server.kill()
    server.communicate()


def test_log_of_the_sshd(tiny_node: Node) -> None:
    """The user and root can read it; another user can't, and nobody can name another file by it."""
    assert setup(tiny_node, "--job", "5").returncode == 0
    assert works(tiny_node, "ssh", "localhost", "echo in") == "in\n"
    for user in ("alice", "root"):
        done = tiny_node.run([f"{PREFIX}/bin/shifterctl", "logs", "--job", "5"], user)
        assert done.returncode == 0 and "Accepted publickey for alice" in done.stdout, done
    done = tiny_node.run([f"{PREFIX}/bin/shifterctl", "logs", "--job", "5"], "bob")
    assert (done.returncode, done.stderr) == (1, "shifterctl: job 5: you have no sshd of that job on this node\n")
    for name in ("../5", "5/..", "", "/etc/shadow"):
        done = tiny_node.run([f"{PREFIX}/bin/shifter", "--udi-log", name], "alice")
        assert (done.returncode, done.stdout) == (125, "") and "no id of a job" in done.stderr, name
    done = tiny_node.run([f"{PREFIX}/bin/shifterctl", "logs"])
    assert done.returncode == 1 and done.stderr == "shifterctl: job _: it has no sshd on this node\n"
    assert unsetup(tiny_node, "--job", "5").returncode == 0


def test_log_of_the_sshd_is_bounded(tiny_node: Node) -> None:
    """Who connects in a loop fills a small file system of its own, and the sshd goes on."""
    assert setup(tiny_node, "--job", "5").returncode == 0
    tiny_node.path("/run/shifter/jobs/5/log/filler").write_bytes(bytes(250_000))
    for _ in range(60):
        assert works(tiny_node, "ssh", "localhost", "true") == ""
    assert tiny_node.path("/run/shifter/jobs/5/log/sshd").stat().st_size < 1 << 18
    assert unsetup(tiny_node, "--job", "5").returncode == 0


def test_limits_of_the_sshd(tiny_node: Node) -> None:
    tiny_node.conf(sshdLimits="nofile=123:456 core=0")
    assert setup(tiny_node, "--job", "5").returncode == 0
    assert works(tiny_node, "ssh", "localhost", "ulimit -Sn; ulimit -Hn; ulimit -Hc") == "123\n456\n0\n"
    assert unsetup(tiny_node, "--job", "5").returncode == 0


def test_limits_that_cannot_be_set(tiny_node: Node) -> None:
    tiny_node.conf(sshdLimits="nofile=2000000000")
    done = setup(tiny_node, "--job", "5")
    assert done.returncode == 1 and "sshdLimits: nofile=2000000000: " in done.stderr, done
    assert udis(tiny_node) == [] and not tiny_node.exists("/run/shifter/jobs/5")


SLOW = f"""
import sys
sys.path.insert(0, "{PREFIX}/libexec/shifter/python")
from shifter.cli import setup_root
from shifter.jobs import builder
builder.PATIENCE = 0.0
sys.exit(setup_root.main(sys.argv[1:]))
"""


def test_names_and_keys_that_take_longer_than_a_builder_waits(tiny_node: Node) -> None:
    """It is started before there is anything to ask it for; one that has waited for long is replaced."""
    done = tiny_node.run(["/usr/bin/python3", "-I", "-c", SLOW, "-u", "alice", "--job", "5", "docker", "tiny:1"])
    assert (done.returncode, done.stderr) == (0, "")
    assert works(tiny_node, "ssh", "localhost", "id", "-un") == "alice\n"
    assert not [process for process in tiny_node.processes() if "builder.pyc" in process.cmdline]
    assert unsetup(tiny_node, "--job", "5").returncode == 0


def test_home_that_cannot_be_read(tiny_node: Node) -> None:
    """No secret to derive keys from: the job runs without an sshd, and one line says what a site can do about it."""
    tiny_node.run("chown root: /home/alice && chmod 700 /home/alice", check=True)
    done = setup(tiny_node, "--job", "5")
    assert done.returncode == 0 and done.stderr.count("\n") == 1, done
    assert done.stderr.startswith("setupRoot: no sshd: ") and "sshSecretFile" in done.stderr
    assert works(tiny_node, "--workdir=/", "id", "-un") == "alice\n"
    assert tiny_node.listeners() == []
    assert unsetup(tiny_node, "--job", "5").returncode == 0
    tiny_node.run("chown alice: /home/alice", check=True)


def test_root_that_a_user_mounted_over_does_not_stop_unsetup(tiny_node: Node) -> None:
    """A FUSE file system that does not answer as the root of a process, above a tmpfs that is called as a UDI's is."""
    fuse = UserFuse({LOOKUP: 0})
    tiny_node.mkdir("/srv/trap")
    try:
        tiny_node.mount("udi", "/srv/trap", "tmpfs")
        tiny_node.mount("fuse", "/srv/trap", "fuse", 6, fuse.options(5001))
        entered = "import os, time; os.chroot('/srv/trap'); print('ready', flush=True); time.sleep(1000)"
        trapped = tiny_node.popen(["/usr/bin/python3", "-c", entered])
        assert trapped.stdout is not None and trapped.stdout.readline() == "ready\n"
        assert setup(tiny_node, "--job", "5", "--no-sshd").returncode == 0
        assert unsetup(tiny_node, "--job", "5").returncode == 0
        assert LOOKUP not in fuse.asked
        trapped.kill()
        trapped.communicate()
    finally:
        fuse.end()
