"""How jobs of a real Slurm live and end among others: at a terminal, beside another user's, at their limit, by a power cut."""

import functools
from typing import Any

import pytest

from tests.cluster.slurm import REQUEUE, Slurm
from tests.cluster.test_slurm import HELLO, nothing_left, once, udis
from tests.images import Tree
from tests.node import PREFIX, Terminal, wait_for
from tests.ptys import SHELL, work_at

DOOR = f"{PREFIX}/bin/shifter"
STAY = "while [ -e $SLURM_JOB_ID ]; do sleep 0.1; done"


@once
def test_interactive_shells_of_an_allocation(slurm: Slurm, debian: Tree) -> None:
    """A shell in the image, at the terminal of salloc and at that which srun makes; who closes the window ends the job."""
    slurm.nodes.add_image("docker:debian:12", debian)
    wanted = ["-Q", "--exclusive", "--image=debian:12"]
    with Terminal(slurm.head) as terminal:
        assert work_at(terminal, ["salloc", "-N2", *wanted, DOOR, *SHELL]) == terminal.name
        nothing_left(slurm)
        assert work_at(terminal, ["srun", "-wnode2", "--pty", *wanted, DOOR, *SHELL]).startswith("/dev/pts/")
        nothing_left(slurm)
        process = terminal.popen(["salloc", "-N2", *wanted, DOOR, "ssh", "-t", "node2", *SHELL])
        terminal.write("hostname; echo here we' 'are\n")
        assert "node2" in terminal.read("here we are")
        terminal.close()
        process.wait(20)
    nothing_left(slurm)


@once
def test_two_users_jobs_on_different_nodes(slurm: Slurm) -> None:
    """Each has the image and an sshd on the nodes of their own job; the other's are no place to go."""
    script = (
        f"shifter cat /var/hostsfile; : > $SLURM_JOB_ID; {STAY}; shifter sh -c 'ssh $(tail -n1 /var/hostsfile) id -un'"
    )
    wanted = ("--exclusive", "--image=tiny:1")
    jobs = {
        "alice": slurm.submit(script, "-wnode1,node2", *wanted),
        "bob": slurm.submit(script, "-wnode3", *wanted, user="bob"),
    }
    for user, job in jobs.items():
        wait_for(functools.partial(slurm.head.exists, f"/home/{user}/{job}"))
    seen = [[f"job.{jobs['alice']}"]] * 2 + [[f"job.{jobs['bob']}"]]
    assert [udis(node) for node in slurm.nodes] == seen
    blind = "-F/dev/null -p1204 -oBatchMode=yes -oStrictHostKeyChecking=no -oUserKnownHostsFile=/dev/null"
    own = f"/opt/udiImage/bin/ssh -i/opt/udiImage/etc/id_ed25519 {blind}"
    for user, here, other, there in (("alice", 0, "bob", 2), ("bob", 2, "alice", 1)):
        node, env = slurm.nodes[here], {"SLURM_JOB_ID": jobs[user]}
        done = node.shifter("sh", "-c", f"{own} {user}@{node.name} id -un", user=user, env=env)
        assert done.stdout == f"{user}\n", done
        address = f"{other}@{slurm.nodes[there].name}"
        for done in (
            node.shifter("sh", "-c", f"{own} {address} id", user=user, env=env),
            node.run(f"/usr/bin/ssh {blind} {address} id", user),
        ):
            assert done.returncode == 255 and done.stdout == "" and "Permission denied" in done.stderr, done
        done = slurm.nodes[there].shifter("id", user=user, env={"SLURM_JOB_ID": jobs[other]})
        assert (done.returncode, done.stdout) == (125, ""), done
    for user, job in jobs.items():
        slurm.head.run(["rm", f"/home/{user}/{job}"])
    outputs = {user: slurm.finish(job, user) for user, job in jobs.items()}
    assert outputs == {"alice": "node1\nnode2\nalice\n", "bob": "node3\nbob\n"}
    nothing_left(slurm)


QUICK = {"conf": f"SlurmdTimeout=3\nMessageTimeout=2\nTCPTimeout=1\n{REQUEUE}"}


@once
@pytest.mark.parametrize("options", [QUICK])
def test_power_cut_and_a_job_at_its_time_limit(slurm: Slurm, options: dict[str, Any]) -> None:
    """A node dies with all that runs on it, and comes back with nothing; elsewhere a job is ended by its limit meanwhile.

    Both in one test, since slurmctld looks at limits each thirty seconds only, the first time so long after its start.
    """
    stays = "shifter ssh {} 'trap : TERM HUP; touch {}; sleep 1000; sleep 1000'\n"
    wanted = ("--exclusive", "--image=tiny:1")
    limited = slurm.submit(stays.format("node3", "limited"), "-wnode3", "-t1", *wanted)
    job = slurm.submit(
        f"shifter cat /var/hostsfile | uniq\n[ $SLURM_RESTART_COUNT ] || {stays.format('node2', 'session')}"
        "shifter ssh node2 'hostname; cat /usr/lib/hello.txt'",
        "-wnode[1-2]",
        "--requeue",
        *wanted,
    )
    for name in ("limited", "session"):
        wait_for(functools.partial(slurm.head.exists, f"/home/alice/{name}"))
    slurm.run("scontrol", "update", f"job={limited}", "EndTime=now", user="root", check=True)
    slurm.crash(slurm.nodes[1])
    slurm.wait_state(job, "PENDING")
    assert slurm.run("sinfo", "-h", "-n", "node2", "-o", "%T").stdout == "down*\n"
    slurm.boot(slurm.nodes[1])
    slurm.wait_state(job, "COMPLETED")
    assert slurm.output(job) == f"node1\nnode2\nnode2\n{HELLO}"
    slurm.wait_state(limited, "TIMEOUT")
    assert "DUE TO TIME LIMIT" in slurm.output(limited)
    nothing_left(slurm)
