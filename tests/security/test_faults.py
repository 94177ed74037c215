"""The builder and `shifterctl gc` die, or fail, at each of their system calls in turn: one line says so, nothing stays.

strace kills the tracee when it enters a call, before the kernel does it, or makes the call fail without doing it. The door
starts the builder itself, so a wrapper lies over the interpreter, in the node only, which does so for one start when it is
told to. A system call is named by its name and count (`openat:when=7`): strace counts each name by itself, per process.
"""

import datetime
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from tests import node as nodes
from tests.conftest import SOAK
from tests.node import PREFIX, Node

RUN = "/run/shifter"
DIRECTORY = "/srv/fault"
PYTHON = next(
    line.split('"')[1] for line in (nodes.BUILD / "config.h").read_text().splitlines() if "SHIFTER_PYTHON" in line
)
WRAPPER = f"""#!/bin/sh
case $* in *builder.pyc\\ -) kind=base ;; *builder.pyc\\ *) kind=build ;; *) kind= ;; esac
if [ "$kind" ] && read -r options 2>/dev/null <{DIRECTORY}/$kind; then
    /bin/rm {DIRECTORY}/$kind
    exec /usr/bin/strace -f -qqq -o {DIRECTORY}/trace $options {DIRECTORY}/python "$@"
fi
exec {DIRECTORY}/python "$@"
"""

KEPT = re.compile(
    rf"{RUN}(/(site|swept|store|images|images/[-0-9a-f]+|udi|udi/\d+|udi/\d+/lock|udi/\d+/[0-9a-f]{{16}}(/(ns|record))?))?"
)
"""What may be in /run/shifter."""

KILLED = r"shifter: the builder was ended while [^\n]+: it took longer than udiBuildTimeout, or somebody killed it\n"

NOT_INJECTED = ("execve", "exit_group", "exit", "rt_sigreturn")
"""The first is strace's own start of the interpreter; the others only end something."""

NEVER_FAIL = ("brk", "futex")
"""libc takes an error number of brk(2) for an address, and loses a wake-up that failed; the kernel does neither."""


class Call(NamedTuple):
    """The *nth* system call *name* of a process; *main*: it is the program's first process that gets there first."""

    name: str
    nth: int
    main: bool


def calls(trace: str, begin: str) -> tuple[list[Call], list[Call]]:
    """Return the system calls of *trace* (`strace -f -o`) that can be told from each other, in their order.

    In two parts: up to the first call that starts with *begin* it is Python that starts, and from there on ours.
    """
    python: list[Call] = []
    found: dict[tuple[str, int], Call] = {}
    counts: Counter[tuple[str, str]] = Counter()
    first = ""
    for line in trace.splitlines():
        if match := re.match(r"(\d+) +(\w+)\(", line):
            pid, name = match.groups()
            first = first or pid
            if not python and line[match.start(2) :].startswith(begin):
                python = list(found.values())
            counts[pid, name] += 1
            if name not in NOT_INJECTED:
                found.setdefault((name, counts[pid, name]), Call(name, counts[pid, name], pid == first))
    return python, list(found.values())[len(python) :]


