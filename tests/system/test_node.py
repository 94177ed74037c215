"""The virtual node itself: everything else relies on it."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import tests.debian
from tests import node as nodes
from tests.images import Tree
from tests.node import REPO, USERS, Leak, Listener, Node, NodeError, Terminal, normal_tag


def test_up_and_down_quickly() -> None:
    """Each of hundreds of tests makes a node: the median of start and end together is well under a second."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        with Node(shared=True, install=None):
            pass
        times.append(time.perf_counter() - start)
    assert sorted(times)[3] < 0.5, times


def test_names_and_namespaces_are_its_own(node: Node) -> None:
    kinds = ("mnt", "pid", "uts", "ipc", "net")
    inside = node.run("readlink " + " ".join(f"/proc/self/ns/{kind}" for kind in kinds), check=True).stdout.split()
    assert not set(inside) & {os.readlink(f"/proc/self/ns/{kind}") for kind in kinds}
    assert node.run(["hostname"]).stdout == "node1\n"
    assert os.uname().nodename != "node1"
    assert node.run("cat /proc/1/comm; echo $$; ls /sys/class/net >/dev/null; ip -o link").stdout.count("lo:") == 1


def test_pid_1_shows_its_mount_namespace(node: Node) -> None:
    """Some machines refuse /proc/1/ns to root; Shifter reaches the node's first namespace through it."""
    assert (
        node.run(["readlink", "/proc/1/ns/mnt"], check=True).stdout
        == node.run(["readlink", "/proc/self/ns/mnt"]).stdout
    )
    assert node.run("test -d /proc/1/root/usr").returncode == 0
    assert node.run("readlink /proc/1/ns/mnt", user="alice").returncode != 0


def test_orphans_are_reaped(node: Node) -> None:
    node.run("(sleep 0.05 &) & exit 0", check=True)
    deadline = time.monotonic() + 5
    while "sleep 0.05" in node.run("ps -eo args").stdout and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "Z" not in node.run("ps -eo stat").stdout


@pytest.mark.parametrize(
    "path", ["/etc", "/var/lib", "/run", "/tmp", "/var/tmp", "/home", "/root", "/images", "/", "/opt"]
)
def test_what_is_written_stays_in_the_node(path: str) -> None:
    name = f"{path.rstrip('/')}/virtual-node-was-here"
    with Node(install=None) as node:
        node.run(["touch", name], check=True)
        assert node.exists(name)
        assert not os.path.lexists(name)
    assert not os.path.lexists(name)


def test_the_system_is_read_only(node: Node) -> None:
    for path in ("/usr/x", "/opt/shifter/x"):
        assert "Read-only" in node.run(["touch", path]).stderr


def test_users(node: Node) -> None:
    for user in USERS.values():
        done = node.run(
            "id -u; id -g; id -G; pwd; umask; echo $HOME $USER; test -w . && echo writable", user=user, check=True
        )
        groups = " ".join(map(str, dict.fromkeys((user.gid, *sorted(user.groups)))))
        assert done.stdout.splitlines() == [
            str(user.uid), str(user.gid), groups, user.home, "0022", f"{user.home} {user.name}", "writable",
        ]  # fmt: skip
    assert node.run("ls /home/bob", user="alice").returncode != 0
    assert node.run("id -Gn alice").stdout.split() == ["alice", "proj", "lab"]
    assert "alice" not in Path("/etc/passwd").read_text()


