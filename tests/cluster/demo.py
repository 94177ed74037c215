"""docs/demo-slurm.sh: the steps of docs/wlm.md from `make install` to a job in an image, executed as they are written there."""

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.slurm import Slurm
from tests.debian import debian
from tests.node import BUILD, CLONE_NEWNS, CONF, MS_PRIVATE, MS_REC, REPO, Node, cluster, mount, unshare

HEADING = "## Slurm: administrator"
INDENT = " " * 7
RESTART = 5
"""The number of the step before which all nodes are configured, and after which one is enough."""


def steps() -> list[tuple[str, str]]:
    """The numbered steps of the chapter: what each says, and its lines for a shell."""
    chapter = (REPO / "docs/wlm.md").read_text().partition(f"{HEADING}\n")[2].partition("\n## ")[0]
    found = []
    for step in re.findall(r"^\d+\. .*(?:\n(?:   .*)?)*", chapter, re.MULTILINE):
        script = [line.removeprefix(INDENT) for line in step.split("\n") if line.startswith(INDENT)]
        text = [line.strip() for line in step.split("\n") if not line.startswith(INDENT)]
        found.append((" ".join(text).strip(), "\n".join(script)))
    return found


def show(text: str) -> None:
    """Print a step of the chapter, or what a command says."""
    print(text, flush=True)


def on(nodes: Sequence[Node], script: str, user: str = "root") -> str:
    """Run lines of the chapter on each node, shown before; return what they said."""
    where = ",".join(node.name for node in nodes)
    show("\n".join(f"{user}@{where}> {line}" for line in script.split("\n")))
    said = "".join(
        node.run(["bash", "-ec", script], user, check=True, stderr=subprocess.STDOUT).stdout for node in nodes
    )
    if said:
        show(said.rstrip())
    return said


def install(target: Path) -> None:
    """Step 1: `make install` on this machine, into a directory that the nodes are shown."""
    text, script = steps()[0]
    show(f"\n{text}")
    script = script.replace("make install", f"make install DESTDIR={target}")
    show("\n".join(f"# {line}" for line in script.split("\n")))
    subprocess.run(["bash", "-ec", script], cwd=REPO, check=True, stdin=subprocess.DEVNULL)


def follow(target: Path, root: Path, shared: bool = False) -> None:
    """The other steps, with the installation in *target*; *root*: a root file system to import."""
    nodes = cluster(3, shared=shared, install=target)
    for node in nodes:
        node.write(CONF, (target / CONF.lstrip("/")).read_text())
    with Slurm(nodes, plain=True) as slurm:
        head = nodes[:1]
        archive = head[0].open("/srv/debian-12.tar", os.O_WRONLY | os.O_CREAT)
        with os.fdopen(archive, "wb") as file:
            subprocess.run(["tar", "-C", root, "-c", "."], check=True, stdout=file)
        for number, (text, script) in enumerate(steps()[1:], 2):
            show(f"\n{text}")
            if not slurm.has_cgroups:  # this machine's fault; doctor advises against it
                script = script.replace("proctrack/cgroup", "proctrack/linuxproc")
            if not script:
                slurm.shut_down()
                slurm.start()
            elif "sbatch" in script:
                job = on(head, script, "alice").split()[-1]
                slurm.finish(job)
                on(head, f"cat slurm-{job}.out", "alice")
            else:
                on(nodes if number < RESTART else head, script)
        show("\nWhat is left on the nodes:")
        on(nodes, "ls /run/shifter/jobs; shifterctl ps")
        nodes.check_leaks()


def main() -> None:
    """Make a Debian of this machine's packages, and follow the chapter with it."""
    unshare(CLONE_NEWNS)  # what the nodes share is mounted here first, and not to be seen by the host
    mount("", "/", flags=MS_REC | MS_PRIVATE)
    with tempfile.TemporaryDirectory(prefix="shifter-demo-", dir=BUILD) as scratch:
        install(Path(scratch, "node"))
        follow(Path(scratch, "node"), debian(Path(scratch)).path)


if __name__ == "__main__":
    main()
