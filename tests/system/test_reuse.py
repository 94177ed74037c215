"""Reuse: a launch joins a UDI only when nothing that it was made of has changed; else it gets a new one, or a refusal."""

import collections
import contextlib
import functools
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import node as nodes
from tests.images import Tree
from tests.node import CONF, IMAGES, PREFIX, Node, User
from tests.security.circumstances import builders

RUN = "/run/shifter"
Done = subprocess.CompletedProcess[str]


def joined(done: Done) -> bool:
    """True if the launch (with -v) joined a UDI that was there; False if it had one built."""
    assert done.returncode == 0, done.stderr
    assert ("built before" in done.stderr) != ("built now" in done.stderr), done.stderr
    return "built before" in done.stderr


def udis(node: Node) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(node.shifterctl("ps", "--json", check=True).stdout)
    return rows


def launch(node: Node, *command: str, user: str | User = "alice", **options: Any) -> Done:
    return node.shifter("-v", "--image=tiny:1", *(command or ("true",)), user=user, **options)


def one_line(text: str) -> bool:
    return text.startswith("shifter: ") and text.count("\n") == 1 and "Traceback" not in text


@pytest.fixture
def ready(tiny_node: Node) -> Node:
    """A node on which alice has launched once."""
    assert not joined(launch(tiny_node))
    assert joined(launch(tiny_node))
    return tiny_node


# --- what the user is ------------------------------------------------------------------------------------------------


def test_group_removed_from_the_user(ready: Node) -> None:
    done = launch(ready, "id", "-G", groups=(6001,))
    assert not joined(done)
    assert sorted(map(int, done.stdout.split())) == [5001, 6001]
    assert joined(launch(ready))  # who still has both groups still has the first UDI


def test_passwd_edited(ready: Node) -> None:
    passwd = ready.read("/etc/passwd")
    ready.write("/etc/passwd", passwd.replace(":Alice:/home/alice:", ":Alice:/home/bob:"))
    done = launch(ready, "grep", "alice", "/etc/passwd")
    assert not joined(done)
    assert done.stdout.split(":")[5] == "/home/bob"


def test_other_users_have_udis_of_their_own(ready: Node) -> None:
    mine, theirs = (launch(ready, "readlink", "/proc/self/ns/mnt", user=user) for user in ("alice", "bob"))
    assert not joined(theirs)
    assert mine.stdout != theirs.stdout
    assert {row["uid"] for row in udis(ready)} == {5001, 5002}


def test_nobody_reaches_the_run_time_state(ready: Node) -> None:
    key = udis(ready)[0]["key"]
    for path in (f"{RUN}/udi", f"{RUN}/udi/5001", f"{RUN}/udi/5001/{key}/record", f"{RUN}/site", f"{RUN}/store"):
        for user in ("alice", "bob"):
            assert ready.run(["cat", path], user=user).returncode != 0
            assert ready.run(["ls", path + "/"], user=user).returncode != 0
    # Inside there is not even a name of it, and no way out to where it is.
    inside = ready.shifter("--image=tiny:1", "sh", "-c", "ls -A /run; cat /proc/self/mountinfo; ls /proc/1/root")
    lines = [line for line in inside.stdout.splitlines() if " /opt/udiImage " not in line]
    assert not [line for line in lines if "shifter/" in line]
    assert "nsfs" not in inside.stdout
    assert "ls: /proc/1/root: Permission denied" in inside.stderr


# --- the image -------------------------------------------------------------------------------------------------------


def test_acl_withdrawn(node: Node, image: Tree) -> None:
    ident = node.add_image("docker:tiny:1", image, user_acl=[5001])
    assert not joined(launch(node))
    assert joined(node.shifter("-v", f"--image=id:{ident}", "true"))
    node.add_image("docker:tiny:1", image, user_acl=[5002])
    for name in ("tiny:1", f"id:{ident}"):
        done = node.shifter(f"--image={name}", "echo", "inside")
        assert done.returncode == 125
        assert done.stdout == ""
        assert "ACL" in done.stderr
        assert one_line(done.stderr)
    assert not joined(launch(node, user="bob"))


