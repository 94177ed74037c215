"""What an administrator has of Shifter under Slurm: doctor, job_submit.lua, and prologs that somebody has lied to."""

import random
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import demo
from tests.cluster.slurm import Slurm
from tests.cluster.test_slurm import once, udis
from tests.images import Tree
from tests.node import PREFIX, REPO, STAGE, wait_for

PROLOG, EPILOG = f"{PREFIX}/sbin/shifter-slurm-prolog", f"{PREFIX}/sbin/shifter-slurm-epilog"


@once
def test_doctor(slurm: Slurm) -> None:
    """Nothing is wrong with the configuration of these tests; each thing taken away is missed, with what to do."""
    node = slurm.head
    done = node.shifterctl("doctor", "--slurm")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    kinds = {line.partition(":")[0] for line in done.stdout.splitlines()}
    assert kinds == ({"ok"} if slurm.has_cgroups else {"ok", "advice"})
    assert node.shifterctl("doctor", "--slurm", "--quiet").stdout == ""
    assert node.shifterctl("doctor", "--slurm", user="alice").returncode == 0
    good = node.read("/etc/slurm/plugstack.conf")
    node.write("/etc/slurm/plugstack.conf", "required other.so\ninclude /etc/slurm/more/*.conf\n")
    done = node.shifterctl("doctor", "--slurm", "--quiet")
    assert done.returncode == 1
    assert done.stdout == f"wrong: /etc/slurm/plugstack.conf: add the line: {good.strip()}\n"
    node.write("/etc/slurm/more/shifter.conf", good)
    assert node.shifterctl("doctor", "--slurm", "--quiet").returncode == 0
    node.write("/etc/slurm/more/shifter.conf", good.strip() + " enable_ccm=1\n")
    assert "--ccm, which enable_ccm=1 offers, needs" in node.shifterctl("doctor", "--slurm", "--quiet").stdout
    node.conf(sharedNodeSshd=1)
    assert "sshdPort=1204-1299 gives each job its own" in node.shifterctl("doctor", "--slurm", "--quiet").stdout
    node.conf(slurmBinPath="/nowhere")
    assert "slurmBinPath" in node.shifterctl("doctor", "--slurm").stdout
    node.conf()
    node.write("/root/prolog", f"#!/bin/sh\nexec {PROLOG}\n", 0o755)
    for lines, said in (
        ("Prolog=/root/prolog\nPrologFlags=Alloc\n", "advice: slurm.conf: PrologFlags=DeferBatch"),
        ("Epilog=/bin/true\nPrologFlags=Alloc\n", f"wrong: slurm.conf: Epilog=/bin/true: set it to {EPILOG}"),
        ("PrologFlags=NoHold\n", "PrologFlags=Contain: else sshd"),
        ("ProctrackType=proctrack/linuxproc\n", "only proctrack/cgroup can take the sshd into the job"),
    ):
        for each in slurm.nodes:
            each.write("/etc/slurm/slurm.conf", slurm.conf + lines)
        slurm.run("scontrol", "reconfigure", user="root", check=True)
        done = node.shifterctl("doctor", "--slurm")
        assert said in done.stdout and done.returncode == ("wrong:" in done.stdout), (said, done)


LUA = {"job_submit.lua": (REPO / "slurm/job_submit.lua").read_text()}


@once
@pytest.mark.parametrize("options", [{"conf": "JobSubmitPlugins=lua\n", "files": LUA}])
def test_sshd_on_shared_nodes_is_refused_at_submission(slurm: Slurm, options: dict[str, Any]) -> None:
    done = slurm.run("sbatch", "--image=tiny:1", "--sshd=yes", "--wrap=true")
    assert done.returncode == 1 and "--sshd=yes needs nodes of one's own: add --exclusive" in done.stderr
    for options_ in (["--sshd=yes", "--exclusive"], ["--sshd=auto"]):
        job = slurm.submit("shifter true", "--image=tiny:1", *options_)
        slurm.finish(job)


