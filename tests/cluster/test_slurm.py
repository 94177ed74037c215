"""Jobs of a real Slurm in images: what sbatch, srun and salloc of an ordinary user do, on three nodes."""

import functools
import json
from typing import Any

import pytest

from tests.cluster.slurm import REQUEUE, Slurm
from tests.images import Tree
from tests.node import PREFIX, Node, wait_for

HELLO = "hello from the image\n"
once = pytest.mark.parametrize("propagation", ["shared"], indirect=True)
"""What does not depend on mount propagation is run with one, that of most real nodes."""


def udis(node: Node) -> list[str]:
    return sorted(udi["key"] for udi in json.loads(node.shifterctl("ps", "--json", check=True).stdout))


def nothing_left(slurm: Slurm) -> None:
    """Every node is idle, and has nothing of any job."""
    slurm.wait_idle()
    for node in slurm.nodes:
        assert udis(node) == [] and node.run("ls /run/shifter/jobs").stdout == ""


def test_batch_job(slurm: Slurm) -> None:
    """The user's side of it all: a line of `#SBATCH`, and the cluster is inside the image."""
    script = """\
#SBATCH --image=docker:tiny:1
#SBATCH -N3 --exclusive
shifter cat /usr/lib/hello.txt /var/hostsfile
shifter sh -c 'for node in node1 node2 node3; do ssh $node "hostname; cat /usr/lib/hello.txt; id -un"; done'
srun shifter hostname | sort
srun sh -c 'shifter --image=tiny:1 readlink /proc/self/ns/mnt; shifter readlink /proc/self/ns/mnt' | sort | uniq -c | wc -l
"""
    job = slurm.submit(script)
    nodes = "".join(f"node{n}\n{HELLO}alice\n" for n in (1, 2, 3))
    assert slurm.finish(job) == f"{HELLO}node1\nnode2\nnode3\n{nodes}node1\nnode2\nnode3\n3\n"
    nothing_left(slurm)


@once
def test_srun_and_salloc(slurm: Slurm) -> None:
    """No option but the image; tasks count as /var/hostsfile does; the shell of salloc is the user's own, outside."""
    done = slurm.run("srun", "-N2", "-n3", "--image=tiny:1", f"{PREFIX}/bin/shifter", "cat", "/var/hostsfile")
    assert (sorted(done.stdout.split()), done.stderr) == (["node1"] * 6 + ["node2"] * 3, "")
    job = slurm.submit(
        f"#!{PREFIX}/bin/shifter /bin/sh\ncat /usr/lib/hello.txt; echo $1", "--image=tiny:1", "--export=NONE"
    )
    assert slurm.finish(job) == f"{HELLO}\n"
    done = slurm.run(
        "salloc", "-N2", "--exclusive", "--image=tiny:1", "sh", "-c", "srun shifter cat /usr/lib/hello.txt; env"
    )
    assert done.returncode == 0, done.stderr
    ident = slurm.head.run("readlink /images/tags/docker:tiny:1").stdout.strip()
    assert done.stdout.startswith(HELLO * 2)
    assert {"SHIFTER_IMAGETYPE=id", f"SHIFTER_IMAGE={ident}", "SHIFTER_IMAGEREQUEST=tiny:1"} <= {
        *done.stdout.splitlines()
    }


@once
def test_two_users_share_a_node(slurm: Slurm) -> None:
    """Each has their own UDI; no sshd, since ports and processors are not one job's there. It can be asked for, by the site."""
    script = (
        "shifter sh -c 'id -un; cat /var/hostsfile'; : > $SLURM_JOB_ID; while [ -e $SLURM_JOB_ID ]; do sleep 0.1; done"
    )
    submitted = {user: slurm.submit(script, "-wnode1", "--image=tiny:1", user=user) for user in ("alice", "bob")}
    for user, job in submitted.items():
        wait_for(functools.partial(slurm.head.exists, f"/home/{user}/{job}"))
    assert udis(slurm.head) == sorted(f"job.{job}" for job in submitted.values())
    assert not any(listener.port == 1204 for listener in slurm.head.listeners())
    done = slurm.head.shifter("id", "-un", user="bob", env={"SLURM_JOB_ID": submitted["alice"]})
    assert done.returncode != 0 and done.stdout == ""
    for user, job in submitted.items():
        slurm.head.run(["rm", f"/home/{user}/{job}"])
    for user, job in submitted.items():
        assert slurm.finish(job, user) == f"{user}\nnode1\n"
    job = slurm.submit("echo not reached", "-wnode1", "--image=tiny:1", "--sshd=yes")
    assert slurm.wait_state(job, "FAILED")
    assert (
        slurm.output(job) == "shifter: --sshd=yes: the nodes of this job are shared with other jobs; use --exclusive\n"
    )
    for node in slurm.nodes:
        node.conf(sharedNodeSshd=1, sshdPort="1204-1299")
    job = slurm.submit("shifter ssh node2 hostname", "-wnode[1-2]", "--image=tiny:1", "--sshd=yes")
    assert slurm.finish(job) == "node2\n"


