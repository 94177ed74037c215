"""setupRoot --from-json, and the examples of docs/wlm.md that are built on it, with what their workload managers give them."""

import dataclasses
import json
from typing import Any

from tests.node import PREFIX, REPO, Node

SETUP, UNSETUP = f"{PREFIX}/sbin/setupRoot", f"{PREFIX}/sbin/unsetupRoot"
JOB = {"job": "17", "user": "alice", "image": "docker:tiny:1"}


def udis(node: Node) -> list[str]:
    return [udi["key"] for udi in json.loads(node.shifterctl("ps", "--json").stdout)]


def test_job_in_json(tiny_node: Node) -> None:
    nodes = ["node2", {"name": "node1", "tasks": 2}]
    job = JOB | {
        "uid": 5001,
        "gid": 6001,
        "volumes": ["/tmp:/mnt"],
        "nodes": nodes,
        "restart": 1,
        "sshd": False,
        "modules": [],
    }
    done = tiny_node.run([SETUP, "--json", "--from-json", "-"], input=json.dumps(job))
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["job"] == "17"
    alice = dataclasses.replace(tiny_node.users["alice"], gid=6001, groups=(6002,))
    done = tiny_node.shifter("sh", "-c", "cat /var/hostsfile; ls -d /mnt; id -g", user=alice)
    assert done.stdout.startswith("node2\nnode1\nnode1\n/mnt\n6001\n"), done
    tiny_node.write("/root/job", json.dumps(job))
    assert "was set up already" in tiny_node.run([SETUP, "-V", "--from-json", "/root/job"]).stdout
    assert tiny_node.run([UNSETUP, "--job", "17"]).returncode == 0
    assert udis(tiny_node) == []
    done = tiny_node.run([SETUP, "--from-json", "-"], input=json.dumps(JOB | {"Sshd": False}))
    assert done.returncode == 1 and "'Sshd' is not one of job, user" in done.stderr
    assert udis(tiny_node) == []


# What OpenPBS gives to a hook: the module pbs as execjob_begin and execjob_end of version 22.05 see it.
PBS = """
class Event:
    def accept(self):
        raise SystemExit(0)
    def reject(self, why):
        print("rejected:", why)
        raise SystemExit(1)
class Job:
    id = "17.head"
    euser = "alice"
    run_count = 1
    exec_host = "node1/0*2+node2/0"
    exec_host2 = "node1.cluster:15002/0*2+node2.cluster:15002/0"
    Variable_List = {"PBS_O_HOME": "/home/alice", "PBS_O_LANG": "C", "PBS_O_WORKDIR": "/home/alice", "PBS_O_QUEUE": "workq"}
    Resource_List = {"ncpus": 3, "nodect": 2, "place": "scatter:excl", "select": "2:ncpus=1"}
EXECJOB_BEGIN, EXECJOB_END, EVENT_ERROR = 4096, 32768, 1
def event():
    import os
    found = Event()
    found.type, found.job = int(os.environ["TYPE"]), Job()
    found.job.Variable_List = Job.Variable_List | eval(os.environ.get("MORE", "{}"))
    return found
def logmsg(level, text):
    print(text)
"""


def test_openpbs(tiny_node: Node) -> None:
    tiny_node.write("/root/pbs.py", PBS)
    tiny_node.write("/root/pbs_hook.py", (REPO / "docs/examples/pbs_hook.py").read_text())

    def hook(kind: int, more: dict[str, str]) -> tuple[int, str]:
        done = tiny_node.run(["python3", "/root/pbs_hook.py"], env={"TYPE": str(kind), "MORE": repr(more)})
        assert done.stderr == ""
        return done.returncode, done.stdout

    assert hook(4096, {}) == (0, "") and udis(tiny_node) == []
    assert hook(4096, {"SHIFTER_IMAGE": "tiny:1", "SHIFTER_VOLUME": "/tmp:/mnt"}) == (0, "")
    inside = tiny_node.shifter("sh", "-c", "cat /var/hostsfile; ls -d /mnt", env={"PBS_JOBID": "17.head"})
    assert inside.stdout == "node1.cluster\nnode1.cluster\nnode2.cluster\n/mnt\n"
    assert hook(32768, {}) == (0, "") and udis(tiny_node) == []
    status, said = hook(4096, {"SHIFTER_IMAGE": "tiny:1", "SHIFTER_VOLUME": "/tmp:/etc/x"})
    assert status == 1 and said.startswith("rejected: shifter: setupRoot: ") and "belongs to the system" in said
    assert udis(tiny_node) == []


# What Flux answers to the questions of the example, for a job that `flux batch` made.
FLUX = """\
#!/bin/sh
case "$*" in
  "job info f3Xk jobspec") cat /root/jobspec ;;
  "jobs --no-header --format={id.dec} {ntasks} {nodelist} f3Xk") echo "1830 5 node[1-2]" ;;
  "hostlist --expand --delimiter=  node[1-2]") echo "node1 node2" ;;
  "job id --to=dec f3Xk") echo 1830 ;;
  *) echo "no such question: $*" >&2; exit 1 ;;
esac
"""
JOBSPEC = {
    "version": 1,
    "resources": [
        {"type": "node", "count": 2, "exclusive": True, "with": [{"type": "slot", "count": 1, "label": "task"}]}
    ],
    "tasks": [{"command": ["flux", "broker", "{{tmpdir}}/script"], "slot": "task", "count": {"per_slot": 1}}],
    "attributes": {"system": {"duration": 0, "cwd": "/home/alice", "shell": {"options": {}}}},
}


def test_flux(tiny_node: Node) -> None:
    tiny_node.mount("flux", "/usr/local/bin", "tmpfs", 0, "mode=755")
    tiny_node.write("/usr/local/bin/flux", FLUX, 0o755)
    for kind in ("prolog", "epilog"):
        tiny_node.write(f"/etc/flux/system/{kind}.d/shifter", (REPO / "docs/examples/flux-shifter").read_text(), 0o755)

    def perilog(kind: str, asked: dict[str, Any] | None) -> tuple[int, str]:
        spec = json.loads(json.dumps(JOBSPEC))
        if asked is not None:
            spec["attributes"]["system"]["shifter"] = asked
        tiny_node.write("/root/jobspec", json.dumps(spec))
        environment = {"FLUX_JOB_ID": "f3Xk", "FLUX_JOB_USERID": "5001", "PATH": "/usr/bin:/bin"}
        done = tiny_node.run([f"/etc/flux/system/{kind}.d/shifter"], env=environment, clean=True)
        return done.returncode, done.stderr

    assert perilog("prolog", None) == (0, "") and udis(tiny_node) == []
    assert perilog("prolog", {"image": "docker:tiny:1", "volumes": ["/tmp:/mnt"]}) == (0, "")
    assert udis(tiny_node) == ["job.1830"]
    inside = tiny_node.shifter("sh", "-c", "cat /var/hostsfile; ls -d /mnt")
    assert inside.stdout == "node1\n" * 3 + "node2\n" * 2 + "/mnt\n"
    assert perilog("epilog", None) == (0, "") and udis(tiny_node) == []
    status, said = perilog("prolog", {"image": "docker:tiny:1;reboot"})
    assert status == 1 and "is not allowed" in said
