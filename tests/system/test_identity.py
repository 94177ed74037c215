"""Who the command is, and what it got from the caller: nothing of root's power, everything else as it was."""

import os
import resource
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.images import BUSYBOX, Tree
from tests.node import MS_NODEV, MS_NOEXEC, MS_NOSUID, PREFIX, Mount, Node, User

DOOR = f"{PREFIX}/bin/shifter"


@pytest.fixture(scope="module")
def powerful(image: Tree, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """An image in which everything that could lend power is prepared."""
    tree = image.copy(tmp_path_factory.mktemp("images") / "powerful")
    for name, mode in (("busybox-suid", 0o6755), ("busybox-sgid", 0o2755), ("busybox-caps", 0o755)):
        (tree.path / "bin" / name).write_bytes(Path(BUSYBOX).read_bytes())
        (tree.path / "bin" / name).chmod(mode)
    # cap_setuid,cap_dac_override=ep, revision 2 (linux/capability.h)
    os.setxattr(
        tree.path / "bin/busybox-caps", "security.capability", bytes.fromhex("01000002" + "82000000" + "00" * 12)
    )
    os.mknod(tree.path / "opt/memory", stat.S_IFCHR | 0o666, os.makedev(1, 1))
    (tree.path / "etc/sudoers").write_text("ALL ALL=(ALL) NOPASSWD: ALL\n")
    (tree.path / "etc/passwd").write_text("root::0:0::/:/bin/sh\nmallory::0:0::/:/bin/sh\n")
    (tree.path / "etc/shadow").write_text("root::::::::\n")
    return tree


@pytest.fixture(scope="module", params=["private", "shared"])
def node(request: pytest.FixtureRequest, image: Tree, powerful: Tree) -> Iterator[Node]:
    with Node(shared=request.param == "shared") as made:
        made.add_image("docker:tiny:1", image)
        for fmt in ("squashfs", "erofs", "VFS"):
            made.add_image(f"docker:{fmt.lower()}:1", powerful, fmt)
        yield made
        made.check_leaks()


def inside(node: Node, *words: str, tag: str = "tiny:1", options: tuple[str, ...] = (), **run: Any) -> str:
    done = node.shifter(f"--image={tag}", *options, *words, **run)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def status(node: Node, **run: Any) -> dict[str, str]:
    lines = inside(node, "cat", "/proc/self/status", **run).splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def both(node: Node, command: str, **run: Any) -> tuple[str, str]:
    """What /bin/sh says to *command* on the node and inside."""
    plain = node.run(["sh", "-c", command], "alice", check=True, **run).stdout
    return plain, inside(node, "sh", "-c", command, **run)


# --- power -----------------------------------------------------------------------------------------------------------


def check_powerless(fields: dict[str, str], uid: int, gid: int, groups: list[int]) -> None:
    assert {fields[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert fields["NoNewPrivs"] == "1"
    assert fields["Uid"].split() == [str(uid)] * 4 and fields["Gid"].split() == [str(gid)] * 4
    assert [int(text) for text in fields["Groups"].split()] == groups


def test_no_privilege(node: Node) -> None:
    for user in ("alice", "bob", "carol"):
        who = node.users[user]
        for _ in range(2):  # built, then joined
            check_powerless(status(node, user=user), who.uid, who.gid, sorted(who.groups))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([], []),
        ([0], []),
        ([6001, 0, 6001, 0, 5001], [5001, 6001]),
        ([4294967294, 1], [1, 4294967294]),
        (list(range(7200, 7000, -1)), list(range(7001, 7201))),
        (list(range(4096)), list(range(1, 4096))),
    ],
    ids=["none", "root", "twice", "extreme", "200", "4096"],
)
def test_groups_are_the_callers_without_roots(node: Node, given: list[int], kept: list[int]) -> None:
    check_powerless(status(node, groups=given), 5001, 5001, kept)


def test_too_many_groups(node: Node) -> None:
    done = node.shifter("--image=tiny:1", "true", groups=range(10000, 14097))
    assert (done.returncode, done.stderr) == (125, "shifter: 4097 supplementary groups; at most 4096 are supported\n")


def test_capabilities_of_the_caller_are_gone_too(node: Node) -> None:
    """An ordinary user to whom a service manager gave ambient capabilities."""
    script = f"setpriv --reuid 5001 --regid 5001 --clear-groups --inh-caps +net_raw --ambient-caps +net_raw {DOOR} --image=tiny:1"
    done = node.run(f"{script} cat /proc/self/status", check=True)
    fields = {key: value.strip() for key, _, value in (line.partition(":") for line in done.stdout.splitlines())}
    check_powerless(fields, 5001, 5001, [])


def test_other_ids_of_the_caller(node: Node) -> None:
    """Effective and saved ids that differ from the real one do not survive."""
    script = (
        "import os; os.setgroups([6001]); os.setresgid(5001, 6001, 6002); os.setresuid(5001, 5001, 5002); "
        f"os.execv('{DOOR}', ['shifter', '--image=tiny:1', 'cat', '/proc/self/status'])"
    )
    done = node.run(["/usr/bin/python3", "-c", script], check=True)
    fields = {key: value.strip() for key, _, value in (line.partition(":") for line in done.stdout.splitlines())}
    check_powerless(fields, 5001, 5001, [6001])


@pytest.mark.parametrize("tag", ["squashfs:1", "erofs:1", "vfs:1"])
def test_no_setuid_program_has_power(node: Node, tag: str) -> None:
    script = (
        "for name in busybox-suid busybox-sgid busybox-caps; do $name id -u; $name id -g; $name grep CapEff /proc/self/status; "
        "$name cat /opt/memory; $name sh -c 'echo > /etc/x'; done 2>&1; true"
    )
    said = inside(node, "sh", "-c", script, tag=tag).splitlines()
    assert said.count("5001") == 6 and said.count("CapEff:\t" + "0" * 16) == 3
    assert len(said) == 15 and sum("ermission denied" in x or "o such" in x for x in said) >= 3
    assert sum("Read-only file system" in line for line in said) == 3


def test_setuid_program_on_a_volume_has_no_power(node: Node) -> None:
    node.write("/srv/vol/busybox-suid", Path(BUSYBOX).read_bytes(), mode=0o6755)
    node.write("/home/alice/busybox-suid", Path(BUSYBOX).read_bytes(), mode=0o6755)
    node.call(lambda: os.chown("/home/alice/busybox-suid", 0, 0))
    node.call(lambda: os.chmod("/home/alice/busybox-suid", 0o6755))
    for program in ("/mnt/busybox-suid", "/home/alice/busybox-suid"):
        script = f"{program} grep -E '^(Uid|Gid|CapEff)' /proc/self/status"
        said = inside(node, "sh", "-c", script, options=("--volume=/srv/vol:/mnt",)).split()
        assert said == ["Uid:", *["5001"] * 4, "Gid:", *["5001"] * 4, "CapEff:", "0" * 16]


def test_no_writable_place_of_the_image_or_the_root(node: Node) -> None:
    places = "/ /etc /bin /usr /var /opt /var/empty /var/spool /proc/sys/kernel /sys"
    script = f"for place in {places}; do touch $place/x && echo $place; done 2>/dev/null; true"
    assert inside(node, "sh", "-c", script) == ""


def test_nothing_of_the_run_time_state_can_be_read(node: Node) -> None:
    script = "ls -la /run /run/shifter; cat /run/shifter/site; ls /proc/1/root/run/shifter"
    done = node.shifter("--image=tiny:1", "sh", "-c", script)
    assert "site" not in done.stdout and "udi" not in done.stdout
    outside = node.run("ls /run/shifter; cat /run/shifter/site; cat /run/shifter/udi/5001/*/record; true", "alice")
    assert outside.stdout == ""


def test_hidepid_of_the_node_stays_in_force(image: Tree) -> None:
    with Node(proc="hidepid=2,gid=6001") as node:
        node.add_image("docker:tiny:1", image)
        root = node.popen(["sleep", "60"])
        carol = node.popen(["sleep", "61"], user="carol")
        for user in ("carol", "alice"):  # alice is in the group that may see all
            plain = node.run("ls -d /proc/[0-9]* | wc -l; cat /proc/1/comm", user)
            seen = node.shifter("--image=tiny:1", "sh", "-c", "ls -d /proc/[0-9]* | wc -l; cat /proc/1/comm", user=user)
            assert plain.stdout.split()[1:] == seen.stdout.split()[1:]
            assert abs(int(plain.stdout.split()[0]) - int(seen.stdout.split()[0])) <= 1
        proc = next(m for m in mounts(node) if m.target == "/proc")
        assert "hidepid=2" in proc.super_options.replace("invisible", "2") and "gid=6001" in proc.super_options
        for process in (root, carol):
            process.kill()
            process.wait()
        node.check_leaks()


# --- mounts ----------------------------------------------------------------------------------------------------------


def mounts(node: Node, **run: Any) -> list[Mount]:
    return [Mount.parse(line) for line in inside(node, "cat", "/proc/self/mountinfo", **run).splitlines()]


PLANNED = {
    "/": "own", "/proc": "own", "/etc": "own", "/run": "own",
    "/dev": "node", "/dev/pts": "node", "/dev/shm": "node", "/dev/mqueue": "node", "/dev/hugepages": "node",
    "/sys": "node", "/sys/fs/cgroup": "node", "/tmp": "node", "/var/tmp": "node", "/home": "site", "/mnt": "volume",
    PREFIX: "own", "/opt/udiImage": "own",
}  # fmt: skip


def test_every_mount_is_one_of_the_plan(node: Node) -> None:
    node.mkdir("/srv/vol")
    found = mounts(node, options=("--volume=/srv/vol:/mnt",))
    of_image = {m.target for m in found if m.fstype == "squashfs"}
    tops = {path.split("/")[1] for path in of_image}
    assert tops <= {"bin", "sbin", "usr", "lib", "home", "root", "opt", "mnt", "srv", "var"}
    assert all(path.count("/") == 1 or path.startswith(("/var/", "/opt/")) for path in of_image)
    for mount in found:
        words = mount.options.split(",")
        assert "nosuid" in words, mount
        assert "nodev" in words or mount.target.startswith("/dev"), mount
        if mount.fstype == "squashfs" or mount.target in ("/", "/etc", "/sys", "/opt/udiImage"):
            assert "ro" in words, mount
        if mount.target not in of_image and not mount.target.startswith(("/sys/fs/cgroup/", "/dev/")):
            assert mount.target in PLANNED, mount
        assert "shared:" not in mount.propagation, "nothing that is mounted inside may appear on the node"
        assert not mount.source.startswith(("/images", "/run/shifter")), mount
    assert {"/", "/proc", "/etc", "/dev", "/sys", "/tmp", "/var/tmp", "/home", "/mnt"} <= {m.target for m in found}


def test_mounts_do_not_depend_on_those_of_the_node(node: Node) -> None:
    node.mkdir("/media/secret")
    node.mount("secret", "/media/secret", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    assert not [m for m in mounts(node, tag="vfs:1") if "secret" in m.source + m.target]


# --- files of the identity -------------------------------------------------------------------------------------------


def test_passwd_and_group(node: Node) -> None:
    passwd = inside(node, "cat", "/etc/passwd").splitlines()
    assert passwd == [
        "root:x:0:0:root:/root:/sbin/nologin",
        "alice:x:5001:5001:Alice:/home/alice:/bin/sh",
        "nobody:x:65534:65534:nobody:/nonexistent:/sbin/nologin",
    ]
    group = inside(node, "cat", "/etc/group").splitlines()
    assert group[:3] == ["root:x:0:", "tty:x:5:", "alice:x:5001:alice"]
    assert group[3:] == ["proj:x:6001:alice", "lab:x:6002:alice", "nogroup:x:65534:"]
    assert inside(node, "cat", "/etc/shadow", "/etc/gshadow", tag="squashfs:1") == ""
    assert "mallory" not in inside(node, "cat", "/etc/passwd", tag="squashfs:1")
    assert inside(node, "sh", "-c", "whoami; id -gn") == "alice\nalice\n"


def test_groups_without_a_name(node: Node) -> None:
    group = inside(node, "cat", "/etc/group", groups=[6001, 7001]).splitlines()
    assert "gid7001:x:7001:alice" in group and "proj:x:6001:alice" in group


def test_uid_without_an_account(node: Node) -> None:
    nobody = User("unknown", 7007, 7008, "/nonexistent")
    for _ in range(2):
        done = node.shifter(
            "--image=tiny:1", "sh", "-c", "grep 7007 /etc/passwd; grep 7008 /etc/group; pwd", user=nobody
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == ["uid7007:x:7007:7008::/:/bin/sh", "gid7008:x:7008:uid7007", "/"]


def test_user_without_a_home(node: Node) -> None:
    passwd = node.read("/etc/passwd")
    if "homeless" not in passwd:
        node.write("/etc/passwd", passwd + "homeless:x:7010:5003::/home/homeless:/bin/sh\n")
    who = User("homeless", 7010, 5003, "/home/homeless")
    done = node.shifter("--image=tiny:1", "sh", "-c", "whoami; pwd; echo $HOME", user=who)
    assert (done.returncode, done.stdout) == (0, "homeless\n/\n/home/homeless\n"), done.stderr


# --- what the caller had ---------------------------------------------------------------------------------------------


def test_no_descriptor_of_ours_and_all_of_the_callers(node: Node) -> None:
    for _ in range(2):
        assert inside(node, "ls", "/proc/self/fd").split() == ["0", "1", "2", "3"], "3 is that of ls"
    read, write = os.pipe()
    try:
        os.write(write, b"from the caller")
        high = os.open("/dev/null", os.O_RDONLY)
        os.dup2(high, 77)
        os.close(high)
        script = f"ls /proc/$$/fd; head -c 15 <&{read}"
        done = node.shifter("--image=tiny:1", "sh", "-c", script, pass_fds=(read, write, 77))
        *numbers, said = done.stdout.splitlines()
        assert said == "from the caller", done.stderr
        assert sorted(numbers) == sorted(["0", "1", "2", str(read), str(write), "77"])
    finally:
        for fd in (read, write, 77):
            os.close(fd)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o027, 0o777])
def test_umask(node: Node, mask: int) -> None:
    assert int(inside(node, "sh", "-c", "umask", umask=mask), 8) == mask


LIMITS = {
    resource.RLIMIT_CORE: (0, 1 << 20),
    resource.RLIMIT_CPU: (100, 200),
    resource.RLIMIT_FSIZE: (1 << 20, 1 << 30),
    resource.RLIMIT_DATA: (1 << 30, 1 << 31),
    resource.RLIMIT_STACK: (1 << 20, 1 << 24),
    resource.RLIMIT_NOFILE: (100, 200),
    resource.RLIMIT_AS: (1 << 31, 1 << 32),
    resource.RLIMIT_NPROC: (400, 500),
    resource.RLIMIT_MEMLOCK: (4096, 8192),
    resource.RLIMIT_NICE: (0, 20),
    resource.RLIMIT_SIGPENDING: (50, 60),
    resource.RLIMIT_MSGQUEUE: (1000, 2000),
}


def test_limits(node: Node) -> None:
    def prepare() -> None:
        for limit, values in LIMITS.items():  # lowered only: not every machine's root may raise them
            most = resource.getrlimit(limit)[1]
            resource.setrlimit(limit, tuple(v if most < 0 else min(v, most) for v in values))  # type: ignore[arg-type]

    runs: list[dict[str, Any]] = [{}, {"prepare": prepare}]
    for run in runs:
        for tag in ("tiny:1", "vfs:1"):
            plain = node.run(["cat", "/proc/self/limits"], "alice", check=True, **run).stdout
            assert inside(node, "cat", "/proc/self/limits", tag=tag, **run) == plain


def test_signals_nice_and_cgroup(node: Node) -> None:
    def prepare() -> None:
        os.nice(5)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM, signal.SIGPIPE, signal.SIGRTMIN})

    command = (
        "grep -E '^(Sig(Blk|Ign|Cgt)|Cpus_allowed|Seccomp)' /proc/$$/status; cut -d' ' -f18,19 /proc/$$/stat; "
        "cat /proc/$$/cgroup /proc/$$/oom_score_adj"
    )
    runs: list[dict[str, Any]] = [{}, {"prepare": prepare}]
    for run in runs:
        for tag in ("tiny:1", "squashfs:1"):
            # exec, so that it is the door's own child that is looked at, by one and the same program
            words = [BUSYBOX, "sh", "-c", command]
            plain = node.run(words, "alice", check=True, **run).stdout
            assert inside(node, "/bin/busybox", "sh", "-c", command, tag=tag, **run) == plain


def test_no_child_and_no_process_group_of_its_own(node: Node) -> None:
    """The command replaces the door: same process, session and group, nothing to wait for that it did not start."""
    node.shifterctl("gc", "--all")
    see = 'echo $$; cut -d" " -f5,6 /proc/$$/stat; cat /proc/$$/task/$$/children'
    script = f"echo $$; exec {DOOR} --image=tiny:1 sh -c '{see}'"
    said = node.run(["sh", "-c", script], "alice", check=True).stdout.split()
    assert len(set(said)) == 1 and len(said) == 4