def test_environment_is_a_logins(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAKED_FROM_PYTEST", "1")
    lines = node.run(["env"], user="alice", env={"EXTRA": "x"}).stdout.splitlines()
    names = {line.partition("=")[0] for line in lines}
    assert names == {"HOME", "USER", "LOGNAME", "SHELL", "PATH", "LANG", "EXTRA"}
    assert node.run(["/usr/bin/env"], clean=True, env={"A": "b"}).stdout == "A=b\n"


def test_setuid_programs_work(node: Node) -> None:
    """No no_new_privs, no nosuid on the way: else no test of a setuid door means anything."""
    node.run("cp /usr/bin/id /opt/suid-id && chmod 4755 /opt/suid-id", check=True)
    assert node.run(["/opt/suid-id", "-u"], user="alice").stdout == "0\n"
    assert node.run(["/opt/suid-id", "-ru"], user="alice").stdout == "5001\n"
    status = node.run("grep -E 'NoNewPrivs|CapEff' /proc/self/status", user="alice").stdout.split()
    assert status == ["CapEff:", "0000000000000000", "NoNewPrivs:", "0"]
    for mount in node.mounts():
        if mount.target.startswith("/opt"):
            assert "nosuid" not in mount.options


def test_run(node: Node) -> None:
    assert node.run("cat; exit 7", input="hello").returncode == 7
    assert node.run(["cat"], input="hello\n").stdout == "hello\n"
    assert node.run("kill -9 $$").returncode == -signal.SIGKILL
    assert node.run(["pwd"], cwd="/usr").stdout == "/usr\n"
    assert node.run("umask", umask=0o077).stdout == "0077\n"
    assert node.run("id -G", user="alice", groups=[6003]).stdout == "5001 6003\n"
    assert node.run(["printf", "%s", "\udcff"], user="alice").stdout == "\udcff"
    with pytest.raises(AssertionError, match=r"as alice: exit 3\n.*said"):
        node.run("echo said; exit 3", user="alice", check=True)
    with pytest.raises(FileNotFoundError):
        node.run(["/no/such/program"])
    start = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        node.run("sleep 100; true", timeout=0.1)
    assert time.monotonic() - start < 5


def test_popen(node: Node) -> None:
    process = node.popen(["cat"], user="bob", stdin=subprocess.PIPE)
    assert [p.uid for p in node.processes() if p.comm == "cat"] == [5002]
    assert process.communicate("x\n") == ("x\n", "")
    assert process.returncode == 0


def test_a_failure_before_exec_is_told(node: Node) -> None:
    def fail() -> None:
        raise RuntimeError("just so")

    with pytest.raises(NodeError, match="just so"):
        node.run("true", prepare=fail)
    with pytest.raises(NodeError, match="No such file"):
        node.call(lambda: nodes.mount("/nowhere", "/mnt", flags=nodes.MS_BIND))


def test_files(node: Node) -> None:
    node.write("/scratch/a/b", "text\n", mode=0o640, owner="alice")
    assert node.read("/scratch/a/b") == "text\n"
    assert node.run("stat -c '%a %U' /scratch/a /scratch/a/b").stdout.splitlines() == ["755 alice", "640 alice"]
    node.run("ln -s /etc /scratch/link", check=True)
    node.write("/scratch/link/made-through-a-link", "x")
    assert node.exists("/etc/made-through-a-link")
    assert not os.path.exists("/etc/made-through-a-link")
    assert node.read("/etc/shifter/udiRoot.conf") == nodes.DEFAULT_CONF
    node.conf(udiIdleTime=7)
    assert node.read("/etc/shifter/udiRoot.conf") == nodes.DEFAULT_CONF + "udiIdleTime=7\n"
    node.conf(siteFs=["/a:/b", "/c:/d"], udiIdleTime=5)
    assert node.read("/etc/shifter/udiRoot.conf") == "imagePath=/images\nsiteFs=/a:/b\nsiteFs=/c:/d\nudiIdleTime=5\n"
    node.conf("one=two\n")
    assert node.read("/etc/shifter/udiRoot.conf") == "one=two\n"


def test_propagation_is_in_force(node: Node, propagation: str) -> None:
    """A mount made in the node shows up in the slave copies exactly when `/` is shared; never the other way round."""
    assert len(node.slaves) == (2 if propagation == "shared" else 0)
    for mount in node.mounts():
        assert mount.propagation.startswith("shared:") == (propagation == "shared"), mount
    for pid in node.slaves:
        assert all("master:" in mount.propagation for mount in node.mounts(pid))
    node.mount("late", "/mnt", "tmpfs")
    for pid in node.slaves:
        assert "/mnt" in {m.target for m in node.mounts(pid)}
    assert "late" not in {m.source for m in nodes.mountinfo()}
    script = "mount -t tmpfs only-here /late; cat /proc/self/mountinfo"
    copy = node.run(f"mkdir /late; unshare -m --propagation slave sh -c '{script}'")
    assert "only-here" in copy.stdout
    assert "only-here" not in {m.source for m in node.mounts()}


def test_pins_need_a_private_mount_under_shared_propagation() -> None:
    """The trap that shared nodes are for: a mount namespace can't be pinned where other namespaces would get a copy."""
    pin = (
        "touch /run/pin; unshare -m --propagation private sleep 9 >/dev/null 2>&1 &"
        " while [ /proc/$!/ns/mnt -ef /proc/self/ns/mnt ]; do sleep 0.01; done;"
        " mount --bind /proc/$!/ns/mnt /run/pin"
    )
    with Node(shared=True, install=None) as node:
        assert node.run(pin).returncode != 0
    with Node(shared=False, install=None) as node:
        assert node.run(pin).returncode == 0


def test_every_later_namespace_can_be_pinned(node: Node) -> None:
    """On whichever CPU it is made: the node's own mount namespace counts as the oldest."""
    script = """
        mount -t tmpfs --make-private pins /media
        for cpu in $(seq 0 $(($(nproc) - 1))) 0; do
            touch /media/$cpu
            taskset -c $cpu unshare -m sleep 9 >/dev/null 2>&1 &
            while [ /proc/$!/ns/mnt -ef /proc/self/ns/mnt ]; do sleep 0.01; done
            mount --bind /proc/$!/ns/mnt /media/$cpu || exit
            umount /media/$cpu; kill $!
        done
        umount /media
    """
    node.run(script, check=True)


def test_leaks_are_found(image: Tree) -> None:
    with Node(install=None) as node:
        node.run("mkdir /x; mount -t tmpfs x /x", check=True)
        with pytest.raises(Leak, match="'/x', 'tmpfs'"):
            node.check_leaks(0.1)
    with Node(install=None) as node:
        node.run("setsid sleep 77 >/dev/null 2>&1 &", check=True)
        with pytest.raises(Leak, match="sleep 77"):
            node.check_leaks(0.1)
    for disk in (False, True):
        with Node(install=None, disk=disk) as node:
            ident = node.add_image("t", image)
            script = f"mount -o loop,ro /images/{ident}.squashfs /mnt; exec sleep 77"
            node.run(f"unshare -m sh -c '{script}' >/dev/null 2>&1 &")
            deadline = time.monotonic() + 5
            while not node.loops() and time.monotonic() < deadline:
                time.sleep(0.01)
            with pytest.raises(Leak, match=f"loop device: .*{ident}"):
                node.check_leaks(0.1)
    with Node(install=None) as node:
        node.run("mkdir -p /run/shifter; touch /run/shifter/store", check=True)
        script = "mount -t tmpfs in-the-store /mnt; exec sleep 9"
        node.run(f"unshare -m --propagation private sh -c '{script}' >/dev/null 2>&1 &")
        node.run(
            "until pid=$(pgrep -f '^sleep 9'); do sleep 0.01; done;"
            " mount --bind /proc/$pid/ns/mnt /run/shifter/store; pkill sleep",
            check=True,
        )
        assert "in-the-store" in {m.source for m in node.store_mounts()}
        with pytest.raises(Leak, match=r"store namespace: .*in-the-store"):
            node.check_leaks(0.1)
    with Node(install=None) as node:
        node.mount("x", "/mnt", "tmpfs")
        node.popen(["sleep", "77"])
        node.check_leaks()


def test_nothing_survives_a_killed_test_run() -> None:
    """SIGKILL for the process that made nodes: every process in them is gone, although nobody cleaned up."""
    script = textwrap.dedent("""
        import time
        from tests.node import Node, cluster
        nodes = [Node(shared=True, install=None), *cluster(1, install=None)]
        for node in nodes:
            node.run("setsid sleep 4711 >/dev/null 2>&1 &", user="alice")
        print(*[p.pid for node in nodes for p in node.processes()], flush=True)
        time.sleep(60)
    """)
    with subprocess.Popen([sys.executable, "-B", "-c", script], cwd=REPO, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        pids = process.stdout.readline().split()
        assert len(pids) == 2 + 2 + 2
        process.kill()
    assert not nodes.until(lambda: [pid for pid in pids if _alive(pid)], 5)
    left = f"nodes/{process.pid}-*"
    assert list(nodes.BUILD.glob(left))
    with Node(install=None, disk=True):  # whoever needs such a directory next removes those of the dead
        assert not list(nodes.BUILD.glob(left))


def _alive(pid: str) -> bool:
    with contextlib.suppress(ChildProcessError):  # this process adopts orphans (conftest.py), so it has to reap them
        os.waitpid(int(pid), os.WNOHANG)
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_devpts_and_proc_options() -> None:
    with Node(install=None, devpts="mode=600,ptmxmode=000", proc="hidepid=2") as node:
        mounts = {m.target: m.super_options for m in node.mounts()}
        assert "mode=600" in mounts["/dev/pts"]
        assert "gid=5" not in mounts["/dev/pts"]
        assert "hidepid=invisible" in mounts["/proc"]
        assert node.run("ls -d /proc/1", user="alice").returncode != 0
    with Node(install=None) as node:
        assert "gid=5" in {m.target: m.super_options for m in node.mounts()}["/dev/pts"]
        assert node.run(["script", "-qc", "stat -c %G $(tty)", "/dev/null"], user="alice").stdout.strip() == "tty"


@pytest.mark.parametrize("fmt", ["squashfs", "erofs", "VFS"])
def test_images(node: Node, image: Tree, fmt: str) -> None:
    entry = ["/bin/sh", "-c"]
    ident = node.add_image(
        "lab/tiny:1", image, fmt, env={"A": "b c"}, entry=entry, cmd=["id"], workdir="/srv", user_acl=[5001, 5002]
    )
    assert node.run("readlink /images/tags/docker:lab%2Ftiny:1").stdout.strip() == ident
    assert node.read(f"/images/{ident}.meta") == (
        f"FORMAT: {fmt}\nENV: A=b c\nENTRY: ['/bin/sh', '-c']\nCMD: ['id']\nWORKDIR: /srv\nUSERACL: 5001,5002\n"
    )
    if fmt == "VFS":
        command = f"chroot /images/{ident}. /bin/cat /usr/lib/hello.txt"
    else:
        script = f"mount -o loop,ro /images/{ident}.{fmt} /mnt && chroot /mnt /bin/cat /usr/lib/hello.txt"
        command = f"unshare -m sh -c '{script}'"
    assert node.run(command, check=True).stdout == "hello from the image\n"
    other = node.add_image("docker:lab/tiny:1", image, fmt, ident="other")
    assert node.run("readlink /images/tags/docker:lab%2Ftiny:1").stdout.strip() == other == "other"
    assert not nodes.until(node.loops, 5)


def test_a_changed_copy_of_the_image(image: Tree, tmp_path: Path) -> None:
    changed = image.copy(tmp_path / "changed")
    (changed.path / "usr/lib/hello.txt").write_text("changed\n")
    (changed.path / "etc/passwd").unlink()
    with Node(install=None) as node:
        ident = node.add_image("changed", changed, "VFS")
        assert node.read(f"/images/{ident}./usr/lib/hello.txt") == "changed\n"
    assert (image.path / "etc/passwd").exists()


@pytest.mark.parametrize(
    ("tag", "normal"),
    [
        ("debian", "docker:debian:latest"),
        ("debian:12", "docker:debian:12"),
        ("docker:a/b:1", "docker:a/b:1"),
        ("custom:alice/x", "custom:alice/x:latest"),
        ("docker:reg:5000/a", "docker:reg:5000/a:latest"),
    ],
)
def test_normal_tag(tag: str, normal: str) -> None:
    assert normal_tag(tag) == normal


# --- terminals, sockets ----------------------------------------------------------------------------------------------


def test_terminal(node: Node) -> None:
    with Terminal(node, "bob") as terminal:
        assert terminal.run(["tty"]) == (0, f"{terminal.name}\n")
        assert terminal.run("stty size; stat -c '%U %G' $(tty); exit 3") == (3, "24 80\nbob tty\n")
        assert terminal.run("read line; echo $line > /dev/tty", input="typed\n") == (0, "typed\n")
        assert terminal.run("test -t 0 || tty <&2 >&2", which=(2,)) == (0, f"{terminal.name}\n")
        assert terminal.run("kill -9 $$")[0] == -signal.SIGKILL
        code, text = terminal.run("seq 20000")  # more than the kernel keeps: it is read while the command runs
        assert (code, text.splitlines()) == (0, [*map(str, range(1, 20001))])


def test_conversation_on_a_terminal(node: Node) -> None:
    with Terminal(node) as terminal:
        shell = terminal.popen("while read line; do echo got $line; done; trap 'exit 9' HUP; sleep 1000 & wait")
        terminal.write("one\ntwo\n")
        assert terminal.read("one\n") == "got one\n"
        assert terminal.read("two") == "got two"
        terminal.write("\x04")  # the end of the input
        with pytest.raises(TimeoutError, match="'more' on a terminal"):
            terminal.read("more", timeout=0.1)
        with pytest.raises(NodeError, match="not permitted"):  # a terminal controls one session
            terminal.popen(["true"])
    assert shell.wait(30) == 9


def test_listening_sockets_and_who_holds_them(node: Node) -> None:
    script = """if 1:
        import os, socket, sys
        sockets = [socket.create_server(("127.0.0.1", 7001)), socket.create_server(("::1", 7002), family=socket.AF_INET6)]
        os.fork()
        sys.stdin.read()
    """
    assert node.listeners() == []
    server = node.popen(["python3", "-c", script], "alice", stdin=subprocess.PIPE)
    node.wait_port(7002)
    nodes.wait_for(lambda: len([p for p in node.processes() if p.uid == 5001]) == 2)
    pids = tuple(sorted(p.pid for p in node.processes() if p.uid == 5001))
    assert server.pid in pids
    assert node.listeners() == [Listener("127.0.0.1", 7001, pids), Listener("::1", 7002, pids)]
    server.communicate("")
    assert not nodes.until(node.listeners, 10)
    with pytest.raises(AssertionError, match="waited"):
        node.wait_port(7001, timeout=0.1)


# --- a real image ----------------------------------------------------------------------------------------------------


def test_debian_in_a_container(node: Node, debian: Tree) -> None:
    node.add_image("debian:12", debian)
    script = """
        . /etc/os-release; echo $ID
        getconf GNU_LIBC_VERSION | cut -d" " -f1
        id -un
        awk "BEGIN { print \\"awk\\" }"
        perl -e "print qq(perl\n)"
        seq 3 | tac | xargs
    """
    done = node.shifter("--image=debian:12", "bash", "-euc", script, check=True)
    assert done.stdout.split("\n") == ["debian", "glibc", "alice", "awk", "perl", "3 2 1", ""]


def test_debian_is_whole(debian: Tree) -> None:
    """Programs find their libraries, and links what they lead to, without the machine that it was made on."""
    programs = [path for name in ("bin", "sbin") for path in (debian.path / "usr" / name).iterdir()]
    files = [str(path) for path in programs if path.is_file() and path.open("rb").read(4) == b"\x7fELF"]
    lines = subprocess.run(["readelf", "-d", *files], check=True, capture_output=True, text=True).stdout.splitlines()
    needed = {line.split("[")[1].rstrip("]") for line in lines if "(NEEDED)" in line}
    cache = subprocess.run(
        ["ldconfig", "-p", "-C", debian.path / "etc/ld.so.cache"], check=True, capture_output=True, text=True
    )
    assert len(files) > 200 and "libc.so.6" in needed
    assert needed <= {line.split()[0] for line in cache.stdout.splitlines()[1:]}
    for link in filter(Path.is_symlink, programs):
        target = link
        while target.is_symlink():  # "/" is that of the image
            text = os.readlink(target)
            target = debian.path / text.lstrip("/") if text.startswith("/") else target.parent / text
        assert target.exists(), link


def test_debian_has_nothing_of_this_machine(debian: Tree) -> None:
    names = {line.split(":")[0] for line in (debian.path / "etc/passwd").read_text().splitlines()}
    assert {"root", "daemon", "nobody"} <= names
    assert not {line.split(":")[0] for line in Path("/etc/passwd").read_text().splitlines() if ":1000:" in line} & names
    for name in ("etc/shadow", "etc/machine-id", "etc/ssh", "etc/resolv.conf", "etc/hosts", "root/.ssh"):
        assert not os.path.lexists(debian.path / name)
    assert not list((debian.path / "home").iterdir()) and not list((debian.path / "tmp").iterdir())


def test_debian_with_a_package_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not installed on this machine: no-such-package"):
        tests.debian.debian(tmp_path, ["no-such-package"])
    assert not list(tmp_path.iterdir())
