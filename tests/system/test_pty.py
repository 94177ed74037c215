"""Terminals in a UDI, whatever the node's /dev/pts is: the one that the caller brings, and those that are made inside."""

import os
import subprocess
from pathlib import Path

import pytest

import tests.debian
from tests.images import Tree
from tests.node import MS_BIND, PREFIX, Node, Terminal
from tests.ptys import CRAY, DISTRIBUTION, HOSTS, MODES, SHELL, made_inside, ptys, remount, shows_the_nodes, work_at

DOOR = f"{PREFIX}/bin/shifter"
MAX = 128
"""Terminals of one /dev/pts that is a UDI's own."""

OPEN_MANY = r"""
use Fcntl;
for (1 .. 400) { my $fh; sysopen($fh, "/dev/ptmx", O_RDWR | O_NOCTTY) or last; push @all, $fh }
print scalar(@all), " $!\n"; $| = 1; <STDIN>;
"""


@pytest.fixture(scope="module")
def debian(debian: Tree) -> Tree:
    """A Debian with what people keep terminals open with."""
    return tests.debian.debian(debian.path.parents[1], ("screen", "tmux"))


@pytest.fixture
def deb(node: Node, debian: Tree) -> Node:
    """A node with that as docker:debian:12."""
    node.add_image("docker:debian:12", debian)
    return node


def command(*words: str) -> list[str]:
    return [DOOR, "--image=debian:12", *words]


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
def test_interactive_shell(debian: Tree, propagation: str, host: str) -> None:
    """In every mode the terminal has a name, jobs are controlled, sizes arrive, and new terminals can be made."""
    with Node(shared=propagation == "shared", devpts=HOSTS[host]) as node:
        node.add_image("docker:debian:12", debian)
        for mode in MODES:
            node.conf(devpts=mode)
            with Terminal(node) as terminal:
                for _ in ("built now", "built before"):
                    name = work_at(terminal, command(*SHELL))
                    assert name == (terminal.name if shows_the_nodes(host, mode) else "/dev/console")
            found = node.run(command("getent", "group", "tty"), "alice").stdout
            exceptions = {"cray": "", "another group": "tty:x:7:\n"} if mode == "host" else {}
            assert found == exceptions.get(host, "tty:x:5:\n")
        node.check_leaks()


@pytest.mark.parametrize("mode", MODES)
def test_old_way_of_the_cray(deb: Node, mode: str) -> None:
    """Without a change of the node's init there are right terminals; where it was changed, the node's are as right."""
    for options, host in ((CRAY, "cray"), (DISTRIBUTION, "distribution")):
        remount(deb, options)
        deb.conf(devpts=mode, siteEnv=f"HOST={host}")
        made = deb.run(command("script", "-qc", "tty; stat -c %G:%a $(tty)", "/dev/null"), "alice", check=True).stdout
        name, owner = made.split()
        assert name.startswith("/dev/pts/")
        # script, unlike sshd, gives it no mode of its own.
        assert owner == ":".join(made_inside(host, mode))
        with Terminal(deb) as terminal:
            shown = terminal.name if shows_the_nodes(host, mode) else "/dev/console"
            assert terminal.run(command("tty")) == (0, shown + "\n")


def test_node_without_dev_pts(deb: Node) -> None:
    deb.run("umount /dev/pts", check=True)
    deb.remember()
    made = deb.run(command("script", "-qc", "tty; stat -c %G:%a $(tty)", "/dev/null"), "alice", check=True).stdout
    assert made.split() == ["/dev/pts/0", "tty:620"]


def test_multiplexer_that_users_cannot_open(deb: Node) -> None:
    """/dev/ptmx is that of /dev/pts, as in containers, and closed by ptmxmode=000: the UDI gets an own one."""
    remount(deb, DISTRIBUTION)
    deb.mount("/dev/pts/ptmx", "/dev/ptmx", flags=MS_BIND)
    assert "Permission denied" in deb.run("exec 3<>/dev/ptmx", "alice").stderr
    made = deb.run(command("script", "-qc", "tty", "/dev/null"), "alice", check=True).stdout
    assert made.split() == ["/dev/pts/0"]
    assert ptys(deb) == 0
    deb.run("umount /dev/ptmx", check=True)