def test_tag_moved(ready: Node, image: Tree, tmp_path: Path) -> None:
    other = image.copy(tmp_path / "other")
    (other.path / "etc/issue").write_text("Other\n")
    ready.add_image("docker:tiny:1", other)
    done = launch(ready, "cat", "/etc/issue")
    assert not joined(done)
    assert done.stdout == "Other\n"


@pytest.mark.parametrize("fmt", ["squashfs", "erofs"])
def test_image_file_replaced_under_its_identifier(node: Node, image: Tree, tmp_path: Path, fmt: str) -> None:
    ident = node.add_image("docker:tiny:1", image, fmt)
    assert launch(node, "cat", "/etc/issue").stdout == "Tiny\n"
    other = image.copy(tmp_path / "other")
    (other.path / "etc/issue").write_text("Other\n")
    node.write(f"{IMAGES}/new", other.pack(fmt).read_bytes())
    node.run(["mv", f"{IMAGES}/new", f"{IMAGES}/{ident}.{fmt}"], check=True)
    done = launch(node, "cat", "/etc/issue")
    assert not joined(done)
    assert done.stdout == "Other\n"


def test_image_removed(ready: Node) -> None:
    ready.run(f"rm {IMAGES}/*.squashfs {IMAGES}/*.meta", check=True)
    done = ready.shifter("--image=tiny:1", "true")
    assert done.returncode == 125
    assert one_line(done.stderr)


# --- the node --------------------------------------------------------------------------------------------------------


def test_hosts_edited(ready: Node) -> None:
    hosts = ready.read("/etc/hosts")
    ready.write("/etc/hosts", hosts.replace("127.0.0.1", "127.0.0.2"))  # the size stays
    done = launch(ready, "cat", "/etc/hosts")
    assert not joined(done)
    assert "127.0.0.2 localhost" in done.stdout


def test_missing_file_appears(tiny_node: Node) -> None:
    tiny_node.run("rm -f /etc/machine-id", check=True)
    assert not joined(launch(tiny_node))
    assert joined(launch(tiny_node))
    tiny_node.write("/etc/machine-id", "0123456789abcdef\n")
    done = launch(tiny_node, "cat", "/etc/machine-id")
    assert not joined(done)
    assert done.stdout == "0123456789abcdef\n"


def test_configuration_edited(ready: Node) -> None:
    ready.conf(siteEnv="FLAVOUR=vanilla")
    done = launch(ready, "sh", "-c", "echo $FLAVOUR")
    assert not joined(done)
    assert done.stdout == "vanilla\n"
    ready.write(CONF, ready.read(CONF).replace("vanilla", "caramel"))
    done = launch(ready, "sh", "-c", "echo $FLAVOUR")
    assert not joined(done)
    assert done.stdout == "caramel\n"
    ready.write(CONF, "nonsense=1\n")
    done = launch(ready)
    assert done.returncode == 125
    assert f"{CONF}:1" in done.stderr


def test_configuration_dated_before_1970_or_after_2554(ready: Node) -> None:
    """Such a time did not fit what the door reads: every launch built a UDI, and none was ever entered."""
    for second in (-1_000_000_000, -1, 20_000_000_000):
        os.utime(ready.path(CONF), ns=(0, second * 10**9 + 5))
        assert not joined(launch(ready))
        assert joined(launch(ready))


