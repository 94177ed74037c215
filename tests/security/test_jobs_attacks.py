"""setupRoot and unsetupRoot against a user who is at work on the node meanwhile, and against a node that fails."""

import contextlib
import json
import os
import random
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shifter.errors import UsageError
from shifter.jobs.job import parse_nodes
from tests.images import Tree
from tests.node import PREFIX, Node, wait_for

SETUP, UNSETUP, DOOR = f"{PREFIX}/sbin/setupRoot", f"{PREFIX}/sbin/unsetupRoot", f"{PREFIX}/bin/shifter"
PORT = 1204
Done = subprocess.CompletedProcess[str]


def setup(node: Node, *args: str, image: str = "tiny:1") -> Done:
    return node.run([SETUP, "-u", "alice", "--job", "5", *args, "docker", image])


def unsetup(node: Node) -> None:
    """It succeeds, says nothing, and takes a time that an epilog has."""
    done = node.run([UNSETUP, "--job", "5"], timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def nothing_left(node: Node) -> None:
    """No process, pin, record, file or log of the job."""
    assert [process for process in node.processes() if process.uid == 5001] == []
    assert json.loads(node.shifterctl("ps", "--json").stdout) == []
    assert node.run("ls /run/shifter/jobs").stdout == ""
    assert not [mount for mount in node.mounts() if mount.target.startswith(("/run/shifter/jobs", "/run/shifter/udi"))]


def login(node: Node, name: str = "node1") -> str:
    """What `hostname` says over ssh, from inside of the job's UDI."""
    return node.shifter("/opt/udiImage/bin/ssh", name, "hostname").stdout


# --- the user's home -------------------------------------------------------------------------------------------------

TRAPS = {
    "link to root's": "ln -s /root .udiRoot",
    "link to bob's": "ln -s /home/bob .udiRoot",
    "FIFO": "mkfifo .udiRoot",
    "secret of root's": "mkdir .udiRoot; ln -s /root/secret .udiRoot/secret",
    "secret that never ends": "mkdir .udiRoot; ln -s /dev/zero .udiRoot/secret",
    "secret that never comes": "mkdir .udiRoot; mkfifo -m 600 .udiRoot/secret",
    "key that never ends": "mkdir .udiRoot; ln -s /dev/zero .udiRoot/id_rsa.key.pub",
    "key that never comes": "mkdir .udiRoot; mkfifo .udiRoot/id_rsa.key.pub",
    "key that is a directory": "mkdir -p .udiRoot/id_rsa.key.pub",
}


def state_of_others(node: Node) -> str:
    return node.run(
        "stat -c '%n %a %u %g %s %Y %Z' /root /root/secret /home/bob; ls -A /root /home/bob; cat /root/secret"
    ).stdout


def test_home_full_of_traps(tiny_node: Node) -> None:
    """The job runs; without a secret it has no sshd, and one line says why. Nothing of others is read or written."""
    tiny_node.write("/root/secret", "ab" * 32 + "\n", 0o600)
    before = state_of_others(tiny_node)
    for kind, script in TRAPS.items():
        tiny_node.run(f"cd; rm -rf .udiRoot; {script}", "alice", check=True)
        done = setup(tiny_node)
        assert done.returncode == 0, (kind, done)
        assert len(done.stderr.splitlines()) == 1 and "no sshd: " in done.stderr and ".udiRoot" in done.stderr, (
            kind,
            done,
        )
        assert tiny_node.shifter("id", "-un").stdout == "alice\n"
        unsetup(tiny_node)
    assert state_of_others(tiny_node) == before


SWAP = """
cd
mkdir -p good && chmod 700 good
i=0
while :; do
    for kind in 'ln -s /root .udiRoot' 'ln -s good .udiRoot' 'mkfifo .udiRoot' 'mkdir -m 700 .udiRoot' \
                'mkdir .udiRoot; ln -s /root/secret .udiRoot/secret' 'cp -r good .udiRoot' 'ln -s /dev/zero .udiRoot'; do
        mv -T .udiRoot old.$i 2>/dev/null; eval "$kind"; rm -rf old.$i; i=$((i + 1))
    done 2>/dev/null
done
"""


@pytest.mark.soak
def test_home_that_changes_while_it_is_read(tiny_node: Node, counts: dict[str, int]) -> None:
    """Whatever it is at each moment: an sshd with the user's own secret, or none and one line; never anything of others."""
    tiny_node.write("/root/secret", "ab" * 32 + "\n", 0o600)
    before = state_of_others(tiny_node)
    swapper = tiny_node.popen(SWAP, "alice")
    for _ in range(counts["set-ups while a home changes"]):
        done = setup(tiny_node)
        assert done.returncode == 0, done
        said = done.stderr.splitlines()
        assert len(said) <= 1 and all("no sshd: " in line for line in said), done
        assert login(tiny_node) == ("" if said else "node1\n")
        unsetup_but(tiny_node, swapper.pid)
    os.killpg(swapper.pid, signal.SIGKILL)
    swapper.communicate()
    assert state_of_others(tiny_node) == before


def unsetup_but(node: Node, outside: int) -> None:
    """unsetupRoot, while a process of the same user runs on the node, and goes on."""
    unsetup(node)
    os.kill(outside, 0)


# --- the image -------------------------------------------------------------------------------------------------------

PLACES = ("opt/udiImage", "var/hostsfile", "var/empty", "usr/bin/ssh", "usr/bin/scp", "run", "etc/hosts", "etc/ssh")

KINDS: dict[str, Callable[[Path], object]] = {
    "links out": lambda path: path.symlink_to("../" * 9 + "srv/marker"),
    "links to root's": lambda path: path.symlink_to("/root"),
    "loops": lambda path: path.symlink_to(path.name),
    "files": lambda path: path.write_text("of the image\n"),
    "directories": lambda path: (path / "bin").mkdir(parents=True),
    "FIFOs": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("kind", KINDS)
def test_image_with_something_in_our_places(image: Tree, tmp_path: Path, kind: str) -> None:
    odd = image.copy(tmp_path / "odd")
    for place in PLACES:
        path = odd.path / place
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():
            path.rmdir()
        path.parent.mkdir(parents=True, exist_ok=True)
        KINDS[kind](path)
    with Node() as node:
        node.add_image("docker:odd:1", odd)
        node.write("/srv/marker/file", "of the node\n")
        before = node.run("ls -lRA /srv /root").stdout
        done = setup(node, "-N", "node1/2", image="odd:1")
        assert (done.returncode, done.stderr) == (0, ""), done
        assert node.shifter("cat", "/var/hostsfile").stdout == "node1\nnode1\n"
        assert login(node) == "node1\n"
        owners = node.shifter("stat", "-c", "%u %F", "/opt/udiImage/bin/ssh", "/opt/udiImage/etc/sshd_config").stdout
        assert owners == "0 regular file\n" * 2
        unsetup(node)
        assert node.run("ls -lRA /srv /root").stdout == before
        node.check_leaks()


# --- host lists ------------------------------------------------------------------------------------------------------

NAMES = (
    "a'b", 'a"b', "a`id`", "$(id)", "a\\b", "a,b", "a*", "!a", "a%h", "a=b", "a#b", "-oProxyCommand=id", "a..b", ".a", "a.",
    "\x1b[2J", "a\u2028b", "n\u00f6de", "\u0661", "a" * 64, "a." * 130, "a/-1", "a/0", "a/1x", "a/\u0661", "a/" + "9" * 400, "/1",
    "a\x1cb", "a\x0bb", "a\x85b", "a\xa0b",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_no_hosts(name: str) -> None:
    """One line break, Unicode's too, is no way to have two names seen as one, or one as two."""
    for text in (name, f"node1/1 {name}", f"node1/1\n{name}\nnode2/1"):
        with pytest.raises(UsageError, match=r"^node ['\"]"):
            parse_nodes(text)


def test_names_that_are_no_hosts_in_one_line(tiny_node: Node) -> None:
    """What is said of them has no control character; nothing of the job is left."""
    for given in ("\x1b[2J", "a\u2028b", "-oProxyCommand=id", "a" * 100_000):
        tiny_node.write("/srv/nodes", f"node1\n{given}\n")
        for words in (["-N", f"node1/1\n{given}"], ["--nodes", "/srv/nodes"]):
            done = setup(tiny_node, *words)
            assert done.returncode == 1 and done.stderr.startswith("setupRoot: "), done
            assert done.stderr.count("\n") == 1 and len(done.stderr) < 500, done
            assert all(" " <= letter <= "~" for letter in done.stderr.rstrip("\n")), done
    nothing_left(tiny_node)


def test_ten_thousand_nodes(tiny_node: Node) -> None:
    """Names that nobody knows among them; the own node is found, its sshd answers, and the client knows them all."""
    names = ["node1", *(f"nid{number:05d}" for number in range(2, 10_001))]
    tiny_node.write("/srv/nodes", "".join(f"{name}/2\n" for name in names))
    done = setup(tiny_node, "--nodes", "/srv/nodes")
    assert (done.returncode, done.stderr) == (0, ""), done
    assert tiny_node.shifter("sh", "-c", "wc -l </var/hostsfile; tail -n1 /var/hostsfile").stdout == "20000\nnid10000\n"
    assert login(tiny_node) == "node1\n"
    command = ("/opt/udiImage/bin/ssh", "-G", "nid10000")
    assert f"port {PORT}\n" in tiny_node.shifter(*command).stdout
    unsetup(tiny_node)
    nothing_left(tiny_node)


# --- faking ----------------------------------------------------------------------------------------------------------

FAKE = """
import socket, sys, time
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind((sys.argv[1], int(sys.argv[2])))
s.listen()
print("ready", flush=True)
time.sleep(1000)
"""


def test_another_user_has_the_port(tiny_node: Node) -> None:
    """Called as our sshd is, and on one address only: no sshd for the job, which is said, and no harm to the other one."""
    for address in ("0.0.0.0", "127.0.0.1", "127.0.1.1"):
        argv = ["/usr/bin/python3", "-c", FAKE, address, str(PORT)]
        fake = tiny_node.popen(argv, "bob", argv0=f"sshd: {PREFIX}/sbin/sshd -D [listener]")
        assert fake.stdout is not None and fake.stdout.readline() == "ready\n"
        done = setup(tiny_node)
        assert (done.returncode, done.stderr.count("\n")) == (0, 1) and f"no sshd: port {PORT} is in use" in done.stderr
        assert tiny_node.shifter("id", "-un").stdout == "alice\n"
        unsetup(tiny_node)
        assert fake.poll() is None
        fake.kill()
        fake.communicate()
    assert (setup(tiny_node).stderr, login(tiny_node)) == ("", "node1\n")
    unsetup(tiny_node)


# --- the end of a job ------------------------------------------------------------------------------------------------


def session(node: Node, command: str) -> subprocess.Popen[str]:
    """An ssh session in the job's UDI, started from inside of it; it has said "ready"."""
    process = node.popen([DOOR, "/opt/udiImage/bin/ssh", "node1", command], "alice")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


STAYING = {
    "a session": "echo ready; sleep 1000",
    "ignores everything": "trap '' TERM HUP INT PIPE; echo ready; while :; do sleep 1; done",
    "stopped": "echo ready; kill -STOP $$",
    "left its session": "setsid sh -c 'trap \"\" HUP TERM; sleep 1000' & echo ready; sleep 1000",
    "another root": "mkdir -p ~/r && cp /bin/busybox ~/r && cd ~ && setsid unshare -Urm chroot r /busybox sleep 1000 & "
    "while ! readlink /proc/$!/root | grep r$; do sleep 0.02; done >/dev/null; echo ready; sleep 1000",
    "user namespaces in each other": "unshare -Urm unshare -Urm sh -c 'cd /home; echo ready; exec sleep 1000'",
    "its cwd in a volume": "cd /mnt && echo ready && sleep 1000",
    "a fork bomb": "b() { while :; do sleep 0.05 & sh -c 'sleep 0.05 & sleep 0.1' & done; }; b 2>/dev/null & echo ready; wait",
}


def test_sessions_end_with_the_job(tiny_node: Node) -> None:
    """All of them at once, and what the user runs outside of the job goes on."""
    assert setup(tiny_node, "-v", "/tmp:/mnt").stderr == ""
    outside = tiny_node.popen(["sleep", "1000"], "alice")
    running = [session(tiny_node, command) for command in STAYING.values()]
    unsetup(tiny_node)
    assert 0 not in [process.wait(10) for process in running] and outside.poll() is None
    outside.kill()
    outside.communicate()
    nothing_left(tiny_node)


SEND = """
import array, os, socket, sys, time
s = socket.socket(socket.AF_UNIX); s.connect("/home/alice/socket")
fd = os.open("/proc/self/ns/mnt", os.O_RDONLY)
s.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]); s.recv(1)
"""

KEEP = """
import array, socket, time
s = socket.socket(socket.AF_UNIX); s.bind("/home/alice/socket"); s.listen(); print("listening", flush=True)
c, _ = s.accept(); _, (got,), *_ = c.recvmsg(1, 64); print("got", array.array("i", got[2])[0], flush=True); time.sleep(1000)
"""


def test_namespace_that_was_passed_to_the_outside(tiny_node: Node) -> None:
    """A process of the user's, no part of the job, has the namespace as a descriptor: named with its user and number."""
    tiny_node.conf(siteFs=["/home:/home", "/usr:/usr", "/lib:/lib", "/lib64:/lib64"])
    assert setup(tiny_node).stderr == ""
    keeper = tiny_node.popen(["python3", "-c", KEEP], "alice")
    assert keeper.stdout is not None and keeper.stdout.readline() == "listening\n"
    sender = tiny_node.popen([DOOR, "/usr/bin/python3", "-I", "-S", "-c", SEND], "alice")
    number = keeper.stdout.readline().split()[1]
    done = tiny_node.run([UNSETUP, "--job", "5"])
    (pid,) = (process.nspid for process in tiny_node.processes() if process.pid == keeper.pid)
    assert done.returncode == 1
    assert done.stderr == f"unsetupRoot: left: process {pid} of alice (it holds the namespace as descriptor {number})\n"
    assert sender.wait(10) == -9
    keeper.kill()
    keeper.communicate()
    unsetup(tiny_node)
    nothing_left(tiny_node)


@pytest.mark.parametrize(
    "wiped", ["umount -l /run/shifter", "rm -rf /run/shifter/udi /run/shifter/jobs 2>/dev/null; true"]
)
def test_sessions_end_although_the_state_was_wiped(tiny_node: Node, wiped: str) -> None:
    """What runs is found by what stands in its root; the next set-up works."""
    assert setup(tiny_node).stderr == ""
    running = session(tiny_node, "echo ready; sleep 1000")
    tiny_node.run(wiped, check=True)
    unsetup(tiny_node)
    assert running.wait(10) != 0
    assert [process for process in tiny_node.processes() if process.uid == 5001] == []
    assert (setup(tiny_node).stderr, login(tiny_node)) == ("", "node1\n")
    unsetup(tiny_node)


@pytest.mark.soak
def test_cycles_with_kills(tiny_node: Node, counts: dict[str, int]) -> None:
    """setupRoot, login, unsetupRoot, each of them killed at some time: the next one works, and at the end nothing is left."""
    dice = random.Random(5)
    for number in range(counts["cycles of a job"]):
        first, last = dice.choice([(True, False), (False, True), (True, True)])
        if first:
            kill_at_some_time(tiny_node, dice, SETUP, "-u", "alice", "--job", "5", "docker", "tiny:1")
        if dice.random() < 0.5:
            unsetup(tiny_node)
            nothing_left(tiny_node)
        done = setup(tiny_node, "-N", "node1/1")
        assert done.returncode == 0 and "no sshd" not in done.stderr, (number, done)
        assert login(tiny_node) == "node1\n", number
        if last:
            kill_at_some_time(tiny_node, dice, UNSETUP, "--job", "5")
        unsetup(tiny_node)
        nothing_left(tiny_node)


def kill_at_some_time(node: Node, dice: random.Random, *argv: str) -> None:
    """Kill a command of root's, its builder too, somewhere between its first line and its end."""
    process = node.popen(argv)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(dice.uniform(0.05, 0.8))
    if dice.random() < 0.3:
        for one in node.processes():
            if "builder.pyc" in one.cmdline:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one.pid, signal.SIGKILL)
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    ("when", "status", "said"),
    [
        # The first setns(2) is to the node's own namespace, the second to the user's, the third the way back.
        (2, 1, "unsetupRoot: mount namespace: Cannot allocate memory\n"),
        (3, 70, "the kernel did not let this process go back to its own mount namespace\n"),
    ],
)
def test_kernel_refuses_a_look_into_a_users_namespace(tiny_node: Node, when: int, status: int, said: str) -> None:
    """unsetupRoot looks into the mount namespaces of users.

    Where it can't, it knows not what is left; where it can't come back, it ends, and acts as root in none. The next one
    finds all that is left.
    """
    assert setup(tiny_node, "--job", "5", "--no-sshd").returncode == 0
    enter = "cp /bin/busybox /tmp; echo ready; exec chroot /tmp /busybox sleep 1000"
    nested = tiny_node.popen([DOOR, "unshare", "-Urm", "sh", "-c", enter], "alice")
    assert nested.stdout is not None and nested.stdout.readline() == "ready\n"
    while "sleep" not in tiny_node.run("ps -eo args").stdout:
        pass
    inject = ["strace", "-qqq", "-o", "/dev/null", "-e", f"inject=setns:error=ENOMEM:when={when}"]
    done = tiny_node.run([*inject, UNSETUP, "--job", "5"])
    assert (done.returncode, done.stdout, done.stderr) == (status, "", said)
    assert nested.poll() is None
    unsetup(tiny_node)
    assert nested.wait(10) == -9
    nothing_left(tiny_node)
    tiny_node.run("rm /tmp/busybox", check=True)


def test_builder_that_outlives_setuproot_publishes_nothing(tiny_node: Node) -> None:
    """It is slow, setupRoot is killed, the epilog says that nothing is left: the job gets no UDI after its end."""
    assert tiny_node.shifter("--image=tiny:1", "true").returncode == 0
    slow = ["strace", "-f", "-qqq", "-o", "/dev/null", "-e", "inject=move_mount:delay_enter=3000000:when=1"]
    started = tiny_node.popen([*slow, SETUP, "-u", "alice", "--job", "5", "--no-sshd", "docker", "tiny:1"])

    def running(program: str) -> list[int]:
        return [one.pid for one in tiny_node.processes() if program in one.cmdline and "strace" not in one.cmdline]

    wait_for(lambda: running("builder.pyc"))
    time.sleep(1)  # until it is in its first move_mount(2), after it has read what setupRoot wrote for it
    for pid in running(SETUP):
        os.kill(pid, signal.SIGKILL)
    unsetup(tiny_node)
    started.communicate(timeout=30)
    assert not tiny_node.run("ls /run/shifter/udi/5001 | grep job").stdout
    tiny_node.shifterctl("gc", "--all")
    nothing_left(tiny_node)


def test_lock_that_the_user_keeps_does_not_keep_the_prolog(tiny_node: Node) -> None:
    """As a launch does that its user stops: setupRoot waits no longer than for a build, and says why."""
    assert tiny_node.shifter("--image=tiny:1", "true").returncode == 0
    tiny_node.conf(udiBuildTimeout=2)
    held = tiny_node.popen("exec 7< /run/shifter/udi/5001/lock; flock 7; echo held; exec sleep 1000")
    assert held.stdout is not None and held.stdout.readline() == "held\n"
    done = setup(tiny_node, "--job", "5")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "setupRoot: another launch of this user has been under way for 2 s\n"
    held.kill()
    held.communicate()
    tiny_node.shifterctl("gc", "--all")
    nothing_left(tiny_node)


def test_log_that_its_user_makes_long(tiny_node: Node) -> None:
    """The log is the user's file: root reads no more of it than was meant to be there."""
    assert setup(tiny_node, "--job", "5", "-N", "node1/1").returncode == 0
    pid = tiny_node.run("pgrep -o sshd", check=True).stdout.strip()
    tiny_node.run(f"chmod u+w /proc/{pid}/fd/2 && truncate -s 1P /proc/{pid}/fd/2", "alice")
    tiny_node.run("truncate -s 1P /run/shifter/jobs/5/log/sshd", check=True)  # if the kernel did not let her
    done = tiny_node.shifterctl("logs", "--job", "5")
    assert done.returncode == 0 and len(done.stdout) <= 4 << 18  # a NUL is printed as four characters
    unsetup(tiny_node)


def commands(node: Node) -> list[str]:
    """What runs of alice's, and of root's for her: a door is root's until it is inside."""
    return [process.cmdline for process in node.processes() if process.uid == 5001 or process.comm == "shifter"]


STAY = """grep -q '"job":"5"' /var/shifterConfig.json && exec sleep 1000"""


@pytest.mark.soak
@pytest.mark.parametrize("options", [(), ("--image=tiny:1", "--volume=/tmp:/mnt")], ids=["own", "on-demand"])
def test_launches_while_the_job_is_taken_down(
    tiny_node: Node, counts: dict[str, int], options: tuple[str, ...]
) -> None:
    """Who found the job's UDI just before its end is ended with it or comes too late, and does not stop the epilog."""
    dice = random.Random(5)
    launch = shlex.join([DOOR, *options, "sh", "-c", STAY])
    for number in range(counts["jobs taken down under launches"]):
        assert setup(tiny_node, "--no-sshd").returncode == 0
        starting = tiny_node.popen(
            f"exec >/dev/null 2>&1; for i in $(seq 1000); do {launch} & sleep 0.003; done",
            "alice",
            env={"SHIFTER_JOB_ID": "5"},
        )
        time.sleep(dice.uniform(0.02, 0.2))
        unsetup(tiny_node)
        starting.kill()
        starting.communicate()
        wait_for(lambda: set(commands(tiny_node)) <= {"sleep 1000"})
        assert commands(tiny_node) == [], number
    tiny_node.shifterctl("gc", "--all")
    nothing_left(tiny_node)


def delayed(call: str, which: int, seconds: int, *options: str) -> list[str]:
    """The beginning of a command line: the call with this number waits before it is made."""
    return ["strace", "-qqq", "-o", "/dev/null", *options, "-e", f"inject={call}:delay_enter={seconds}s:when={which}"]


OTHERWISE = [""]
"""What a launch says that was ended, or had ended, when unsetupRoot was the later one: on a busy machine it can be."""


def unpin_late(node: Node) -> None:
    """unsetupRoot, four seconds of which are between its look at all processes and its first change to the job's UDI.

    umount2(2) is tried on two files that the job may have had, then on the UDI.
    """
    done = node.run([*delayed("umount2", 3, 4), UNSETUP, "--job", "5"])
    assert (done.returncode, done.stderr) == (0, "")


def test_door_that_waits_before_it_opens_the_namespace(tiny_node: Node) -> None:
    """As its user can have it do by a signal; it comes when unsetupRoot has looked at all processes, before it unpins."""
    assert setup(tiny_node, "--no-sshd").returncode == 0
    door = ["-u", "alice", "-E", "SHIFTER_JOB_ID=5"]
    tiny_node.run(["strace", "-qqq", "-o", "/tmp/calls", "-e", "trace=openat", *door, DOOR, "true"], check=True)
    calls = tiny_node.run("cat /tmp/calls; rm /tmp/calls").stdout.splitlines()
    (which,) = (number for number, call in enumerate(calls, 1) if ', "ns", ' in call)
    launch = tiny_node.popen([*delayed("openat", which, 2, *door), DOOR, "sleep", "1000"])
    time.sleep(0.5)
    unpin_late(tiny_node)
    said = launch.communicate(timeout=20)[1]
    gone = "the UDI of job 5 was taken down meanwhile, or is of another version of Shifter; name an image (--image)"
    assert said in (f"shifter: {gone}\n", *OTHERWISE) or "no image" in said
    nothing_left(tiny_node)


def test_access_list_that_is_read_again_while_the_job_ends(tiny_node: Node) -> None:
    """The record that says so does not come back after unsetupRoot has taken it away."""
    assert setup(tiny_node, "--no-sshd").returncode == 0
    tiny_node.run("touch /images/*.meta", check=True)
    door = ["-f", "-u", "alice", "-E", "SHIFTER_JOB_ID=5"]
    launch = tiny_node.popen([*delayed("renameat2", 1, 2, *door), DOOR, "sleep", "1000"])
    wait_for(lambda: tiny_node.run("ls /run/shifter/udi/5001/job.5/renewed").returncode == 0)
    unpin_late(tiny_node)
    assert launch.communicate(timeout=20)[1] in ("shifter: job 5 was taken down meanwhile (unsetupRoot)\n", *OTHERWISE)
    tiny_node.shifterctl("gc", "--all")
    nothing_left(tiny_node)


def test_build_for_a_job_that_ends_meanwhile(tiny_node: Node) -> None:
    """A UDI that was to be the job's, beside its own, would not be taken down by anybody."""
    assert setup(tiny_node, "--no-sshd").returncode == 0
    door = ["-f", "-u", "alice", "-E", "SHIFTER_JOB_ID=5"]
    asked = [DOOR, "--image=tiny:1", "--volume=/tmp:/mnt", "true"]
    launch = tiny_node.popen([*delayed("move_mount", 1, 2, *door), *asked])
    wait_for(lambda: [process for process in tiny_node.processes() if "builder.pyc" in process.cmdline])
    time.sleep(0.5)
    unsetup(tiny_node)
    assert launch.communicate(timeout=20)[1] in ("shifter: job 5 was taken down meanwhile (unsetupRoot)\n", *OTHERWISE)
    assert tiny_node.run("ls /run/shifter/udi/5001").stdout == "lock\n"
    tiny_node.shifterctl("gc", "--all")
    nothing_left(tiny_node)


def test_launches_of_the_user_do_not_hide_what_is_left(tiny_node: Node) -> None:
    """What unsetupRoot could not take down, the next one finds, whatever the user has built meanwhile."""
    tiny_node.conf(udiMaxPerUser=1)
    assert setup(tiny_node, "--job", "5", "--no-sshd").returncode == 0
    other = ("--image=tiny:1", "--volume=/tmp:/mnt")
    assert tiny_node.shifter(*other, "true", env={"SHIFTER_JOB_ID": "5"}).returncode == 0
    key = tiny_node.run("ls /run/shifter/udi/5001 | grep -v 'job\\|lock'", check=True).stdout.strip()
    held = tiny_node.popen(f"exec 7< /run/shifter/udi/5001/{key}/ns; echo ready; exec sleep 1000")
    assert held.stdout is not None and held.stdout.readline() == "ready\n"
    for number in range(3):
        done = tiny_node.run([UNSETUP, "--job", "5"])
        assert done.returncode == 1 and "of root (it holds the namespace as descriptor 7)" in done.stderr, number
        listed = json.loads(tiny_node.shifterctl("ps", "--json").stdout)
        assert [udi["job"] for udi in listed if udi["ended"]] == ["5", "5"], listed
        volume = f"--volume=/tmp:/mnt/{number}"
        assert tiny_node.shifter("--image=tiny:1", volume, "true").returncode == 0
        tiny_node.shifter(*other, "true", env={"SHIFTER_JOB_ID": "5"})
    held.kill()
    held.communicate()
    unsetup(tiny_node)
    tiny_node.shifterctl("gc", "--all")
    nothing_left(tiny_node)
