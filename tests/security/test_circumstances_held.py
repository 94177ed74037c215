"""What a user does to their own launch at a bad moment: signals, a frozen cgroup, idle scheduling, a crowd. Others go on."""

import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.node import Mount, Node, mountinfo, wait_for
from tests.security.circumstances import DOOR, RUN, builders, held_image, stopped_builder, untouched, works

# --- signals ---------------------------------------------------------------------------------------------------------

SIGNALLER = textwrap.dedent(
    """
    # As the user, who may signal the door and all that it has not made root's yet: itself, or its process group.
    import os, random, signal, subprocess, sys, time
    shifter, count, longest = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    kinds = [signal.SIGSTOP, signal.SIGTSTP, signal.SIGKILL, signal.SIGINT, signal.SIGHUP]
    for number in range(count):
        kind = kinds[number % 5]
        words = [shifter, "--image=tiny:1", "--volume=/home/alice:/mnt" + "/" * number, "sh", "-c", "exit 7"]
        door = subprocess.Popen(words, stderr=subprocess.PIPE, process_group=0)
        time.sleep(random.uniform(0, longest))
        target = os.killpg if number % 2 else os.kill
        target(door.pid, kind)
        status = os.waitpid(door.pid, os.WUNTRACED)[1]
        if os.WIFSTOPPED(status):
            print(kind.name, "stopped", flush=True)
            sys.stdin.readline()
            os.killpg(door.pid, signal.SIGCONT)
            status = os.waitpid(door.pid, 0)[1]
        print(kind.name, os.waitstatus_to_exitcode(status), repr(door.stderr.read()), flush=True)
        door.stderr.close()
    """
)


@pytest.mark.soak
def test_signals_at_random_moments(tiny_node: Node, counts: dict[str, int], finding: Callable[[str], None]) -> None:
    """The door or its whole process group, so also what is about to become the builder, is stopped or ended by its user."""
    tiny_node.write("/tmp/signaller", SIGNALLER)
    works(tiny_node, "alice", "bob")
    begin = time.monotonic()
    works(tiny_node, "alice")
    longest = time.monotonic() - begin
    seen: collections.Counter[str] = collections.Counter()
    with untouched(tiny_node):
        signaller = tiny_node.popen(
            ["python3", "-I", "/tmp/signaller", DOOR, str(counts["signalled doors"]), str(longest / 2)],
            "alice",
            stdin=subprocess.PIPE,
        )
        assert signaller.stdin and signaller.stdout
        for line in signaller.stdout:
            name, result, *rest = line.split(maxsplit=2)
            seen[f"{name} {result}"] += 1
            if result == "stopped":
                works(tiny_node, "bob")
                signaller.stdin.write("\n")
                signaller.stdin.flush()
            elif result == "125":  # a signal for the group ended the builder before it was root's
                assert "the builder was ended while starting" in rest[0], line
            else:
                assert int(result) in (7, -signal.Signals[name]) and rest == ["b''\n"], line
        assert signaller.wait() == 0, signaller.communicate()
    finding(", ".join(f"{what}: {count}" for what, count in sorted(seen.items())))
    assert seen.total() >= counts["signalled doors"]


# --- frozen ----------------------------------------------------------------------------------------------------------


class Freezer:
    """A cgroup of our own below a mounted hierarchy of version 1 or 2."""

    def __init__(self, mount: Mount) -> None:
        self.old = mount.fstype == "cgroup"
        self.path = Path(mount.target) / f"shifter-test-{os.getpid()}-{time.monotonic_ns()}"
        self.path.mkdir()

    def enter(self) -> None:
        (self.path / "cgroup.procs").write_text("0")

    def freeze(self, frozen: bool) -> None:
        if self.old:
            (self.path / "freezer.state").write_text("FROZEN" if frozen else "THAWED")
        else:
            (self.path / "cgroup.freeze").write_text(str(int(frozen)))

    def remove(self) -> None:
        self.freeze(False)
        wait_for(lambda: not (self.path / "cgroup.procs").read_text())
        self.path.rmdir()


def hierarchies() -> list[Mount]:
    """The mounted cgroup hierarchies that can freeze."""
    found = [m for m in mountinfo() if m.fstype == "cgroup" and "freezer" in m.super_options.split(",")]
    return found + [m for m in mountinfo() if m.fstype == "cgroup2"]


@pytest.fixture(params=hierarchies(), ids=lambda mount: mount.fstype)
def freezer(request: pytest.FixtureRequest) -> Iterator[Freezer]:
    made = Freezer(request.param)
    yield made
    made.remove()


