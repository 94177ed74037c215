"""A door that can't do its work says why in one line, and odd circumstances of the caller do not stop it."""

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.images import Tree
from tests.node import PREFIX, Node, Terminal, User
from tests.node.terminal import pts_number

DOOR = f"{PREFIX}/bin/shifter"
CAP_SYS_RESOURCE = 24


@pytest.fixture(scope="module", params=["private", "shared"])
def node(request: pytest.FixtureRequest, image: Tree) -> Iterator[Node]:
    with Node(shared=request.param == "shared") as made:
        made.conf(siteFs=["/home:/home", f"{PREFIX}:{PREFIX}"])  # so that there is a door inside
        made.add_image("docker:tiny:1", image)
        made.add_image("docker:other:1", image)
        made.add_image("docker:tiny:latest", image)
        made.add_image("custom:tiny:latest", image)
        made.add_image("docker:full:1", image, entry=["/bin/echo"], workdir="/srv")
        yield made
        made.check_leaks()


def refused(done: Any, message: str) -> None:
    assert (done.returncode, done.stdout) == (125, ""), done.stderr
    assert message in done.stderr and done.stderr.startswith("shifter: ") and done.stderr.count("\n") == 1, done.stderr


def copy_door(node: Node, path: str, mode: int, uid: int = 0) -> None:
    node.write(path, node.path(DOOR).read_bytes(), mode=0o755)
    node.call(lambda: os.chown(path, uid, 0))
    node.call(lambda: os.chmod(path, mode))


# --- without privilege -----------------------------------------------------------------------------------------------


def test_setuid_bit_lost(node: Node) -> None:
    copy_door(node, "/opt/door", 0o755)
    refused(
        node.run(["/opt/door", "--image=tiny:1", "true"], "alice"),
        "/opt/door is not setuid root any more (mode 0755, uid 0)",
    )
    copy_door(node, "/opt/door", 0o4755, uid=5002)
    done = node.run(["/opt/door", "--image=tiny:1", "true"], "alice")
    refused(done, "/opt/door is not setuid root any more (mode 4755, uid 5002); run, as root: make install")


def test_setgid_door_is_refused(node: Node) -> None:
    """Somebody's chmod 2755 gives the door a group of root's, and no more."""
    copy_door(node, "/opt/door", 0o2755)
    refused(node.run(["/opt/door", "--image=tiny:1", "true"], "alice"), "is not setuid root any more (mode 2755")


def test_nosuid_mount(node: Node) -> None:
    copy_door(node, "/tmp/door", 0o4755)
    refused(
        node.run(["/tmp/door", "--image=tiny:1", "true"], "alice"),
        "/tmp/door is on a file system that is mounted nosuid",
    )


def test_no_new_privs(node: Node) -> None:
    done = node.run(["setpriv", "--no-new-privs", DOOR, "--image=tiny:1", "true"], "alice")
    refused(done, "no privilege: no_new_privs is set for this process")


def test_tracer(node: Node) -> None:
    done = node.run(["strace", "-o", "/dev/null", DOOR, "--image=tiny:1", "true"], "alice")
    refused(done, "a debugger or strace of an ordinary user traces this process")


def test_tracer_of_root(node: Node) -> None:
    done = node.run(["strace", "-f", "-o", "/dev/null", "-u", "alice", DOOR, "--image=tiny:1", "id", "-u"])
    assert (done.returncode, done.stdout) == (0, "5001\n"), done.stderr


@pytest.mark.parametrize("options", [["-U"], ["-Ur"], ["-Urm"], ["-Uc"]])
def test_user_namespace(node: Node, options: list[str]) -> None:
    done = node.run(["unshare", *options, DOOR, "--image=tiny:1", "true"], "alice")
    refused(done, "this is a user namespace (unshare -U, rootless container)")


def test_user_namespace_that_root_made(node: Node) -> None:
    """Setuid root works in it, and gives nothing outside of it."""
    script = (
        "cd /tmp; mkfifo -m 666 go; "
        f"unshare -U sh -c 'read x < go; exec setpriv --reuid 5001 --regid 5001 --clear-groups {DOOR} --image=tiny:1 true' & "
        "while [ /proc/$!/ns/user -ef /proc/self/ns/user ]; do sleep 0.01; done; "
        "for map in uid_map gid_map; do echo 0 0 65536 > /proc/$!/$map; done; echo > go; rm go; wait $!"
    )
    refused(node.run(script), "this is a user namespace (unshare -U, rootless container)")


def test_chroot(node: Node) -> None:
    node.mkdir("/mnt/root")
    script = (
        f"mount --rbind / /mnt/root; exec chroot --userspec=5001:5001 --groups= /mnt/root {DOOR} --image=tiny:1 true"
    )
    done = node.run(["unshare", "-m", "sh", "-c", script])
    refused(done, "called in a chroot")