def test_image_with_another_group_of_terminals(node: Node, debian: Tree, tmp_path: Path) -> None:
    """What an image's /etc/group says of tty is covered: an old libc, or sshd, would want to change the group."""
    odd = debian.copy(tmp_path / "odd")
    group = odd.path / "etc/group"
    group.write_text(group.read_text().replace("tty:x:5:", "tty:x:77:"))
    node.add_image("docker:odd:1", odd, "VFS")
    for mode in ("host", "private"):
        node.conf(devpts=mode)
        made = node.shifter("--image=odd:1", "script", "-qc", "stat -c %G:%g $(tty)", "/dev/null", check=True).stdout
        assert made.split() == ["tty:5"]


# --- the caller's terminal -------------------------------------------------------------------------------------------

TTYNAME = """
#include <stdio.h>
#include <unistd.h>
int main(void)
{
    for (int fd = 0; fd <= 2; fd++) {
        char *name = ttyname(fd);
        dprintf(1, "%s ", name ? name : "none");
    }
    return 0;
}
"""


@pytest.mark.parametrize("mode", ["host", "private"])
def test_name_of_the_terminal_for_musl(tiny_node: Node, tmp_path: Path, mode: str) -> None:
    """Its ttyname(3) looks nowhere but at the name that the descriptor was opened by."""
    (tmp_path / "ttyname.c").write_text(TTYNAME)
    subprocess.run(["musl-gcc", "-static", "-o", tmp_path / "ttyname", tmp_path / "ttyname.c"], check=True)
    tiny_node.write("/home/alice/ttyname", (tmp_path / "ttyname").read_bytes(), 0o755, "alice")
    tiny_node.conf(devpts=mode)
    with Terminal(tiny_node) as terminal:
        name = terminal.name if mode == "host" else "/dev/console"
        program = [DOOR, "--image=tiny:1", "/home/alice/ttyname"]
        assert terminal.run(program) == (0, f"{name} {name} {name} ")
        assert terminal.run(program, which=(1, 2)) == (0, f"none {name} {name} ")


def test_descriptor_of_the_terminal_keeps_its_flags(tiny_node: Node) -> None:
    """It is opened anew, as the caller had it: read-only, appending, non-blocking."""
    tiny_node.conf(devpts="private")
    with Terminal(tiny_node) as terminal:
        shell = f"exec {DOOR} --image=tiny:1 sh -c 'cat /proc/$$/fdinfo/[01] | grep flags'"
        code, text = terminal.run(f"exec <{terminal.name} >>{terminal.name}; {shell}")
        flags = [int(line.split()[1], 8) & (os.O_ACCMODE | os.O_APPEND) for line in text.splitlines()]
        assert (code, flags) == (0, [os.O_RDONLY, os.O_WRONLY | os.O_APPEND])


def test_terminal_of_another_user(tiny_node: Node) -> None:
    """As after su: it can't be opened by its name, neither outside nor inside, and what is open goes on working."""
    tiny_node.conf(devpts="private")
    with Terminal(tiny_node, "bob") as terminal:
        slave = terminal.open()
        try:
            look = "tty; echo into it; cat /dev/console"
            argv = [DOOR, "--image=tiny:1", "sh", "-c", look]
            process = tiny_node.popen(argv, "alice", stdin=slave, stdout=slave, stderr=slave)
        finally:
            os.close(slave)
        text = terminal.read()
        assert process.wait(20) == 1
        assert text.splitlines()[:2] == ["/dev/console", "into it"] and "Permission denied" in text


def test_terminal_that_is_no_pty_keeps_its_name(tiny_node: Node) -> None:
    """/dev is the node's: what has its name there needs no other one."""
    tiny_node.conf(devpts="private")
    with Terminal(tiny_node) as terminal:
        argv = f"exec {DOOR} --image=tiny:1 tty </dev/tty >/home/alice/said"
        assert terminal.run(argv, which=()) == (0, "")
    assert tiny_node.read("/home/alice/said") == "/dev/tty\n"


# --- screen and tmux -------------------------------------------------------------------------------------------------

