"""MPI in jobs of a real Slurm: MPICH and Open MPI of a real Debian image, by mpiexec over ssh and by srun's PMI."""

import re
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
        words = [f"mpicc.{kind}", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(directory / kind)]
        subprocess.run([*words, str(REPO / "tests/cluster/ring.c")], check=True)
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
    size = 2 * len(hosts)
    total = sum(range(size))
    return [f'{n} of {size} on {hosts[n // 2]}: {total} "Debian GNU/Linux 12 (bookworm)"' for n in range(size)]


def example(word: str) -> str:
    """The script of shifter-slurm(7) that has *word* in it, as it stands there."""
    page = (REPO / "man/shifter-slurm.7").read_text().replace("\\-", "-").partition(".SH EXAMPLES")[2]
    (found,) = [text for text in re.findall(r"^\.EX\n(.*?)^\.EE$", page, re.S | re.M) if word in text]
    return str(found)


PYTHON = """\
import platform
from mpi4py import MPI
world = MPI.COMM_WORLD
rank = world.rank, MPI.Get_processor_name(), platform.freedesktop_os_release()["ID"]
ranks, total = world.gather(rank), world.allreduce(world.rank)
if ranks:
    print(ranks, total)
"""


@once
def test_mpiexec(mpi: Slurm) -> None:
    """With nothing set up by the user: all tasks of the job, on all of its nodes, in the image, through its sshd."""
    mpi.head.write("/home/alice/hello.py", PYTHON, owner="alice")
    python, *said = mpi.finish(mpi.submit(example("mpiexec"))).splitlines()
    assert python == f"{[(rank, f'node{rank // 2 + 1}', 'debian') for rank in range(6)]} 15"
    assert (sorted(said[:6]), sorted(said[6:])) == (lines(), lines())
    # From a session on another node, which has no variable of Slurm's: as on a cluster without a workload manager.
    script = [f"shifter ssh node2 'mpiexec.{kind} -n 6 ./ring.{kind}'" for kind in KINDS]
    script += ["shifter mpiexec.mpich sh -c 'exit 7' 2>&1 >/dev/null; echo $?"]
    said = mpi.finish(mpi.submit("\n".join(script), *WANTED)).splitlines()
    assert (sorted(said[:6]), sorted(said[6:12])) == (lines(), lines(("node2", "node1", "node3")))
    assert said[12:] == ["7"]


@once
def test_srun(mpi: Slurm) -> None:
    """Slurm starts the tasks and connects them, by descriptors (PMI) and addresses (PMIx) that pass through shifter."""
    said = mpi.finish(mpi.submit(example("srun --mpi"))).splitlines()
    assert (sorted(said[:6]), sorted(said[6:])) == (lines(), lines())


@once
def test_mpiexec_without_an_sshd(mpi: Slurm) -> None:
    """It stays on its node, and needs none: on shared nodes, and in containers beside the job's own, where MPICH is told so."""
    script = [f"shifter mpiexec.{kind} -n 2 ./ring.{kind}" for kind in KINDS]
    other = "shifter --image=mpi:1 --volume=$HOME:/mnt"
    script += [f"HYDRA_LAUNCHER=fork {other} mpiexec.{kind} -n 2 ./ring.{kind}" for kind in KINDS]
    said = mpi.finish(mpi.submit("\n".join(script), "-wnode2", "-n2", "--image=mpi:1")).splitlines()
    assert [sorted(said[at : at + 2]) for at in range(0, len(said), 2)] == [lines(["node2"])] * 4


@once
def test_cancelled(mpi: Slurm) -> None:
    """The launchers' daemons on the other nodes, some of which leave their session, end with the job."""
    script = [f"shifter mpiexec.{kind} sh -c 'touch {kind}.$(hostname); sleep 1000' &" for kind in KINDS]
    job = mpi.submit("\n".join([*script, "wait"]), *WANTED)
    started = [f"/home/alice/{kind}.{node.name}" for kind in KINDS for node in mpi.nodes]
    wait_for(lambda: all(mpi.head.exists(path) for path in started))
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
