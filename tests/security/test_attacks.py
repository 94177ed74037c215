"""Attacks that must fail: by image content, environment, tracing, guessed names, and from inside of a UDI."""

import os
import resource
import shutil
import signal
import stat
import time
from pathlib import Path

import pytest

from tests.images import Tree
from tests.node import PREFIX, Node

DOOR = f"{PREFIX}/bin/shifter"


def test_nothing_is_kept(tiny_node: Node) -> None:
    script = "grep -E '^(Uid|Gid|Groups|NoNewPrivs|Cap|Seccomp)' /proc/self/status"
    done = tiny_node.shifter("--image=tiny:1", "sh", "-c", script, groups=(0, 6001, 6002))
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(":\t") for line in done.stdout.splitlines())
    assert lines["Uid"] == "5001\t5001\t5001\t5001" and lines["Gid"] == "5001\t5001\t5001\t5001"
    assert lines["Groups"].split() == ["6001", "6002"]
    assert all(int(lines[f"Cap{name}"], 16) == 0 for name in ("Inh", "Prm", "Eff", "Bnd", "Amb"))
    assert lines["NoNewPrivs"] == "1"


def test_inheritable_and_ambient_capabilities_are_dropped(tiny_node: Node) -> None:
    """As pam_cap or a job starter gives them."""
    done = tiny_node.run(
        "setpriv --reuid 5001 --regid 5001 --clear-groups --inh-caps +net_raw,+sys_admin --ambient-caps +net_raw,+sys_admin "
        f"{DOOR} --image=tiny:1 grep ^Cap /proc/self/status"
    )
    assert done.returncode == 0, done.stderr
    assert all(int(line.split()[1], 16) == 0 for line in done.stdout.splitlines()), done.stdout


@pytest.mark.parametrize("caps", ["-setuid", "-setgid", "-setpcap", "-sys_admin", "-sys_chroot", "-all"])
def test_reduced_bounding_set_never_leaves_root(tiny_node: Node, caps: str) -> None:
    """A change of identity that the kernel refuses must end the launch, not go on as root."""
    done = tiny_node.run(
        f"setpriv --bounding-set {caps} setpriv --reuid 5001 --regid 5001 --clear-groups {DOOR} --image=tiny:1 id -u"
        if caps not in ("-setuid", "-setgid", "-all")
        else f"setpriv --reuid 5001 --regid 5001 --clear-groups --bounding-set {caps} {DOOR} --image=tiny:1 id -u"
    )
    assert done.stdout in ("", "5001\n") and (done.stdout or done.returncode != 0), (done.stdout, done.stderr)


# --- image content ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", ["/srv/victim", "../../../../srv/victim", "/proc/self/fd", "/proc/1/root", ".", "/loop"]
)
@pytest.mark.parametrize(
    "name", ["etc", "var", "dev", "proc", "sys", "tmp", "run", "opt", "home", "usr", "var/tmp", "var/spool"]
)
def test_symlinks_of_an_image_lead_nowhere(image: Tree, tmp_path: Path, name: str, target: str) -> None:
    """At every path that root touches. Whatever the launch answers, the node is as it was."""
    tree = image.copy(tmp_path / "tree")
    place = tree.path / name
    if place.is_dir():
        shutil.rmtree(place)
    place.symlink_to(target)
    (tree.path / "loop").symlink_to("loop")
    with Node() as node:
        node.add_image("docker:evil:1", tree)
        node.mkdir("/srv/victim", 0o755)
        node.write("/srv/victim/file", "untouched")
        before = (node.path("/srv/victim").stat(), node.path("/").stat().st_mode, sorted(os.listdir(node.path("/"))))
        done = node.shifter("--image=evil:1", "/bin/busybox", "sh", "-c", "busybox cat /etc/passwd; busybox id -u")
        assert done.returncode in (0, 125, 126, 127)
        if done.returncode == 0:
            assert "alice:x:5001" in done.stdout, done.stdout
        assert (
            node.path("/srv/victim").stat(),
            node.path("/").stat().st_mode,
            sorted(os.listdir(node.path("/"))),
        ) == before
        assert os.listdir(node.path("/srv/victim")) == ["file"] and node.read("/srv/victim/file") == "untouched"
        node.check_leaks()


