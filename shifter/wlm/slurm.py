"""Slurm: the Job of a prolog, from the few variables that are believed and from what Slurm itself says of the job.

Of the environment, three variables of slurmd's are used (which job, whose, on what node), and some that are only wishes
of the user's, whoever set them: SPANK_SHIFTER_*. Everything else is asked from slurmctld by the job's id.

It is asked by ``squeue -O``, for numbers, words and node names: ``scontrol show job`` prints the job's name and comment
too, unquoted, in which a user can write ``UserId=root(0)`` or a whole second job.
"""

import contextlib
import os
import pwd
import subprocess
from collections.abc import Mapping

from shifter import config
from shifter.errors import ShifterError, UsageError, describe
from shifter.images import reference
from shifter.jobs import job as jobs
from shifter.linux import paths
from shifter.wlm.submit import MAX_WISH

WISHES = tuple(f"SPANK_SHIFTER_{name}" for name in ("IMAGE", "IMAGETYPE", "VOLUME", "MODULE", "SSHD", "CCM"))
BELIEVED = (
    "SLURM_JOB_ID", "SLURM_JOB_UID", "SLURMD_NODENAME", "SLURM_CONF", "SLURM_JOB_CPUS_PER_NODE", "SLURM_NODELIST", *WISHES,
)  # fmt: skip
"""The white list: nothing else of a prolog's environment is looked at, and of SLURM_NODELIST only how long it is."""

MAX_COMMENT = 1024
TIME_LIMIT = 60
"""Seconds for slurmctld's answer; it is asked by all nodes of a job at once."""

_COLUMNS = (
    "JobID", "UserID", "GroupID", "RestartCnt", "OverSubscribe", "NumNodes", "NumTasks", "cpus-per-task", "NodeList",
)  # fmt: skip
_WIDTH, _WIDEST = 24, 1 << 18
"""Of columns, to which squeue fills up, and which it cuts off; for the last one slurmd's own list of the nodes is a measure."""


class SlurmError(ShifterError):
    """Slurm did not answer, or not what can be believed."""


class Allocation:
    """What slurmctld says of a job. *exclusive*: no other job is on its nodes."""

    def __init__(
        self,
        ident: int,
        uid: int,
        gid: int,
        restart: int,
        exclusive: bool,
        tasks: int,
        cpus_per_task: int,
        nodes: list[str],
    ) -> None:
        self.ident = ident
        self.uid = uid
        self.gid = gid
        self.restart = restart
        self.exclusive = exclusive
        self.tasks = tasks
        self.cpus_per_task = cpus_per_task
        self.nodes = nodes


def number(text: str, what: str, limit: int = 2**32 - 2) -> int:
    """Return the decimal *text*. Raises UsageError."""
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= limit):
        raise UsageError(f"{what} {text[:40]!a} is not a number from 0 to {limit}")
    return int(text)


def job_id(environment: Mapping[str, str]) -> str:
    """Return SLURM_JOB_ID. Raises UsageError."""
    ident = number(environment.get("SLURM_JOB_ID", ""), "SLURM_JOB_ID")
    if not ident:
        raise UsageError("SLURM_JOB_ID 0 is no job")
    return str(ident)


def job(environment: Mapping[str, str], settings: config.Config) -> tuple[jobs.Job, dict[str, str]]:
    """Return the Job of a prolog's *environment*, and its user's wishes (SSHD: yes, no or auto). Raises ShifterError."""
    ident = job_id(environment)
    wish = _wishes(environment)
    nodes = environment.get("SLURM_NODELIST", "")
    width = 2 * len(nodes) + _WIDTH if nodes else _WIDEST
    allocation = look_up(ident, settings.slurmBinPath, environment.get("SLURM_CONF", ""), width)
    uid = number(environment.get("SLURM_JOB_UID", ""), "SLURM_JOB_UID")
    if allocation.uid != uid:
        raise SlurmError(f"job {ident} is uid {allocation.uid}'s for slurmctld, uid {uid}'s for slurmd")
    if environment.get("SLURMD_NODENAME", "") not in allocation.nodes:
        raise SlurmError(f"job {ident} is not on this node ({environment.get('SLURMD_NODENAME', '')[:80]!a})")
    name, uid, gid, groups, home = jobs.account("", allocation.uid, allocation.gid)
    cpus = cpus_per_node(environment.get("SLURM_JOB_CPUS_PER_NODE", ""), len(allocation.nodes))
    made = jobs.Job(
        ident,
        name,
        uid,
        gid,
        groups,
        _image(wish["IMAGETYPE"] or settings.defaultImageType, wish["IMAGE"]),
        volumes=[wish["VOLUME"]] if wish["VOLUME"] else [],
        modules=[word for word in wish["MODULE"].split(",") if word],
        nodes=place_tasks(allocation, cpus),
        restart=allocation.restart,
        sshd=_sshd(wish["SSHD"], allocation.exclusive or settings.sharedNodeSshd),
        home=home,
    )
    return made, wish