def test_directory_behind_a_volume_made_again(tiny_node: Node) -> None:
    tiny_node.write("/home/alice/data/file", "old\n", owner="alice")
    volume = "--volume=/home/alice/data:/mnt"
    show = ("sh", "-c", "cat /mnt/file; stat -c %i /mnt")
    old = tiny_node.shifter("-v", "--image=tiny:1", volume, *show)
    assert not joined(old)
    assert joined(tiny_node.shifter("-v", "--image=tiny:1", volume, *show))
    tiny_node.run("rm -r data", user="alice", check=True)
    tiny_node.write("/home/alice/data/file", "new\n", owner="alice")
    new = tiny_node.shifter("-v", "--image=tiny:1", volume, *show)
    assert not joined(new)
    assert (old.stdout.split()[0], new.stdout.split()[0]) == ("old", "new")
    assert old.stdout != new.stdout
    inode = tiny_node.run(["stat", "-c", "%i", "/home/alice/data"], check=True).stdout
    assert new.stdout.split()[1] == inode.strip()


def test_volume_that_the_user_lost(tiny_node: Node) -> None:
    """The right to the directory went away: no launch shows it any more."""
    tiny_node.mkdir("/srv/closed/data", owner="alice")
    volume = "--volume=/srv/closed/data:/mnt"
    assert not joined(tiny_node.shifter("-v", "--image=tiny:1", volume, "true"))
    tiny_node.run("chown root:root /srv/closed; chmod 700 /srv/closed", check=True)
    done = tiny_node.shifter("-v", "--image=tiny:1", volume, "true")
    assert done.returncode == 125
    assert "/srv/closed/data: Permission denied" in done.stderr


# --- namespaces ------------------------------------------------------------------------------------------------------

AS_ALICE = "exec setpriv --reuid 5001 --regid 5001 --clear-groups "


@pytest.mark.parametrize("how", ["private", "slave"])
@pytest.mark.parametrize("run", ["", "mount -t tmpfs tmpfs /run; "], ids=["run", "own-run"])
def test_callers_in_namespaces_of_their_own(ready: Node, how: str, run: str) -> None:
    """One after the other, so that the kernel reuses the inode of the namespace; none sees another's /tmp."""
    script = (
        f"{run}mount -t tmpfs tmpfs /tmp; chmod 1777 /tmp; echo {{0}} > /tmp/mine; "
        f"{PREFIX}/bin/shifter --version >&2; "
        "alice() {{ setpriv --reuid 5001 --regid 5001 --clear-groups "
        + PREFIX
        + '/bin/shifter -v --image=tiny:1 "$@"; }}; '
        "alice cat /tmp/mine; alice cat /tmp/mine"
    )
    for number in range(3):
        done = ready.run(["unshare", "-m", "--propagation", how, "sh", "-c", script.format(number)])
        assert done.stdout == f"{number}\n{number}\n", done.stderr
        assert done.stderr.count("built now") == 1
        assert done.stderr.count("built before") == 1
    assert joined(launch(ready))
    assert len(udis(ready)) == 4


# --- not shared ------------------------------------------------------------------------------------------------------


def test_idle_time_0_never_shares(tiny_node: Node) -> None:
    tiny_node.conf(udiIdleTime=0)
    for _ in range(3):
        assert not joined(launch(tiny_node))
        assert udis(tiny_node) == []
    running = tiny_node.popen([f"{PREFIX}/bin/shifter", "--image=tiny:1", "sleep", "60"], user="alice")
    wait_for(lambda: running.poll() is not None or b"sleep" in Path(f"/proc/{running.pid}/cmdline").read_bytes()[:9])
    assert udis(tiny_node) == []
    assert [m for m in tiny_node.mounts() if m.target.startswith(f"{RUN}/udi")] == []
    running.kill()
    running.wait()
    tiny_node.conf(udiIdleTime=300)
    assert not joined(launch(tiny_node))
    tiny_node.conf(udiIdleTime=0)
    assert not joined(launch(tiny_node))


def test_kernel_without_namespace_ids(tiny_node: Node) -> None:
    """Linux < 6.11: the node's own namespace has to do without an id; a UDI of another one is never shared."""
    blind = ["strace", "-qq", "-f", "-u", "alice", "-o", "/dev/null", "-e", "trace=ioctl", "-e"]
    blind += ["inject=ioctl:error=ENOTTY:when=1", f"{PREFIX}/bin/shifter", "-v", "--image=tiny:1", "true"]
    assert not joined(tiny_node.run(blind))
    assert joined(tiny_node.run(blind))
    assert not joined(tiny_node.run(["unshare", "-m", *blind]))
    assert not joined(tiny_node.run(["unshare", "-m", *blind]))
    assert len(udis(tiny_node)) == 1


