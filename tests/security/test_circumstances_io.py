"""What a user's launch may wait for without end: their own file system, terminal, pipe. Nobody else waits for it."""

import contextlib
import functools
import os
import subprocess
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.node import Node, wait_for
from tests.security.circumstances import DOOR, builders, untouched, works
from tests.security.fuse import GETATTR, INIT, LOOKUP, STATFS, UserFuse

VOLUME = "--volume=/home/alice/fuse/a:/mnt"
PLACE = "/home/alice/fuse"


@contextlib.contextmanager
def mounted(node: Node, patience: dict[int, int], allow_other: bool = True) -> Iterator[UserFuse]:
    """A file system of alice's at PLACE; it ends, and is unmounted, with the block."""
    node.mkdir(PLACE, owner="alice")
    fuse = UserFuse(patience)
    try:
        node.mount("alice", PLACE, "fuse", data=fuse.options(5001, allow_other))
        yield fuse
    finally:
        fuse.end()
        node.run(["umount", "--lazy", PLACE], check=True)


def others_go_on(node: Node) -> None:
    """What others do while something of alice's hangs."""
    works(node, "bob")
    for words, user in ((["gc"], "root"), (["ps"], "root"), (["ps"], "bob"), (["ps"], "alice")):
        done = node.shifterctl(*words, user=user)
        assert done.returncode == 0 and done.stderr == "", (words, user, done)


def refused(door: "subprocess.Popen[str]", *texts: str) -> None:
    out, err = door.communicate(timeout=60)
    assert (door.returncode, out) == (125, "") and err.startswith("shifter: ") and err.count("\n") == 1, err
    assert all(text in err for text in texts), err


def in_request(pid: int) -> bool:
    """True if the process waits for the answer of a FUSE daemon."""
    return "fuse" in (text := Path(f"/proc/{pid}/wchan").read_text()) or "request_wait" in text


def test_file_system_that_takes_no_request(tiny_node: Node) -> None:
    """udiBuildTimeout ends the builder."""
    tiny_node.conf(udiBuildTimeout=1)
    works(tiny_node, "alice", "bob")
    with untouched(tiny_node), mounted(tiny_node, {}) as fuse:
        wait_for(lambda: INIT in fuse.asked)
        fuse.reading = False
        door = tiny_node.popen([DOOR, "--image=tiny:1", VOLUME, "true"], "alice")
        others_go_on(tiny_node)
        refused(door, "opening volume /home/alice/fuse/a", "udiBuildTimeout")


def test_file_system_that_takes_a_request_and_does_not_answer(tiny_node: Node) -> None:
    """The kernel lets the builder go only with the answer, or the end of the daemon (not by SIGKILL). Others do not wait."""
    works(tiny_node, "alice", "bob")
    with untouched(tiny_node):
        for opcode in (INIT, LOOKUP, STATFS):
            with mounted(tiny_node, {opcode: 0}):
                first = tiny_node.popen([DOOR, "--image=tiny:1", VOLUME, "true"], "alice")
                wait_for(lambda: any(map(in_request, builders(tiny_node))))
                # A second launch of alice's waits for the first, and starts no second builder.
                second = tiny_node.popen([DOOR, "--image=tiny:1", VOLUME + "/", "true"], "alice")
                others_go_on(tiny_node)
                assert len(builders(tiny_node)) == 1 and first.poll() is second.poll() is None, opcode
            refused(first, "/home/alice/fuse")
            refused(second, "/home/alice/fuse")


def test_file_system_that_answers_once(tiny_node: Node) -> None:
    """The builder found the directory; the door, which looks again as the user, gets no answer. It holds no lock by then."""
    works(tiny_node, "alice", "bob")
    with untouched(tiny_node):
        with mounted(tiny_node, {LOOKUP: 1}):
            door = tiny_node.popen([DOOR, "--image=tiny:1", VOLUME, "true"], "alice")
            wait_for(lambda: in_request(door.pid))
            others_go_on(tiny_node)
            works(tiny_node, "alice")
            assert door.poll() is None
        refused(door, "/home/alice/fuse/a")