@once
def test_another_image_in_a_step(slurm: Slurm, image: Tree) -> None:
    """A tag that moves moves no running job; a step may have another image, built on demand, which goes with the job.

    Also where tasks have nothing of the script's environment; of the job's volumes none comes to another image.
    """
    other = slurm.nodes.add_image("docker:other:1", image, "VFS")
    slurm.head.write(f"/images/{other}./etc/issue", "other\n")
    script = """\
shifter cat /etc/issue
srun --image=other:1 shifter cat /etc/issue
srun --volume=$HOME:/mnt shifter ls -d /mnt/.
srun shifter cat /etc/issue
srun shifter --image=tiny:1 cat /etc/issue
shifter --image=docker:tiny:1 cat /etc/issue
for export in NONE ALL; do
    srun --export=$export --image=other:1 $(command -v shifter) ls -d /etc /data
    srun --export=$export --image=other:1 --volume=$HOME:/mnt $(command -v shifter) cat /etc/issue /mnt/once
    srun --export=$export $(command -v shifter) cat /etc/issue /data/once
done 2>/dev/null
"""
    wait = "touch ready; while [ -e ready ]; do sleep 0.1; done\n"
    slurm.head.write("/home/alice/once", "once\n")
    job = slurm.submit(wait + script, "--image=tiny:1", "--volume=/home/alice:/data")
    wait_for(lambda: slurm.head.exists("/home/alice/ready"))
    slurm.nodes[0].tag_image("tiny:1", other)
    slurm.head.run("rm /home/alice/ready")
    steps = "/etc\nother\nonce\nTiny\nonce\n"
    assert slurm.finish(job) == "Tiny\nother\n/mnt/.\nTiny\nTiny\nother\n" + 2 * steps


@once
def test_submission_is_refused_with_the_reason(slurm: Slurm) -> None:
    wrong = {
        ("--image=tiny:2",): "no image docker:tiny:2; did you mean docker:tiny:1?",
        ("--image=",): "no image name",
        ("--image=ti;ny",): "the character ';' is not allowed",
        ("--volume=/home:/mnt",): "--volume is of no use without --image",
        ("--image=tiny:1", "--volume=home:/mnt"): "'home' is not an absolute path",
        ("--image=tiny:1", "--volume=/home:/mnt", "--volume=/home:/etc/x"): "/etc",
        ("--image=tiny:1", *[f"--volume=/home:/mnt/{n}{'/x' * 1000}" for n in range(5)]): "--volume: longer than 8192",
        ("--image=tiny:1", "--sshd=maybe"): "--sshd='maybe': it must be one of yes, no, auto",
        ("--image=tiny:1", "--sshd=no", "--sshd=\nyes"): "it must be one of yes, no, auto",
    }
    for options, reason in wrong.items():
        for command in (["sbatch", "--wrap=true"], ["srun", "true"], ["salloc", "true"]):
            done = slurm.run(command[0], *options, command[1])
            assert done.returncode != 0 and f"{command[0]}: error: shifter: " in done.stderr, (options, done)
            assert reason in done.stderr and "Traceback" not in done.stderr
    assert slurm.run("squeue", "-h", "-t", "all").stdout == ""


@once
def test_failed_set_up(slurm: Slurm) -> None:
    """The job ends with the reason, the node is not to blame: or as the site wants it."""
    bad = ("-N2", "--image=tiny:1", "--volume=/nowhere:/mnt")
    reason = "shifter: volume /nowhere: No such file or directory\n"
    job = slurm.submit("echo not reached", *bad)
    slurm.wait_state(job, "FAILED")
    assert slurm.output(job) == reason
    slurm.head.mkdir("/srv/of-this-node")
    job = slurm.submit("echo not reached", "-N2", "--image=tiny:1", "--volume=/srv/of-this-node:/mnt")
    slurm.wait_state(job, "FAILED")
    assert slurm.output(job) == "shifter: node2: volume /srv/of-this-node: No such file or directory\n"
    done = slurm.run("srun", *bad, "echo", "not reached")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count(reason) == 2
    slurm.wait_idle()
    for node in slurm.nodes:
        assert node.run("ls /run/shifter/jobs").stdout == ""
        node.conf(prologFailure="ignore")
    job = slurm.submit("echo reached; shifter --image=tiny:1 --volume=/home:/mnt cat /usr/lib/hello.txt", *bad)
    assert slurm.finish(job) == f"reached\n{HELLO}"
    for node in slurm.nodes:
        node.conf(prologFailure="drain")
    job = slurm.submit("echo not reached", *bad)
    wait_for(lambda: slurm.run("sinfo", "-h", "-N", "-o", "%T %E").stdout.count("drained Prolog error") == 2, pause=0.1)
    slurm.run("scancel", job)
    slurm.run("scontrol", "update", "nodename=node[1-2]", "state=resume", user="root", check=True)
    slurm.run("scontrol", "reconfigure", user="root", check=True)