@pytest.mark.parametrize(
    "user",
    [User("root", 0, 0, "/root"), User("r", 0, 5001, "/root"), User("g", 5001, 0, "/home/alice")],
    ids=lambda u: u.name,
)
def test_root_is_refused(node: Node, user: User) -> None:
    done = node.shifter("--image=tiny:1", "true", user=user)
    refused(done, f"shifter is for ordinary users: uid 0 and gid 0 are refused (uid {user.uid}, gid {user.gid})")


# --- inside ----------------------------------------------------------------------------------------------------------


def inside(node: Node, *words: str, outer: tuple[str, ...] = ("--image=tiny:1",), **run: Any) -> Any:
    return node.shifter(*outer, DOOR, *words, **run)


@pytest.mark.parametrize(
    ("outer", "options"),
    [
        ("tiny:1", []),
        ("tiny:1", ["--image=tiny:1"]),
        ("tiny:1", ["-v", "--module=none", "--"]),
        ("docker:tiny:1", []),
        ("docker:tiny:1", ["--image=docker:tiny:1"]),
        ("tiny", ["--image=tiny:latest"]),
        ("custom:tiny", ["--image=custom:tiny:latest"]),
    ],
)
def test_inside_the_same_image(node: Node, options: list[str], outer: str) -> None:
    done = inside(node, *options, "sh", "-c", "echo $A; id -u; exit 3", outer=(f"--image={outer}", "--env=A=outer"))
    assert (done.returncode, done.stdout) == (3, "outer\n5001\n"), done.stderr


def test_inside_by_identifier(node: Node) -> None:
    script = f"{DOOR} --image=$SHIFTER_IMAGE echo 1; {DOOR} --image=id:$SHIFTER_IMAGE echo 2"
    done = node.shifter("--image=tiny:1", "sh", "-c", script)
    assert done.stdout == "1\n2\n", done.stderr


def test_inside_another_image(node: Node) -> None:
    refused(
        inside(node, "--image=other:1", "echo", "ran"),
        "this is the inside of a UDI of tiny:1: another image (other:1) can't be entered from here",
    )
    for name in (
        "tiny:2",
        "custom:tiny:1",
        "tin",
        "",
        "local:/",
        "tiny:1\n",
        "docker:tiny:1",
    ):  # which type tiny:1 has?
        assert inside(node, f"--image={name}", "echo", "ran").returncode == 125


def test_inside_variables_of_the_job_do_not_matter(node: Node) -> None:
    """They say how this UDI was asked for; Slurm's stay in the environment, SHIFTER_IMAGE is now an identifier."""
    node.mkdir("/srv/vol")
    job = {
        "SLURM_SPANK_SHIFTER_IMAGETYPE": "docker",
        "SLURM_SPANK_SHIFTER_IMAGE": "tiny:1",
        "SHIFTER_IMAGETYPE": "docker",
        "SHIFTER_IMAGE": "tiny:1",
        "SHIFTER_VOLUME": "/srv/vol:/mnt",
        "SHIFTER_MODULE": "none",
    }
    done = node.shifter(DOOR, "echo", "ran", env=job)
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr
    assert node.shifter(DOOR, "--image=docker:tiny:1", "echo", "ran", env=job).stdout == "ran\n"


def test_inside_volumes_and_modules(node: Node) -> None:
    node.mkdir("/srv/vol")
    refused(inside(node, "--volume=/srv:/mnt", "true"), "this is the inside of a UDI: volumes can't be added")
    refused(inside(node, "--module=mpi", "true"), "this is the inside of a UDI: modules can't be added")
    outer = ("--image=tiny:1", "--volume=/srv/vol:/mnt")
    assert inside(node, "--volume=/srv/vol:/mnt", "echo", "same", outer=outer).stdout == "same\n"
    refused(inside(node, "--volume=/srv/vol:/mnt;/tmp:/srv", "true", outer=outer), "volumes can't be added")
    refused(inside(node, "--volume=/srv/vol", "true", outer=outer), "volumes can't be added")


def test_inside_the_other_options_work(node: Node) -> None:
    outer = ("--image=full:1", "--env=OUTER=1")
    assert inside(node, "--env=A=1", "sh", "-c", "echo $A$OUTER", outer=outer).stdout == "11\n"
    assert inside(node, "-E", "--env=A=1", "/bin/env", outer=outer).stdout == "A=1\n"
    assert inside(node, "--workdir=/srv", "pwd", outer=outer).stdout == "/srv\n"
    assert inside(node, "--entrypoint=echo", "x", outer=outer).stdout == "x\n"
    assert inside(node, input="echo $0", outer=outer).stdout == "/bin/sh\n"
    assert inside(node, "nonsense", outer=outer).returncode == 127
    refused(inside(node, "--entrypoint", outer=outer), "entry point isn't known inside of a UDI")
    refused(inside(node, "--workdir", "pwd", outer=outer), "working directory isn't known inside of a UDI")


