"""What the tests of terminals share: the ways in which nodes mount /dev/pts, and what a person does at a terminal."""

import os
import re
import termios

from tests.node import Node, Terminal

DISTRIBUTION = "gid=5,mode=620,ptmxmode=000"
CRAY = "mode=600,ptmxmode=000"

HOSTS = {
    "distribution": DISTRIBUTION,
    "container": "gid=5,mode=620,ptmxmode=666",
    "cray": CRAY,
    "another group": "gid=7,mode=620",
    "no messages": "gid=5,mode=600",
}
"""Options of a node's /dev/pts. (`newinstance` says nothing any more: since Linux 4.7 each mount is an instance.)"""

MODES = ("auto", "host", "private")


def shows_the_nodes(host: str, mode: str) -> bool:
    """Whether a container has the node's /dev/pts."""
    return mode == "host" or (mode == "auto" and host in ("distribution", "container"))


def made_inside(host: str, mode: str) -> tuple[str, str]:
    """Group and mode of a terminal that an sshd makes for alice: `tty` wherever there is one, else her own group."""
    return ("alice", "600") if shows_the_nodes(host, mode) and host == "cray" else ("tty", "620")


SHELL = ["env", "PS1=", "PS0=", "bash", "--noediting", "--norc", "-i"]
"""An interactive shell with job control that prints nothing of itself."""


def work_at(terminal: Terminal, shell: list[str]) -> str:
    """Work in the interactive *shell* (SHELL, however it is reached) on *terminal*; return the name that it has inside.

    Its name, /dev/tty, ^Z and fg, ^C, a new window size, and a terminal of its own for a command; then the shell is left.
    """
    process = terminal.popen(shell)

    def say(command: str, until: str = "\n") -> str:
        terminal.write(command + "\n")
        return terminal.read(until)

    say("stty -opost -echo; echo here we' 'are", "here we are\n")
    name = say("tty").strip()
    assert re.fullmatch(r"/dev/(pts/\d+|console)", name), name
    assert say("stat -L -c %F /dev/tty && echo and' 'to the terminal > /dev/tty", "terminal\n").startswith("character")
    assert say("stty size") == "24 80\n"

    # Not a shell's loop: what ^Z stops between vfork and exec keeps its parent from being stopped.
    job = """perl -e '$| = 1; $SIG{%s} = sub { %s }; print "work", "ing\\n"; sleep 9 while 1'"""
    say(job % ("CONT", r'print "going on\n"'), "working\n")
    terminal.write("\x1a")
    terminal.read("Stopped")
    say("jobs %% | grep -c Stopped", "\n1\n")
    say("fg", "going on\n")
    terminal.write("\x03")
    say("echo status $?", "status 130\n")

    say(job % ("WINCH", 'exec "stty", "size"'), "working\n")
    termios.tcsetwinsize(terminal.master, (40, 100))
    assert terminal.read("\n") == "40 100\n"

    inner = say("script -qc 'tty; stat -c %G:%a $(tty); stty size' /dev/null | tr -d '\\r' | tr '\\n' ' '; echo", "\n")
    assert re.match(r"/dev/pts/\d+ (tty:6[02]0|alice:600) 40 100 ", inner), inner
    assert inner.split()[0] != name
    terminal.write("exit 3\n")
    terminal.read()
    assert process.wait(20) == 3
    termios.tcsetwinsize(terminal.master, (24, 80))
    return name


def remount(node: Node, options: str) -> None:
    """Mount the node's /dev/pts anew, as an init would; UDIs that were there go."""
    node.tidy()
    node.run(f"umount /dev/pts && mount -t devpts -o {options} devpts /dev/pts", check=True)
    node.remember()


def ptys(node: Node) -> int:
    """How many terminals of the node's own /dev/pts are in use."""
    return sum(name.isdigit() for name in os.listdir(node.path("/dev/pts")))
