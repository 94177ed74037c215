"""Reaping: what nobody uses goes, what somebody uses stays, and nothing is left of either at the end."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.images import Tree
from tests.node import IMAGES, PREFIX, Node, Terminal, loops, wait_for

RUN = "/run/shifter"
SHIFTER = f"{PREFIX}/bin/shifter"
LOOP_CTL_GET_FREE, LOOP_CTL_REMOVE = 0x4C82, 0x4C81


def udis(node: Node, *arguments: str, user: str = "root") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(node.shifterctl("ps", "--json", *arguments, user=user, check=True).stdout)
    return rows


def gc(node: Node, *arguments: str) -> str:
    done = node.shifterctl("gc", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def age(node: Node, seconds: int) -> None:
    """Make everything below /run/shifter look that much older."""
    when = time.time() - seconds
    node.run(f"find {RUN} -xdev -type f ! -name ns ! -name store -exec touch -d @{when} {{}} +", check=True)


def launch(node: Node, *command: str, image: str = "tiny:1", user: str = "alice", **options: Any) -> str:
    return node.shifter("-v", f"--image={image}", *(command or ("true",)), user=user, check=True, **options).stderr


@contextlib.contextmanager
def running(node: Node, *command: str, user: str = "alice", **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A launch that prints a line when it is inside, and goes on until the end of the block."""
    argv = [SHIFTER, "--image=tiny:1", *(command or ("sh", "-c", "echo inside; exec sleep 1000"))]
    process = node.popen(argv, user=user, **options)
    assert process.stdout
    line = process.stdout.readline()
    assert line == "inside\n", (line, process.communicate())
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


# --- age and use -----------------------------------------------------------------------------------------------------


def test_idle_udis_go_and_their_images_with_them(tiny_node: Node) -> None:
    tiny_node.conf(udiIdleTime=1)
    launch(tiny_node)
    launch(tiny_node, user="bob")
    assert gc(tiny_node) == ""
    assert len(udis(tiny_node)) == 2
    assert len(tiny_node.loops()) == 1
    time.sleep(2.1)
    said = gc(tiny_node)
    assert said.count("UDI 500") == 2
    assert said.count(": idle for ") == 2
    assert said.count("image ") == 1
    assert udis(tiny_node) == []
    wait_for(lambda: not tiny_node.loops())
    assert tiny_node.left() == []
    assert "built now" in launch(tiny_node)


def test_launches_keep_a_udi(tiny_node: Node) -> None:
    launch(tiny_node)
    age(tiny_node, 299)
    launch(tiny_node)
    assert gc(tiny_node) == ""
    age(tiny_node, 299)
    assert gc(tiny_node) == ""
    age(tiny_node, 302)
    assert "idle" in gc(tiny_node)


def test_udi_in_use_stays(tiny_node: Node) -> None:
    with running(tiny_node) as process:
        age(tiny_node, 1000)
        assert gc(tiny_node) == ""
        (udi,) = udis(tiny_node)
        assert udi["pids"] == [p.nspid for p in tiny_node.processes() if p.pid == process.pid]
        assert "built before" in launch(tiny_node)
        age(tiny_node, 1000)
    assert "idle" in gc(tiny_node)


def test_udi_with_a_nested_user_namespace_stays(tiny_node: Node) -> None:
    with running(tiny_node, "unshare", "-U", "-r", "-m", "sh", "-c", "echo inside; exec sleep 1000"):
        age(tiny_node, 1000)
        assert gc(tiny_node) == ""