CONTAINER = {"job_container.conf": "AutoBasePath=true\nBasePath=/var/jobs\n"}


@once
@pytest.mark.parametrize("options", [{"conf": "JobContainerType=job_container/tmpfs\n", "files": CONTAINER}])
def test_tmp_of_the_job(slurm: Slurm, options: dict[str, Any]) -> None:
    """With job_container/tmpfs a job's /tmp is its own, and what is seen in the container, on every node and over ssh."""
    for node in slurm.nodes:
        node.mkdir("/tmp/of-the-node")
    script = """\
srun -N3 -n3 touch /tmp/of-the-job
ls /tmp
shifter sh -c 'for node in node1 node2 node3; do ssh $node "hostname; ls /tmp; touch /tmp/from-$node"; done'
srun -N3 -n3 ls /tmp | sort
srun -N3 -n3 shifter ls /tmp | sort
"""
    job = slurm.submit(script, "-N3", "--exclusive", "--image=tiny:1")
    seen = "from-node1\nfrom-node2\nfrom-node3\n" + "of-the-job\n" * 3
    assert slurm.finish(job) == "of-the-job\n" + "".join(f"node{n}\nof-the-job\n" for n in (1, 2, 3)) + seen * 2
    job = slurm.submit("echo not reached", "-N2", "--image=tiny:1", "--volume=/tmp/of-the-node:/mnt")
    slurm.wait_state(job, "FAILED")
    assert slurm.output(job) == "shifter: volume /tmp/of-the-node: No such file or directory\n"


@once
def test_sshd_is_in_the_extern_step(slurm: Slurm) -> None:
    """So Slurm counts and limits it with all sessions, and kills it when the job ends, before the epilog."""
    script = "shifter ssh node2 'touch session; sleep 1000'"
    job = slurm.submit(script, "-N2", "--exclusive", "--image=tiny:1")
    wait_for(lambda: slurm.head.exists("/home/alice/session"))
    for node in slurm.nodes[:2] if slurm.has_cgroups else ():
        groups = node.run(
            "for pid in $(pgrep -x 'sshd.*|sleep' -u alice); do cat /proc/$pid/cgroup; done", check=True
        ).stdout
        where = {line.partition("/slurm_")[2] for line in groups.splitlines() if ":freezer:" in line}
        assert where == {f"{node.name}/uid_5001/job_{job}/step_extern"}
    slurm.run("scancel", job, check=True)
    slurm.wait_idle()
    assert not any(listener.port == 1204 for node in slurm.nodes for listener in node.listeners())


SLOW = f"""\
#!/bin/sh
trap "" CHLD
echo $SLURM_SCRIPT_CONTEXT >> /home/alice/$SLURMD_NODENAME.$SLURM_JOB_ID
while [ -e /home/alice/wait ]; do /bin/sleep 0.1; done
exec {PREFIX}/sbin/shifter-slurm-prolog
"""


@once
@pytest.mark.parametrize("options", [{"conf": f"Prolog=/etc/slurm/prolog\n{REQUEUE}", "files": {"prolog": SLOW}}])
def test_end_of_a_job_in_each_phase(slurm: Slurm, options: dict[str, Any]) -> None:
    """Cancelled in its prologs, in the script, requeued, ended after slurmd was killed: nothing is left, nothing is drained."""
    for node in slurm.nodes:
        node.run("chmod 755 /etc/slurm/prolog; chmod 711 /home/alice", check=True)
    wanted = ("-N2", "--exclusive", "--image=tiny:1", "--requeue")
    script = """\
shifter cat /usr/lib/hello.txt
shifter sh -c "trap : TERM; touch $SLURM_RESTART_COUNT.$SLURM_JOB_ID; sleep 1000; sleep 1000"
"""
    slurm.head.write("/home/alice/wait", "")
    job = slurm.submit(script, *wanted)
    wait_for(lambda: slurm.head.exists(f"/home/alice/node2.{job}"))
    slurm.run("scancel", job, check=True)
    slurm.head.run("rm /home/alice/wait", check=True)
    slurm.wait_idle()
    assert slurm.state(job) == "CANCELLED" and slurm.output(job) == ""
    job = slurm.submit(script, *wanted)
    wait_for(lambda: slurm.head.exists(f"/home/alice/.{job}"))
    slurm.run("scontrol", "requeuehold", job, check=True)
    nothing_left(slurm)
    slurm.run("scontrol", "release", job, user="root", check=True)
    wait_for(lambda: slurm.head.exists(f"/home/alice/1.{job}"))
    (record,) = json.loads(slurm.head.shifterctl("ps", "--json", check=True).stdout)
    assert record["key"] == f"job.{job}"
    slurm.run("scancel", job, check=True)
    slurm.wait_idle()
    assert slurm.output(job).count(HELLO) == 1  # a requeued job's output begins anew
    job = slurm.submit("touch go; while [ -e go ]; do sleep 0.1; done; shifter ssh node2 hostname", *wanted)
    wait_for(lambda: slurm.head.exists("/home/alice/go"))
    for node in slurm.nodes:
        slurm.restart(node)
    slurm.head.run("rm /home/alice/go")
    assert slurm.finish(job) == "node2\n"
    nothing_left(slurm)


