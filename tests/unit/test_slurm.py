"""The Job of a Slurm prolog: node lists, tasks, what squeue prints, and environments that somebody else has written."""

import pwd
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shifter import config
from shifter.errors import ShifterError, UsageError
from shifter.wlm import slurm
from shifter.wlm.slurm import Allocation, SlurmError, cpus_per_node, expand, parse_allocation, place_tasks


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("node1", ["node1"]),
        ("node[1-3,7]", ["node1", "node2", "node3", "node7"]),
        ("node[08-11],login", ["node08", "node09", "node10", "node11", "login"]),
        ("r[1-2]n[3-4]-ib", ["r1n3-ib", "r1n4-ib", "r2n3-ib", "r2n4-ib"]),
    ],
)
def test_node_lists(text: str, nodes: list[str]) -> None:
    """Compared with Slurm's own idea of them."""
    assert expand(text) == nodes
    said = subprocess.run(["scontrol", "show", "hostnames", text], capture_output=True, text=True, check=False)
    if said.returncode == 0:  # without a slurm.conf scontrol answers nothing
        assert said.stdout.split() == nodes


@pytest.mark.parametrize(
    "text",
    ["node[1-", "node[1-3]]", "node[[1-3]]", "node[a-b]", "node[]", "node[3-1]x[1-99999999999]", "n[1-99999]", "-x", "a b;c"]
    + ["n[1-1000]m[1-1000]", "node\n1", "$(id)", "../x", "n[1-65536],n[65537-131072]"],
)  # fmt: skip
def test_node_lists_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        expand(text)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="node[]-,0123456789", max_size=40))
def test_any_node_list_ends(text: str) -> None:
    try:
        assert len(expand(text)) <= 65536
    except UsageError as error:
        assert "\n" not in str(error)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), st.integers(1, 2000), st.integers(1, 8))
def test_tasks_are_placed(cpus: list[int], tasks: int, each: int) -> None:
    """All of them, at least one on each node, no node above its processors before all are full."""
    allocation = Allocation(1, 1, 1, 0, True, tasks, each, [f"n{number}" for number in range(len(cpus))])
    placed = [count for _, count in place_tasks(allocation, cpus)]
    assert sum(placed) == max(tasks, len(cpus)) and min(placed) >= 1
    room = [max(count // each, 1) for count in cpus]
    if any(count > limit for count, limit in zip(placed, room, strict=True)):
        assert all(count >= limit for count, limit in zip(placed, room, strict=True))


def test_processors_of_nodes() -> None:
    assert cpus_per_node("4(x2),2", 3) == [4, 4, 2]
    assert cpus_per_node("4(x2)", 3) == cpus_per_node("4(x4)", 3) == cpus_per_node("", 3) == []
    for text in ("4(x", "x", "4(x2", "4(x99999999)", "-1", "4;2"):
        with pytest.raises(UsageError):
            cpus_per_node(f"{text}|", 3)


LINE = "7 5001 5001 0 NO 2 4 1 node[1-2]\n"


def test_what_squeue_prints() -> None:
    found = parse_allocation("6 5002 5002 0 OK 1 1 1 node1\n" + LINE, "7")
    assert found is not None and vars(found) == vars(Allocation(7, 5001, 5001, 0, True, 4, 1, ["node1", "node2"]))
    for word in ("OK", "YES", "USER", "MCS", "no"):
        assert not parse_allocation(LINE.replace("NO", word), "7").exclusive
    for text in (
        "",
        "8 " + LINE[2:],
        LINE.replace("node[1-2]", ""),
        LINE.replace("node[1-2]", "node[1-3]"),
        LINE.replace("5001", "x"),
    ):
        with pytest.raises(SlurmError):
            parse_allocation(text, "7")


GOOD = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_UID": "0",
    "SLURMD_NODENAME": "node1",
    "SPANK_SHIFTER_IMAGE": "0a1b",
    "SPANK_SHIFTER_IMAGETYPE": "id",
}
HOSTILE = st.sampled_from(
    ["", "0", "-1", "1e3", "99999999999999999999", "7;id", "7\nx", "../..", "$(id)", "`id`", "\x1b[2J", "a" * 9000]
    + ["id", "docker", "local", "/", "tiny:1", "/etc:/etc", "/home:/mnt;/x:/y", "yes", "no", "auto", "\udcff", "7 ", "\u0967"]
) | st.text(max_size=30)  # fmt: skip
NAMES = st.sampled_from(
    [*slurm.BELIEVED, "PATH", "LD_PRELOAD", "PYTHONPATH", "SHIFTER_IMAGE", "SPANK_SHIFTER_SSH_PUBKEY"]
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES, HOSTILE, max_size=6))
def test_environments_that_no_slurmd_sets(changed: dict[str, str]) -> None:
    """Each is refused with one line, by an error that the prolog knows how to answer; here there is no such job."""
    environment = GOOD | {name: value for name, value in changed.items() if "\0" not in value}
    site = config.Config()
    site.slurmBinPath = "/nowhere"
    with pytest.raises(ShifterError) as caught:
        slurm.job(environment, site)
    assert "\n" not in caught.value.chain() and len(caught.value.chain()) < 1000


# --- the Job of a prolog ---------------------------------------------------------------------------------------------

