"""Fixtures of all tests, and the watch over what tests leave behind.

As root, the pytest process moves into a mount namespace of its own with a private `/run` and a read-only `/etc`, and
adopts orphans. So whatever a test mounts, starts or creates outside of a virtual node is seen after that test, nothing
of it reaches the machine, and other work on the same machine does not disturb the check.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tests.debian
from tests.images import Tree
from tests.node import (
    BUILD,
    CLONE_NEWNS,
    MS_NODEV,
    MS_NOSUID,
    MS_PRIVATE,
    MS_REC,
    PR_SET_CHILD_SUBREAPER,
    Cluster,
    Node,
    bind,
    cluster,
    mount,
    mountinfo,
    prctl,
    unshare,
    until,
)
from tests.node.cluster import BRIDGE
from tests.node.watch import job_cgroups, links, namespaces_held


def pytest_configure(config: pytest.Config) -> None:
    if os.geteuid() == 0:
        unshare(CLONE_NEWNS)
        mount("", "/", flags=MS_REC | MS_PRIVATE)
        mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
        bind("/etc", "/etc", readonly=True)
        prctl(PR_SET_CHILD_SUBREAPER, 1)


def _children() -> dict[int, str]:
    """Live children of this process, adopted orphans among them; dead ones that nobody waits for are waited for."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        for word in (task / "children").read_text().split():
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{word}/stat").read_text()
                if stat.rpartition(")")[2].split()[0] == "Z":
                    os.waitpid(int(word), os.WNOHANG)
                else:
                    found[int(word)] = Path(f"/proc/{word}/cmdline").read_text().replace("\0", " ") or stat
    return found


def _mounts() -> set[tuple[str, str, str, str]]:
    return {mount.key for mount in mountinfo()}


def _run() -> set[str]:
    return {f"/run/{name}" for name in os.listdir("/run")}


@pytest.fixture(autouse=True)
def nothing_left_on_the_host() -> Iterator[None]:
    """Fail a test that leaves something outside of its virtual nodes: a mount, a process, a namespace, a file in /run."""
    if os.geteuid() != 0:
        yield
        return
    mounts, children, run, namespaces = _mounts(), _children(), _run(), namespaces_held()
    yield

    def left() -> list[str]:
        found = [f"mount {m}" for m in sorted(_mounts() ^ mounts)]
        found += [f"process {pid}: {cmd}" for pid, cmd in _children().items() if pid not in children]
        found += [f"namespace {name}, by a descriptor" for name in sorted(namespaces_held() - namespaces)]
        # Other programs may make interfaces meanwhile; these names are those of a cluster's network.
        found += [f"network interface {name}" for name in sorted(links()) if re.fullmatch(rf"node\d+|{BRIDGE}", name)]
        return found + [f"file {name}" for name in sorted(_run() - run)]

    if found := until(left, 3):
        for pid in set(_children()) - set(children):  # the next test starts clean
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        pytest.fail("left on the host:\n  " + "\n  ".join(found), pytrace=False)


@pytest.fixture(params=["private", "shared"])
def propagation(request: pytest.FixtureRequest) -> str:
    """Mount propagation of `/`: private, or shared with other namespaces holding slave copies, as under systemd."""
    value: str = request.param
    return value


@pytest.fixture
def node(propagation: str) -> Iterator[Node]:
    """A virtual node, once with each propagation; checked for leaks after `shifterctl gc --all` at the end."""
    with Node(shared=propagation == "shared") as made:
        yield made
        made.check_leaks()


@pytest.fixture
def nodes(propagation: str) -> Iterator[Cluster]:
    """Three nodes with a network and a shared /home and /images, once with each propagation; checked as `node`."""
    with cluster(3, shared=propagation == "shared") as made:
        yield made
        made.check_leaks()


@pytest.fixture
def disk_node(propagation: str) -> Iterator[Node]:
    """The same with its image store on a disk file system, where EROFS needs no loop device (Linux >= 6.12)."""
    with Node(shared=propagation == "shared", disk=True) as made:
        yield made
        made.check_leaks()