KEEPERS = {
    "screen": ("screen -dmS work", "screen -ls | grep -o 'work.*tached'", "screen -r work", "\x01d", "screen -S work -X quit"),
    "tmux": ("tmux new -d -s work", "tmux ls -F '#{session_name} #{?session_attached,attached,detached}'", "tmux attach", "\x02d",
             "tmux kill-server"),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["host", "private"])
@pytest.mark.parametrize("program", KEEPERS)
def test_session_is_left_and_taken_up_again(deb: Node, program: str, mode: str) -> None:
    """From one terminal to the next, each of which may be another launch's /dev/console."""
    start, look, attach, leave, stop = KEEPERS[program]
    deb.conf(devpts=mode)
    shell = command("env", "TERM=xterm", "bash", "-c")
    deb.run([*shell, start], "alice", check=True)
    for number in range(2):
        assert "etached" in deb.run([*shell, look], "alice", check=True).stdout
        with Terminal(deb) as terminal:
            process = terminal.popen([*shell, attach])
            terminal.write(f"echo number {number} on' '$(tty)\n")
            terminal.read(f"number {number} on /dev/pts/")
            terminal.write(leave)
            terminal.read("etached")
            terminal.read()
            assert process.wait(20) == 0
    deb.run([*shell, stop], "alice", check=True)


# --- how many --------------------------------------------------------------------------------------------------------


def test_nobody_uses_up_the_ptys(deb: Node) -> None:
    """One UDI's own /dev/pts is full at some time; then there are still terminals on the node, and in other UDIs."""
    deb.conf(devpts="private")
    full = deb.popen(command("perl", "-e", f"$| = 1; {OPEN_MANY}"), "alice", stdin=subprocess.PIPE)
    assert full.stdout is not None and full.stdout.readline() == f"{MAX} No space left on device\n"
    again = deb.run(command("perl", "-e", OPEN_MANY), "alice")
    assert again.stdout.startswith("0 ")
    for user, volume in (("bob", "/tmp:/mnt"), ("alice", "/tmp:/srv")):
        other = deb.run([DOOR, "--image=debian:12", f"--volume={volume}", "perl", "-e", OPEN_MANY], user)
        assert other.stdout.startswith(f"{MAX} ")
    with Terminal(deb, "bob") as terminal:
        assert terminal.run(["tty"]) == (0, f"{terminal.name}\n")
    full.communicate("\n")


def test_as_many_udis_as_a_user_may_have_leave_ptys_to_others() -> None:
    """What the kernel keeps for the node's own /dev/pts is not counted: 1,024 of 4,096."""
    from shifter.config import Config
    from shifter.udi.build import MAX_PTYS

    assert MAX_PTYS == MAX and MAX_PTYS * Config().udiMaxPerUser <= 4096 - 1024


# --- /run ------------------------------------------------------------------------------------------------------------


def test_run_is_the_users_to_write(tiny_node: Node) -> None:
    """Where screen, and much else, has its sockets. It is of this UDI alone, and nothing but /run is writable."""
    inside = ["--image=tiny:1", "sh", "-c"]
    tiny_node.shifter(*inside, "mkdir -p /run/user/5001 && echo here > /var/run/user/5001/file", check=True)
    assert tiny_node.shifter(*inside, "cat /run/user/5001/file; stat -c %a:%U /run").stdout == "here\n1777:root\n"
    assert not tiny_node.exists("/run/user/5001")
    for others in (("bob", ()), ("alice", ("--volume=/tmp:/mnt",))):
        assert tiny_node.shifter(*others[1], *inside, "ls -A /run", user=others[0], check=True).stdout == ""
    done = tiny_node.shifter(*inside, "touch /run/../x /run/../var/x; dd if=/dev/zero of=/run/full bs=1M count=64")
    assert done.stderr.count("Read-only file system") == 2 and "No space left" in done.stderr
    assert tiny_node.shifter("--image=tiny:1", "true").returncode == 0
    options = tiny_node.shifter("--image=tiny:1", "grep", " /run ", "/proc/self/mountinfo").stdout.split()[5]
    assert {"rw", "nosuid", "nodev"} <= set(options.split(","))