NOBODY = pwd.getpwnam("nobody")
TRUE = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_UID": str(NOBODY.pw_uid),
    "SLURMD_NODENAME": "node2",
    "SLURM_JOB_CPUS_PER_NODE": "4(x2)",
    "SPANK_SHIFTER_IMAGE": "0a1b",
    "SPANK_SHIFTER_IMAGETYPE": "id",
}


@pytest.fixture
def site(tmp_path: Path) -> Callable[..., config.Config]:
    """A configuration whose squeue prints what slurmctld said of job 7, and leaves a file where it was asked."""

    def make(said: str = "NO", **settings: object) -> config.Config:
        line = f"7 {NOBODY.pw_uid} {NOBODY.pw_gid} 3 {said} 2 4 1 node[1-2]"
        program = tmp_path / "squeue"
        program.write_text(f"#!/bin/sh\necho \"$*\" > {tmp_path}/asked\necho '{line}'\n")
        program.chmod(0o755)
        made = config.Config()
        made.slurmBinPath = str(tmp_path)
        for name, value in settings.items():
            setattr(made, name, value)
        return made

    return make


def test_job_of_a_prolog(site: Callable[..., config.Config]) -> None:
    """Who, where and which start is slurmctld's word; what, the user's."""
    wishes = {"SPANK_SHIFTER_VOLUME": "/a:/b;/c:/d", "SPANK_SHIFTER_SSHD": "yes"}
    lies = {
        "SLURM_JOB_RESTART_COUNT": "9",
        "SLURM_NODELIST": "evil",
        "SLURM_JOB_GID": "0",
        "SPANK_SHIFTER_SSH_PUBKEY": "ssh-rsa x",
    }
    job, wish = slurm.job(TRUE | wishes | lies, site())
    assert (job.ident, job.user, job.uid, job.gid, job.restart, wish["SSHD"]) == (
        "7",
        "nobody",
        NOBODY.pw_uid,
        NOBODY.pw_gid,
        3,
        "yes",
    )
    assert (job.image, job.volumes, job.nodes, job.sshd) == (
        "id:0a1b",
        ["/a:/b;/c:/d"],
        [("node1", 2), ("node2", 2)],
        True,
    )
    assert not job.authorized


def test_job_of_another_user(site: Callable[..., config.Config]) -> None:
    with pytest.raises(SlurmError, match=r"for slurmctld, uid 5001's for slurmd"):
        slurm.job(TRUE | {"SLURM_JOB_UID": "5001"}, site())


def test_job_of_another_node(site: Callable[..., config.Config]) -> None:
    with pytest.raises(SlurmError, match="is not on this node"):
        slurm.job(TRUE | {"SLURMD_NODENAME": "node3"}, site())


def test_lines_of_an_array_are_no_longer_than_its_nodes(site: Callable[..., config.Config], tmp_path: Path) -> None:
    """squeue fills each member's line up to the width that it is given: 256 KiB times 10,000 members, on every node."""
    for environment, width in ((TRUE | {"SLURM_NODELIST": "node[1-2]"}, 42), (TRUE, 1 << 18)):
        slurm.job(environment, site())
        assert (tmp_path / "asked").read_text().endswith(f",NodeList:{width}\n")


def test_ccm_has_no_other_image(site: Callable[..., config.Config]) -> None:
    for wishes in ({}, {"IMAGETYPE": "local", "IMAGE": "/etc"}, {"IMAGETYPE": "docker", "IMAGE": "/"}, {"CCM": "yes"}):
        lies = {f"SPANK_SHIFTER_{name}": value for name, value in ({"CCM": "1"} | wishes).items()}
        with pytest.raises(UsageError, match="--ccm"):
            slurm.job(TRUE | lies, site())
    root = {"SPANK_SHIFTER_CCM": "1", "SPANK_SHIFTER_IMAGETYPE": "local", "SPANK_SHIFTER_IMAGE": "/"}
    assert slurm.job(TRUE | root, site())[0].image == "local:/"


@pytest.mark.parametrize("said", ["OK", "YES", "USER", "MCS"])
def test_sshd_on_shared_nodes(site: Callable[..., config.Config], said: str) -> None:
    """None, and none is pretended, whatever the user wishes; unless the site wants it."""
    assert not slurm.job(TRUE, site(said))[0].sshd
    with pytest.raises(UsageError, match="are shared with other jobs; use --exclusive"):
        slurm.job(TRUE | {"SPANK_SHIFTER_SSHD": "yes"}, site(said))
    assert slurm.job(TRUE | {"SPANK_SHIFTER_SSHD": "yes"}, site(said, sharedNodeSshd=True))[0].sshd
    assert not slurm.job(TRUE | {"SPANK_SHIFTER_SSHD": "no"}, site(said, sharedNodeSshd=True))[0].sshd


def test_a_configuration_of_slurm_that_others_can_write(site: Callable[..., config.Config], tmp_path: Path) -> None:
    """It would name another slurmctld, which says whatever its owner likes."""
    conf = tmp_path / "slurm.conf"
    conf.write_text("ClusterName=evil\n")
    conf.chmod(0o666)
    with pytest.raises(SlurmError, match=r"SLURM_CONF .*writable by group or others"):
        slurm.job(TRUE | {"SLURM_CONF": str(conf)}, site())
    assert not (tmp_path / "asked").exists()