# --- many at once ----------------------------------------------------------------------------------------------------


def start(node: Node, count: int, *command: str, user: str = "alice", **options: Any) -> list[subprocess.Popen[str]]:
    argv = [f"{PREFIX}/bin/shifter", "-v", "--image=tiny:1", *command]
    return [node.popen(argv, user=user, **options) for _ in range(count)]


def finish(children: list[subprocess.Popen[str]]) -> list[Done]:
    done = []
    for child in children:
        out, err = child.communicate(timeout=60)
        done.append(Done(child.args, child.returncode, out, err))
    return done


@pytest.mark.soak
def test_many_launches_at_once_build_once(tiny_node: Node, counts: dict[str, int]) -> None:
    launch(tiny_node, user="bob")  # makes /run/shifter
    for _ in range(counts["rounds of 64 at once"]):
        ends = finish(start(tiny_node, 64, "readlink", "/proc/self/ns/mnt"))
        assert [end for end in ends if end.returncode] == []
        assert len({end.stdout for end in ends}) == 1
        assert sum(not joined(end) for end in ends) == 1
        assert len([row for row in udis(tiny_node) if row["uid"] == 5001]) == 1
        tiny_node.run(f"rm {RUN}/udi/5001/*/record", check=True)


def test_many_launches_at_once_from_nothing(tiny_node: Node) -> None:
    """Not even /run/shifter is there: one base, one UDI for each user."""
    users = ("alice", "bob", "carol", "dave")
    children = {user: start(tiny_node, 16, "readlink", "/proc/self/ns/mnt", user=user) for user in users}
    for user in users:
        ends = finish(children[user])
        assert [end for end in ends if end.returncode] == []
        assert len({end.stdout for end in ends}) == 1
    assert len(udis(tiny_node)) == 4
    assert len([m for m in tiny_node.mounts() if m.target == RUN]) == 1


@pytest.mark.soak
def test_launches_while_a_reaper_runs(tiny_node: Node, counts: dict[str, int]) -> None:
    tiny_node.conf(udiIdleTime=1)
    gc = "while :; do /opt/shifter/bin/shifterctl gc || exit 1; /opt/shifter/bin/shifterctl gc --all || exit 1; done"
    reaper = tiny_node.popen(gc)
    done = 0
    try:
        while done < counts["reaped launches"]:
            for status, child in enumerate(start(tiny_node, 16, "sh", "-c", "exit $0", "7")):
                out, err = child.communicate(timeout=60)
                assert child.returncode == 7, (status, out, err)
            done += 16
            assert reaper.poll() is None, reaper.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(reaper.pid, signal.SIGKILL)
        reaper.communicate()


wait_for = functools.partial(nodes.wait_for, pause=0.0005)  # for moments of builders that live for ten milliseconds


