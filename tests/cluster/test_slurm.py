"""Jobs of a real Slurm in images: what sbatch, srun and salloc of an ordinary user do, on three nodes."""

from tests.cluster.slurm import Slurm
from tests.node import PREFIX


def test_batch_job(slurm: Slurm) -> None:
    """The user's side of it all: a line of `#SBATCH`, and the cluster is inside the image."""
    script = """\
#SBATCH --image=docker:tiny:1
#SBATCH -N3 --exclusive
shifter cat /usr/lib/hello.txt /var/hostsfile
shifter sh -c 'for node in node1 node2 node3; do ssh $node "hostname; cat /usr/lib/hello.txt; id -un"; done'
srun shifter hostname | sort
"""
    job = slurm.submit(script)
    nodes = "".join(f"node{n}\nhello from the image\nalice\n" for n in (1, 2, 3))
    assert slurm.finish(job) == f"hello from the image\nnode1\nnode2\nnode3\n{nodes}node1\nnode2\nnode3\n"
