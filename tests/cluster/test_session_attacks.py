"""Who gets into a session, whom the client believes, and what the sshd of a job inherits: with real jobs on real nodes.

Keys, certificates and configuration files by themselves are attacked in tests/security/test_sshd_*.py.
"""

import contextlib
import os
import resource
import signal
import subprocess
from collections.abc import Iterator

import pytest

from tests.cluster.job import SETUP, UNSETUP, Job
from tests.images import Tree
from tests.node import PREFIX, Cluster, Node, cluster

ETC = "/opt/udiImage/etc"
REFUSED = "Permission denied (publickey)."
NOT_BELIEVED = "Host key verification failed."
BLIND = (
    "-F",
    "/dev/null",
    "-o",
    "StrictHostKeyChecking=no",
    "-o",
    "UserKnownHostsFile=/dev/null",
    "-o",
    "LogLevel=ERROR",
)
"""Options of somebody who wants to get in whatever answers."""
SERVER = "AllowUsers *\nPidFile none\nUsePAM no\nAuthorizedKeysFile /home/bob/fake/any\nStrictModes no\n"


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """Three nodes with private propagation only: nothing of what is tested here depends on it."""
    with cluster(3) as made:
        yield made
        made.check_leaks()


def real_ssh(node: Node, user: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """The node's own ssh, outside of every container."""
    return node.run(["/usr/bin/ssh", *BLIND, "-o", "BatchMode=yes", *words], user)


def test_nobody_but_the_user_gets_in(nodes: Cluster, image: Tree) -> None:
    """Not bob with every key that he can read, not root's name with the right key, not the key of another job of alice's."""
    nodes.add_image("docker:tiny:1", image)
    nodes.conf(sshdPort="1204-1299")
    there = nodes[1].name
    with (
        Job(nodes, "tiny:1", ident="17") as job,
        Job(nodes, "tiny:1", ident="18") as other,
        Job(nodes, "tiny:1", ident="19", user="bob") as bobs,
    ):
        assert job.ssh(there, "id -un; hostname") == f"alice\n{there}\n"
        port = str(1204 + 17 % 96)
        key = job.sh(f"cat {ETC}/id_ed25519")
        nodes[0].write("/home/bob/alice.pub", job.sh(f"cat {ETC}/id_ed25519.pub {ETC}/user_auth_keys"), 0o600, "bob")
        nodes[0].write("/home/alice/other", other.sh(f"cat {ETC}/id_ed25519"), 0o600, "alice")
        nodes[0].write("/home/alice/own", key, 0o600, "alice")
        # bob's own key of his own job, and alice's public one as if it were private.
        for file in (f"{ETC}/id_ed25519", "/home/bob/alice.pub"):
            for name in ("alice", "bob", "root"):
                words = (*BLIND, "-i", file, "-p", port, f"{name}@{there}", "id")
                done = bobs.run("/opt/udiImage/libexec/ssh.real", *words, check=False)
                assert done.stdout == "" and REFUSED in done.stderr, (file, name, done)
        # What of alice's he reaches on the node: no file of the job, and nothing through her processes.
        sshd = nodes[0].run("pgrep -u alice -o sshd", check=True).stdout.strip()
        for path in (
            "/run/shifter",
            f"/proc/{sshd}/root/",
            f"/proc/{sshd}/environ",
            f"/proc/{sshd}/fd",
            f"/proc/{sshd}/ns/mnt",
        ):
            done = nodes[0].run(f"ls {path}/ || cat {path}", "bob")
            assert done.stdout == "" and "Permission denied" in done.stderr, (path, done)
        # alice's other job; her own key under other names; the right key with the right name, from outside: hers.
        assert REFUSED in real_ssh(nodes[0], "alice", "-i", "other", "-p", port, there, "id").stderr
        for name in ("root", "bob"):
            assert REFUSED in real_ssh(nodes[0], "alice", "-i", "own", "-p", port, f"{name}@{there}", "id").stderr
        assert real_ssh(nodes[0], "alice", "-i", "own", "-p", port, there, "id -un").stdout == "alice\n"
        nodes[0].run("rm /home/alice/o* /home/bob/alice.pub", check=True)


def fake_sshd(node: Node, address: str) -> "subprocess.Popen[str]":
    """An sshd of bob's on the port of jobs, with a host certificate for every name by an authority of his own."""
    node.mkdir("/home/bob/fake", owner="bob")
    node.run(
        "cd fake; rm -f *; for k in ca host; do ssh-keygen -q -t ed25519 -N '' -f $k; done; cp host.pub any;"
        "ssh-keygen -q -s ca -I node2 -h -n node1,node2,10.128.0.2 host.pub",
        "bob",
        check=True,
    )
    node.write("/home/bob/fake/config", SERVER, owner="bob")
    options = [
        "-o",
        "HostKey=/home/bob/fake/host",
        "-o",
        "HostCertificate=/home/bob/fake/host-cert.pub",
        "-o",
        f"ListenAddress={address}",
    ]
    # By the name of the right one.
    words = ["bash", "-c", 'exec -a "sshd: /opt/udiImage/sbin/sshd [listener]" /usr/sbin/sshd "$@"', "x"]
    fake = node.popen([*words, "-D", "-e", "-r", "-p", "1204", "-f", "/home/bob/fake/config", *options], "bob")
    node.wait_port(1204)
    return fake


def test_port_that_somebody_took_before(nodes: Cluster, image: Tree) -> None:
    """No sshd there, and that is said; the client does not take bob's for it; unsetupRoot leaves it alone."""
    nodes.add_image("docker:tiny:1", image)
    for address in ("127.0.0.1", "10.128.0.2"):
        fake = fake_sshd(nodes[1], address)
        with Job([nodes[0]], "tiny:1", names="node1/1 node2/1") as job:
            done = nodes[1].run([SETUP, "-u", "alice", "-N", "node1/1 node2/1", "--job", "17", "docker", "tiny:1"])
            assert "port 1204 is in use" in done.stderr
            if address != "127.0.0.1":
                done = job.run("ssh", "node2", "id", check=False)
                assert done.stdout == "" and NOT_BELIEVED in done.stderr, done
            assert nodes[1].run([UNSETUP, "--job", "17"]).returncode == 0
        assert fake.poll() is None
        fake.kill()
        fake.wait()


def test_port_that_somebody_takes_when_the_sshd_is_gone(nodes: Cluster, image: Tree) -> None:
    """bob's own, or that of a later run of the same job on that node: neither is what this run trusts."""
    nodes.add_image("docker:tiny:1", image)
    with Job(nodes, "tiny:1") as job:
        assert job.ssh("node2", "hostname") == "node2\n"
        nodes[1].run("pkill -o sshd", "alice", check=True)
        fake = fake_sshd(nodes[1], "0.0.0.0")
        done = job.run("ssh", "node2", "id", check=False)
        assert done.stdout == "" and NOT_BELIEVED in done.stderr
        assert job.ssh("node3", "hostname") == "node3\n"
        fake.kill()
        fake.wait()
        names = "node1/1 node2/1 node3/1"
        words = [SETUP, "-u", "alice", "-N", names, "--job", "17", "--restart", "1", "docker", "tiny:1"]
        nodes[1].run(words, check=True)
        done = job.run("ssh", "node2", "id", check=False)
        assert done.stdout == "" and NOT_BELIEVED in done.stderr
        done = job.run("ssh", "node1", "id", on=1, check=False)
        assert done.stdout == "" and NOT_BELIEVED in done.stderr


def test_sshd_inherits_only_limits_of_the_prolog(tiny_node: Node) -> None:
    """Not its signals, mask, umask, environment, descriptors, nor that it is spared when memory runs out."""

    def prolog() -> None:
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR2, signal.SIGRTMIN])
        with contextlib.suppress(PermissionError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("-900")  # where root may: some machines' root has no CAP_SYS_RESOURCE
        resource.setrlimit(resource.RLIMIT_NOFILE, (700, 800))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    words = [SETUP, "-u", "alice", "-N", "node1/1", "--job", "17", "docker", "tiny:1"]
    env = {"LD_PRELOAD": "", "SLURM_JOB_ID": "99", "SHIFTER_JOB_ID": "98", "PATH": "/usr/bin:/bin", "SECRET": "prolog"}
    secret = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(secret, True)
    done = tiny_node.run(words, prepare=prolog, umask=0o077, env=env, cwd="/etc", pass_fds=(secret,))
    os.close(secret)
    assert (done.returncode, done.stderr) == (0, "")
    script = "umask; ulimit -n; ulimit -Hn; ulimit -c; cat /proc/self/oom_score_adj;"
    script += "grep -E 'Sig(Blk|Ign)' /proc/self/status; ls /proc/self/fd; env"
    done = tiny_node.shifter("ssh", "node1", script)
    *lines, rest = done.stdout.split("\n", 7)
    ignored = int(lines.pop().removeprefix("SigIgn:\t"), 16)
    assert lines == ["0022", "700", "800", "0", "0", f"SigBlk:\t{0:016x}"]
    # 32 and 33 are glibc's own, which lets nobody change them; its posix_spawn(3), by which make starts this test, ignores 32.
    assert ignored & ~(1 << 31 | 1 << 32) == 0
    assert rest.startswith("0\n1\n2\n3\n") and not any(
        word in rest for word in ("prolog", "SLURM", "SHIFTER_JOB", "LD_PRELOAD")
    )
    sshd = tiny_node.run("pgrep -o sshd", check=True).stdout.strip()
    assert tiny_node.run(f"cat /proc/{sshd}/environ", check=True).stdout.split("\0")[-2].startswith("PATH=")
    assert not tiny_node.run(f"ls -l /proc/{sshd}/fd | grep passwd").stdout
    assert tiny_node.run([UNSETUP, "--job", "17"]).returncode == 0


def test_why_the_door_could_not_start_the_sshd_is_said(tiny_node: Node) -> None:
    words = ["setpriv", "--no-new-privs", SETUP, "-u", "alice", "-N", "node1/1", "--job", "17", "docker", "tiny:1"]
    done = tiny_node.run(words)
    assert "no privilege: no_new_privs is set for this process" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert tiny_node.run([UNSETUP, "--job", "17"]).returncode == 0


STOPPER = """
import os, signal, time
while not os.path.exists("/tmp/go"):
    time.sleep(0.001)
while True:
    try:
        os.kill(-1, signal.SIGSTOP)
    except ProcessLookupError:
        pass
"""
IMPATIENT = f"""
import sys, time
sys.path.insert(0, "{PREFIX}/libexec/shifter/python")
from shifter.cli import setup_root
from shifter.sshd import daemon
daemon.TIME_LIMIT = 1.0
enter, start = daemon._enter, daemon.Sshd.start
daemon._enter = lambda *account: (enter(*account), time.sleep(0.2))
daemon.Sshd.start = lambda *job: (open("/tmp/go", "w").close(), start(*job))
sys.exit(setup_root.main(sys.argv[1:]))
"""


def test_user_who_stops_all_processes_of_theirs_holds_up_no_prolog(tiny_node: Node) -> None:
    """Which would end in a node that is taken out of service. Nothing stopped is left, either.

    It begins when the sshd is started; a child that is the user's, and has not executed the door yet, is given more time,
    so that it is stopped for sure.
    """
    stopper = tiny_node.popen(["/usr/bin/python3", "-I", "-c", STOPPER], "alice")
    try:
        words = ["-u", "alice", "-N", "node1/1", "--job", "17", "docker", "tiny:1"]
        done = tiny_node.run(["/usr/bin/python3", "-I", "-c", IMPATIENT, *words], timeout=20)
        assert "sshd" in done.stderr and done.stderr.count("\n") == 1, done
    finally:
        stopper.kill()
        stopper.wait()
        tiny_node.run("rm -f /tmp/go", check=True)
    assert tiny_node.run([UNSETUP, "--job", "17"]).returncode == 0


SMALL_ORDER = """
import os, socket, struct, sys

def packet(sock, payload):
    padding = 8 - (len(payload) + 5) % 8 + 8
    sock.sendall(struct.pack(">IB", len(payload) + padding + 1, padding) + payload + bytes(padding))

def payload(file):
    length, padding = struct.unpack(">IB", file.read(5))
    return file.read(length - 1)[: length - 1 - padding]

with socket.create_connection(("127.0.0.1", 1204)) as sock, sock.makefile("rb") as file:
    sock.sendall(b"SSH-2.0-attacker\\r\\n")
    file.readline()
    kexinit = payload(file)
    packet(sock, kexinit)
    packet(sock, bytes([30]) + struct.pack(">I", 32) + bytes.fromhex(sys.argv[1]))
    answer = payload(file) if file.peek(1) else b""
    print(answer[0] if answer else "closed")
"""
POINTS = (
    "00" * 32,
    "01" + "00" * 31,
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
)
SSH_MSG_KEX_ECDH_REPLY = 31


def test_key_exchange_with_a_point_of_small_order(tiny_node: Node) -> None:
    """With one the secret would be known to everybody (RFC 7748, section 6.1): refused, whosever code computes it."""
    words = [SETUP, "-u", "alice", "-N", "node1/1", "--job", "17", "docker", "tiny:1"]
    assert tiny_node.run(words).returncode == 0
    for point in POINTS:
        said = tiny_node.run(["/usr/bin/python3", "-I", "-c", SMALL_ORDER, point], "bob", check=True).stdout
        assert said == "closed\n"
    log = tiny_node.shifterctl("logs", "--job", "17").stdout
    assert log.count("invalid elliptic curve value") == len(POINTS)
    honest = f"09{'00' * 31}"
    said = tiny_node.run(["/usr/bin/python3", "-I", "-c", SMALL_ORDER, honest], "bob", check=True).stdout
    assert said == f"{SSH_MSG_KEX_ECDH_REPLY}\n"
    assert tiny_node.run([UNSETUP, "--job", "17"]).returncode == 0
