"""MPI in jobs of a real Slurm: MPICH and Open MPI of a real Debian image, by mpiexec over ssh and by srun's PMI."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

import tests.debian
from tests.cluster.job import Job
from tests.cluster.slurm import Slurm
from tests.conftest import scratch
from tests.images import Tree
from tests.node import REPO, Node, wait_for

PACKAGES = ("mpich", "openmpi-bin", "python3-minimal", "python3-mpi4py")
KINDS = ("mpich", "openmpi")
WANTED = ("--image=mpi:1", "-N3", "-n6", "--exclusive")
once = pytest.mark.parametrize("propagation", ["shared"], indirect=True)
"""What does not depend on mount propagation is run with one, that of most real nodes."""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """ring.c, compiled for each MPI."""
    directory = tmp_path_factory.mktemp("ring")
    for kind in KINDS:
        words = [f"mpicc.{kind}", "-O2", "-Wall", "-Wextra", "-Werror", "-o", directory / kind]
        subprocess.run([*words, REPO / "tests/cluster/ring.c"], check=True)
    return {kind: Path(directory, kind).read_bytes() for kind in KINDS}


@pytest.fixture
def mpi(slurm: Slurm, programs: dict[str, bytes]) -> Slurm:
    """Slurm with the image mpi:1, alice's ring.mpich and ring.openmpi, and nodes that say of themselves that they are not it."""
    slurm.nodes.add_image("docker:mpi:1", tests.debian.debian(scratch(), PACKAGES))
    for kind, program in programs.items():
        slurm.head.write(f"/home/alice/ring.{kind}", program, 0o755, "alice")
    for node in slurm.nodes:
        node.run("rm /etc/os-release; echo 'NAME=\"the node\"' > /etc/os-release", check=True)
    return slurm


def lines(hosts: Sequence[str] = ("node1", "node2", "node3")) -> list[str]:
    """What ring says, sorted, with two ranks on each of *hosts* in this order."""
    return [f'{n} of 6 on {hosts[n // 2]}: 15 "Debian GNU/Linux 12 (bookworm)"' for n in range(6)]


@once
@pytest.mark.parametrize("kind", KINDS)
def test_mpiexec(mpi: Slurm, kind: str) -> None:
    """With nothing set up by the user: all tasks of the job, on all of its nodes, in the image, through its sshd."""
    script = "\n".join([*(f"#SBATCH {word}" for word in WANTED), f"shifter mpiexec.{kind} ./ring.{kind}"])
    assert sorted(mpi.finish(mpi.submit(script)).splitlines()) == lines()
    # As on a cluster without a workload manager: from another node, in a session, which has no variable of Slurm's.
    script = f"shifter ssh node2 'mpiexec.{kind} -n 6 ./ring.{kind}'; shifter mpiexec.{kind} sh -c 'exit 7'; echo $?"
    said = mpi.finish(mpi.submit(script, *WANTED)).splitlines()
    placed = ("node1", "node2", "node3") if kind == "mpich" else ("node2", "node1", "node3")
    assert sorted(said[:6]) == lines(placed)
    assert said[-1] == "7"


@once
def test_srun(mpi: Slurm) -> None:
    """Slurm starts the tasks and connects them, by descriptors (PMI) and addresses (PMIx) that pass through shifter."""
    script = "srun --mpi=pmi2 shifter ./ring.mpich 2>&1; srun --mpi=pmix shifter ./ring.openmpi 2>&1"
    said = mpi.finish(mpi.submit(script, *WANTED)).splitlines()
    assert (sorted(said[:6]), sorted(said[6:])) == (lines(), lines())


PYTHON = """\
import platform
from mpi4py import MPI
world = MPI.COMM_WORLD
nodes = world.gather((world.rank, MPI.Get_processor_name(), platform.freedesktop_os_release()["ID"]))
if world.rank == 0:
    print(nodes, world.allreduce(world.rank))
else:
    world.allreduce(world.rank)
"""


@once
def test_python(mpi: Slurm) -> None:
    mpi.head.write("/home/alice/hello.py", PYTHON, owner="alice")
    job = mpi.submit("shifter mpiexec.openmpi python3 hello.py", *WANTED)
    assert mpi.finish(job) == f"{[(rank, f'node{rank // 2 + 1}', 'debian') for rank in range(6)]} 15\n"


@once
@pytest.mark.parametrize("kind", KINDS)
def test_cancelled(mpi: Slurm, kind: str) -> None:
    """The launcher's daemons on the other nodes, which leave their session, end with the job (`slurm` looks what is left)."""
    job = mpi.submit(f"shifter mpiexec.{kind} sh -c 'touch $(hostname); sleep 1000'", *WANTED)
    wait_for(lambda: all(mpi.head.exists(f"/home/alice/{node.name}") for node in mpi.nodes))
    mpi.run("scancel", job, check=True)
    mpi.wait_idle()
    for node in mpi.nodes:
        assert node.run(["pgrep", "-l", "-u", "alice"]).stdout == ""


def test_environment_of_launchers(node: Node, image: Tree) -> None:
    """It is a default in the containers of jobs: image, user and site have the last word; elsewhere there is none of it."""
    node.add_image("docker:tiny:1", image, env={"OMPI_MCA_plm": "slurm"})
    node.conf(siteEnvUnset="HYDRA_HOST_FILE")
    with Job([node], "tiny:1") as job:
        said = job.run("env", env={"PMIX_MCA_gds": "ds21"}).stdout.splitlines()
        assert sorted(line for line in said if line.startswith(("HYDRA_", "OMPI_", "PMIX_"))) == [
            "HYDRA_LAUNCHER=ssh",
            "OMPI_MCA_orte_default_hostfile=/var/hostsfile",
            "OMPI_MCA_plm=slurm",
            "PMIX_MCA_gds=ds21",
        ]
    said = node.shifter("--image=tiny:1", "env", user="alice").stdout.splitlines()
    assert [line for line in said if line.startswith(("HYDRA_", "OMPI_", "PMIX_"))] == ["OMPI_MCA_plm=slurm"]