@once
def test_job_array(slurm: Slurm) -> None:
    """Members of an array are jobs of their own, which share the first one's number in what Slurm prints of them."""
    job = slurm.submit("shifter cat /var/hostsfile", "-n1", "--array=1-5%3", "--image=tiny:1")
    wait_for(lambda: set(slurm.state(job).split()) == {"COMPLETED"}, 60, 0.1)
    slurm.wait_idle()
    outputs = [slurm.output(str(int(job) + number)) for number in range(5)]
    assert all(output.startswith("node") for output in outputs), outputs


TASK = "#!/bin/sh\necho export FROM_PROLOG=of the prolog\n"


@once
@pytest.mark.parametrize(
    "options", [{"plugin": "enable_ccm=1", "conf": "TaskProlog=/etc/slurm/task\n", "files": {"task": TASK}}]
)
def test_ccm(slurm: Slurm, options: dict[str, Any]) -> None:
    """An old script as it is: all of it runs in a container of the nodes' own root, in which ssh leads to the other nodes."""
    done = slurm.run("sbatch", "--ccm", "--wrap=true")
    assert done.returncode == 1 and "allowLocalChroot in udiRoot.conf is 0" in done.stderr
    for node in slurm.nodes:
        node.run("chmod 755 /etc/slurm/task", check=True)
        node.conf(allowLocalChroot=1)
    for wrong, said in (
        ("--image=tiny:1", "its image is local:/, not 'tiny:1'"),
        ("--volume=home:/x", "not an absolute path"),
    ):
        done = slurm.run("srun", "--ccm", wrong, "true")
        assert done.returncode == 1 and said in done.stderr, done
    script = """\
#!/bin/bash -e
#SBATCH --ccm -N2 --exclusive
ulimit -n; echo "$1" "$FROM_PROLOG" $SHIFTER_TASK; grep -c . /var/hostsfile; ls /run /var/spool
ssh node2 'hostname; id -un'
exit 3
"""
    slurm.head.write("/home/alice/old.sh", script, owner="alice")
    sent = slurm.run("sh", "-c", "ulimit -n 777; sbatch --parsable -o %j.out old.sh 'two  words'").stdout.strip()
    slurm.wait_state(sent, "FAILED")
    assert slurm.output(sent) == "777\ntwo  words of the prolog\n2\n/run:\n\n/var/spool:\nnode2\nalice\n"
    done = slurm.run("srun", "--ccm", "-N2", "sh", "-c", "readlink /proc/self/ns/mnt; [ -e /run/lock ] || echo inside")
    assert done.stdout.count("inside") == 2 and len(set(done.stdout.split())) == 3, done


@once
def test_components_of_a_heterogeneous_job(slurm: Slurm) -> None:
    """All of their tasks have the first one's SLURM_JOB_ID; each has its own image, and its own failure."""
    both = "COMPLETED\nCOMPLETED", "FAILED\nFAILED"
    each = ("-wnode1", "--exclusive", "--image=tiny:1", ":", "-wnode2", "--image=tiny:1", "--exclusive")
    job = slurm.submit("srun --het-group=0,1 shifter cat /var/hostsfile /etc/issue | sort", *each)
    assert slurm.wait_state(job, *both) == both[0], slurm.output(job)
    assert slurm.output(job) == "Tiny\nTiny\nnode1\nnode2\n"
    nothing_left(slurm)
    job = slurm.submit("srun --het-group=1 echo not reached 2>&1 | grep shifter", *each, "--volume=/nowhere:/mnt")
    slurm.wait_state(job, *both)
    assert slurm.output(job) == "shifter: volume /nowhere: No such file or directory\n"
    nothing_left(slurm)
