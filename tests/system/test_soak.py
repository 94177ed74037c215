"""Many launches: every exit status is right, and nothing is left of any of them. `make soak` runs it with large numbers."""

import contextlib
import json
import os
import signal
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import node as nodes
from tests.conftest import SOAK
from tests.images import Tree
from tests.node import PREFIX, Node

USERS = ("alice", "bob", "carol", "dave")
IMAGES = ("one", "two", "three")

WORKER = textwrap.dedent(
    """
    import json, os, subprocess, sys, time
    shifter, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    wrong, times = [], []
    for number in range(first, first + count):
        image = ("one", "two", "three")[number % 3]
        status = number % 120
        extra = [f"--volume=/srv/{number % 7}:/mnt"] if number % 5 == 0 else []
        # What it is in, who it is, and a status of its own.
        command = f"read name < /etc/issue; echo $name $(id -u); exit {status}"
        start = time.perf_counter()
        done = subprocess.run([shifter, f"--image={image}:1", *extra, "/bin/sh", "-c", command], capture_output=True, text=True)
        times.append(time.perf_counter() - start)
        if done.returncode != status or done.stdout != f"{image} {os.getuid()}\\n" or done.stderr:
            wrong.append([number, status, done.returncode, done.stdout, done.stderr])
    print(json.dumps([wrong, times]))
    """
)


def slab() -> tuple[int, int]:
    """KiB of kernel objects, and mounts of the whole machine, when what can be dropped is dropped."""
    for _ in range(4):
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
        time.sleep(0.5)  # RCU and the workers that free namespaces
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    mounts = next(
        (line.split()[1] for line in Path("/proc/slabinfo").read_text().splitlines() if line.startswith("mnt_cache ")),
        "0",
    )
    return int(fields["Slab"].split()[0]), int(mounts)


@pytest.mark.soak
def test_launches_of_many_users(
    node: Node, image: Tree, tmp_path: Path, counts: dict[str, int], finding: Callable[[str], None]
) -> None:
    for name in IMAGES:
        tree = image.copy(tmp_path / name)
        (tree.path / "etc/issue").write_text(f"{name}\n")
        node.add_image(f"docker:{name}:1", tree)
    for number in range(7):
        node.mkdir(f"/srv/{number}")
    node.conf(udiIdleTime=1, udiMaxPerUser=4)  # so that UDIs come and go all the time
    node.write("/tmp/worker", WORKER)

    def round_of(total: int) -> list[float]:
        share = total // len(USERS)
        reaper = node.popen(f"while sleep 1; do {PREFIX}/bin/shifterctl gc || exit; done >/dev/null")
        workers = [
            node.popen(
                ["python3", "-I", "/tmp/worker", f"{PREFIX}/bin/shifter", str(index * share), str(share)], user=user
            )
            for index, user in enumerate(USERS)
        ]
        times = []
        try:
            for worker in workers:
                out, err = worker.communicate(timeout=1800)
                assert worker.returncode == 0, err
                wrong, took = json.loads(out)
                assert wrong == []
                times += took
            assert reaper.poll() is None, reaper.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(reaper.pid, signal.SIGKILL)
            reaper.communicate()
        return times

    def state() -> tuple[set[tuple[str, str, str, str]], int, int, list[str]]:
        done = node.shifterctl("gc", "--all")
        assert done.returncode == 0, done.stderr
        left = nodes.until(node.left, 5)
        fds = len(os.listdir(f"/proc/{node.pid}/fd"))
        return {mount.key for mount in node.mounts()}, len(node.loops()), fds, left

    round_of(40)
    before, kernel_before = state(), slab() if SOAK else (0, 0)
    start = time.monotonic()
    times = sorted(round_of(counts["launches"]))
    took = time.monotonic() - start
    assert len(times) == counts["launches"] // 4 * 4
    assert state() == before
    assert before[3] == []
    finding(
        f"{len(times)} launches by {len(USERS)} users over {len(IMAGES)} images in {took:.1f} s, every status and output right; "
        f"median {times[len(times) // 2] * 1000:.1f} ms, 99 % below {times[len(times) * 99 // 100] * 1000:.0f} ms, "
        f"longest {times[-1] * 1000:.0f} ms; no mount, loop device, process or descriptor of PID 1 left"
    )
    if SOAK:
        kernel = slab()
        growth = (kernel[0] - kernel_before[0]) / kernel_before[0]
        finding(f"slab {kernel_before[0]} KiB before, {kernel[0]} KiB after ({growth:+.2%})")
        finding(f"mount objects of the whole machine: {kernel_before[1]} before, {kernel[1]} after")
        assert growth < 0.01