def test_file_system_that_shows_itself_to_its_owner_only(tiny_node: Node) -> None:
    """Without allow_other root is not let in, and the daemon is asked for nothing."""
    works(tiny_node, "alice", "bob")
    with (
        untouched(tiny_node),
        mounted(tiny_node, dict.fromkeys((LOOKUP, GETATTR, STATFS), 0), allow_other=False) as fuse,
    ):
        for source in (PLACE, f"{PLACE}/a"):
            door = tiny_node.popen([DOOR, "--image=tiny:1", f"--volume={source}:/mnt", "true"], "alice")
            refused(door, source, "refuses root" if source == PLACE else "ermission denied")
        assert set(fuse.asked) <= {INIT}


# --- messages that nobody reads --------------------------------------------------------------------------------------


Stuck = Callable[[], "contextlib.AbstractContextManager[tuple[int, Callable[[], None]]]"]


@contextlib.contextmanager
def full_pipe() -> Iterator[tuple[int, Callable[[], None]]]:
    """A pipe that is full, and what empties it."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, bytes(4096))
    os.set_blocking(write, True)

    try:
        yield write, lambda: drain(read)
    finally:
        os.close(read)
        os.close(write)


@contextlib.contextmanager
def stopped_terminal() -> Iterator[tuple[int, Callable[[], None]]]:
    """A terminal after control-S, and what is control-Q."""
    master, slave = os.openpty()
    os.set_blocking(master, False)
    termios.tcflow(slave, termios.TCOOFF)

    def go_on() -> None:
        termios.tcflow(slave, termios.TCOON)
        drain(master)

    try:
        yield slave, go_on
    finally:
        os.close(master)
        os.close(slave)


def drain(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        while os.read(fd, 65536):
            pass


@pytest.mark.parametrize("stuck", [full_pipe, stopped_terminal])
def test_messages_that_nobody_reads(tiny_node: Node, stuck: Stuck) -> None:
    """A door that could not write its error held its user's lock; a builder with many steps to tell waited for its door."""
    deep = "/home/alice/" + "d" * 234 + "/" + "d" * 234
    tiny_node.mkdir(deep, owner="alice")
    works(tiny_node, "alice", "bob")
    missing = "--volume=/home/alice/missing:/mnt"
    many = "--volume=" + ";".join(
        f"{deep}:/{number}" for number in range(120)
    )  # more than a pipe holds; then: too long a record
    plain = "--volume=/home/alice:/mnt"
    with untouched(tiny_node):
        for options, status in (([missing], 125), (["-v", many], 125), (["-v", plain], 6), (["-v", plain], 6)):
            with stuck() as (end, release):
                words = [DOOR, *options, "--image=tiny:1", "/bin/busybox", "sh", "-c", "exit 6"]
                door = tiny_node.popen(words, "alice", stdout=end, stderr=end)
                wait_for(functools.partial(writing, door.pid))
                works(tiny_node, "alice", "bob")
                assert door.poll() is None
                while door.poll() is None:
                    release()
                assert door.returncode == status, options[0]


def writing(pid: int) -> bool:
    """True if the process sleeps in write(2) or writev(2)."""
    numbers = ("1", "20") if os.uname().machine == "x86_64" else ("64", "66")
    return Path(f"/proc/{pid}/syscall").read_text().split()[0] in numbers


def test_messages_that_can_not_be_written(tiny_node: Node) -> None:
    """The status is right all the same."""
    works(tiny_node, "alice", "bob")
    with untouched(tiny_node):
        for to in ("> /dev/full 2>&1", ">&- 2>&-"):
            for option, status in (
                ("-v", 6),
                ("-v", 6),
                ("--volume=/home/alice/missing:/mnt", 125),
                ("--nonsense", 125),
            ):
                done = tiny_node.run(f"exec {DOOR} {option} --image=tiny:1 sh -c 'exit 6' {to}", "alice")
                assert (done.returncode, done.stdout, done.stderr) == (status, "", ""), (option, to)