def test_inside_usage_errors(node: Node) -> None:
    """The image has no Python to print them."""
    refused(inside(node, "--nonsense"), "unknown option '--nonsense'")


def test_marker_of_the_user_means_nothing(node: Node) -> None:
    """A file that merely looks like the UDI's own, on the node."""
    node.write("/var/shifterConfig.json", '{"identifier":"tiny:1"}', owner="alice")
    done = node.run(["setpriv", "--no-new-privs", DOOR, "--image=tiny:1", "true"], "alice")
    refused(done, "no_new_privs is set")
    node.call(lambda: os.unlink("/var/shifterConfig.json"))


# --- odd circumstances -----------------------------------------------------------------------------------------------


def can_raise_limits() -> bool:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("CapEff"))
    return bool(int(line.split()[1], 16) >> CAP_SYS_RESOURCE & 1)


@pytest.fixture(params=["build", "join"])
def launch(request: pytest.FixtureRequest, node: Node) -> Any:
    """Launch from nothing, and with the UDI there already."""
    if request.param == "build":
        node.shifterctl("gc", "--all")
    else:
        assert node.shifter("--image=tiny:1", "true").returncode == 0

    def run(*words: str, **options: Any) -> Any:
        return node.shifter("--image=tiny:1", *words, **options)

    return run


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_closed_standard_descriptors(node: Node, launch: Any, closed: tuple[int, ...]) -> None:
    """They are /dev/null for the command, so that what it opens first is not mistaken for one of them."""
    shut = " ".join(f"{fd}<&-" if fd == 0 else f"{fd}>&-" for fd in closed)
    script = "ls -l /proc/self/fd/ > fds; exit 6"
    done = node.run(["sh", "-c", f"exec {DOOR} --image=tiny:1 sh -c '{script}' {shut}"], "alice")
    assert done.returncode == 6, done.stderr
    lines = [line.split() for line in node.read("/home/alice/fds").splitlines() if "->" in line]
    fds = {int(line[-3]): line[-1] for line in lines}
    assert {0, 1, 2} <= set(fds) <= {0, 1, 2, 3}, "3 is that of ls"
    assert all(fds[fd] == "/dev/null" for fd in closed if fd != 1)


@pytest.mark.parametrize(("soft", "hard"), [(3, 4096), (20, 4096), (3, 3), (20, 20)])
def test_few_descriptors(launch: Any, soft: int, hard: int) -> None:
    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    words = ["sh", "-c", "ulimit -n; ulimit -Hn"] if soft > 3 else ["true"]
    done = launch(*words, prepare=prepare)
    if hard < 64 and not can_raise_limits():
        refused(done, f"at most {hard} open files are allowed (ulimit -Hn); shifter needs 64")
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout == (f"{soft}\n{hard}\n" if soft > 3 else "")


def limited(which: int, soft: int, hard: int | None = None) -> Any:
    def prepare() -> None:
        resource.setrlimit(which, (soft, resource.getrlimit(which)[1] if hard is None else hard))

    return prepare


def test_no_file_may_be_written(launch: Any) -> None:
    done = launch(
        "sh", "-c", "ulimit -f; echo ran", prepare=limited(resource.RLIMIT_FSIZE, 0, 0 if can_raise_limits() else None)
    )
    assert (done.returncode, done.stdout) == (0, "0\nran\n"), done.stderr