def test_udi_with_an_interactive_launch_stays(tiny_node: Node) -> None:
    """With a private devpts a launch on a terminal has a copy of the namespace: the terminal is its /dev/console."""
    tiny_node.conf(devpts="private")
    launch(tiny_node)
    with Terminal(tiny_node) as terminal:
        argv = [SHIFTER, "--image=tiny:1", "sh", "-c", "echo inside; tty; exec sleep 1000"]
        process = terminal.popen(argv)
        assert terminal.read("/dev/console\n") == "inside\n/dev/console\n"
        age(tiny_node, 1000)
        assert gc(tiny_node) == ""
        assert len(udis(tiny_node)[0]["pids"]) == 1
        process.kill()
        process.wait()
    age(tiny_node, 1000)
    assert "idle" in gc(tiny_node)


def test_too_old_a_udi_goes_even_in_use(tiny_node: Node) -> None:
    tiny_node.conf(udiMaxAge=1)
    with running(tiny_node, "sh", "-c", "echo inside; read line; cat /etc/issue", stdin=subprocess.PIPE) as process:
        time.sleep(2.1)
        assert "udiMaxAge" in gc(tiny_node)
        assert udis(tiny_node) == []
        assert "built now" in launch(tiny_node)
        assert process.communicate("go on\n")[0] == "Tiny\n"


def test_least_recently_used_goes_first(tiny_node: Node) -> None:
    tiny_node.conf(udiMaxPerUser=3)
    for number in range(3):
        tiny_node.mkdir(f"/srv/{number}")
        tiny_node.shifter("--image=tiny:1", f"--volume=/srv/{number}:/mnt", "true", check=True)
    tiny_node.shifter("--image=tiny:1", "--volume=/srv/0:/mnt", "true", check=True)
    launch(tiny_node, user="bob")
    tiny_node.shifter("--image=tiny:1", "true", check=True)  # the fourth: its builder takes the oldest down

    def volumes() -> list[list[str]]:
        return sorted(udi["volumes"] for udi in udis(tiny_node) if udi["uid"] == 5001)

    wait_for(lambda: len(volumes()) == 3)
    assert volumes() == [[], ["/srv/0:/mnt"], ["/srv/2:/mnt"]]
    assert len([udi for udi in udis(tiny_node) if udi["uid"] == 5002]) == 1


def test_builders_sweep(tiny_node: Node) -> None:
    """Without a timer: a build takes down what others left, if the last sweep is a while ago."""
    launch(tiny_node)
    age(tiny_node, 1000)
    launch(tiny_node, user="bob")
    wait_for(lambda: [udi["uid"] for udi in udis(tiny_node)] == [5002])


# --- everything ------------------------------------------------------------------------------------------------------


def test_all_takes_down_what_is_in_use_and_it_goes_on(tiny_node: Node) -> None:
    with running(tiny_node, "sh", "-c", "echo inside; read line; cat /etc/issue", stdin=subprocess.PIPE) as process:
        said = gc(tiny_node, "--all")
        assert "UDI 5001/" in said
        assert "image " in said
        assert udis(tiny_node) == []
        assert tiny_node.loops()  # the process has it
        assert process.communicate("go on\n")[0] == "Tiny\n"
    wait_for(lambda: not tiny_node.loops())


def test_keep_images(tiny_node: Node) -> None:
    launch(tiny_node)
    assert "image " not in gc(tiny_node, "--all", "--keep-images")
    assert udis(tiny_node) == []
    assert len(tiny_node.loops()) == 1
    assert "image " in gc(tiny_node, "--all")
    wait_for(lambda: not tiny_node.loops())


def test_all_waits_for_a_build(tiny_node: Node) -> None:
    launch(tiny_node)
    holder = tiny_node.popen(f"exec flock {RUN}/udi/5001/lock sh -c 'echo held; sleep 0.5'")
    assert holder.stdout and holder.stdout.readline() == "held\n"
    assert gc(tiny_node) == ""
    assert "UDI 5001/" in gc(tiny_node, "--all")


def test_only_root_collects(tiny_node: Node) -> None:
    for arguments in (["gc"], ["release", "/home"]):
        done = tiny_node.shifterctl(*arguments, user="alice")
        assert done.returncode == 1
        assert done.stderr == "shifterctl: this needs root\n"


