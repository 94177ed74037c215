"""What the benchmarks share: the tree and its images, the laboratory they run in, statistics and result files.

The laboratory is a private mount and PID namespace with its own ``/etc``, ``/run``, ``/tmp``, ``/home``, ``/srv``,
cgroup file system and users. Nothing of it is visible on the machine, and it is gone, with every process, mount and
loop device, when its first process ends, however that happens.
"""

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
RESULTS = HERE / "results"
PREFIX = Path("/opt/shifter")
SHIFTER = PREFIX / "bin/shifter"
SHIFTERCTL = PREFIX / "bin/shifterctl"
SHIFTERIMG = PREFIX / "bin/shifterimg"

LAB = Path("/srv/bench")
"""Where the laboratory sees the work directory."""
TREE = LAB / "tree"
IMAGES = LAB / "images"
USER = "shbench"
UID = 47000
CROWD = 64
"""How many processes, or users, start at once."""
CROWD_UID = UID + 100
"""First of the uids of the different users ``shbench0`` to ``shbench63``."""
VARIABLES = 40

CLONE_NEWNS = 0x00020000
CLONE_NEWPID = 0x20000000
PR_SET_PDEATHSIG = 1
NS_GET_MNTNS_ID = 0x8008B705

_libc = ctypes.CDLL(None, use_errno=True)


class CommandFailed(Exception):
    """A command that ended with an error: the message holds the command and its last words."""


def run(*command: str | Path, **options: Any) -> str:
    """Run a command, return what it prints."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise CommandFailed(f"{command[0]}: {_last_words(done)}")
    return done.stdout


def run_as_user(*command: str | Path, **options: Any) -> str:
    """The same as the ordinary user of the laboratory."""
    identity = {"user": UID, "group": UID, "extra_groups": []}
    return run(*command, **identity, env=environment(USER, UID), cwd="/", **options)


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    """The last two lines of an error message (the command's, the launcher's), else the exit status."""
    return " / ".join(done.stderr.strip().splitlines()[-2:]) or f"exit status {done.returncode}"


# -- made once into the work directory ---------------------------------------------------------------------------------


def prepare(work: Path) -> None:
    """Make the Debian 12 tree, its SquashFS images and the two C programs, as far as they are not there yet."""
    os.umask(0o022)
    work.mkdir(parents=True, exist_ok=True)
    tree = work / "tree"
    if not tree.exists():
        print("making the Debian 12 tree", file=sys.stderr)
        fresh = work / "tree.new"
        shutil.rmtree(fresh, ignore_errors=True)
        run("mmdebstrap", "--variant=minbase", "--include=python3", "bookworm", fresh)
        fresh.rename(tree)
    for compression in ("gzip", "zstd"):
        image = work / f"{compression}.sqfs"
        if not image.exists():
            fresh = work / f"{compression}.new"
            fresh.unlink(missing_ok=True)
            run("mksquashfs", tree, fresh, "-comp", compression, "-no-progress", "-quiet")
            fresh.rename(image)
    for program in ("launcher", "reader"):
        run("gcc", "-O2", "-Wall", "-Wextra", "-static", "-o", work / program, HERE / f"{program}.c")


# -- the laboratory ----------------------------------------------------------------------------------------------------


def in_lab(work: Path, stage: Path | None, body: Callable[[], Any]) -> Any:
    """Run ``body`` in a laboratory, hand back what it returns (through JSON); leave nothing behind.

    ``stage`` is what ``make stage`` made; without it the installation of this machine is measured.
    """
    if os.geteuid():
        raise SystemExit("the benchmarks make namespaces and users: run them as root")
    sys.stdout.flush()
    sys.stderr.flush()
    own = os.open("/proc/self/ns/pid", os.O_RDONLY)
    source, sink = os.pipe()
    if _libc.unshare(CLONE_NEWPID):
        raise OSError(ctypes.get_errno(), "unshare")
    init = os.fork()
    if init == 0:
        os.close(source)
        _as_init(work, stage, body, sink)
    os.close(sink)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with os.fdopen(source, encoding="utf-8") as stream:
            text = stream.read()
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        os.kill(init, signal.SIGKILL)
        os.waitpid(init, 0)
        _libc.setns(own, CLONE_NEWPID)  # or no process could be started any more
        shutil.rmtree(work / "home", ignore_errors=True)
        _wait_for_loops(work)
    if not text:
        raise SystemExit(1)
    return json.loads(text)


def _as_init(work: Path, stage: Path | None, body: Callable[[], Any], sink: int) -> None:
    """Be the laboratory's process 1: set it up, run the body in a child and reap whatever is orphaned."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _unshare_mounts()
    worker = os.fork()
    if worker == 0:
        status = 1
        try:
            _furnish(work, stage)
            result = body()
            with os.fdopen(sink, "w", encoding="utf-8") as stream:
                json.dump(result, stream)
            status = 0
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
        except CommandFailed as failure:
            print(failure, file=sys.stderr)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(sink)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while os.wait()[0] != worker:
        pass
    os._exit(0)


