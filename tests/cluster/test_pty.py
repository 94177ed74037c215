"""Terminals in a job, on its own node and over ssh from node to node, whatever /dev/pts of the nodes is."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import tests.debian
from tests.images import Tree
from tests.node import PREFIX, Cluster, Terminal, cluster
from tests.ptys import HOSTS, SHELL, made_inside, shows_the_nodes, work_at

SETUP, UNSETUP, DOOR = f"{PREFIX}/sbin/setupRoot", f"{PREFIX}/sbin/unsetupRoot", f"{PREFIX}/bin/shifter"


@pytest.fixture(scope="module")
def debian(debian: Tree) -> Tree:
    """A Debian with what people keep terminals open with."""
    return tests.debian.debian(debian.path.parents[1], ("screen", "tmux"))


def on_all(nodes: Cluster, *argv: str) -> None:
    """Run a command of root's on all nodes at once, as a workload manager does; it has nothing to say."""
    for process in [node.popen(argv) for node in nodes]:
        assert (process.communicate(timeout=60), process.returncode) == (("", ""), 0)


def set_up(nodes: Cluster, tag: str = "debian:12") -> None:
    on_all(nodes, SETUP, "-u", "alice", "-N", "node1/1 node2/1", "--job", "17", "docker", tag)


def take_down(nodes: Cluster) -> None:
    on_all(nodes, UNSETUP, "--job", "17")


def to_node2(*command: str, options: str = "-t") -> list[str]:
    """The command line that runs *command* on node2, from inside of the job's UDI."""
    return [DOOR, "env", "TERM=xterm", "ssh", options, "node2", *command]


ROWS = [
    ("distribution", "auto"),
    ("distribution", "private"),
    ("another group", "host"),
    ("no messages", "host"),
    ("cray", "auto"),
    ("cray", "host"),
]
"""Where sshd meets another group or mode; every pair of a node and a mode is tried by tests/system/test_pty.py."""


@pytest.mark.parametrize("host", dict(ROWS))
def test_interactive_shells_of_a_job(debian: Tree, propagation: str, host: str) -> None:
    """The caller's own terminal, and the one that sshd makes: name, owner and group; jobs are controlled, sizes arrive."""
    with cluster(2, shared=propagation == "shared", devpts=HOSTS[host]) as nodes:
        nodes.add_image("docker:debian:12", debian)
        for mode in (mode for name, mode in ROWS if name == host):
            nodes.conf(devpts=mode)
            set_up(nodes)
            with Terminal(nodes[0]) as terminal:
                shown = shows_the_nodes(host, mode)
                assert work_at(terminal, [DOOR, *SHELL]) == (terminal.name if shown else "/dev/console")
                assert work_at(terminal, to_node2(*SHELL)).startswith("/dev/pts/")
                look = "tty; stat -c %U:%G:%a $(tty); hostname"
                lines = terminal.run(to_node2(look))[1].replace("\r", "").splitlines()
                assert lines[1:3] == [":".join(("alice", *made_inside(host, mode))), "node2"], lines
            take_down(nodes)
        nodes.check_leaks()


@pytest.fixture
def job(debian: Tree, propagation: str) -> Iterator[Cluster]:
    """Two nodes as some clusters have them, with a job's UDI on both."""
    with cluster(2, shared=propagation == "shared", devpts=HOSTS["cray"]) as nodes:
        nodes.add_image("docker:debian:12", debian)
        set_up(nodes)
        yield nodes
        nodes.check_leaks()


KEEPERS = {
    "screen": ("screen -S work", "screen -ls", "screen -r work", "\x01d"),
    "tmux": ("tmux new -s work", "tmux ls", "tmux attach", "\x02d"),
}


def test_sessions_of_screen_and_tmux_outlast_the_login_and_end_with_the_job(job: Cluster) -> None:
    with Terminal(job[0]) as terminal:
        for start, look, again, leave in KEEPERS.values():
            for number, command in enumerate((start, again)):
                process = terminal.popen(to_node2(command))
                terminal.write(f"echo {number}: $(hostname) on' '$(tty)\n")
                terminal.read(f"{number}: node2 on /dev/pts/")
                terminal.write(leave)
                terminal.read("etached")
                terminal.read()
                assert process.wait(20) == 0
                assert "work" in terminal.run(to_node2(look, options="-T"))[1]
        assert terminal.run(to_node2("tmux new -d -s other && tmux ls"))[1].count("windows") == 2
    take_down(job)
    assert [process for node in job for process in node.processes() if process.uid == 5001] == []


def test_full_dev_pts_leaves_sessions_without_a_terminal(job: Cluster) -> None:
    """The user's own processes have all terminals of their UDI: ssh -t says so, and the sshd goes on."""
    many = 'for (1 .. 200) { sysopen(my $fh, "/dev/ptmx", 258) or last; push @all, $fh } print "full\\n"; sleep 99'
    full = job[1].popen([DOOR, "perl", "-e", f"$| = 1; {many}"], "alice")
    assert full.stdout is not None and full.stdout.readline() == "full\n"
    with Terminal(job[0]) as terminal:
        assert "PTY allocation request failed" in terminal.run(to_node2("hostname"))[1]
        assert terminal.run(to_node2("hostname", options="-T")) == (0, "node2\n")
    take_down(job)
    assert full.wait(20) != 0


def test_image_with_another_group_of_terminals(debian: Tree, propagation: str, tmp_path: Path) -> None:
    odd = debian.copy(tmp_path / "odd")
    group = odd.path / "etc/group"
    group.write_text(group.read_text().replace("tty:x:5:", "tty:x:77:"))
    with cluster(2, shared=propagation == "shared") as nodes:
        nodes.add_image("docker:odd:1", odd)
        set_up(nodes, "odd:1")
        with Terminal(nodes[0]) as terminal:
            assert work_at(terminal, to_node2(*SHELL)).startswith("/dev/pts/")
        take_down(nodes)
        nodes.check_leaks()