def _wishes(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what the user asks for, by the last word of its variable. Raises UsageError."""
    found = {name.removeprefix("SPANK_SHIFTER_"): environment.get(name, "") for name in WISHES}
    for name, text in found.items():
        if len(text) > MAX_WISH or any(ord(char) < 32 or ord(char) == 127 for char in text):
            raise UsageError(f"SPANK_SHIFTER_{name}: control characters, or longer than {MAX_WISH} characters")
    found["SSHD"] = found["SSHD"] or "auto"
    if found["SSHD"] not in ("yes", "no", "auto"):
        raise UsageError(f"--sshd={found['SSHD'][:40]!a}: it must be yes, no or auto")
    if found["CCM"] and (found["CCM"], found["IMAGETYPE"], found["IMAGE"]) != ("1", "local", "/"):
        raise UsageError("--ccm: its image is local:/, and no other one")
    return found


def _image(kind: str, name: str) -> str:
    if kind not in reference.KINDS:
        raise UsageError(f"image type {kind[:40]!a}: it must be one of {', '.join(reference.KINDS)}")
    return str(reference.parse(f"{kind}:{name}"))


def _sshd(wish: str, possible: bool) -> bool:
    if wish == "yes" and not possible:
        raise UsageError("--sshd=yes: the nodes of this job are shared with other jobs; use --exclusive")
    return wish != "no" and possible


def look_up(ident: str, directory: str, conf: str = "", width: int = _WIDEST) -> Allocation:
    """Ask slurmctld for the job, by squeue of *directory*. *conf*: SLURM_CONF, if that is root's. Raises SlurmError.

    *width*: of the list of nodes. For an array squeue prints all members that run, and fills each line up to it.
    """
    widths = [*(f"{name}:{_WIDTH}" for name in _COLUMNS[:-1]), f"{_COLUMNS[-1]}:{min(width, _WIDEST)}"]
    command = ["squeue", "--noheader", "--all", "--states=all", f"--jobs={ident}", "-O", ",".join(widths)]
    return parse_allocation(_ask(command, directory, conf), ident)


def tell(ident: str, text: str, directory: str, conf: str = "") -> None:
    """Leave *text* with the job, in the comment that only administrators can write. Raises SlurmError."""
    _ask(["scontrol", "update", f"JobId={ident}", f"AdminComment={text}"], directory, conf)


def _ask(command: list[str], directory: str, conf: str) -> str:
    """Run one of Slurm's programs; return what it printed. Raises SlurmError."""
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
    if conf:
        environment["SLURM_CONF"] = _trusted(conf)
    program, *words = command
    try:
        done = subprocess.run(
            [f"{directory}/{program}", *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
            check=False,
        )
    except OSError as error:
        raise SlurmError(f"{describe(error)}; slurmBinPath of udiRoot.conf says where Slurm's programs are") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{program} did not answer within {TIME_LIMIT} s") from None
    if done.returncode != 0:
        raise SlurmError(f"{program}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    return done.stdout


def parse_allocation(text: str, ident: str) -> Allocation:
    """Return the job *ident* from what squeue printed; of a job array each member has a line. Raises SlurmError."""
    for line in text.splitlines():
        words = line.split()
        if len(words) != len(_COLUMNS) or words[0] != ident:
            continue
        try:
            uid, gid, restart = (number(words[n], _COLUMNS[n]) for n in (1, 2, 3))
            count, tasks, cpus = (number(words[n], _COLUMNS[n]) for n in (5, 6, 7))
            nodes = expand(words[8])
        except UsageError as error:
            raise SlurmError(f"squeue, job {ident}: {error}") from None
        if len(nodes) != count:
            raise SlurmError(f"squeue, job {ident}: {count} nodes, but {len(nodes)} names")
        return Allocation(int(ident), uid, gid, restart, words[4] == "NO", max(tasks, 1), max(cpus, 1), nodes)
    raise SlurmError(f"slurmctld knows no job {ident} that has nodes")


def _trusted(path: str) -> str:
    """Return *path* if nobody but root and Slurm's own account can change that file. Raises SlurmError."""
    owners = [0]
    with contextlib.suppress(KeyError):
        owners.append(pwd.getpwnam("slurm").pw_uid)
    try:
        fd = paths.open_trusted(path, tuple(owners))
    except (OSError, ShifterError) as error:
        raise SlurmError(
            f"SLURM_CONF {path[:200]!a}: {error.strerror if isinstance(error, OSError) else error}"
        ) from None
    os.close(fd)
    return path


def expand(text: str) -> list[str]:
    """Return the names of ``node[1-3,07],login``. Raises UsageError.

    Several brackets in a word (a multi-dimensional system) multiply.
    """
    found: list[str] = []
    word, depth = "", 0
    if text.split() != [text]:
        raise UsageError(f"node list {text[:80]!a}")
    for char in [*text, ","]:
        depth += (char == "[") - (char == "]")
        if char == "," and depth == 0:
            found += _expand_word(word)
            word = ""
        else:
            word += char
        if depth not in (0, 1) or len(found) > jobs.MAX_NODES:
            raise UsageError(f"node list {text[:80]!a}")
    if depth:
        raise UsageError(f"node list {text[:80]!a}")
    return [name for name, _ in jobs.parse_nodes(" ".join(found))]


def _expand_word(word: str) -> list[str]:
    head, bracket, rest = word.partition("[")
    if not bracket:
        return [word]
    inner, _, tail = rest.partition("]")
    names = []
    for part in inner.split(","):
        low, dash, high = part.partition("-")
        first, last = number(low, "node"), number(high if dash else low, "node")
        if last - first > jobs.MAX_NODES:
            raise UsageError(f"node list {word[:80]!a}: too many nodes")
        names += [f"{head}{n:0{len(low)}}" for n in range(first, last + 1)]
    ends = _expand_word(tail)
    if len(names) * len(ends) > jobs.MAX_NODES:
        raise UsageError(f"node list {word[:80]!a}: too many nodes")
    return [name + end for name in names for end in ends]


def cpus_per_node(text: str, count: int) -> list[int]:
    """Return the processors of each of *count* nodes from ``4(x2),2``; none if it does not fit. Raises UsageError."""
    found: list[int] = []
    for part in text.split(",") if text else ():
        cpus, _, times = part.partition("(x")
        repeat = number(times.removesuffix(")"), "SLURM_JOB_CPUS_PER_NODE", jobs.MAX_NODES) if times else 1
        found += [number(cpus, "SLURM_JOB_CPUS_PER_NODE", jobs.MAX_TASKS)] * repeat
        if len(found) > count:
            return []
    return found if len(found) == count else []


def place_tasks(allocation: Allocation, cpus: list[int]) -> list[tuple[str, int]]:
    """Return how many tasks each node is for: one after the other gets one, while it has processors for it."""
    nodes = allocation.nodes
    total = max(allocation.tasks, len(nodes))
    if total > jobs.MAX_TASKS:
        raise SlurmError(f"job {allocation.ident}: {total} tasks, more than {jobs.MAX_TASKS}")
    room = [max(count // allocation.cpus_per_task, 1) for count in cpus] or [total] * len(nodes)
    placed = [0] * len(nodes)
    while total:
        able = [at for at in range(len(nodes)) if placed[at] < room[at]] or list(range(len(nodes)))
        # As many rounds at once as each that takes part has room for.
        rounds = max(1, min(total // len(able), min(max(room[at] - placed[at], 1) for at in able)))
        for at in able[:total]:
            placed[at] += rounds
        total -= rounds * min(len(able), total)
    return list(zip(nodes, placed, strict=True))