def _unshare_mounts() -> None:
    """Make the laboratory's mount namespace, with an id that is lower than that of every later one.

    A mount namespace can only be bound (pinned) in one with a lower id. Linux 6.18 hands ids out in batches to each
    processor, so that a later one is the lower one if it was made on another processor. A machine's first namespace
    has the lowest of all; this one gets the lowest by being made where the next id is the lowest.
    """
    processors = os.sched_getaffinity(0)
    identifiers = {processor: _fresh_mounts(processor) for processor in processors}
    _fresh_mounts(min(processors, key=lambda processor: identifiers[processor]))
    os.sched_setaffinity(0, processors)


def _fresh_mounts(processor: int) -> int:
    """Enter a new mount namespace made on one processor; return its id, 0 where the kernel can't tell."""
    os.sched_setaffinity(0, {processor})
    if _libc.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    identifier = bytearray(8)
    with open("/proc/thread-self/ns/mnt", "rb") as namespace, contextlib.suppress(OSError):
        fcntl.ioctl(namespace, NS_GET_MNTNS_ID, identifier)
    return int.from_bytes(identifier, sys.byteorder)


def _furnish(work: Path, stage: Path | None) -> None:
    """Mount what the laboratory has of its own. Paths below ``/srv`` are ours from here on."""
    handle = os.open(work, os.O_PATH | os.O_DIRECTORY)
    staged = None if stage is None else os.open(stage, os.O_PATH | os.O_DIRECTORY)
    run("mount", "--make-rprivate", "/")
    run("mount", "-t", "proc", "proc", "/proc")
    for place in ("/srv", "/run"):
        run("mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", place)
    for place in ("/tmp", "/var/tmp", "/dev/shm"):
        run("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", place)
    LAB.mkdir()
    run("mount", "--bind", f"/proc/self/fd/{handle}", LAB, pass_fds=(handle,))
    os.close(handle)
    run("mount", "-t", "cgroup2", "cgroup2", "/sys/fs/cgroup")
    os.mknod("/srv/fuse", 0o020666, os.makedev(10, 229))
    os.chmod("/srv/fuse", 0o666)
    run("mount", "--bind", "/srv/fuse", "/dev/fuse")
    run("cp", "-a", "/etc", "/srv/etc")
    run("mount", "--bind", "/srv/etc", "/etc")
    if staged is not None:
        run("mount", "--bind", f"/proc/self/fd/{staged}/opt", "/opt", pass_fds=(staged,))
        run("cp", "-a", f"/proc/self/fd/{staged}/etc/shifter", "/etc", pass_fds=(staged,))
        os.close(staged)
    shutil.rmtree(LAB / "home", ignore_errors=True)
    (LAB / "home").mkdir()
    run("mount", "--bind", LAB / "home", "/home")
    _add_user(USER, UID)
    for number in range(CROWD):
        _add_user(f"{USER}{number}", CROWD_UID + number)
    for table in ("/etc/subuid", "/etc/subgid"):
        with open(table, "w", encoding="utf-8") as stream:
            stream.write(f"{USER}:1000000:65536\n")


def _add_user(name: str, uid: int) -> None:
    """Write an ordinary user into the laboratory's own ``/etc`` and make the home and run-time directories."""
    home, runtime = Path("/home") / name, Path("/run/user") / str(uid)
    with open("/etc/passwd", "a", encoding="utf-8") as users, open("/etc/group", "a", encoding="utf-8") as groups:
        users.write(f"{name}:x:{uid}:{uid}::{home}:/bin/bash\n")
        groups.write(f"{name}:x:{uid}:\n")
    runtime.parent.mkdir(exist_ok=True)
    for path in (home, runtime):
        path.mkdir(mode=0o700)
        os.chown(path, uid, uid)


def _wait_for_loops(work: Path) -> None:
    """The kernel frees the laboratory's loop devices with its last mount, a moment after its last process."""
    deadline = time.monotonic() + 10
    while left := _loops(work):
        if time.monotonic() > deadline:
            raise SystemExit(f"loop devices left over: {' '.join(left)}")
        time.sleep(0.05)


