#!/usr/bin/env python3
"""How long a login from container to container takes, beside Debian's OpenSSH and dropbear. See README.md for the rows."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.nodes import main, setup_steps
from tests.debian import debian
from tests.node import PREFIX, Cluster, Node, cluster

USER = "alice"
SETUP, UNSETUP, SHIFTER = f"{PREFIX}/sbin/setupRoot", f"{PREFIX}/sbin/unsetupRoot", f"{PREFIX}/bin/shifter"
JOB = ("--job", "1", "-u", USER, "-N", "node1/1 node2/1", "docker", "debian:12")
CROWD = 64
BULK = 1 << 30
"""Bytes that scp copies from one tmpfs to another."""
PORTS = {"debian": 2201, "debian-crowd": 2202, "dropbear": 2203}
PACKAGES = ("openssh-server", "openssh-client", "dropbear-bin")
TIMED = "a=${EPOCHREALTIME/./}; %s || exit 1; b=${EPOCHREALTIME/./}; echo $((b - a))"
"""Microseconds of a command, as bash sees it: the same bash in the image and outside of it."""


class Row(NamedTuple):
    """One line of the table: *script* runs on the first node as the user, *inside* the UDI or outside of it."""

    key: str
    title: str
    script: str
    inside: bool = False


def _debian(port: str, program: str = "ssh") -> str:
    return f"{program} -{'P' if program == 'scp' else 'p'} {PORTS[port]}"


def _crowd(command: str) -> str:
    return f"{{ for i in {{1..{CROWD}}}; do {command} & pids+=($!); done; for p in ${{pids[@]}}; do wait $p || exit 1; done; }}"


# It asks for a host's key that it does not know as PORT-less name: -y, so it verifies less than the others.
DROPBEAR = f"dbclient -y -p {PORTS['dropbear']} -i .ssh/id_dropbear node2 true </dev/null"
ROWS = (
    Row("ours", "`ssh node2 true` in the UDI", "ssh -n node2 true", True),
    Row("debian", "Debian's OpenSSH, as it is shipped", f"{_debian('debian')} -n node2 true"),
    Row("dropbear", "dropbear", DROPBEAR),
    Row("ours-crowd", f"{CROWD} at once, in the UDI", _crowd("ssh -n node2 true"), True),
    Row(
        "debian-crowd",
        f"{CROWD} at once, Debian's, MaxStartups raised",
        _crowd(f"{_debian('debian-crowd')} -n node2 true"),
    ),
    Row("ours-bulk", "`scp` of 1 GiB, in the UDI", "scp -q /tmp/bulk node2:/tmp/copy", True),
    Row("debian-bulk", "`scp` of 1 GiB, Debian's", f"{_debian('debian', 'scp')} -q /tmp/bulk node2:/tmp/copy"),
)
SLOW = {"ours-crowd": 5, "debian-crowd": 5, "ours-bulk": 10, "debian-bulk": 10}
"""Rows of which there is one sample in so many rounds."""


def serve(node: Node) -> list[subprocess.Popen[str]]:
    """Start the other servers on *node*, with the machine's own host keys and configuration."""
    node.mkdir("/run/sshd")
    node.run(["dropbearkey", "-t", "ed25519", "-f", "/root/dropbear_key"], check=True)
    sshd = ["/usr/sbin/sshd", "-D", "-f", "/etc/ssh/sshd_config", "-p"]
    servers = [
        node.popen([*sshd, str(PORTS["debian"])]),
        node.popen([*sshd, str(PORTS["debian-crowd"]), "-o", "MaxStartups=512"]),
        node.popen(["dropbear", "-F", "-r", "/root/dropbear_key", "-p", str(PORTS["dropbear"])]),
    ]
    for port in PORTS.values():
        node.wait_port(port)
    return servers


def furnish(nodes: Cluster) -> None:
    """Make the user's keys, who they may log in as, and which hosts they know: what Debian's and dropbear need."""
    first = nodes[0]
    script = """
        set -e; cd; mkdir -m 700 .ssh; cd .ssh
        ssh-keygen -q -t ed25519 -N '' -f id_ed25519
        dropbearkey -t ed25519 -f id_dropbear | grep ^ssh- > id_dropbear.pub
        cat id_ed25519.pub id_dropbear.pub > authorized_keys; chmod 600 authorized_keys
        for port in %s; do ssh-keyscan -p $port node2; done > known_hosts 2>/dev/null
    """
    first.run(["bash", "-c", script % f"{PORTS['debian']} {PORTS['debian-crowd']}"], USER, check=True)
    first.run(
        ["head", "-c", str(BULK), "/dev/urandom"], stdout=os.open(first.path("/tmp/bulk"), os.O_WRONLY | os.O_CREAT)
    )
    first.run("chmod 644 /tmp/bulk", check=True)