class HeldImage:
    """Hold the lock of the only mounted image, so that a builder stops there."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def __enter__(self) -> "HeldImage":
        node = self.node
        assert not joined(launch(node, user="dave"))
        self.holder = node.popen(
            f"exec flock -x $(ls -d {RUN}/images/*) sh -c 'echo held; exec cat'", stdin=subprocess.PIPE
        )
        assert self.holder.stdout
        assert self.holder.stdout.readline() == "held\n"
        return self

    def release(self) -> None:
        if self.holder.poll() is None:
            self.holder.communicate()

    def __exit__(self, *_: object) -> None:
        self.release()


def test_door_killed_while_the_builder_works(tiny_node: Node) -> None:
    """The builder holds the lock and goes on; the next launch waits for it and joins what it made."""
    with HeldImage(tiny_node) as held:
        (first,) = start(tiny_node, 1, "true")
        working = wait_for(lambda: builders(tiny_node))
        wait_for(lambda: "flock" in Path(f"/proc/{working[0]}/wchan").read_text() or at_lock(working[0]))
        first.kill()
        first.wait()
        (second,) = start(tiny_node, 1, "true")
        time.sleep(0.1)
        assert builders(tiny_node) == working
        assert second.poll() is None
        held.release()
        assert joined(finish([second])[0])
    assert len([row for row in udis(tiny_node) if row["uid"] == 5001]) == 1


def at_lock(pid: int) -> bool:
    """True if the process sleeps in flock(2)."""
    return Path(f"/proc/{pid}/syscall").read_text().split()[0] == ("73" if os.uname().machine == "x86_64" else "32")


def test_second_door_waits_for_the_first(tiny_node: Node) -> None:
    with HeldImage(tiny_node) as held:
        first = start(tiny_node, 1, "readlink", "/proc/self/ns/mnt")
        working = wait_for(lambda: builders(tiny_node))
        others = start(tiny_node, 8, "readlink", "/proc/self/ns/mnt")
        time.sleep(0.1)
        assert builders(tiny_node) == working
        held.release()
        ends = finish(first + others)
    assert len({end.stdout for end in ends}) == 1
    assert [joined(end) for end in ends] == [False] + [True] * 8


def test_another_user_does_not_wait(tiny_node: Node) -> None:
    """One builder per user: another user's launch, of another image format, is not held up."""
    with HeldImage(tiny_node) as held:
        blocked = start(tiny_node, 1, "true")
        wait_for(lambda: builders(tiny_node))
        assert joined(launch(tiny_node, user="dave"))
        held.release()
        assert [end.returncode for end in finish(blocked)] == [0]


@pytest.mark.soak
def test_builder_killed_at_random_moments(
    tiny_node: Node, counts: dict[str, int], finding: Callable[[str], None]
) -> None:
    """One clear line, and the next launch works."""
    chance = random.Random(2)  # the moments differ anyway
    steps: collections.Counter[str] = collections.Counter()
    begin = time.monotonic()
    launch(tiny_node)
    usual = time.monotonic() - begin
    for _ in range(counts["killed builders"]):
        tiny_node.run(f"rm -rf {RUN}/udi/5001/????????????????/record", check=True)
        (child,) = start(tiny_node, 1, "sh", "-c", "exit 7")
        working: list[int] = []
        while not working and child.poll() is None:
            working = builders(tiny_node)
        time.sleep(chance.uniform(0, usual))
        for pid in working:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        (end,) = finish([child])
        if end.returncode == 125:
            found = re.fullmatch(
                r"shifter: the builder was ended while (.+): it took longer .*", end.stderr.splitlines()[-1]
            )
            assert found, end.stderr
            steps[found[1]] += 1
            assert "Traceback" not in end.stderr
        else:
            assert end.returncode == 7, end.stderr
            steps["had answered"] += 1
        again = launch(tiny_node, "sh", "-c", "exit 7")
        assert again.returncode == 7, again.stderr
    assert steps.total() > steps["had answered"]
    text = ", ".join(f"{name} {count}" for name, count in steps.most_common())
    finding(f"{steps.total()} builders, SIGKILL at a random moment ({text}); every next launch worked")


# --- broken state ----------------------------------------------------------------------------------------------------

BREAK_FILE = {
    "truncated": "truncate -s 60 {0}",
    "empty": "truncate -s 0 {0}",
    "half": "truncate -s $(($(stat -c %s {0}) / 2)) {0}",
    "garbage": "head -c 5000 /dev/urandom > {0}",
    "large": "head -c 200000 /dev/zero >> {0}",
    "removed": "rm {0}",
    "directory": "rm {0}; mkdir -p {0}/sub; touch {0}/sub/file",
    "fifo": "rm {0}; mkfifo {0}",
    "symlink": "mv {0} {0}.real; ln -s {0}.real {0}",
    "other owner": "chown 5001 {0}",
    "writable": "chmod 666 {0}",
    "other build": "sed -i s/^shifter=[^\\\\x00]*/shifter=0.0.1-deadbeef/ {0}",
    "other request": "sed -i s/uid=5001/uid=5002/ {0}",
    "no end": "sed -i s/\\\\x00end=/\\\\x00and=/ {0}",
}


