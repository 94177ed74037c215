"""What an attack on a node's state must leave: nothing, and a node on which the next launch works."""

import os
import random
from collections.abc import Iterator, Sequence
from subprocess import CompletedProcess
from typing import Any

from tests.conftest import SOAK
from tests.node import Node

RUN = "/run/shifter"
Traces = dict[str, list[Any]]


def traces(node: Node) -> Traces:
    """Everything of Shifter's that can be left on *node*: files, mounts of both namespaces, loop devices, processes."""
    base = node.path(RUN)
    files = [
        os.path.relpath(os.path.join(top, name), base) for top, dirs, names in os.walk(base) for name in dirs + names
    ]
    return {
        "files": sorted(name for name in files if name != "swept"),
        "mounts": sorted((mount.target, mount.fstype) for mount in node.mounts()),
        "store": sorted((mount.target, mount.fstype) for mount in node.store_mounts()),
        "loops": sorted((loop.dev, loop.inode) for loop in node.loops()),
        "processes": sorted(process.pid for process in node.processes()),
    }


def collect(node: Node, *options: str) -> str:
    """Run `shifterctl gc`, which has nothing to complain of; return its report."""
    done = node.shifterctl("gc", *options)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def nothing_left(node: Node, before: Traces, ref: str = "tiny:1") -> None:
    """Assert that after one `shifterctl gc` nothing is on *node* that was not there *before*, and that *ref* starts."""
    collect(node)
    after = traces(node)
    new = {what: [item for item in items if item not in before[what]] for what, items in after.items()}
    assert not any(new.values()), new
    done = node.shifter(f"--image={ref}", "/bin/busybox", "id", "-u")
    assert (done.returncode, done.stdout) == (0, "5001\n"), done.stderr


def refused(done: "CompletedProcess[str]", *words: str) -> str:
    """Assert that *done* is a launch that Shifter refused in one clear line with *words* in it; return the line."""
    assert (done.returncode, done.stdout) == (125, ""), (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("shifter: ") and done.stderr.count("\n") == 1, done.stderr
    assert not any(word in done.stderr for word in ("Traceback", "internal error")), done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    return done.stderr


def damages(good: bytes, seed: int, flips: int, cuts: int) -> Iterator[tuple[int, bytes]]:
    """Versions of *good* with one byte changed, and cut off, with the position: some of them, with SHIFTER_SOAK=1 all."""
    chance = random.Random(seed)
    places: Sequence[int] = range(len(good))
    for place in places if SOAK else sorted(chance.sample(places, flips)):
        for byte in {0, 10, 0xFF, good[place] ^ 1} if SOAK else {chance.choice((0, 10, 0xFF)), good[place] ^ 1}:
            if byte != good[place]:
                yield place, good[:place] + bytes([byte]) + good[place + 1 :]
    for place in places if SOAK else sorted(chance.sample(places, cuts)):
        yield place, good[:place]