def test_special_files_of_an_image(node: Node, image: Tree, tmp_path: Path) -> None:
    """FIFOs, sockets, devices and setuid programs at paths that root looks at."""
    tree = image.copy(tmp_path / "tree")
    for name in ("fifo", "etc/hosts", "etc/group", "var/pipe", "opt/pipe"):
        (tree.path / name).unlink(missing_ok=True)
        os.mkfifo(tree.path / name)
    os.mknod(tree.path / "disk", stat.S_IFBLK | 0o666, os.makedev(7, 0))
    os.mknod(tree.path / "srv/disk", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    shutil.copyfile("/bin/busybox", tree.path / "srv/busybox")
    (tree.path / "srv/busybox").chmod(0o6755)
    node.add_image("docker:evil:1", tree)
    done = node.shifter(
        "--image=evil:1", "sh", "-c", "ls /; /srv/busybox id -u; /srv/busybox id -g; head -c1 /srv/disk", timeout=20
    )
    assert "disk" not in done.stdout.split() and "5001\n5001" in done.stdout, done.stdout + done.stderr
    assert "ermission denied" in done.stderr


def test_setuid_and_file_capability_in_a_volume_are_powerless(tiny_node: Node) -> None:
    tiny_node.mkdir("/srv/tools", 0o755)
    for name in ("suid", "cap"):
        tiny_node.write(f"/srv/tools/{name}/busybox", Path("/bin/busybox").read_bytes(), 0o755)
    tiny_node.path("/srv/tools/suid/busybox").chmod(0o6755)
    tiny_node.run(["setcap", "cap_sys_admin,cap_dac_override+ep", "/srv/tools/cap/busybox"], check=True)
    tiny_node.mkdir("/srv/private", 0o700)
    done = tiny_node.shifter(
        "--image=tiny:1",
        "--volume=/srv/tools:/mnt",
        "sh",
        "-c",
        "/mnt/suid/busybox id -u; /mnt/suid/busybox id -g; /mnt/cap/busybox grep CapEff /proc/self/status",
    )
    lines = done.stdout.split()
    assert lines[:2] == ["5001", "5001"], done.stdout + done.stderr
    assert len(lines) == 2 or int(lines[-1], 16) == 0, done.stdout


# --- environment, descriptors, limits, signals ------------------------------------------------------------------------


def test_hostile_environment(tiny_node: Node) -> None:
    """Whether a UDI is built or joined; also the Python that prints help runs without it."""
    for name in ("sitecustomize", "site", "encodings/__init__", "posix", "shifter/__init__", "click"):
        tiny_node.write(f"/home/alice/evil/{name}.py", "open('/tmp/pwned', 'w')", owner="alice")
    evil = "/home/alice/evil"
    env = {f"X{number}": "y" for number in range(10000)} | {
        "PYTHONPATH": evil, "PYTHONHOME": evil, "PYTHONSTARTUP": f"{evil}/site.py", "PYTHONINSPECT": "1", "PYTHONUSERBASE": evil,
        "PYTHONPYCACHEPREFIX": evil, "PYTHONWARNINGS": "default::click.X", "PYTHONBREAKPOINT": "site.x", "PYTHONMALLOC": "debug",
        "LD_PRELOAD": f"{evil}/x.so", "LD_LIBRARY_PATH": evil, "LD_AUDIT": f"{evil}/x.so", "LD_DEBUG": "all",
        "LD_DEBUG_OUTPUT": "/tmp/pwned",
        "GCONV_PATH": evil, "NLSPATH": evil, "LOCPATH": evil, "MALLOC_TRACE": "/tmp/pwned", "TMPDIR": evil, "HOSTALIASES": evil,
        "IFS": "/", "PATH": f"{evil}:.", "BASH_ENV": evil, "ENV": evil, "BIG": "b" * 130000, "HOME": "/home/alice",
    }  # fmt: skip
    for args in (["--image=tiny:1", "/bin/echo", "ok"],) * 2 + (["--help"], ["--nonsense"]):
        done = tiny_node.shifter(*args, clean=True, env=env, cwd=evil)
        assert done.returncode == 0 or args == ["--nonsense"], done.stderr
        assert not list(tiny_node.path("/tmp").glob("pwned*"))  # ld.so puts a number behind it
    assert not list(tiny_node.path(evil).rglob("__pycache__"))


def test_messages_are_written_as_the_caller(tiny_node: Node) -> None:
    """Descriptors 0-2 closed, and no number free for others: no file of ours takes their place."""

    tiny_node.shifter("--image=tiny:1", "/bin/true")
    done = tiny_node.run(["sh", "-c", f"exec {DOOR} --image=tiny:1 /bin/true 0<&- 1>&- 2>&-"], "alice")
    assert done.returncode == 0
    tiny_node.write(
        "/tmp/go.py",
        f"""import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
os.closerange(0, 3)
os.execv('{DOOR}', ['{DOOR}', '--image=tiny:1', '/bin/true'])
""",
    )
    done = tiny_node.run(["python3", "/tmp/go.py"], "alice")
    assert done.returncode in (125, -signal.SIGSEGV)  # musl's start-up crashes on purpose when it can't open /dev/null
    assert tiny_node.path("/run/shifter/udi/5001/lock").stat().st_size == 0


def test_limits_and_ignored_signals_of_the_caller(tiny_node: Node) -> None:
    def prepare() -> None:
        for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    done = tiny_node.run([DOOR, "--image=tiny:1", "grep", "^Sig[BI]", "/proc/self/status"], "alice", prepare=prepare)
    assert done.returncode == 0 and done.stdout.count("Sig") == 2, done.stderr


# --- tracing, reading, guessing ---------------------------------------------------------------------------------------

LOOK = """
import ctypes, os, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
got = set()
def privileged(pid):
    try:
        return open(f"/proc/{pid}/status").read().split("Uid:")[1].split()[:3] != ["5001"] * 3
    except OSError:
        return False
def read(fd):
    try:
        return os.read(fd, 1)
    except OSError:
        return b""
for round in range(int(sys.argv[1])):
    door = subprocess.Popen([sys.argv[2], "--image=tiny:1", "--volume=/home/alice:/mnt" + "/" * (round + 1), "/bin/true"],
                            stderr=subprocess.DEVNULL)
    seen = set()
    while door.poll() is None:
        for pid in os.listdir("/proc"):
            if not pid.isdigit():
                continue
            try:
                status = open(f"/proc/{pid}/status").read()
                argv = open(f"/proc/{pid}/cmdline").read()
            except OSError:
                continue
            uids = status.split("Uid:")[1].split()[:3]
            if uids == ["5001"] * 3 or ("builder.pyc" not in argv and int(pid) != door.pid):
                continue
            seen.add("builder" if "builder.pyc" in argv else "door")
            # Whatever succeeds counts only if the process still has privilege afterwards: it may have become the command.
            # PTRACE_SEIZE: unlike PTRACE_ATTACH it does not stop what has become the command meanwhile.
            if libc.ptrace(0x4206, int(pid), 0, 0) == 0 and privileged(pid):
                got.add("ptrace")
            for name, flags in (("mem", os.O_RDWR), ("environ", 0), ("exe", os.O_WRONLY), ("maps", 0), ("fd", 0), ("ns/mnt", 0)):
                try:
                    fd = os.open(f"/proc/{pid}/{name}", flags)
                except OSError:
                    continue
                # Of a process that is ending, which has no memory any more, everybody may open these; they are empty.
                empty = name in ("mem", "environ", "maps") and not read(fd)
                if not empty and privileged(pid):
                    got.add(name)
                os.close(fd)
            if "builder.pyc" in argv:
                for number in (0, 19, 9):
                    try:
                        os.kill(int(pid), number)
                        got.add("kill")
                    except OSError:
                        pass
    print(*seen)
print("got", *sorted(got))
"""


def test_door_and_builder_cannot_be_looked_into(tiny_node: Node) -> None:
    tiny_node.write("/tmp/look.py", LOOK)
    done = tiny_node.run(["python3", "/tmp/look.py", "12", DOOR], "alice", timeout=60)
    assert "builder" in done.stdout and "door" in done.stdout, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "got", done.stdout


def test_traced_door_has_no_privilege(tiny_node: Node) -> None:
    done = tiny_node.run(["strace", "-o", "/dev/null", "-f", DOOR, "--image=tiny:1", "/bin/true"], "alice")
    assert done.returncode == 125 and "trace" in done.stderr


def test_no_core_of_the_door(tiny_node: Node) -> None:
    tiny_node.mkdir("/home/alice/v", owner="alice")
    door = tiny_node.popen(
        ["sh", "-c", f"ulimit -c unlimited; exec {DOOR} --image=tiny:1 /bin/true"], "alice", cwd="/home/alice/v"
    )
    time.sleep(0.004)
    door.send_signal(signal.SIGQUIT)
    door.wait()
    assert os.listdir(tiny_node.path("/home/alice/v")) == []


def test_run_time_state_is_closed_to_users(tiny_node: Node) -> None:
    assert tiny_node.shifter("--image=tiny:1", "/bin/true").returncode == 0
    [key] = [name for name in os.listdir(tiny_node.path("/run/shifter/udi/5001")) if name != "lock"]
    for path in (
        "",
        "site",
        "store",
        "images",
        "udi",
        "udi/5001",
        "udi/5001/lock",
        f"udi/5001/{key}/ns",
        f"udi/5001/{key}/record",
    ):
        for user in ("alice", "bob"):
            full = f"/run/shifter/{path}"
            script = f"cat {full} 2>/dev/null; ls {full} 2>/dev/null; flock -n {full} echo held"
            assert tiny_node.run(script, user).stdout == "", (user, path)
            assert (
                tiny_node.run(f"rm -rf /run/shifter/{path} 2>/dev/null; : > /run/shifter/{path}", user).returncode != 0
            )
    assert tiny_node.shifter("--udi-list", user="bob").stdout == ""


@pytest.mark.parametrize("what", ["site", "record"])
def test_replaced_state_of_a_stranger_is_not_used(tiny_node: Node, what: str) -> None:
    """Were a bug elsewhere to let a user put files there: owner, mode, kind and size are checked on the descriptor."""
    tiny_node.shifter("--image=tiny:1", "/bin/true")
    base = tiny_node.path("/run/shifter")
    [key] = [name for name in os.listdir(base / "udi/5001") if name != "lock"]
    place = base / "site" if what == "site" else base / f"udi/5001/{key}/record"
    good = place.read_bytes()
    bad = good.replace(b"udiIdleTime=", b"udiIdleTime=9").replace(b"end=record", b"env.set=PWNED=1\0end=record")

    def owned() -> None:
        place.write_bytes(bad)
        os.chown(place, 5001, 5001)

    def writable() -> None:
        place.write_bytes(bad)
        place.chmod(0o666)

    def link() -> None:
        tiny_node.write("/srv/other", bad)
        place.unlink()
        place.symlink_to("/srv/other")

    def fifo() -> None:
        place.unlink()
        os.mkfifo(place)

    def cut() -> None:
        place.write_bytes(good[:-3])

    def large() -> None:
        place.write_bytes(good + b"x" * 70000)

    for damage in (owned, writable, link, cut, large, fifo):
        damage()
        done = tiny_node.shifter("--image=tiny:1", "env", timeout=20)
        assert done.returncode == 0 and "PWNED" not in done.stdout, (damage.__name__, done.stderr)
        if place.is_symlink() or not place.is_file():
            place.unlink(missing_ok=True)
        place.parent.mkdir(exist_ok=True)


def test_control_characters_in_a_request(tiny_node: Node) -> None:
    for args in (
        ["--image=tiny:1\nuid=0"],
        ["--image=tiny:1", "--volume=/home/alice:/mnt\nvolume=/root:/opt"],
        ["--image=tiny:1", "--volume=/home/alice:/mnt\x1b[2J"],
        ["--image=tiny:1", "--module=x\nend=request"],
        ["--image=tiny:1", "--workdir=/\x1b[2J"],
        ["--image=local:/home/alice\x07"],
        ["--image=" + "x" * 70000],
        ["--image=tiny:1", "--volume=" + "/" * 70000],
        ["--image=id:../../../etc/passwd"],
        ["--image=docker:../../x"],
        ["--image=id:.meta"],
    ):
        done = tiny_node.shifter(*args, "/bin/true")
        assert done.returncode == 125, args
        assert not any(ord(char) < 32 and char != "\n" for char in done.stderr), done.stderr


@pytest.mark.parametrize(
    "source",
    [
        "/proc",
        "/proc/self/root",
        "/proc/self/cwd",
        "/proc/1/root",
        "/proc/self/fd",
        "/dev/fd/",
        "/root/x",
        "/run/shifter",
    ],
)
def test_sources_that_are_no_volume(tiny_node: Node, source: str) -> None:
    tiny_node.shifter("--image=tiny:1", "/bin/true")
    done = tiny_node.shifter("--image=tiny:1", f"--volume={source}:/mnt", "ls", "/mnt")
    assert done.returncode == 125 and done.stdout == "", done.stdout


def test_message_does_not_tell_what_is_in_a_closed_directory(tiny_node: Node) -> None:
    tiny_node.mkdir("/home/bob/there", owner="bob")
    said = [
        tiny_node.shifter("--image=tiny:1", f"--volume=/home/bob/{name}:/mnt", "true").stderr.replace(name, "X")
        for name in ("there", "missing")
    ]
    assert said[0] == said[1] and "ermission denied" in said[0]


def test_acl_holds_for_every_name_of_an_image(node: Node, image: Tree) -> None:
    ident = node.add_image("docker:closed:1", image, user_acl=[5002])
    assert node.shifter("--image=closed:1", "true", user="bob").returncode == 0
    for name in ("closed:1", "docker:closed:1", f"id:{ident}"):
        assert node.shifter(f"--image={name}", "true").returncode == 125
    # An ACL that is made tighter counts from the next launch, though the UDI is pinned.
    node.write(f"/images/{ident}.meta", "FORMAT: squashfs\nUSERACL: 5003\n")
    assert node.shifter("--image=closed:1", "true", user="bob").returncode == 125


def test_tag_that_is_moved_between_images(node: Node, image: Tree, tmp_path: Path) -> None:
    """A race of tag and ACL: whatever is entered is an image that the user may have."""
    tree = image.copy(tmp_path / "closed")
    (tree.path / "etc/issue").write_text("closed\n")
    open_id = node.add_image("docker:open:1", image)
    closed_id = node.add_image("docker:closed:1", tree, user_acl=[5002])
    mover = node.popen(
        [
            "sh",
            "-c",
            f"cd /images/tags; while :; do for i in {open_id} {closed_id}; do "
            "ln -sfn $i .n; mv -T .n docker:moving:1; done; done",
        ]
    )
    try:
        for _ in range(40):
            done = node.shifter("--image=moving:1", "cat", "/etc/issue")
            assert "closed" not in done.stdout
    finally:
        mover.kill()
        mover.wait()


# --- from inside ------------------------------------------------------------------------------------------------------


def test_nested_user_namespace_gains_nothing(tiny_node: Node) -> None:
    """In a user namespace of one's own every mount is locked: no remount, no look below, no way to /run/shifter."""
    tiny_node.write(
        "/home/alice/probe.sh",
        """
for path in / /etc /usr /var /bin; do mount -o remount,bind,rw $path 2>/dev/null && touch $path/pwned && echo writable $path; done
for path in /etc /proc /sys /dev /tmp /usr; do umount $path 2>/dev/null && echo unmounted $path; done
for path in /run/shifter /mnt/run/shifter; do ls -A $path 2>/dev/null; cat $path/site 2>/dev/null; done
mount -t tmpfs none /run 2>/dev/null
grep -q '/run/shifter' /proc/self/mountinfo && echo visible
true
""",
        owner="alice",
    )
    done = tiny_node.shifter(
        "--image=tiny:1", "--volume=/:/mnt", "unshare", "-r", "-m", "sh", "/home/alice/probe.sh", clean=False
    )
    assert [line for line in done.stdout.splitlines() if line] == [], done.stdout
    assert done.returncode == 0, done.stderr


def test_the_doors_own_file_is_not_writable(tiny_node: Node) -> None:
    before = tiny_node.path(DOOR).stat()
    door = tiny_node.popen([DOOR, "--image=tiny:1", "sleep", "5"], "alice")
    done = tiny_node.run(f"echo x > /proc/{door.pid}/exe; echo x > {DOOR}", "alice")
    assert done.returncode != 0
    door.kill()
    door.wait()
    assert tiny_node.path(DOOR).stat().st_mtime == before.st_mtime


def test_no_descriptor_of_ours_and_no_host_directory_inside(tiny_node: Node) -> None:
    for _ in range(2):  # built, joined
        done = tiny_node.shifter("--image=tiny:1", "ls", "-l", "/proc/self/fd", cwd="/srv")
        fds = [line.split()[-3:] for line in done.stdout.splitlines() if "->" in line]
        assert {fd[0] for fd in fds} <= {"0", "1", "2", "3"}, done.stdout  # 3: ls's own
        assert not any("run/shifter" in fd[2] or "nsfs" in fd[2] or "mnt:[" in fd[2] for fd in fds), done.stdout


def test_door_inside_is_no_door(tiny_node: Node) -> None:
    """A copy of the setuid file that a volume shows: nosuid and no_new_privs."""
    tiny_node.mkdir("/srv/copy")
    tiny_node.run(f"cp -p {DOOR} /srv/copy/shifter; chmod 4755 /srv/copy/shifter", check=True)
    done = tiny_node.shifter("--image=tiny:1", "--volume=/srv/copy:/mnt", "/mnt/shifter", "--image=local:/", "id", "-u")
    assert "0" not in done.stdout.split()


@pytest.mark.parametrize("flags", ["-Ur", "-Urm", "-Urmpf"])
def test_caller_in_a_user_namespace_is_refused(tiny_node: Node, flags: str) -> None:
    done = tiny_node.run(["unshare", flags, DOOR, "--image=tiny:1", "/bin/true"], "alice")
    assert done.returncode == 125, done.stdout + done.stderr


def test_chroot_is_refused(tiny_node: Node) -> None:
    tiny_node.run("mkdir -p /srv/jail; mount --rbind / /srv/jail", check=True)
    tiny_node._expected |= {m.target for m in tiny_node.mounts() if m.target.startswith("/srv/jail")}
    done = tiny_node.run(["chroot", "--userspec=5001:5001", "/srv/jail", DOOR, "--image=tiny:1", "/bin/true"])
    assert done.returncode == 125 and "chroot" in done.stderr, done.stderr