@pytest.mark.parametrize("which", [resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_little_memory(launch: Any, which: int) -> None:
    size = 8 << 20
    done = launch("sh", "-c", "echo ran", prepare=limited(which, size, size if can_raise_limits() else None))
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr


def test_little_stack_and_no_time_to_sleep(launch: Any) -> None:
    done = launch("sh", "-c", "echo ran", prepare=limited(resource.RLIMIT_STACK, 256 << 10))
    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr


def test_no_further_process(node: Node, launch: Any) -> None:
    """The user has more processes than the limit: exec works on the node, so it must here."""
    assert launch("true").returncode == 0
    others = [node.popen(["sleep", "60"], user="alice") for _ in range(3)]
    kind = "" if can_raise_limits() else "S"  # without it, a hard limit is one for the door too
    try:
        done = node.run(["bash", "-c", f"ulimit -{kind}u 1; exec {DOOR} --image=tiny:1 cat /proc/self/limits"], "alice")
        assert done.returncode == 0, done.stderr
        line = next(x for x in done.stdout.splitlines() if x.startswith("Max processes"))
        assert line.split()[2] == "1"
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.parametrize("how", ["blocked", "ignored"])
def test_all_signals(launch: Any, how: str) -> None:
    numbers = [n for n in range(1, 65) if n not in (9, 19, 32, 33)]

    def prepare() -> None:
        if how == "blocked":
            signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        else:
            for number in numbers:
                signal.signal(number, signal.SIG_IGN)

    done = launch("grep", "-E", "Sig(Blk|Ign)", "/proc/self/status", prepare=prepare)
    assert done.returncode == 0, done.stderr
    value = int(done.stdout.split()[1 if how == "blocked" else 3], 16)
    assert all(value >> (n - 1) & 1 for n in numbers)


def test_pending_signal_reaches_the_command(node: Node, launch: Any) -> None:
    """Sent to the caller while it is blocked, before the exec of the door."""
    assert launch("true").returncode == 0

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        os.kill(os.getpid(), signal.SIGUSR1)

    done = launch("grep", "ShdPnd", "/proc/self/status", prepare=prepare)
    assert int(done.stdout.split()[1], 16) == 1 << (signal.SIGUSR1 - 1)


def test_directory_with_a_long_name(node: Node, launch: Any) -> None:
    long = "/home/alice" + "/x" * 1000
    node.run(["mkdir", "-p", long], "alice", check=True)
    assert launch("pwd", cwd=long).stdout == long + "\n"


# --- terminal --------------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(node: Node) -> Iterator[Terminal]:
    with Terminal(node) as made:
        yield made
    node.conf(siteFs=["/home:/home", f"{PREFIX}:{PREFIX}"])


SEE = "tty; ls -l $(tty) | cut -c1; echo to the terminal > /dev/tty; test -t 0 && stty size"


def test_terminal_keeps_its_name(node: Node, terminal: Terminal) -> None:
    node.conf(siteFs="/home:/home", devpts="host")
    for _ in range(2):
        code, text = terminal.run([DOOR, "--image=tiny:1", "sh", "-c", SEE])
        assert (code, text.splitlines()) == (0, [terminal.name, "c", "to the terminal", "24 80"])


def test_terminal_of_the_node_is_the_console(node: Node, terminal: Terminal) -> None:
    node.conf(siteFs="/home:/home", devpts="private")
    for _ in range(2):
        code, text = terminal.run([DOOR, "--image=tiny:1", "sh", "-c", SEE])
        assert (code, text.splitlines()) == (0, ["/dev/console", "c", "to the terminal", "24 80"])
    # Only one of the three is a terminal.
    code, text = terminal.run([DOOR, "--image=tiny:1", "sh", "-c", "tty <&2 >&2"], which=(2,))
    assert (code, text) == (0, "/dev/console\n")


def test_console_of_one_launch_is_not_anothers(node: Node, terminal: Terminal) -> None:
    node.conf(siteFs="/home:/home", devpts="private")
    code, text = terminal.run([DOOR, "--image=tiny:1", "sh", "-c", "ls -Ll /dev/console"])
    assert code == 0 and "alice" in text
    done = node.shifter("--image=tiny:1", "sh", "-c", "ls -Ll /dev/console; mount | grep -c console")
    assert "alice" not in done.stdout and done.stdout.endswith("0\n")


@pytest.mark.parametrize("devpts", ["host", "private"])
def test_new_terminals_have_the_group_tty(node: Node, devpts: str) -> None:
    node.conf(siteFs="/home:/home", devpts=devpts)
    try:
        process = node.popen([DOOR, "--image=tiny:1", "sh", "-c", "echo; exec sleep 60"], "alice")
        assert process.stdout and process.stdout.readline() == "\n"
        ptmx = os.open(f"/proc/{process.pid}/root/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
        number = pts_number(ptmx)
        made = os.stat(f"/proc/{process.pid}/root/dev/pts/{number}")
        os.close(ptmx)
        process.kill()
        process.communicate()
        assert (made.st_gid, made.st_mode & 0o777) == (5, 0o620)
        assert "tty:x:5:" in node.shifter("--image=tiny:1", "cat", "/etc/group").stdout
    finally:
        node.conf(siteFs=["/home:/home", f"{PREFIX}:{PREFIX}"])


def test_automatic_choice_of_devpts(image: Tree) -> None:
    for options, expected in (("gid=5,mode=620,ptmxmode=666", False), ("mode=600,ptmxmode=666", True)):
        with Node(devpts=options) as node:
            node.add_image("docker:tiny:1", image)
            with Terminal(node) as terminal:
                code, text = terminal.run([DOOR, "--image=tiny:1", "tty"])
                assert (code, text) == (0, "/dev/console\n" if expected else f"{terminal.name}\n")
            node.check_leaks()
