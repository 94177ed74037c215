#!/usr/bin/env python3
"""What Shifter adds to a job of Slurm: its beginning, its end, the prolog, memory. See README.md for the rows."""

import contextlib
import json
import os
import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.nodes import main, setup_steps
from tests.cluster.slurm import Slurm
from tests.debian import debian
from tests.node import PREFIX, Node, cluster, wait_for
from tests.node.watch import mountinfo

USER, IMAGE = "alice", "debian:12"
SETUP, UNSETUP = f"{PREFIX}/sbin/setupRoot", f"{PREFIX}/sbin/unsetupRoot"
PROLOG, EPILOG = f"{PREFIX}/sbin/shifter-slurm-prolog", f"{PREFIX}/sbin/shifter-slurm-epilog"
CLOCK = "echo $EPOCHREALTIME"
"""All of the script: its first line is its last one, too."""
HERE = ("-N3", "--exclusive")
LOOK_UP = """
import sys, time
sys.path.insert(0, "%s/libexec/shifter/python")
from shifter.wlm import slurm
begin = time.monotonic()
slurm.look_up(sys.argv[1], "/usr/bin")
print((time.monotonic() - begin) * 1000)
"""
"""What the prolog asks of slurmctld, without the rest of the prolog."""
PACKAGES = ("slurmctld", "slurmd", "munge")


class Row(NamedTuple):
    """One line of the first table: a job on a Slurm that knows of Shifter or not, with *options*."""

    key: str
    title: str
    slurm: str
    options: tuple[str, ...] = ()


ROWS = (
    Row("bare", "a Slurm without a line of Shifter's", "bare"),
    Row("flags", "the same with `PrologFlags=Alloc,Contain,DeferBatch`", "flags"),
    Row("no-image", "plugin, prolog and epilog; a job without an image", "ours"),
    Row("no-sshd", "a job with `--image --sshd=no`", "ours", (f"--image={IMAGE}", "--sshd=no")),
    Row("image", "a job with `--image`", "ours", (f"--image={IMAGE}",)),
)
LATE = {"bare": ("Prolog=", "Epilog=", "PrologFlags="), "flags": ("Prolog=", "Epilog=")}
"""Lines of slurm.conf that a Slurm does not have."""
PHASES = {"srun": "`srun` to the first line", "sbatch": "`sbatch`", "first": "to the first line", "end": "end"}


def sample(slurm: Slurm, options: tuple[str, ...]) -> dict[str, float]:
    """Milliseconds: srun until all tasks run; sbatch; from its start to the first line; from that until all nodes are idle."""
    begin = time.time()
    done = slurm.run("srun", *HERE, *options, "bash", "-c", CLOCK, check=True)
    started = max(map(float, done.stdout.split()))
    slurm.wait_idle()
    by_srun, begin = started - begin, time.time()
    job = slurm.submit(f"#!/bin/bash\n{CLOCK}", *HERE, *options)
    submitted = time.time()
    wait_for(lambda: slurm.output(job).endswith("\n"), 60, 0.01)
    slurm.wait_idle()
    idle, line = time.time(), float(slurm.output(job))
    spent = {"srun": by_srun, "sbatch": submitted - begin, "first": line - begin, "end": idle - line}
    return {name: seconds * 1000 for name, seconds in spent.items()}


def timed(node: Node, *command: str, **options: Any) -> tuple[float, str]:
    """Milliseconds of a command of root's that the harness starts on a node, and what it printed."""
    begin = time.monotonic()
    done = node.run(list(command), check=True, **options)
    return (time.monotonic() - begin) * 1000, done.stdout


def by_hand(slurm: Slurm, job: str) -> dict[str, Any]:
    """One prolog and epilog as slurmd starts them for *job*, setupRoot and unsetupRoot for the same, each from nothing."""
    node, spent = slurm.head, {}
    named = {"SLURM_JOB_ID": job, "SLURM_JOB_UID": str(node.users[USER].uid), "SLURMD_NODENAME": node.name}
    wish = {"SPANK_SHIFTER_IMAGE": IMAGE, "SPANK_SHIFTER_IMAGETYPE": "docker"}
    for kind, environment in (("without an image", named), ("of a job with an image", named | wish)):
        node.shifterctl("gc", "--all")
        for name, program in (("prolog", PROLOG), ("epilog", EPILOG)):
            spent[f"{name} {kind}"], _ = timed(node, program, env=environment, clean=True)
    node.shifterctl("gc", "--all")
    names = " ".join(f"{each.name}/1" for each in slurm.nodes)
    spent["setupRoot"], said = timed(
        node, SETUP, "--json", "--job", job, "-u", USER, "-N", names, "docker", IMAGE, clean=True
    )
    spent["unsetupRoot"], _ = timed(node, UNSETUP, "--job", job, clean=True)
    look_up = ("/usr/bin/python3", "-I", "-S", "-c", LOOK_UP % PREFIX, job)
    spent["of the prolog: what it asks of Slurm (`squeue`)"] = float(timed(node, *look_up)[1])
    steps = {name: seconds * 1000 for name, seconds in json.loads(said)["steps"].items()}
    return {"spent": spent, "steps": steps}