def _loops(work: Path) -> list[str]:
    """Loop devices on images of the work directory."""
    images = {str(path.stat().st_ino) for path in (*work.glob("*.sqfs"), *work.glob("images/*"))}
    device = work.stat().st_dev
    place = f"{os.major(device)}:{os.minor(device)}"
    lines = run("losetup", "--list", "--noheadings", "--output", "NAME,BACK-INO,BACK-MAJ:MIN").splitlines()
    return [name for name, inode, where in map(str.split, lines) if inode in images and where == place]


def environment(user: str, uid: int | str) -> dict[str, str]:
    """Exactly 40 variables, as a batch job has them."""
    variables = {
        "HOME": f"/home/{user}", "USER": user, "LOGNAME": user, "SHELL": "/bin/bash", "LANG": "C.UTF-8",
        "PATH": "/usr/local/bin:/usr/bin:/bin", "TERM": "xterm", "PWD": "/", "TMPDIR": "/tmp",
        "XDG_RUNTIME_DIR": f"/run/user/{uid}",
    }  # fmt: skip
    for number in range(VARIABLES - len(variables)):
        variables[f"SLURM_BENCH_{number}"] = f"value of variable {number} of the job"
    return variables


# -- ours --------------------------------------------------------------------------------------------------------------


def install_ours(formats: Sequence[str]) -> None:
    """Give the laboratory the shipped configuration (one siteFs: /home), and images of the tree in these formats."""
    if not SHIFTER.exists():
        raise CommandFailed(f"{SHIFTER} is missing: run make install, or make stage and give --stage build/stage")
    shipped = Path("/etc/shifter/udiRoot.conf.example").read_text(encoding="utf-8")
    text = f"{shipped}\nimagePath = {IMAGES}\n"
    Path("/etc/shifter/udiRoot.conf").write_text(text, encoding="utf-8")
    shutil.rmtree(IMAGES, ignore_errors=True)
    (IMAGES / "tags").mkdir(parents=True, mode=0o755)
    for image_format in formats:
        if image_format == "directory":
            run("cp", "-al", TREE, IMAGES / "bench-directory.")
            (IMAGES / "bench-directory.meta").write_text("FORMAT: VFS\n", encoding="utf-8")
            (IMAGES / "tags" / reference("directory")).symlink_to("bench-directory")
        else:
            run(SHIFTERIMG, "import", TREE, reference(image_format), "--format", image_format)


def reference(image_format: str) -> str:
    """The name of the image in one of the formats squashfs, erofs and directory."""
    return f"docker:bench-{image_format}:12"


def ours(image_format: str, *command: str) -> list[str]:
    """A command in the image."""
    return [str(SHIFTER), f"--image={reference(image_format)}", *command]


# -- samples -----------------------------------------------------------------------------------------------------------


def launch(command: Sequence[str], count: int = 1, step: int = 0) -> int:
    """Nanoseconds from fork to the exit of ``count`` commands of the ordinary user; of different ones with step 1."""
    user, uid = (f"{USER}{{}}", CROWD_UID) if step else (USER, UID)
    words = [str(word) for word in (LAB / "launcher", uid, uid, count, step, *command)]
    output = run(*words, env=environment(user, uid), cwd="/", stdin=subprocess.DEVNULL)
    return int(output)


def p95(samples: Sequence[float]) -> float:
    """The 95th percentile (nearest rank)."""
    return sorted(samples)[-(-95 * len(samples) // 100) - 1]


def machine() -> dict[str, Any]:
    """What the numbers depend on and a reader can't know."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "kernel": platform.release(),
        "cpu": f"{os.cpu_count()} x {cpu}",
        "python": platform.python_version(),
        "load": os.getloadavg(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Debian packages; "not installed" is one too."""
    found = {}
    for package in packages:
        query = ("dpkg-query", "-W", "-f", "${Version}", package)
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        found[package] = done.stdout or "not installed"
    return found


# -- results -----------------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser, number: int) -> None:
    """The options that the benchmarks share."""
    parser.add_argument("-n", "--number", type=int, default=number, help="samples of each row (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=PROJECT / "build/bench", help="cache of the tree and its images")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the results are written")
    parser.add_argument("--stage", type=Path, help="measure what `make stage` made there, not the installation")


def describe(result: dict[str, Any]) -> list[str]:
    """The machine and the versions, as lines of Markdown."""
    machine = result["machine"]
    loads = " / ".join(f"{load[0]:.2f}" for load in (machine["load"], result["load_after"]))
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return [
        f"{machine['time']}, Linux {machine['kernel']}, {machine['cpu']}; load average before / after: {loads}.",
        f"Versions: {packages}.",
    ]


def write(directory: Path, name: str, result: dict[str, Any], text: str) -> None:
    """Write the raw samples and the report, and print the report."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (directory / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
