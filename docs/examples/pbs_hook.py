"""An OpenPBS hook for Shifter: a job that asks for an image has its container set up on each of its nodes.

    qmgr -c "create hook shifter event='execjob_begin,execjob_end'"
    qmgr -c "set hook shifter fail_action=none"
    qmgr -c "import hook shifter application/x-python default pbs_hook.py"

A user says: qsub -v SHIFTER_IMAGE=docker:debian:12,SHIFTER_VOLUME=/scratch:/mnt -l place=excl job.sh
execjob_begin runs as root on every node before the job's first process, execjob_end after its last.
"""

import json
import subprocess

import pbs

SBIN = "/opt/shifter/sbin/"


def describe(job):
    """Return the job as setupRoot --from-json wants it. All that is the user's own is a value, checked there."""
    asked = job.Variable_List
    tasks = {}
    for chunk in str(job.exec_host2 or job.exec_host).split("+"):  # node1.cluster:15002/0*4
        name, _, slot = chunk.partition("/")
        tasks[name.partition(":")[0]] = int(slot.partition("*")[2] or 1) + tasks.get(name.partition(":")[0], 0)
    image = str(asked["SHIFTER_IMAGE"])
    return {
        "job": str(job.id),
        "user": str(job.euser),
        "image": image if image.partition(":")[0] in ("docker", "custom", "id", "local") else "docker:" + image,
        "volumes": [str(asked["SHIFTER_VOLUME"])] if "SHIFTER_VOLUME" in asked else [],
        "restart": max(int(job.run_count or 1) - 1, 0),
        "sshd": "excl" in str(job.Resource_List["place"]),
        "nodes": [{"name": name, "tasks": count} for name, count in tasks.items()],
    }


def run(program, arguments, text=""):
    """Return the reason why a program of Shifter failed, None if it did not."""
    done = subprocess.run([SBIN + program, *arguments], input=text, capture_output=True, text=True, check=False)
    return (done.stderr.strip() or f"exit status {done.returncode}") if done.returncode else None


event = pbs.event()
job = event.job
if event.type == pbs.EXECJOB_BEGIN and "SHIFTER_IMAGE" in job.Variable_List:
    reason = run("setupRoot", ["--from-json", "-"], json.dumps(describe(job)))
    if reason:
        event.reject("shifter: " + reason)  # the job does not start, and qstat -f shows this line
elif event.type == pbs.EXECJOB_END:
    reason = run("unsetupRoot", ["--job", str(job.id)])
    if reason:
        pbs.logmsg(pbs.EVENT_ERROR, "shifter: " + reason)
event.accept()