def test_all_without_a_readable_configuration(tiny_node: Node) -> None:
    launch(tiny_node)
    tiny_node.conf("nonsense\n")
    assert tiny_node.shifterctl("gc").returncode == 1
    assert "UDI 5001/" in gc(tiny_node, "--all")


# --- debris ----------------------------------------------------------------------------------------------------------


def test_debris_without_a_record_goes(tiny_node: Node) -> None:
    launch(tiny_node)
    (udi,) = udis(tiny_node)
    tiny_node.run(f"rm {RUN}/udi/5001/{udi['key']}/record; mkdir {RUN}/udi/5001/0123456789abcdef", check=True)
    tiny_node.run(f"touch {RUN}/site.0123 {RUN}/site.4567; touch -d '-2 minutes' {RUN}/site.0123", check=True)
    assert gc(tiny_node).count("no valid record") == 2
    assert tiny_node.run(f"ls {RUN}/udi/5001").stdout == "lock\n"
    assert "site.0123" not in tiny_node.run(f"ls {RUN}").stdout
    assert "site.4567" in tiny_node.run(f"ls {RUN}").stdout


def test_image_without_its_lock_file_is_found(tiny_node: Node) -> None:
    launch(tiny_node)
    tiny_node.run(f"rm {RUN}/images/*", check=True)
    assert "built now" in launch(tiny_node, user="bob")
    assert len(tiny_node.loops()) == 1
    tiny_node.run(f"rm {RUN}/images/*", check=True)
    assert "image " in gc(tiny_node, "--all")
    wait_for(lambda: not tiny_node.loops())


def test_nothing_was_ever_made(tiny_node: Node) -> None:
    for arguments in (["gc"], ["gc", "--all"], ["ps"], ["release", "/home"]):
        done = tiny_node.shifterctl(*arguments)
        assert (done.returncode, done.stderr) == (0, ""), arguments
    assert udis(tiny_node) == []
    assert udis(tiny_node, user="alice") == []
    assert not tiny_node.exists(RUN)


WIPES = {
    "unmounted": f"umount -l {RUN}",
    "unmounted and removed": f"umount -l {RUN}; rm -r {RUN}",
    "files removed": f"rm -rf {RUN}/* 2>/dev/null; true",
    "everything but pins": f"find {RUN} -xdev -mindepth 1 -type f ! -name ns ! -name store -delete",
    "store unmounted": f"umount {RUN}/store",
    "store removed": f"umount {RUN}/store; rm {RUN}/store",
    "udi removed": f"umount {RUN}/udi/*/*/ns; rm -r {RUN}/udi",
    "images removed": f"rm -r {RUN}/images",
    "another run": "mount -t tmpfs tmpfs /run",
}


@pytest.mark.parametrize("how", WIPES)
def test_wiped_while_in_use(tiny_node: Node, how: str) -> None:
    """The next launch works, and so do what runs, and the collection; afterwards nothing is left."""
    tiny_node._expected.add("/run")
    with running(tiny_node, "sh", "-c", "echo inside; read line; cat /etc/issue", stdin=subprocess.PIPE) as process:
        tiny_node.run(WIPES[how], check=True)
        for user in ("alice", "bob"):
            done = tiny_node.shifter("--image=tiny:1", "echo", "works", user=user)
            assert done.stdout == "works\n", done.stderr
            assert "built before" in launch(tiny_node, user=user)
        assert 5002 in {udi["uid"] for udi in udis(tiny_node)}
        assert len([m for m in tiny_node.mounts() if m.target == RUN]) == (2 if how == "another run" else 1)
        assert process.communicate("go on\n")[0] == "Tiny\n"
    if how == "another run":  # what lies below is out of reach until that goes
        tiny_node.run("shifterctl gc --all; umount -l /run", check=True)