def sample(found: list[Call], count: int, shift: int = 0) -> list[Call]:
    """Return all of *found*; without SHIFTER_SOAK at most *count*, at even distances, other ones every day."""
    if SOAK:
        return found
    step = -(-len(found) // count)
    return found[(datetime.date.today().toordinal() + shift) % step :: step]


class Faults:
    """A node with the wrapper, and launches that go wrong in it."""

    def __init__(self, node: Node) -> None:
        self.node = node
        node.conf(udiBuildTimeout=30)
        node.write(f"{DIRECTORY}/wrapper", WRAPPER, 0o755)
        node.write(f"{DIRECTORY}/python", "", 0o755)
        node.write("/srv/data/file", "data\n")
        # Private, or the wrapper would also cover what it executes where mounts are shared.
        real = f"mount --bind {PYTHON} {DIRECTORY}/python && mount --make-private {DIRECTORY}/python"
        node.run(f"{real} && mount --bind {DIRECTORY}/wrapper {PYTHON}", check=True)
        self.mounts = Counter(mount.key for mount in node.mounts())
        self.elsewhere = {pid: {mount.key for mount in node.mounts(pid)} for pid in node.slaves}
        self.processes = {process.pid for process in node.processes()}
        self.volume: list[str] = []
        self.trace = ""

    def launch(self, kind: str = "", options: str = "") -> tuple[int, str, str]:
        """Launch; the builder of *kind* is started below strace with *options*. Return what the launch said."""
        if kind:
            self.node.write(f"{DIRECTORY}/{kind}", options + "\n")
        done = self.node.shifter("--image=tiny:1", *self.volume, "sh", "-c", "echo inside")
        if kind:
            assert not self.node.exists(f"{DIRECTORY}/{kind}"), "this builder was not started"
            # A builder that has answered goes on; what it left is looked at when it has ended.
            assert nodes.until(self.strays, 10) == []
            self.trace = self.node.read(f"{DIRECTORY}/trace")
        return done.returncode, done.stdout, done.stderr

    def fault(self, kind: str, call: Call, what: str) -> tuple[int, str, str]:
        """Launch; *call* of the builder of *kind* gets *what* injected."""
        inject = f"-e inject={call.name}:{what}:when={call.nth}"
        return self.launch(kind, f"-e trace={call.name},write {inject}")

    def hit(self) -> bool:
        """True if what was to be injected was."""
        return "INJECTED" in self.trace or "killed by SIGKILL" in self.trace

    def answered(self) -> bool:
        """True if the builder had given its answer."""
        return bool(re.search(r'write\(3, "(ok|again)=[^)]*\) += \d+$', self.trace, re.M))

    def strays(self) -> list[object]:
        """Processes that were not there at first."""
        return [process for process in self.node.processes() if process.pid not in self.processes]

    def debris(self) -> list[object]:
        """What is there and neither was at first nor belongs to the base, to a whole UDI or to a mounted image."""
        node = self.node
        files = set(node.run(f"[ ! -d {RUN} ] || find {RUN} -xdev", check=True).stdout.splitlines())
        found: list[object] = [path for path in files if not KEPT.fullmatch(path)]
        udis = {path.rpartition("/")[0] for path in files if path.endswith(("/ns", "/record"))}
        udis |= {path for path in files if re.fullmatch(rf"{RUN}/udi/\d+/[0-9a-f]{{16}}", path)}
        here = Counter(mount.key for mount in node.mounts())
        pins = {mount.target for mount in node.mounts() if mount.fstype == "nsfs"}
        found += [udi for udi in udis if not {f"{udi}/ns", f"{udi}/record"} <= files or f"{udi}/ns" not in pins]
        own = {RUN, f"{RUN}/store", *(f"{udi}/ns" for udi in udis)}
        found += [mount for mount, number in (here - self.mounts).items() if mount[0] not in own or number > 1]
        found += [f"gone: {mount}" for mount in self.mounts - here]
        for pid, before in self.elsewhere.items():
            there = {mount.key for mount in node.mounts(pid)} - before
            found += [f"elsewhere: {mount}" for mount in there if mount[0] != RUN]
        images = [mount.target for mount in node.store_mounts()[1:]]
        found += [f"image without its lock file: {path}" for path in images if f"{RUN}/images{path}" not in files]
        found += [f"mounted twice: {path}" for path, number in Counter(images).items() if number > 1]
        if len(loops := node.loops()) > len(images):
            found += loops
        return found + self.strays()

    def gc(self, everything: str, before: str = ":") -> None:
        """What `shifterctl gc` does, without the time that its command line takes to load, which is most of it."""
        code = f"from shifter.udi import inventory; inventory.collect('{nodes.CONF}', {everything})"
        code = f"import sys; sys.path.append('{PREFIX}/libexec/shifter/python'); {code}"
        done = self.node.run(f"{before}; exec {DIRECTORY}/python -I -S -B -c {shlex.quote(code)}")
        assert (done.returncode, done.stderr) == (0, ""), done.stderr

    def collect(self) -> None:
        """One `shifterctl gc`, after which nothing is left over. Files being written have a minute's grace: it is over."""
        self.gc(
            "False",
            f"[ ! -d {RUN} ] || find {RUN} -xdev -maxdepth 1 -name 'site.*' -exec touch -d '2 minutes ago' {{}} +",
        )
        assert nodes.until(self.debris, 10) == []

    def nothing(self) -> None:
        """No /run/shifter."""
        self.base()
        self.node.run(f"while umount -l {RUN} 2>/dev/null; do :; done; rm -rf {RUN}", check=True)

    def base(self) -> None:
        """/run/shifter with no UDI and no image."""
        self.gc("True")
        if not self.node.exists(f"{RUN}/store"):
            self.image()
            self.base()

    def image(self) -> None:
        """The image mounted, and no UDI."""
        self.node.run(f"cd {RUN}/udi/5001 && for ns in */ns; do umount -l $ns; rm -r ${{ns%/*}}; done")
        if len(self.node.store_mounts()) < 2:
            assert self.launch() == (0, "inside\n", "")
            self.image()

    def older(self) -> None:
        """A UDI of an older build, which has to be replaced."""
        assert self.launch() == (0, "inside\n", "")
        record = self.node.run(f"echo {RUN}/udi/*/*/record", check=True).stdout.strip()
        text = self.node.read(record)
        self.node.write(record, re.sub("^shifter=[^\0]*", "shifter=0.0.1-older", text), 0o600)


@pytest.fixture
def faults(tiny_node: Node) -> Iterator[Faults]:
    made = Faults(tiny_node)
    yield made
    made.node.run(f"umount {PYTHON} && umount {DIRECTORY}/python", check=True)


ERRORS = ("ENOMEM", "EIO", "ENOSPC", "EINTR")

STARTS = {
    # Where it starts from: (which builder, with a volume)
    "nothing": ("base", False),
    "base": ("build", True),
    "image": ("build", False),
    "older": ("build", True),
}


def prepare(faults: Faults, start: str) -> tuple[str, list[Call], list[Call]]:
    """Go to where it *start*s from; return the kind of builder, and the calls by which Python starts there, and ours."""
    kind, volume = STARTS[start]
    faults.volume = ["--volume=/srv/data:/mnt"] if volume else []
    getattr(faults, start)()
    assert faults.launch(kind, "-v") == (0, "inside\n", "")
    return kind, *calls(faults.trace, "read(0, ")


def all_of(chosen: list[Call], check: Callable[[Call], None]) -> None:
    """Call *check* for each; what is wrong with one does not hide what is wrong with others."""
    wrong = []
    for call in chosen:
        try:
            check(call)
        except AssertionError as error:
            wrong.append(f"{call}: {error}")
    assert not wrong, f"{len(wrong)} of {len(chosen)}:\n" + "\n".join(wrong)


@pytest.mark.soak
@pytest.mark.parametrize("start", STARTS)
def test_builder_killed_at_every_system_call(faults: Faults, start: str, finding: Callable[[str], None]) -> None:
    kind, python, own = prepare(faults, start)
    # How Python starts does not depend on what there is.
    chosen = sample(own, 3) + (sample(python, 2) if start == "image" else python[:: len(python) // 5] if SOAK else [])
    said: Counter[str] = Counter()
    missed = []

    def check(call: Call) -> None:
        getattr(faults, start)()
        status, out, err = faults.fault(kind, call, "signal=KILL")
        if not faults.hit():
            missed.append(call)
        if (faults.hit() and call.main and not faults.answered()) or status:
            assert (status, out) == (125, ""), err
            # Only one that is not the first process leaves somebody who can say more.
            assert re.fullmatch(KILLED if call.main else r"shifter: [^\n]+\n", err), err
        else:
            assert (out, err) == ("inside\n", "")
        faults.collect()
        assert faults.launch() == (0, "inside\n", "")
        said[err.partition(" while ")[2].partition(":")[0] or err.strip() or "worked"] += 1

    all_of(chosen, check)
    # Threads and fast children are not always as fast, and wait for each other with futex(2) or not.
    assert all(not call.main or call.name == "futex" for call in missed), missed
    text = ", ".join(f"{what} {number}" for what, number in said.most_common())
    finding(
        f"{len(chosen)} of {len(python) + len(own)} system calls, SIGKILL at each ({len(missed)} not reached again): {text}"
    )


@pytest.mark.soak
@pytest.mark.parametrize("start", ("nothing", "base"))
def test_builder_whose_system_calls_fail(faults: Faults, start: str, finding: Callable[[str], None]) -> None:
    kind, python, own = prepare(faults, start)
    for number, error in enumerate(ERRORS):
        chosen = sample(own, 1, number)
        if SOAK and start == "base":
            chosen += python if error == "ENOMEM" else python[:: len(python) // 20]
        chosen = [call for call in chosen if call.name not in NEVER_FAIL]
        said: Counter[str] = Counter()

        def check(call: Call, error: str = error, said: Counter[str] = said) -> None:
            getattr(faults, start)()
            status, out, err = faults.fault(kind, call, f"error={error}")
            if status:
                assert (status, out) == (125, ""), err
                assert re.fullmatch(r"shifter: [^\n]+\n", err), err
                assert not re.search("internal error|Traceback|<no Python frame>", err), err
                # An interpreter that can't start says it in its own words; libc says nothing without its first page.
                assert " while starting: " in err or not re.search("[a-z]Error:|was ended", err), err
            else:
                assert (out, err) == ("inside\n", "")
            faults.collect()
            assert faults.launch() == (0, "inside\n", "")
            said["refused" if status else "worked"] += 1

        all_of(chosen, check)
        finding(f"{len(chosen)} of {len(python) + len(own)} system calls, {error} from each: {dict(said)}")


def test_interpreter_that_cannot_start_says_why(tiny_node: Node) -> None:
    def hide() -> None:
        """In a namespace of its own: PID 1 of the node may still be starting, and is Python, too."""
        nodes.unshare(nodes.CLONE_NEWNS)
        nodes.mount("", "/", flags=nodes.MS_REC | nodes.MS_PRIVATE)
        nodes.mount("none", f"/usr/lib/{PYTHON.rpartition('/')[2]}/encodings", "tmpfs")

    done = tiny_node.shifter("--image=tiny:1", "true", prepare=hide)
    assert done.returncode == 125
    assert re.fullmatch("shifter: the builder failed while starting: Fatal Python error: [^\n]+\n", done.stderr)


def test_build_does_not_wait_for_a_thread_without_memory(faults: Faults) -> None:
    """The thread that reads ahead ended before its first line, and the build waited for it until udiBuildTimeout."""
    faults.base()
    # Its own stack of Python frames; what Python itself maps second is a cache that it can do without.
    assert faults.launch("build", "-e inject=mmap:error=ENOMEM:when=2") == (0, "inside\n", "")


def test_change_of_identity_that_is_refused_is_said(faults: Faults) -> None:
    faults.base()
    faults.volume = ["--volume=/srv/data:/mnt"]
    status, _, err = faults.launch("build", "-e inject=setfsuid:error=EPERM:when=1")
    assert (status, err.count("\n")) == (125, 1)
    assert "the kernel did not let the builder act as another account" in err


def test_site_file_that_cannot_be_renamed_leaves_nothing(faults: Faults) -> None:
    faults.base()
    status, _, err = faults.launch("build", "-e inject=rename:error=EIO:when=1")
    assert (status, err) == (125, f"shifter: the UDI could not be built: {RUN}/site: Input/output error\n")
    assert faults.debris() == []


@pytest.mark.soak
def test_gc_killed_at_every_system_call(faults: Faults, finding: Callable[[str], None]) -> None:
    node = faults.node
    gc = f"{DIRECTORY}/python -I {PREFIX}/bin/shifterctl gc"

    def something_to_do() -> None:
        """Two idle UDIs, one with a file for its pin; debris of two builds; an image that nobody needs."""
        for faults.volume in ([], ["--volume=/srv/data:/mnt"]):
            assert faults.launch() == (0, "inside\n", "")
        node.run(
            f"cd {RUN}/udi/5001 && mkdir dead && echo >dead/record.0123456789abcdef && >dead/ns && "
            f"mount --bind /proc/1/ns/net dead/ns && mkdir -p {RUN}/udi/5002/0123456789abcdef && >{RUN}/site.00 && "
            f"find {RUN} -xdev -type f ! -name ns ! -name store -exec touch -d '3 days ago' {{}} +",
            check=True,
        )

    def strace(options: str) -> str:
        return node.run(["sh", "-c", f"strace -f -qqq -o {DIRECTORY}/trace {options} {gc}"]).stdout

    something_to_do()
    report = strace("-v")
    assert len(report.splitlines()) == 5, report
    trace = node.read(f"{DIRECTORY}/trace")
    starting, own = calls(trace, "setns(")
    chosen = starting[:: len(starting) // 20 if SOAK else len(starting)] + sample(own, 3)

    def check(call: Call) -> None:
        something_to_do()
        inject = f"{call.name}:signal=KILL:when={call.nth}"
        strace(f"-e trace={shlex.quote(call.name)} -e inject={inject}")
        assert "killed by SIGKILL" in node.read(f"{DIRECTORY}/trace")
        faults.collect()
        left = node.run(f"find {RUN} -xdev -mindepth 2 ! -name lock ! -path '{RUN}/udi/500[12]'", check=True).stdout
        assert left == ""
        assert len(node.store_mounts()) == 1

    all_of(chosen, check)
    faults.volume = []
    assert faults.launch() == (0, "inside\n", "")
    finding(f"{len(chosen)} of {len(starting) + len(own)} system calls of gc, SIGKILL at each")