def resident(slurm: Slurm, options: tuple[str, ...]) -> dict[str, float]:
    """KiB on the second node while a job has that node alone: of processes (PSS), and in tmpfs of the UDI."""
    node = slurm.nodes[1]
    job = slurm.submit("echo up; exec sleep 1000", "-N1", "-wnode2", "--exclusive", *options)
    wait_for(lambda: slurm.output(job) == "up\n", 60, 0.01)
    time.sleep(0.5)
    found = {"PSS of all processes": sum(map(pss, node.processes())), "tmpfs of the UDI": 0.0}
    if options:
        inside = node.popen([f"{PREFIX}/bin/shifter", "sleep", "1000"], USER, env={"SLURM_JOB_ID": job})
        wait_for(lambda: Path(f"/proc/{inside.pid}/comm").read_text() == "sleep\n")
        others = {mount.dev for mount in mountinfo(node.pid)}
        kept = {mount.dev: mount.target for mount in mountinfo(inside.pid) if mount.fstype == "tmpfs"}
        for target in (target for device, target in kept.items() if device not in others):
            status = os.statvfs(f"/proc/{inside.pid}/root{target}")
            found["tmpfs of the UDI"] += (status.f_blocks - status.f_bfree) * status.f_frsize / 1024
        inside.kill()
        inside.communicate()
    slurm.run("scancel", job, check=True)
    slurm.wait_idle()
    return found


def pss(process: Any) -> float:
    """KiB of a process, what it shares divided by those who share it; nothing of one that is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return float(line.split()[1])
    return 0.0


def measure(number: int, cycles: int) -> dict[str, Any]:
    """All samples; the rows of the first table interleaved, in another order each round."""
    machine = common.machine()
    with contextlib.ExitStack() as stack:
        slurms = {"ours": stack.enter_context(Slurm(cluster(3)))}
        for name, missing in LATE.items():
            text = "".join(line for line in slurms["ours"].conf.splitlines(True) if not line.startswith(missing))
            slurms[name] = stack.enter_context(Slurm(cluster(3), files={"slurm.conf": text, "plugstack.conf": ""}))
        ours = slurms["ours"]
        ours.nodes.add_image(f"docker:{IMAGE}", debian(common.PROJECT / "build/test-images"))
        samples: dict[str, list[dict[str, float]]] = {row.key: [] for row in ROWS}
        for turn in range(-1, number):  # the first round is not counted
            for row in random.sample(ROWS, len(ROWS)):
                spent = sample(slurms[row.slurm], row.options)
                if turn >= 0:
                    samples[row.key].append(spent)
        job = ours.submit("sleep 100000", *HERE)
        ours.wait_state(job, "RUNNING")
        hands = [by_hand(ours, job) for _ in range(cycles + 1)][1:]
        ours.run("scancel", job, check=True)
        ours.wait_idle()
        memory: dict[str, list[dict[str, float]]] = {row.key: [] for row in ROWS}
        for _ in range(max(1, cycles // 4)):
            for row in ROWS:
                memory[row.key].append(resident(slurms[row.slurm], row.options))
    return {
        "machine": machine, "samples": samples, "hands": hands, "memory": memory, "load_after": os.getloadavg(),
    }  # fmt: skip


def report(result: dict[str, Any]) -> str:
    """The tables as Markdown."""
    samples, hands, memory = result["samples"], result["hands"], result["memory"]
    lines = ["# Slurm", "", *common.describe(result), ""]
    titles = [f"{title}, ms | 95 %" for title in PHASES.values()]
    lines += [f"| row | job on 3 nodes | n | {' | '.join(titles)} |", "|---" * (3 + 2 * len(PHASES)) + "|"]
    for row in ROWS:
        values = {phase: [one[phase] for one in samples[row.key]] for phase in PHASES}
        cells = [f"{median(found):.0f} | {common.p95(found):.0f}" for found in values.values()]
        lines.append(f"| {row.key} | {row.title} | {len(samples[row.key])} | {' | '.join(cells)} |")
    lines += ["", "The three nodes share one machine, so their three prologs do not run side by side as on a cluster."]
    lines += [
        "slurmctld starts batch jobs once a second: up to 1000 ms of the time to the first line are that; `srun` has none of it."
    ]
    lines += ["", f"## By hand on one node, medians of {len(hands)}", "", "| | ms |", "|---|---|"]
    lines += [f"| {name} | {median(one['spent'][name] for one in hands):.1f} |" for name in hands[0]["spent"]]
    lines += setup_steps([one["steps"] for one in hands], median(one["spent"]["setupRoot"] for one in hands))
    lines += ["", f"## Resident on a node while a job is up, KiB, medians of {len(memory['bare'])}", ""]
    kinds = list(memory["bare"][0])
    lines += [f"| row | {' | '.join(kinds)} |", "|---" * (1 + len(kinds)) + "|"]
    for row in ROWS:
        cells = [f"{median(one[kind] for one in memory[row.key]):.0f}" for kind in kinds]
        lines.append(f"| {row.key} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main("slurm", __doc__, 20, PACKAGES, measure, report))