@pytest.mark.parametrize("how", WIPES)
def test_collection_after_a_wipe(tiny_node: Node, how: str) -> None:
    launch(tiny_node)
    tiny_node.run(WIPES[how], check=True)
    gc(tiny_node)
    udis(tiny_node)
    gc(tiny_node, "--all")
    if how == "another run":
        tiny_node._expected.add("/run")
        tiny_node.run("umount -l /run", check=True)


@pytest.mark.soak
def test_wiped_while_launches_run(tiny_node: Node, counts: dict[str, int], finding: Callable[[str], None]) -> None:
    """Any moment is a bad one; a launch works, or says in one line why not."""
    wiper = tiny_node.popen(f"while :; do sleep 0.4; umount -l {RUN}; done 2>/dev/null")
    failed = []
    for _ in range(counts["wipes"]):
        children = [tiny_node.popen([SHIFTER, "--image=tiny:1", "echo", "works"], user="alice") for _ in range(8)]
        for child in children:
            out, err = child.communicate(timeout=60)
            if child.returncode:
                failed.append(err)
                assert child.returncode == 125
                assert err.startswith("shifter: "), err
                assert err.count("\n") == 1, err
                assert "Traceback" not in err
            else:
                assert (out, err) == ("works\n", "")
    os.killpg(wiper.pid, signal.SIGKILL)
    wiper.communicate()
    assert len(failed) < counts["wipes"] * 8 / 2, failed
    finding(
        f"{counts['wipes'] * 8} launches while /run/shifter was unmounted every 0.4 s: {len(failed)} said in one line why not"
    )
    assert launch(tiny_node)


# --- other namespaces ------------------------------------------------------------------------------------------------


OTHER_RUN = ("mount -t tmpfs tmpfs /run;", "mount -t tmpfs tmpfs /run; mkdir /run/shifter;")


# With shared propagation another /run would appear in the node, too: that is another test's.
@pytest.mark.parametrize(
    ("how", "run"), [(how, run) for how in ("private", "slave") for run in ("", *OTHER_RUN)] + [("shared", "")]
)
def test_shifterctl_in_another_namespace(tiny_node: Node, how: str, run: str) -> None:
    """It works on the node's own state, wherever it is called."""
    tiny_node._expected.add("/run")
    launch(tiny_node)
    script = f"{run} shifterctl ps; shifterctl gc --all; ls {RUN}/; pwd"
    done = tiny_node.run(["unshare", "-m", "--propagation", how, "sh", "-c", script], check=True, cwd="/srv")
    assert "5001" in done.stdout.splitlines()[1]
    assert "UDI 5001/" in done.stdout
    assert done.stdout.endswith("/srv\n")
    assert udis(tiny_node) == []


def test_base_made_by_a_caller_in_another_namespace(tiny_node: Node) -> None:
    alice = f"setpriv --reuid 5001 --regid 5001 --clear-groups {SHIFTER} -v --image=tiny:1 true"
    for how in ("private", "slave"):
        done = tiny_node.run(["unshare", "-m", "--propagation", how, "sh", "-c", alice])
        assert done.returncode == 0, done.stderr
        assert "built now" in done.stderr
        assert len(udis(tiny_node)) == 1
        assert "built now" in launch(tiny_node)
        assert len(udis(tiny_node)) == 2
        gc(tiny_node, "--all")


# --- images and loop devices -----------------------------------------------------------------------------------------


def test_two_images_at_once(tiny_node: Node, image: Tree, tmp_path: Path) -> None:
    other = image.copy(tmp_path / "other")
    (other.path / "etc/issue").write_text("Other\n")
    tiny_node.add_image("docker:other:1", other)
    children = {
        name: [
            tiny_node.popen([SHIFTER, f"--image={name}:1", "cat", "/etc/issue"], user=user) for user in ("alice", "bob")
        ]
        for name in ("tiny", "other")
    }
    said = {name: {child.communicate(timeout=30)[0] for child in made} for name, made in children.items()}
    assert said == {"tiny": {"Tiny\n"}, "other": {"Other\n"}}
    assert len(tiny_node.loops()) == 2
    assert len(tiny_node.store_mounts()) == 3
    tiny_node.run(f"rm -r {RUN}/udi/*/*/record", check=True)
    age(tiny_node, 1000)
    launch(tiny_node, image="other:1")
    wait_for(lambda: len(tiny_node.store_mounts()) == 2)  # its builder swept
    wait_for(lambda: len(tiny_node.loops()) == 1)


