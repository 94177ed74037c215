"""Whatever a caller starts the door with: the builder is the same process as for anybody, and the launch is right.

For each circumstance one launch is built and one joined. The builder is stopped in between and looked at.
"""

import dataclasses
import fcntl
import os
import signal
import subprocess
import termios
from collections.abc import Callable, Iterator

import pytest

from tests.node import Node
from tests.security.circumstances import DOOR, held_image, portrait, stopped_builder, untouched, works
from tests.system.test_diagnoses import can_raise_limits

EVIL = "/home/alice/evil"
ALL_SIGNALS = [number for number in range(1, 65) if number not in (9, 19, 32, 33)]


@dataclasses.dataclass
class Circumstance:
    """*env* is added to a login's; *prepare* runs before the exec of the door, *closed* names descriptors that it lacks.

    *limits* go to prlimit(1), which executes the door under them. *deadly*: the kernel may end the door, or the command.
    """

    env: dict[str, str] = dataclasses.field(default_factory=dict)
    prepare: Callable[[], object] | None = None
    closed: tuple[int, ...] = ()
    limits: str = ""
    deadly: bool = False


def idle() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.nice(19)
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def ignored() -> None:
    for number in ALL_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def pending() -> None:
    """Signals that would end or stop the door, waiting for whoever unblocks them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ALL_SIGNALS)
    for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGHUP, signal.SIGTSTP, signal.SIGRTMAX):
        os.kill(os.getpid(), number)


VARIABLES = [
    *("PATH", "IFS", "ENV", "BASH_ENV", "PS4", "SHELLOPTS", "HOME", "USER", "LOGNAME", "SHELL", "TMPDIR", "PWD", "TERM"),
    *("LD_LIBRARY_PATH", "LD_DEBUG", "LD_DEBUG_OUTPUT", "LD_PROFILE", "LD_TRACE_LOADED_OBJECTS", "GLIBC_TUNABLES"),
    *("GCONV_PATH", "LOCPATH", "NLSPATH", "LANGUAGE", "LC_ALL", "HOSTALIASES", "LOCALDOMAIN", "RES_OPTIONS", "TZ", "TZDIR"),
    *(f"MALLOC_{name}" for name in ("TRACE", "CHECK_", "PERTURB_", "ARENA_MAX", "TOP_PAD_", "MMAP_THRESHOLD_")),
    *(f"PYTHON{name}" for name in ("PATH", "HOME", "STARTUP", "USERBASE", "PYCACHEPREFIX", "PLATLIBDIR", "INSPECT", "MALLOC")),
    *(f"PYTHON{name}" for name in ("WARNINGS", "BREAKPOINT", "DEBUG", "DUMPREFS", "TRACEMALLOC", "PROFILEIMPORTTIME")),
]  # fmt: skip
# A kernel that runs out of what these allow ends the door or the command.
DEADLY = ("nofile=0", "nofile=3", "fsize=0", "as=0", "as=8000000", "data=0", "stack=0", "stack=65536", "cpu=0", "cpu=1")
HARMLESS = "--nproc=1 --core=unlimited --memlock=0 --sigpending=0 --msgqueue=0 --locks=0 --rttime=1 --rss=0"

CIRCUMSTANCES: dict[str, Circumstance] = {
    "nothing": Circumstance(),
    "variables of others": Circumstance(dict.fromkeys(VARIABLES, EVIL)),
    "empty variables": Circumstance(dict.fromkeys(VARIABLES, "")),
    # In eight: execve(2) takes no single string of more than 128 KiB, for the door as for any program.
    "a megabyte of variables": Circumstance({f"BIG{number}": "b" * 131000 for number in range(8)}),
    "ten thousand variables with odd bytes": Circumstance(
        {f"%n \udcff{number}\x01": "=%s\n\udcfe" * 5 for number in range(10000)}
    ),
    "idle": Circumstance(prepare=idle),
    "umask 777": Circumstance(prepare=lambda: os.umask(0o777)),
    "signals ignored": Circumstance(prepare=ignored),
    "signals blocked and pending": Circumstance(prepare=pending),
    "harmless limits": Circumstance(limits=HARMLESS),
    **{limit: Circumstance(limits=f"--{limit}", deadly=True) for limit in DEADLY},
    **{
        f"closed {closed}": Circumstance(closed=closed)
        for closed in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2))
    },
}


@pytest.fixture
def terminal() -> Iterator[int]:
    master, slave = os.openpty()
    yield slave
    os.close(master)
    os.close(slave)


def start(node: Node, what: Circumstance, request: int, terminal: int, hard: bool) -> "subprocess.Popen[str]":
    """Start the door on a controlling terminal, in a circumstance. Each *request* is another one, for the same place."""

    def prepare() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        if what.prepare:
            what.prepare()
        for fd in what.closed:
            os.close(fd)

    words = [DOOR, "--image=tiny:1", f"--volume=/home/alice:/srv{'/' * request}", "/bin/busybox", "sh", "-c", "exit 6"]
    limits = [limit if hard else limit + ":" for limit in what.limits.split()]  # with a colon: the soft one only
    before = ["/usr/bin/prlimit", *limits] if limits else []
    return node.popen(
        [*before, *words], "alice", env=what.env, prepare=prepare, cwd=EVIL, stdin=terminal, pass_fds=(terminal,)
    )


def answered(door: "subprocess.Popen[str]", what: Circumstance) -> str:
    """What is wrong with the answer of a launch, or ""."""
    out, err = door.communicate(timeout=60)
    right = (door.returncode, out, err) == (6, "", "")
    if what.deadly:  # not one word, or one line
        refused = door.returncode == 125 and err.startswith("shifter: ") and err.count("\n") == 1
        right = right or (out == "" and (refused or (door.returncode < 0 and err == "")))
    return "" if right else f"exit {door.returncode}: {out!r} {err!r}"


def test_builder_never_shows_who_called(tiny_node: Node, terminal: int) -> None:
    """Environment, descriptors, limits, signals, scheduling, session, terminal: nothing of the caller's reaches root.

    A builder of a SCHED_IDLE caller stayed SCHED_IDLE, with the lock of an image that others wait for: musl has no
    sched_setscheduler(3).
    """
    for name in ("sitecustomize", "encodings/__init__", "posix", "shifter/__init__"):
        tiny_node.write(f"{EVIL}/{name}.py", "open('/tmp/pwned', 'w')", owner="alice")
    works(tiny_node, "alice", "bob")
    wrong = []
    expected: dict[str, object] = {}
    with untouched(tiny_node):
        for request, (name, what) in enumerate(CIRCUMSTANCES.items()):
            # Root may raise what a user lowered, but not on every machine: in some containers only the soft limits.
            hard = can_raise_limits()
            with held_image(tiny_node):
                door = start(tiny_node, what, request, terminal, hard)
                builder = stopped_builder(tiny_node, door)
                seen = portrait(builder) if builder else {}
            expected = expected or seen
            wrong += [
                f"{name}: {key}: {seen[key]!r} instead of {expected[key]!r}"
                for key in seen
                if seen[key] != expected[key]
            ]
            answers = [answered(door, what), answered(start(tiny_node, what, request, terminal, hard), what)]
            answers += ["no builder"] if not builder and not what.deadly else []
            wrong += [f"{name}: {answer}" for answer in answers if answer]
        assert not tiny_node.exists("/tmp/pwned")
    assert wrong == []
    assert expected["environment"] == b"LC_ALL=C\0" and expected["leads its session"] is True
    assert expected["terminal, nice, policy"] == ("0", "0", "0")
    assert "/dev/pts/" not in str(expected["descriptors"]), "every one of these doors has its terminal"


def test_limits_that_root_can_not_raise(tiny_node: Node, terminal: int) -> None:
    """In some containers: the builder may not even start. The door says so in one line, and nothing is left."""
    tiny_node.mkdir(EVIL, owner="alice")
    works(tiny_node, "alice", "bob")
    with untouched(tiny_node):
        for request, limit in enumerate(DEADLY):
            what = Circumstance(limits=f"--{limit}", deadly=True)
            assert answered(start(tiny_node, what, request, terminal, hard=True), what) == "", limit
