"""A user who looks into door and builder while a launch is stopped in the middle: every way to trace, read or steer them."""

import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node import Node, wait_for
from tests.security.circumstances import DOOR, held_image, stopped_builder, untouched, works

PROBE = textwrap.dedent(
    """
    # Prints which of the ways into each process work. The first is a child of this program's own: there all do.
    import ctypes, errno, os, resource, signal, subprocess, sys, time
    libc = ctypes.CDLL(None, use_errno=True)
    READV, WRITEV, KCMP = {"x86_64": (310, 311, 312), "aarch64": (270, 271, 272)}[os.uname().machine]
    PIDFD_GETFD = 438

    def call(number, *arguments):
        words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
        result = libc.syscall(ctypes.c_long(number), *words)
        if result < 0:
            raise OSError(ctypes.get_errno(), "")
        return result

    def ptrace(request, pid):
        if libc.ptrace(ctypes.c_long(request), pid, ctypes.c_long(0), ctypes.c_long(0)) < 0:
            raise OSError(ctypes.get_errno(), "")

    def attach(pid):
        ptrace(16, pid)
        os.waitpid(pid, 0x40000000)  # __WALL
        ptrace(17, pid)

    def seize(pid):
        ptrace(0x4206, pid)
        ptrace(0x4207, pid)  # PTRACE_INTERRUPT: only what is stopped can be detached
        os.waitpid(pid, 0x40000000)
        ptrace(17, pid)

    def transfer(number):
        def move(pid):
            memory = ctypes.create_string_buffer(1)
            here, there = (ctypes.c_ulong * 2)(ctypes.addressof(memory), 1), (ctypes.c_ulong * 2)(0, 1)
            try:
                call(number, pid, here, 1, there, 1, 0)
            except OSError as error:
                if error.errno != errno.EFAULT:  # there is nothing at that address, but the right was given
                    raise
        return move

    def steal(pid):
        fd = os.pidfd_open(pid)
        try:
            os.close(call(PIDFD_GETFD, fd, 0, 0))
        finally:
            os.close(fd)

    def read(name, flags=os.O_RDONLY):
        def look(pid):
            fd = os.open(f"/proc/{pid}/{name}", flags)
            try:
                os.pread(fd, 1, 0)
            except OSError as error:
                if error.errno != errno.EIO:  # of mem: as above
                    raise
            finally:
                os.close(fd)
        return look

    def write(name, text):
        def change(pid):
            with open(f"/proc/{pid}/{name}", "w") as file:
                file.write(text)
        return change

    def on(function, name):
        return lambda pid: function(f"/proc/{pid}/{name}")

    LOOK = {
        "PTRACE_ATTACH": attach, "PTRACE_SEIZE": seize,
        "process_vm_readv": transfer(READV), "process_vm_writev": transfer(WRITEV),
        "kcmp": lambda pid: call(KCMP, pid, os.getpid(), 2, 0, 0), "pidfd_getfd": steal,
        "prlimit": lambda pid: resource.prlimit(pid, resource.RLIMIT_CORE),
        **{name: read(name) for name in ("environ", "auxv", "maps", "smaps", "syscall", "io", "personality")},
        "mem": read("mem", os.O_RDWR), "clear_refs": write("clear_refs", "1"), "oom_score_adj": write("oom_score_adj", "1000"),
        **{f"link {name}": on(os.readlink, name) for name in ("exe", "cwd", "root", "ns/mnt", "fd/0")},
        **{f"through {name}": on(os.stat, name) for name in ("exe", "cwd", "root", "ns/pid", "fd/0")},
        **{f"list {name}": on(os.listdir, name) for name in ("fd", "fdinfo", "map_files", "root/")},
    }
    STEER = {
        "signal": lambda pid: os.kill(pid, 0), "pidfd": lambda pid: signal.pidfd_send_signal(os.pidfd_open(pid), 0),
        "nice": lambda pid: os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, pid)),
        "policy": lambda pid: os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0)),
        "affinity": lambda pid: os.sched_setaffinity(pid, os.sched_getaffinity(pid)),
    }

    def works(way, pid):
        try:
            way(pid)
        except OSError:
            return False
        return True

    child = subprocess.Popen(["sleep", "60"])
    while open(f"/proc/{child.pid}/comm").read() != "sleep\\n":
        time.sleep(0.001)
    for pid in [child.pid, *map(int, sys.argv[1:])]:
        print(*(name for ways in (LOOK, STEER) for name, way in ways.items() if works(way, pid)), sep=", ")
    print(*LOOK, *STEER, sep=", ")
    child.kill()
    child.wait()
    """
)


@pytest.fixture
def stopped(tiny_node: Node) -> Iterator[tuple[int, int]]:
    """The door and the builder of a launch of alice's that stands still, as the host counts; it goes on afterwards."""
    tiny_node.conf(allowLocalChroot=1)  # the node's own root as an image: it has what the probe needs
    works(tiny_node, "alice", "bob")
    assert tiny_node.shifter("--image=local:/", "true").returncode == 0  # so that alice has a UDI to join meanwhile
    tiny_node.write("/tmp/probe", PROBE)
    with untouched(tiny_node):
        with held_image(tiny_node):
            words = [DOOR, "--image=tiny:1", "--volume=/home/alice:/mnt", "sh", "-c", "exit 7"]
            door = tiny_node.popen(words, "alice")
            yield door.pid, stopped_builder(tiny_node, door)
        assert door.wait(30) == 7


def test_no_way_into_a_launch(tiny_node: Node, stopped: tuple[int, int]) -> None:
    """Its user may send signals to the door, which is their process; nothing else, and nobody reaches the builder."""
    inner = [str(next(p.nspid for p in tiny_node.processes() if p.pid == pid)) for pid in stopped]
    probe = ["python3", "-I", "/tmp/probe", *inner]
    runs = {"alice": probe, "bob": probe, "alice in a UDI": [DOOR, "--image=local:/", *probe]}
    for user, command in runs.items():
        done = tiny_node.run(command, user.split()[0], check=True)
        control, door, builder, everything = (set(line.split(", ")) for line in done.stdout.splitlines())
        assert control == everything, (user, everything - control)
        assert door == ({""} if user == "bob" else {"signal", "pidfd"}), user
        assert builder == {""}, user
    # Not dumpable: what is in their /proc directories is root's. So no core either, whatever core_pattern is.
    plain = tiny_node.popen(["sleep", "60"], "alice")
    wait_for(lambda: Path(f"/proc/{plain.pid}/comm").read_text() == "sleep\n")
    owners = [Path(f"/proc/{pid}/mem").stat().st_uid for pid in (plain.pid, *stopped)]
    plain.kill()
    plain.wait()
    assert owners == [5001, 0, 0]