def test_all_loop_devices_busy(tiny_node: Node, tmp_path: Path) -> None:
    """Then the kernel makes one more, and the image is mounted on that."""
    control = os.open("/dev/loop-control", os.O_RDWR)
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(1 << 16))
    before = {entry.name for entry in Path("/sys/block").glob("loop*")}
    taken = []
    try:
        while True:
            number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
            if f"loop{number}" not in before:
                break
            done = subprocess.run(["losetup", "-r", f"/dev/loop{number}", backing], capture_output=True)
            if done.returncode == 0:  # else somebody else on this machine was faster
                taken.append(number)
            assert len(taken) < 300
        fcntl.ioctl(control, LOOP_CTL_REMOVE, number)  # LOOP_CTL_GET_FREE made it
        assert "built now" in launch(tiny_node)
        (loop,) = tiny_node.loops()
        assert loop.number not in taken
        gc(tiny_node, "--all")
        wait_for(lambda: not tiny_node.loops())
    finally:
        for number in taken:
            subprocess.run(["losetup", "-d", f"/dev/loop{number}"], check=True)
        for entry in {entry.name for entry in Path("/sys/block").glob("loop*")} - before:
            with contextlib.suppress(OSError):
                fcntl.ioctl(control, LOOP_CTL_REMOVE, int(entry[4:]))
        os.close(control)
    assert not [loop for loop in loops() if loop.name == str(backing)]


def test_loop_device_taken_in_between(tiny_node: Node) -> None:
    """Between asking for a free loop device and taking it somebody else may: EBUSY, and the next one is asked for."""
    launch(tiny_node)

    def trace(*options: str) -> list[str]:
        gc(tiny_node, "--all")
        strace = ["strace", "-qq", "-f", "-u", "alice", "-o", "/tmp/trace", "-e", "trace=ioctl", "-e", "signal=none"]
        done = tiny_node.run([*strace, *options, SHIFTER, "--image=tiny:1", "echo", "works"])
        assert done.stdout == "works\n", done.stderr
        return tiny_node.read("/tmp/trace").splitlines()

    first = trace()
    number = next(index for index, line in enumerate(first) if "LOOP_CONFIGURE" in line)
    nth = [line.split()[0] for line in first[: number + 1]].count(first[number].split()[0])
    second = [line for line in trace("-e", f"inject=ioctl:error=EBUSY:when={nth}") if "LOOP_CONFIGURE" in line]
    assert len(second) == 2
    assert "EBUSY" in second[0]
    assert second[1].endswith("= 0")


# --- ps and release --------------------------------------------------------------------------------------------------


def test_ps(tiny_node: Node) -> None:
    launch(tiny_node)
    tiny_node.mkdir("/srv/v")
    with running(tiny_node, user="bob"):
        everything = udis(tiny_node)
        assert [udi["uid"] for udi in everything] == [5001, 5002]
        for user, udi in zip(("alice", "bob"), everything, strict=True):
            assert udis(tiny_node, user=user) == [udi]  # processes too: they are the user's own
            assert set(udi) == {"key", "uid", "job", "ended", "image", "ref", "volumes", "built", "used", "pids"}
            assert (udi["ref"], udi["job"], udi["ended"]) == ("tiny:1", "", False)
            assert abs(udi["used"] - time.time()) < 30
        table = tiny_node.shifterctl("ps").stdout.splitlines()
        assert table[0].split() == ["UID", "JOB", "IMAGE", "BUILT", "USED", "PROCESSES", "VOLUMES"]
        assert [line.split()[0] for line in table[1:]] == ["5001", "5002"]
    refused = tiny_node.shifterctl("ps", "--path", "/", user="alice")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    missing = tiny_node.shifterctl("ps", "--path", "/nonexistent")
    assert (missing.returncode, missing.stderr) == (1, "shifterctl: /nonexistent: No such file or directory\n")