@pytest.mark.parametrize(
    ("what", "how"),
    [(what, how) for what in ("record", "site") for how in BREAK_FILE if (what, how) != ("site", "other request")],
)  # a site file has no uid to change
def test_broken_record_or_site_is_never_used(ready: Node, how: str, what: str) -> None:
    path = f"{RUN}/site" if what == "site" else f"{RUN}/udi/5001/{udis(ready)[0]['key']}/record"
    ready.run(BREAK_FILE[how].format(path), check=True)
    done = launch(ready, "echo", "works")
    assert done.stdout == "works\n", done.stderr
    # A site file is only how the door finds the UDI; what it finds then is good.
    assert not joined(done)
    assert joined(launch(ready))
    assert len(udis(ready)) == 1
    gc = ready.shifterctl("gc")
    assert gc.returncode == 0, gc.stderr


BREAK_PIN = {
    "unmounted": "umount {0}",
    "removed": "umount {0}; rm {0}",
    "garbage": "umount {0}; echo garbage > {0}",
    "symlink": "umount {0}; rm {0}; ln -s /proc/1/ns/mnt {0}",
    "directory": "umount {0}; rm {0}; mkdir {0}",
    "no namespace": "umount {0}; mount --bind /etc/hostname {0}",
    "other kind": "umount {0}; mount --bind /proc/1/ns/net {0}",
}


@pytest.mark.parametrize("how", BREAK_PIN)
def test_broken_pin_is_never_used(ready: Node, how: str) -> None:
    pin = f"{RUN}/udi/5001/{udis(ready)[0]['key']}/ns"
    ready.run(BREAK_PIN[how].format(pin), check=True)
    done = launch(ready, "echo", "works")
    assert done.stdout == "works\n", done.stderr
    assert not joined(done)
    assert joined(launch(ready))


@pytest.mark.parametrize("how", BREAK_PIN)
def test_collection_takes_broken_pins_down(ready: Node, how: str) -> None:
    pin = f"{RUN}/udi/5001/{udis(ready)[0]['key']}/ns"
    ready.run(BREAK_PIN[how].format(pin), check=True)
    gc = ready.shifterctl("gc", "--all")
    assert gc.returncode == 0, gc.stderr
    assert ready.run(f"ls {RUN}/udi/5001").stdout == "lock\n"


def test_record_of_another_build_is_taken_down(ready: Node) -> None:
    directory = f"{RUN}/udi/5001/{udis(ready)[0]['key']}"
    ready.run(BREAK_FILE["other build"].format(directory + "/record"), check=True)
    gc = ready.shifterctl("gc", check=True)
    assert "built by 0.0.1-deadbeef" in gc.stdout
    assert not ready.exists(directory)


def test_garbage_where_users_udis_are(ready: Node) -> None:
    ready.run(
        f"cd {RUN}; touch udi/garbage udi/5001/garbage images/garbage; mkdir -p udi/5002/lock udi/x/y images/d/e",
        check=True,
    )
    assert joined(launch(ready))
    done = launch(ready, user="bob")
    assert done.returncode in (0, 125)
    assert "Traceback" not in done.stderr
    for arguments in (["gc"], ["gc", "--all"]):
        gc = ready.shifterctl(*arguments)
        assert gc.returncode == 0, gc.stderr
    assert ready.run(f"ls {RUN}/images; cd {RUN}/udi; echo *; echo */*").stdout == "5001\n5001/lock\n"
    for user in ("alice", "bob"):
        assert not joined(launch(ready, user=user))
