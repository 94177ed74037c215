"""docs/demo-slurm.sh: the steps from an installation to a job in an image, shown as they are done."""

import tempfile
from pathlib import Path

from tests.cluster.slurm import Slurm
from tests.images import Tree
from tests.node import CLONE_NEWNS, MS_PRIVATE, MS_REC, PREFIX, cluster, mount, unshare

JOB = """\
#SBATCH --image=docker:tiny:1 -N3 --exclusive
shifter cat /etc/os-release /var/hostsfile
srun shifter hostname
shifter ssh node3 'hostname; cat /usr/lib/hello.txt'
"""


def show(text: str) -> None:
    """Print a step of the chapter, or what a command says."""
    print(text, flush=True)


def main() -> None:
    """Do all of it."""
    unshare(CLONE_NEWNS)  # what the nodes share is mounted here first, and not to be seen by the host
    mount("", "/", flags=MS_REC | MS_PRIVATE)
    with tempfile.TemporaryDirectory() as scratch:
        nodes = cluster(3)
        show(f"1. make install, on three nodes\n   {nodes[0].shifter('--version').stdout.strip()}")
        show(
            "2. slurm.conf: Prolog, Epilog, PrologFlags   3. plugstack.conf: the plugin   4. slurmctld and slurmd are started"
        )
        with Slurm(nodes) as slurm:
            show("5. shifterctl doctor --slurm")
            show(nodes[0].shifterctl("doctor", "--slurm").stdout.rstrip())
            show("6. shifterimg import (here: a small image of busybox)")
            nodes.add_image("docker:tiny:1", Tree.tiny(Path(scratch) / "tiny"))
            show(f"7. as alice: sbatch <<END\n{JOB}END")
            job = slurm.submit(JOB)
            show(f"Submitted batch job {job}")
            show(slurm.finish(job).rstrip())
            show(f"8. after the job: ls /run/shifter/jobs; {PREFIX}/bin/shifterctl ps")
            show(nodes[0].run(f"ls /run/shifter/jobs; {PREFIX}/bin/shifterctl ps").stdout.rstrip())
            nodes.check_leaks()


if __name__ == "__main__":
    main()