@pytest.fixture(scope="session")
def image() -> Iterator[Tree]:
    """The tiny busybox image; made once. Don't change it: `image.copy(tmp_path / "x")` gives one to change."""
    base = Path(tempfile.mkdtemp(prefix="shifter-image-", dir=scratch()))
    try:
        yield Tree.tiny(base / "tiny")
    finally:
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny(image: Tree) -> Tree:
    """Another name of `image`."""
    return image


@pytest.fixture(scope="session")
def debian() -> Tree:
    """A real Debian (glibc, bash, coreutils, perl, ...), kept on the machine: 2 s when it is made. Don't change it."""
    return tests.debian.debian(scratch())


@pytest.fixture
def tiny_node(node: Node, image: Tree) -> Node:
    """A node whose store has the tiny image as docker:tiny:1 (squashfs)."""
    node.add_image("docker:tiny:1", image)
    return node


SOAK = os.environ.get("SHIFTER_SOAK") == "1"
"""Set by `make soak`: the same tests with the large numbers, and a report (tools/soak_report.py)."""

COUNTS = {
    # What: (every day, soak)
    "launches": (120, 2000),
    "reaped launches": (64, 640),
    "killed builders": (12, 200),
    "rounds of 64 at once": (1, 30),
    "wipes": (6, 60),
    "builds while a path is swapped": (12, 500),
    "fuzzed inputs": (250_000, 12_500_000),
    "signalled doors": (15, 300),
    "frozen doors": (2, 40),
    "different requests at once": (60, 1000),
    "cycles of a job": (3, 200),
    "jobs taken down under launches": (4, 300),
    "set-ups while a home changes": (3, 100),
    "hostile environments": (8, 2000),
}


@pytest.fixture(scope="session")
def counts() -> dict[str, int]:
    """How often the tests that are marked `soak` repeat what they do."""
    return {name: pair[SOAK] for name, pair in COUNTS.items()}


@pytest.fixture
def finding(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Say something for the report of `make soak`: numbers that a passing test would keep to itself."""

    def add(text: str) -> None:
        request.node.user_properties.append(("finding", text))

    return add


_results: list[dict[str, object]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if SOAK and (report.when == "call" or report.outcome != "passed"):
        findings = [value for name, value in report.user_properties if name == "finding"]
        failure = report.longreprtext.strip().splitlines()[-1:] if report.failed else []
        _results.append(
            {
                "test": report.nodeid,
                "when": report.when,
                "outcome": report.outcome,
                "seconds": report.duration,
                "findings": [*map(str, findings), *failure],
            }
        )


_cgroups: list[Path] = []


def _empty_cgroups() -> list[Path]:
    """New ones in which nobody is: those of another run at the same time have somebody, but for a moment."""
    found = []
    for path in set(job_cgroups()) - set(_cgroups):
        with contextlib.suppress(FileNotFoundError):
            if not (path / "cgroup.procs").read_text():
                found.append(path)
    return found


def pytest_sessionstart() -> None:
    _cgroups[:] = job_cgroups()


def pytest_sessionfinish(session: pytest.Session) -> None:
    # Of the machine's own hierarchy, which all workers share: only when all of them have ended.
    if not hasattr(session.config, "workerinput") and (left := until(_empty_cgroups, 5)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\nFAILED: cgroups left behind: {' '.join(map(str, left))}")
    if SOAK:
        BUILD.mkdir(exist_ok=True)
        counts = {name: pair[1] for name, pair in COUNTS.items()}
        (BUILD / "soak.json").write_text(json.dumps({"counts": counts, "tests": _results}, indent=1))


def scratch() -> Path:
    """Files that are dear to make again; what no session has used for a day goes when the next one starts."""
    base = BUILD / "test-images"
    base.mkdir(parents=True, exist_ok=True)
    for old in base.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another session was faster
            if time.time() - old.stat().st_mtime > 86400:
                shutil.rmtree(old, ignore_errors=True)
    return base