@pytest.mark.soak
def test_frozen_in_mid_build(tiny_node: Node, freezer: Freezer, counts: dict[str, int]) -> None:
    """The builder is outside of the caller's cgroup before it takes a lock that others wait for."""
    works(tiny_node, "alice", "bob")

    def start(number: int) -> "subprocess.Popen[str]":
        volume = f"--volume=/home/alice:/mnt{'/' * number}"
        return tiny_node.popen([DOOR, "--image=tiny:1", volume, "sh", "-c", "exit 7"], "alice", prepare=freezer.enter)

    with untouched(tiny_node):
        with held_image(tiny_node):
            door = start(0)
            assert stopped_builder(tiny_node, door)
            freezer.freeze(True)
        wait_for(lambda: not builders(tiny_node))
        works(tiny_node, "bob")
        assert door.poll() is None
        freezer.freeze(False)
        assert door.wait(30) == 7
        chance = random.Random(3)
        for number in range(counts["frozen doors"]):
            # Nothing is mounted, so that the builder, if it comes so far, mounts the image that bob wants.
            tiny_node.shifterctl("gc", "--all", check=True)
            door = start(number + 1)
            time.sleep(chance.uniform(0, 0.06))
            freezer.freeze(True)
            works(tiny_node, "bob")
            freezer.freeze(False)
            assert door.wait(30) == 7


# --- idle ------------------------------------------------------------------------------------------------------------


def test_idle_caller_on_busy_processors(tiny_node: Node) -> None:
    """The builder of an idle caller holds the lock of an image: it must not be idle itself."""
    works(tiny_node, "alice", "bob")

    def idle() -> None:
        os.nice(19)
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))

    with untouched(tiny_node):
        spinners = [tiny_node.popen("while :; do :; done", "alice") for _ in range(2 * (os.cpu_count() or 1))]
        try:
            tiny_node.shifterctl("gc", "--all", check=True)
            doors = [
                tiny_node.popen(
                    [DOOR, "--image=tiny:1", "--volume=/home/alice:/mnt", "sh", "-c", "exit 7"], "alice", prepare=idle
                )
                for _ in range(2)
            ]
            works(tiny_node, "bob", "carol")
            assert all(spinner.poll() is None for spinner in spinners)
        finally:
            for spinner in spinners:
                spinner.kill()
                spinner.wait()
        assert [door.wait(30) for door in doors] == [7, 7]


# --- a crowd ---------------------------------------------------------------------------------------------------------

CROWD = textwrap.dedent(
    """
    import json, os, resource, subprocess, sys
    shifter, count = sys.argv[1], int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    home = os.environ["HOME"]
    doors = []
    for number in range(count):
        os.mkdir(f"{home}/v{number}")
        with open(f"{home}/v{number}/which", "w") as file:
            file.write(str(number))
        words = [shifter, "--image=tiny:1", f"--volume={home}/v{number}:/mnt", "sh", "-c", "id -u; cat /mnt/which; exit 7"]
        doors.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    wrong = []
    for number, door in enumerate(doors):
        out = door.communicate()[0]
        if (door.returncode, out) != (7, f"{os.getuid()}\\n{number}"):
            wrong.append([number, door.returncode, out])
    print(json.dumps(wrong))
    """
)


@pytest.mark.soak
def test_different_requests_at_once(tiny_node: Node, counts: dict[str, int], finding: Callable[[str], None]) -> None:
    """One user has many, three have some: all are answered, each by its own UDI, and UDIs and builders are bounded."""
    tiny_node.conf(udiMaxPerUser=4)
    tiny_node.write("/tmp/crowd", CROWD)
    works(tiny_node, "alice", "bob")
    total = counts["different requests at once"]
    shares = {"alice": total, "bob": total // 8, "carol": total // 8, "dave": total // 8}
    most: collections.Counter[str] = collections.Counter()
    with untouched(tiny_node):
        crowds = [
            tiny_node.popen(["python3", "-I", "/tmp/crowd", DOOR, str(share)], user) for user, share in shares.items()
        ]
        while any(crowd.poll() is None for crowd in crowds):
            most["builders"] = max(most["builders"], len(builders(tiny_node)))
            for user in shares:
                with contextlib.suppress(FileNotFoundError):
                    names = os.listdir(tiny_node.path(f"{RUN}/udi/{tiny_node.users[user].uid}"))
                    most[user] = max(most[user], len(names) - 1)
            time.sleep(0.005)
        for crowd in crowds:
            out, err = crowd.communicate()
            assert crowd.returncode == 0, err
            assert json.loads(out) == []
    finding(f"different requests at once: {shares}; most UDIs and builders at a time: {dict(most)}")
    assert all(most[user] <= 4 + 1 for user in shares), most
    # One that builds for each user, and those that have answered and still sweep.
    assert most["builders"] <= 4 * len(shares), most