@pytest.fixture
def disk(tiny_node: Node) -> Iterator[tuple[Node, str]]:
    """A file system on a loop device of its own: it is gone when that can be detached."""
    tiny_node.run("truncate -s 8M /tmp/disk && mkfs.ext2 -q /tmp/disk && mkdir /scratch", check=True)
    device = tiny_node.run("losetup -f --show /tmp/disk", check=True).stdout.strip()
    tiny_node.mount(device, "/scratch", "ext2")
    tiny_node.run("mkdir -m 1777 /scratch/data", check=True)
    yield tiny_node, device
    tiny_node.run(f"umount -q /scratch; losetup -d {device}")


def in_use(device: str) -> bool:
    """True while a file system is mounted from *device*, wherever: then it can't be opened exclusively."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    except OSError:
        return True
    return False


@pytest.mark.parametrize("where", ["/scratch", "/scratch/data"])
@pytest.mark.parametrize("kind", ["volume", "siteFs"])
def test_release(disk: tuple[Node, str], kind: str, where: str) -> None:
    node, device = disk
    options = [f"--volume={where}:/mnt"] if kind == "volume" else []
    if kind == "siteFs":
        node.conf(siteFs=["/home:/home", f"{where}:{where}"])
    node.shifter("--image=tiny:1", *options, "true", check=True)
    node.shifter("--image=tiny:1", *options, "true", user="bob", check=True)
    if kind == "volume":
        launch(node)
    assert {udi["uid"] for udi in udis(node, "--path", "/scratch")} == {5001, 5002}
    node.run("umount /scratch", check=True)
    assert in_use(device)  # this is why release is needed
    node.run(f"mount {device} /scratch", check=True)
    said = node.shifterctl("release", "/scratch", check=True).stdout
    assert said.count("UDI") == 2
    assert "still used" not in said
    node.run("umount /scratch", check=True)
    assert not in_use(device)
    assert len(udis(node)) == (1 if kind == "volume" else 0)  # the one without the volume stays


def test_release_names_who_is_inside(disk: tuple[Node, str]) -> None:
    node, device = disk
    inside = ["--volume=/scratch:/mnt", "sh", "-c", "echo inside; exec sleep 1000"]
    with running(node, *inside) as process:
        pid = next(p.nspid for p in node.processes() if p.pid == process.pid)
        assert f"still used by PID {pid}" in node.shifterctl("release", "/scratch", check=True).stdout
        node.run("umount /scratch", check=True)
        assert in_use(device)
    wait_for(lambda: not in_use(device))


def test_release_of_the_file_system_of_an_image(disk: tuple[Node, str], image: Tree) -> None:
    node, device = disk
    node.run(
        f"cp -a {IMAGES} /scratch/images && chown -R root:root /scratch/images && chmod 755 /scratch/images", check=True
    )
    launch(node, user="bob")
    node.conf(imagePath="/scratch/images")
    launch(node)
    assert node.run("umount /scratch").returncode != 0
    assert [udi["uid"] for udi in udis(node, "--path", "/scratch")] == [5001]
    said = node.shifterctl("release", "/scratch", check=True).stdout
    assert "image /scratch/images/" in said
    assert said.count("UDI") == 1
    wait_for(lambda: node.run("umount /scratch").returncode == 0)
    assert not in_use(device)
    assert [udi["uid"] for udi in udis(node)] == [5002]