def test_chapter_for_administrators(debian: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/wlm.md, executed as it is written, but for the installation: ten steps at most, and a job runs in an image."""
    assert len(demo.steps()) <= 10 and "make install" in demo.steps()[0][1]
    demo.follow(STAGE, debian.path, shared=True)
    said = capsys.readouterr().out
    assert "wrong:" not in said and said.count("12.") >= 2 and "node1\nnode2\nnode3\n" in said, said


VALUES = [
    "0", "1", "-1", "5001", "5002", "18446744073709551617", "7;id", "0x1", "$(id)", "../1", "docker", "id", "local",
    "custom", "yes", "no", "auto", "none", "node1", "node2", "node[1-3]", "node[1-99999999]", "/", "/etc",
    "/root:/mnt", "/home/alice:/mnt", "/etc/shadow:/mnt", "/tmp:/etc", "/tmp:/mnt:rw;/x", "/proc/1/root:/r", "tiny:1",
    "docker:tiny:1", "/images", "../../etc", "local:/", "/dev/zero", "/home/bob/slurm.conf", "/proc/self/environ",
    "/run/shifter/site", "/home/bob", "/home/bob/evil.py", "", "1 2", "\x1b[2J", "\nJobId=1 UserId=bob(5002)",
    "a" * 10000, "\udcff\udcfe", "\u00e9",
]  # fmt: skip
CHECKED = ["SLURM_JOB_ID", "SLURM_JOB_UID", "SLURMD_NODENAME"]
"""What a prolog believes, once slurmctld says the same."""
SENT = [f"SPANK_SHIFTER_{name}" for name in ("IMAGE", "IMAGETYPE", "VOLUME", "MODULE", "SSHD", "CCM")]
SENT += [*CHECKED, "SLURM_CONF", "SLURM_JOB_CPUS_PER_NODE", "SLURM_NODELIST", "SLURM_JOB_USER", "SLURM_JOB_GID"]
SENT += ["SLURM_JOB_COMMENT", "SLURM_JOB_NAME", "SLURM_JOB_WORK_DIR", "SLURM_JOB_RESTART_COUNT", "SLURM_JOB_PARTITION"]
SENT += ["LD_PRELOAD", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME", "PATH", "HOME", "TMPDIR", "BASH_ENV"]
SENT += ["SHIFTER_IMAGE", "SHIFTER_VOLUME", "SPANK_SHIFTER_SSH_PUBKEY", "SPANK__SLURM_SPANK_OPTION_shifter_image"]

HOMES = [
    "true",
    "ln -s /etc .udiRoot",
    "mkdir .udiRoot; ln -s /etc/shadow .udiRoot/secret",
    "mkdir -m 700 .udiRoot; mkfifo -m 600 .udiRoot/secret",
    "mkdir -m 700 .udiRoot; ln -s /dev/zero .udiRoot/secret",
    "mkdir -m 700 .udiRoot; yes | head -c 9999999 > .udiRoot/secret; chmod 600 .udiRoot/secret",
    "mkdir -m 700 .udiRoot; ln -s /proc/self/environ .udiRoot/id_rsa.key.pub; mkdir .udiRoot/secret",
]
"""What a user may have made of the directory where the sshd's secret is looked for."""


def begin(slurm: Slurm, *options: str) -> str:
    """Start a job and return its id when its script runs.

    In the state RUNNING it may still wait for its prolog, and a prolog that is replayed and fails then ends it.
    """
    job = slurm.submit("touch $SLURM_JOB_ID.begun; exec sleep 10000", *options)
    wait_for(lambda: slurm.head.exists(f"/home/alice/{job}.begun"))
    return job


@pytest.mark.soak
@once
def test_prologs_that_are_killed_and_two_at_once(
    slurm: Slurm, counts: dict[str, int], finding: Callable[[str], None]
) -> None:
    """SIGKILL at any moment, as at the end of PrologEpilogTimeout: the epilog takes all of it down, and says so."""
    node = slurm.nodes[1]
    job = begin(slurm, "-wnode2", "--exclusive")
    environment = {"SLURM_JOB_ID": job, "SLURM_JOB_UID": "5001", "SLURMD_NODENAME": "node2"}
    environment |= {"SPANK_SHIFTER_IMAGE": "tiny:1", "SPANK_SHIFTER_IMAGETYPE": "docker"}
    generator = random.Random(1)
    for number in range(counts["cycles of a job"]):
        prologs = [node.popen([PROLOG], env=environment, clean=True) for _ in range(1 + number % 2)]
        time.sleep(generator.random() / 2)
        prologs[0].kill()
        for prolog in prologs[1:]:
            assert prolog.communicate(timeout=60)[1] == "" and prolog.returncode == 0
        done = node.run([EPILOG], env=environment, clean=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert udis(node) == [] and node.run("ls /run/shifter/jobs").stdout == ""
        assert not any(listener.port == 1204 for listener in node.listeners())
    finding(
        f"{counts['cycles of a job']} prologs killed at a random moment of half a second; nothing left after the epilog"
    )
    slurm.run("scancel", job, check=True)


@pytest.mark.soak
@once
def test_hostile_environments(slurm: Slurm, counts: dict[str, int], finding: Callable[[str], None]) -> None:
    """Replayed straight into prolog and epilog while jobs of alice's run: no UDI but of that job's user for that job.

    One of her jobs shares its node, the other one does not, so that its prolog looks into her home, too.
    """
    for name in ("slurm.conf", "evil.py"):
        slurm.head.write(f"/home/bob/{name}", "import os; os.mkdir('/run/evil')\n", owner="bob")
    odd = ["--job-name=x UserId=bob(5002) OverSubscribe=NO", "--comment=JobId=1\nUserId=bob(5002)"]
    odd += ["--export=ALL,SHIFTER_IMAGE=/etc,SPANK_SHIFTER_IMAGE=../x,LD_PRELOAD=/home/bob/evil.so"]
    running = [begin(slurm, *odd, *more) for more in (["-wnode1"], ["-wnode2", "--exclusive"])]
    good = {"SPANK_SHIFTER_IMAGE": "tiny:1", "SPANK_SHIFTER_IMAGETYPE": "docker", "SLURM_JOB_CPUS_PER_NODE": "1"}
    generator = random.Random(counts["hostile environments"])
    refused, built = [0, 0], [0, 0]
    reasons: list[Counter[str]] = [Counter(), Counter()]

    def lie() -> str:
        if generator.random() < 0.8:
            return generator.choice(VALUES)
        return "".join(chr(generator.randrange(1, 256)) for _ in range(generator.randrange(1, 40)))

    for number in range(counts["hostile environments"]):
        which = number % 2
        node, job = slurm.nodes[which], running[which]
        udi = node.path("/run/shifter/udi")

        def made(udi: Path = udi) -> list[str]:
            return [f"{path.parent.name}/{path.name}" for path in udi.glob("*/*") if path.name != "lock"]

        if which:
            node.run(f"cd /home/alice && rm -rf .udiRoot && {{ {generator.choice(HOMES)}; }}", "alice", check=True)
        true = dict(zip(CHECKED, (job, "5001", node.name), strict=True))
        environment = true | good | {name: lie() for name in generator.sample(SENT, generator.randrange(1, 5))}
        done = node.run([PROLOG], env=environment, clean=True)
        assert "Traceback" not in done.stderr and done.returncode in (0, 1), (environment, done)
        assert "root:*" not in done.stderr and len(done.stderr) < 4000, (environment, done)
        listening = any(listener.port == 1204 for listener in node.listeners())
        if seen := made():  # then nothing that counts was a lie: it is alice's job, and her wish
            assert seen == [f"5001/job.{job}"], environment
            assert {name: environment[name] for name in CHECKED} == true, environment
            assert not listening or which, environment
            built[which] += 1
        else:
            assert not listening, environment
            refused[which] += 1
            reasons[which].update(re.sub(r"[^A-Za-z:_-]+", " ", line)[:60] for line in done.stderr.splitlines()[-1:])
        done = node.run([EPILOG], env=environment, clean=True)
        assert "Traceback" not in done.stderr, (environment, done)
        if made():  # it was about another job
            assert node.run([EPILOG], env=true, clean=True).returncode == 0
        assert made() == [], (number, environment)
    # And no lie has left a node that sets up nothing any more.
    for node, job in zip(slurm.nodes[:2], running, strict=True):
        true = dict(zip(CHECKED, (job, "5001", node.name), strict=True))
        done = node.run([PROLOG], env=true | good, clean=True)
        assert udis(node) == [f"job.{job}"], done
        assert node.run([EPILOG], env=true, clean=True).returncode == 0
    for node in slurm.nodes[:2]:
        assert not node.exists("/run/evil") and node.run("ls /run/shifter/jobs").stdout == ""
    for which, where in enumerate(("the shared node", "her own node")):
        most = "; ".join(f"{number} {reason.strip()}" for reason, number in reasons[which].most_common(5))
        finding(f"{where}: {refused[which]} without a UDI ({most}), {built[which]} with alice's own")
    slurm.run("scancel", *running, check=True)