def sample(node: Node, row: Row) -> float:
    """Milliseconds of one row's command."""
    shell = ["/bin/bash", "-c", TIMED % row.script]
    command = [SHIFTER, *shell] if row.inside else shell
    return int(node.run(command, USER, cwd=f"/home/{USER}", check=True, timeout=300).stdout) / 1000


def timed(node: Node, *command: str, user: str = "root") -> tuple[float, str]:
    """Milliseconds of a command that the harness starts on a node, and what it printed."""
    begin = time.monotonic()
    done = node.run(list(command), user, cwd="/", check=True)
    return (time.monotonic() - begin) * 1000, done.stdout


def cycle(node: Node) -> dict[str, Any]:
    """Set the job up from nothing, log in, end it; and for comparison the first launch of the same image."""
    node.shifterctl("gc", "--all")
    first, _ = timed(node, SHIFTER, "--image=debian:12", "true", user=USER)
    node.shifterctl("gc", "--all")
    begin = time.monotonic()
    setup, said = timed(node, SETUP, "--json", *JOB)
    login, _ = timed(node, SHIFTER, "ssh", "-n", "node1", "true", user=USER)
    total = (time.monotonic() - begin) * 1000
    unsetup, _ = timed(node, UNSETUP, "--job", "1")
    return {
        "first launch": first,
        "setupRoot": setup,
        "setupRoot and a login": total,
        "a login by `shifter ssh`": login,
        "unsetupRoot": unsetup,
        "steps": {key: value * 1000 for key, value in json.loads(said)["steps"].items()},
    }


def measure(number: int, cycles: int) -> dict[str, Any]:
    """All samples, rows interleaved in another order each round."""
    machine = common.machine()
    with cluster(2) as nodes:
        nodes.add_image("docker:debian:12", debian(common.PROJECT / "build/test-images"))
        servers = serve(nodes[1])
        furnish(nodes)
        ends = [cycle(nodes[0]) for _ in range(cycles)]
        for node in nodes:
            node.run([SETUP, *JOB], check=True)
        samples: dict[str, list[float]] = {row.key: [] for row in ROWS}
        for turn in range(-1, number):  # the first round is not counted
            for row in random.sample(ROWS, len(ROWS)):
                if turn % SLOW.get(row.key, 1) == 0 or turn < 0:
                    spent = sample(nodes[0], row)
                    if turn >= 0:
                        samples[row.key].append(spent)
        for node in nodes:
            node.run([UNSETUP, "--job", "1"], check=True)
        for server in servers:
            server.kill()
            server.communicate()
    return {"machine": machine, "samples": samples, "cycles": ends, "load_after": os.getloadavg()}


def report(result: dict[str, Any]) -> str:
    """The tables as Markdown."""
    middle = {key: median(values) for key, values in result["samples"].items()}
    reference = {
        "ours-crowd": "debian-crowd",
        "debian-crowd": "debian-crowd",
        "ours-bulk": "debian-bulk",
        "debian-bulk": "debian-bulk",
    }
    lines = ["# ssh", "", *common.describe(result), ""]
    lines += ["| row | what | n | median, ms | 95 % | against Debian's |", "|---|---|---|---|---|---|"]
    for row in ROWS:
        values = result["samples"][row.key]
        ratio = middle[row.key] / middle[reference.get(row.key, "debian")]
        lines.append(
            f"| {row.key} | {row.title} | {len(values)} | {middle[row.key]:.1f} | {common.p95(values):.1f} | {ratio:.2f} |"
        )
    lines += ["", "Budgets of issue 4: one login <= 0.25, 64 at once <= 0.35, 1 GiB <= 1.", ""]
    cycles = result["cycles"]
    lines += [f"## A job's beginning and end, medians of {len(cycles)}", "", "| | ms |", "|---|---|"]
    lines += [f"| {name} | {median(one[name] for one in cycles):.1f} |" for name in cycles[0] if name != "steps"]
    over = median(one["setupRoot and a login"] - one["first launch"] for one in cycles)
    lines += [f"| setupRoot and a login, more than the first launch (budget 120) | {over:.1f} |"]
    lines += setup_steps([one["steps"] for one in cycles], median(one["setupRoot"] for one in cycles))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main("ssh", __doc__, 40, PACKAGES, measure, report))
