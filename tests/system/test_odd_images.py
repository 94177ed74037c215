"""Images that are no ordinary root file system: they work, or one line says why not; nothing leaves the container."""

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.images import Tree
from tests.node import Node

FORMATS = ["squashfs", "erofs", "VFS"]
MARKER = "/host-marker"
SCRIPT = f"test ! -e {MARKER}/secret && cat /srv/data/file && id -un && echo x > /tmp/out && test -d /proc/1"
"""What every image must be able to do: nothing of the host is reached, its own data and the user's name are there."""


@pytest.fixture
def host(node: Node) -> Node:
    """A node with something at its root that symbolic links of an image would like to reach."""
    for path in (MARKER, "/host-etc"):
        node.mkdir(path)
        node.write(f"{path}/secret", "secret\n")
    return node


def one_line(stderr: str) -> str:
    """Return the message if *stderr* is exactly one line of Shifter's."""
    assert stderr.startswith("shifter: "), stderr
    assert stderr.count("\n") == 1, stderr
    assert stderr.endswith("\n"), stderr
    assert "Traceback" not in stderr
    assert "Error:" not in stderr
    return stderr


def launch(node: Node, *args: str, ref: str = "odd", **options: object) -> tuple[int, str, str]:
    done = node.shifter(f"--image={ref}", *args, **options)  # type: ignore[arg-type]
    if done.returncode == 125:
        one_line(done.stderr)
    return done.returncode, done.stdout, done.stderr


def works(node: Node, *args: str, ref: str = "odd") -> str:
    code, out, err = launch(node, *args, ref=ref)
    assert (code, err) == (0, ""), (code, out, err)
    return out


def refused(node: Node, *args: str, ref: str = "odd") -> str:
    code, out, err = launch(node, *args, ref=ref)
    assert (code, out) == (125, ""), (code, out, err)
    return err


def replace(tree: Tree, name: str) -> Path:
    """Move the directory *name* away and return its path, which is free now."""
    path = tree.path / name
    if path.is_dir() and not path.is_symlink():
        os.rename(path, tree.path / f"was-{name.replace('/', '-')}")
    return path


def host_unchanged(node: Node, before: dict[str, list[str]]) -> None:
    assert snapshot(node) == before


def snapshot(node: Node) -> dict[str, list[str]]:
    """Names in the directories of the node that a link of an image could lead to."""
    return {name: sorted(os.listdir(node.path(name))) for name in ("/", "/etc", "/var", "/opt", "/home", MARKER)}


LINKS = {
    "absolute": MARKER,
    "climbing": "../../../.." + MARKER,
    "absolute-climbing": "/../.." + MARKER,
    "looping": "{name}",
    "dangling": "/nowhere/at/all",
    "to-a-file": "/srv/data/file",
    "to-root": "/",
    "to-proc": "/proc/self/cwd",
}


@pytest.mark.parametrize("kind", LINKS)
def test_symlinks_in_place_of_directories(host: Node, image: Tree, tmp_path: Path, kind: str) -> None:
    tree = image.copy(tmp_path / "odd")
    for name in ("etc", "var", "opt", "dev", "tmp", "proc", "run", "sys"):
        os.symlink(LINKS[kind].format(name=name), replace(tree, name))
    host.add_image("odd", tree, "VFS")
    host.run("touch /tmp/before", "alice", check=True)
    before = snapshot(host)
    assert works(host, "/bin/sh", "-c", SCRIPT) == "data\nalice\n"
    assert host.read("/tmp/out") == "x\n"
    host_unchanged(host, before)


@pytest.mark.parametrize("kind", LINKS)
def test_symlinks_in_place_of_programs(host: Node, image: Tree, tmp_path: Path, kind: str) -> None:
    tree = image.copy(tmp_path / "odd")
    for name in ("usr/bin", "lib", "bin"):
        os.symlink(LINKS[kind].format(name=name.rpartition("/")[2]), replace(tree, name))
    host.add_image("odd", tree, "VFS")
    before = snapshot(host)
    script = "test ! -e /host-marker/secret && /was-bin/busybox id -un"
    assert works(host, "/was-bin/busybox", "sh", "-c", script) == "alice\n"
    assert launch(host, "sh")[0] in (126, 127)
    host_unchanged(host, before)


@pytest.mark.parametrize(
    "to", ["/", "/etc", "/etc/new", "/etc/../dev/shm", "/sys", "/proc/1", "/dev/new", "/var", "opt"]
)
def test_image_can_not_lead_a_mount_of_the_site_astray(host: Node, image: Tree, tmp_path: Path, to: str) -> None:
    tree = image.copy(tmp_path / "odd")
    os.symlink(to, replace(tree, "home"))
    host.add_image("odd", tree, "VFS")
    assert "which can't be a target" in refused(host, "/bin/true")


@pytest.mark.parametrize("kind", LINKS)
def test_home_as_symlink(host: Node, image: Tree, tmp_path: Path, kind: str) -> None:
    """/home is a mount point of the site: made where the link leads to, inside the container, or refused in one line."""
    tree = image.copy(tmp_path / "odd")
    os.symlink(LINKS[kind].format(name="home"), replace(tree, "home"))
    host.write("/home/alice/mine", "mine\n", owner="alice")
    host.add_image("odd", tree, "VFS")
    before = snapshot(host)
    if kind in ("looping", "to-a-file", "to-root", "to-proc"):
        message = refused(host, "/bin/sh", "-c", "cat /home/alice/mine")
        assert "/home" in message
        assert "siteFs at /etc/shifter/udiRoot.conf:2" in message
    else:
        assert works(host, "/bin/sh", "-c", "cat /home/alice/mine") == "mine\n"
    host_unchanged(host, before)


def test_files_in_place_of_directories(host: Node, image: Tree, tmp_path: Path) -> None:
    tree = image.copy(tmp_path / "odd")
    for name in ("etc", "var", "opt", "dev", "tmp", "proc", "run", "sys", "usr/bin", "lib"):
        replace(tree, name).write_text("a file\n")
    host.add_image("odd", tree)
    assert works(host, "/bin/sh", "-c", SCRIPT) == "data\nalice\n"


def test_home_as_file(host: Node, image: Tree, tmp_path: Path) -> None:
    tree = image.copy(tmp_path / "odd")
    replace(tree, "home").write_text("a file\n")
    host.add_image("odd", tree)
    assert "/home is a file in the container" in refused(host, "/bin/true")
    assert "udiRoot.conf:2" in refused(host, "/bin/true")


@pytest.mark.parametrize("fmt", FORMATS)
def test_missing_directories(host: Node, image: Tree, tmp_path: Path, fmt: str) -> None:
    tree = image.copy(tmp_path / "odd")
    for name in ("etc", "var", "opt", "tmp", "home", "proc", "dev", "sys", "run"):
        replace(tree, name)
    host.add_image("odd", tree, fmt)
    assert works(host, "/bin/sh", "-c", SCRIPT) == "data\nalice\n"
    assert works(host, "/bin/sh", "-c", "test -d /home/alice && cat /etc/hosts") == host.read("/etc/hosts")


def test_missing_passwd_and_shell(host: Node, image: Tree, tmp_path: Path) -> None:
    tree = image.copy(tmp_path / "odd")
    (tree.path / "etc/passwd").unlink()
    (tree.path / "etc/group").unlink()
    for place in ("bin", "usr/bin"):
        (tree.path / place / "sh").unlink()
    host.add_image("odd", tree)
    assert works(host, "/bin/busybox", "id", "-un") == "alice\n"
    code, _, err = launch(host)
    assert code == 127
    assert "/bin/sh" in one_line(err)


def test_directories_in_place_of_files_of_etc(host: Node, image: Tree, tmp_path: Path) -> None:
    tree = image.copy(tmp_path / "odd")
    names = ("passwd", "group", "hosts", "nsswitch.conf", "mtab", "localtime")
    for name in names:
        path = tree.path / "etc" / name
        path.unlink(missing_ok=True)
        (path / "below").mkdir(parents=True)
    host.add_image("odd", tree)
    script = "id -un; cd /etc; for f; do test -f $f || echo $f is no file; done"
    assert works(host, "/bin/sh", "-c", script, "sh", *names) == "alice\n"


@pytest.mark.parametrize("fmt", FORMATS)
def test_empty_image(host: Node, tmp_path: Path, fmt: str) -> None:
    (tmp_path / "odd").mkdir()
    host.add_image("odd", Tree(tmp_path / "odd"), fmt)
    code, _, err = launch(host, "/bin/true")
    assert code == 127
    assert "/bin/true" in one_line(err)
    host.conf(siteFs=["/home:/home", "/usr/bin/busybox:/busybox:ro"])
    assert "etc" in works(host, "/busybox", "ls", "/").split()


@pytest.mark.parametrize(("where", "count"), [(".", 5000), ("var", 1100), ("opt", 1100)])
def test_too_many_entries(host: Node, image: Tree, tmp_path: Path, where: str, count: int) -> None:
    tree = image.copy(tmp_path / "odd")
    for number in range(count):
        (tree.path / where / f"entry{number}").touch()
    host.add_image("odd", tree)
    assert f"more than 1024 entries in /{where.strip('.')};" in refused(host, "/bin/true")


NAMES = [b"two words", b"new\nline", "\N{SNOWMAN} d\xfcrfen".encode(), b"\xff\xfe not UTF-8", b"a:b,c=d\\e", b"n" * 255]


@pytest.mark.parametrize("fmt", FORMATS)
def test_odd_names(host: Node, image: Tree, tmp_path: Path, fmt: str) -> None:
    tree = image.copy(tmp_path / "odd")
    base = os.fsencode(tree.path)
    names = [name for name in NAMES if fmt != "erofs" or len(name) < 255]  # mkfs.erofs can't
    for place in (b"", b"var/", b"opt/", b"etc/"):
        for name in names:
            os.mkdir(base + b"/" + place + name)
            with open(base + b"/" + place + name + b"/x", "wb") as file:
                file.write(b"content\n")
            with open(base + b"/" + place + b"f" + name[:200], "wb") as file:
                file.write(b"file\n")
            os.symlink(name, base + b"/" + place + b"l" + name[:200])
    host.add_image("odd", tree, fmt)
    for where in ("/", "/var/", "/opt/", "/etc/"):
        for name in names:
            words = [os.fsdecode(where.encode() + part) for part in (name + b"/x", b"f" + name[:200])]
            link = os.fsdecode(where.encode() + b"l" + name[:200])
            assert works(host, "/bin/cat", *words) == "content\nfile\n"
            assert os.fsencode(works(host, "/bin/readlink", link)) == name + b"\n"


@pytest.mark.parametrize("where", [".", "etc", "var", "opt", "srv"])
def test_special_files(host: Node, image: Tree, tmp_path: Path, where: str) -> None:
    tree = image.copy(tmp_path / "odd")
    base = tree.path / where
    os.mkfifo(base / "fifo")
    os.mknod(base / "disk", stat.S_IFBLK | 0o666, os.stat("/").st_dev)
    os.mknod(base / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    os.mknod(base / "whiteout", stat.S_IFCHR | 0o666, os.makedev(0, 0))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(base / "socket"))
    host.add_image("odd", tree, "VFS")
    assert works(host, "/bin/sh", "-c", SCRIPT) == "data\nalice\n"
    for device in ("disk", "zero", "whiteout"):
        done = host.shifter("--image=odd", "/bin/dd", f"if=/{where}/{device}", "of=/dev/null", "count=1", "bs=1")
        assert done.returncode == 1, (device, done)  # not there, or its device can't be opened


def test_own_directories_in_the_image(host: Node, image: Tree, tmp_path: Path) -> None:
    """The image's /opt/shifter gives way to the node's, so that `shifter` works inside; /opt/udiImage is never shown."""
    tree = image.copy(tmp_path / "odd")
    for name in ("opt/shifter/bin", "opt/udiImage/bin", "opt/mine"):
        (tree.path / name).mkdir(parents=True)
        (tree.path / name / "file").write_text("image\n")
    host.add_image("odd", tree)
    assert works(host, "/bin/ls", "/opt").split() == ["mine", "shifter", "udiImage"]
    assert works(host, "/bin/cat", "/opt/mine/file") == "image\n"
    assert works(host, "/bin/ls", "/opt/shifter/bin").split() == ["shifter", "shifterctl", "shifterimg"]
    assert works(host, "/opt/shifter/bin/shifter", "/bin/id", "-un") == "alice\n"


def test_modes_of_image_directories_hold(host: Node, image: Tree, tmp_path: Path) -> None:
    tree = image.copy(tmp_path / "odd")
    for name in ("srv/closed", "closed", "etc/closed"):
        (tree.path / name).mkdir()
        (tree.path / name / "file").write_text("image\n")
        (tree.path / name).chmod(0o700)
    (tree.path / "etc/secret").write_text("secret\n")
    (tree.path / "etc/secret").chmod(0o600)
    for fmt in FORMATS:
        host.add_image("odd", tree, fmt)
        script = "cat /srv/closed/file /closed/file /etc/closed/file /etc/secret; echo done"
        _, out, err = launch(host, "/bin/sh", "-c", script)
        assert out == "done\n"
        assert err.count("denied") == 4, err


@pytest.mark.parametrize("fmt", FORMATS)
def test_image_is_read_only(host: Node, image: Tree, fmt: str) -> None:
    host.add_image("odd", image, fmt)
    for place in ("/", "/etc/x", "/usr/x", "/var/x", "/var/lib/x", "/opt/x", "/srv/data/file", "/etc/passwd"):
        done = host.shifter("--image=odd", "/bin/sh", "-c", f"touch {place} 2>/dev/null || echo no")
        assert done.stdout == "no\n", place


def test_two_hundred_groups(host: Node, image: Tree) -> None:
    host.add_image("odd", image)
    groups = list(range(20000, 20200))
    done = host.shifter("--image=odd", "/bin/id", "-G", groups=groups)
    assert (done.returncode, sorted(map(int, done.stdout.split()))) == (0, [5001, *groups]), done.stderr
    done = host.shifter("--image=odd", "/bin/grep", "-c", "alice", "/etc/group", groups=groups)
    assert done.stdout == "201\n"
    host.conf(maxGroupCount=16)
    done = host.shifter("--image=odd", "/bin/grep", "-c", ":alice$", "/etc/group", groups=groups)
    assert done.stdout == "16\n"


def test_user_without_a_home(host: Node, image: Tree) -> None:
    host.add_image("odd", image)
    host.run("rm -r /home/carol", check=True)
    done = host.shifter("--image=odd", "/bin/pwd", user="carol")
    assert (done.returncode, done.stdout) == (0, "/\n"), done.stderr


# --- local: ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def local(host: Node, image: Tree) -> Node:
    """A node that allows directories as images, and has one of alice's in /srv/tree, on a file system of the node."""
    host.conf(allowLocalChroot=1)
    image.copy(host.path("/srv/tree"))
    host.run("chown alice:alice /srv/tree", check=True)
    return host


def test_local_is_refused_by_default(local: Node) -> None:
    local.conf()
    assert "allowLocalChroot" in refused(local, "/bin/true", ref="local:/srv/tree")


def test_local_works_and_is_read_only(local: Node) -> None:
    ref = "local:/srv/tree"
    assert works(local, "/bin/sh", "-c", SCRIPT, ref=ref) == "data\nalice\n"
    assert works(local, "/bin/sh", "-c", "cat /etc/issue /etc/hosts", ref=ref).startswith("Tiny\n127.0.0.1")
    script = "for i in / /etc /usr /srv /opt /var; do touch $i/new && echo $i; done 2>/dev/null; true"
    assert works(local, "/bin/sh", "-c", script, ref=ref) == ""


@pytest.mark.parametrize(
    ("prepare", "ref", "message"),
    [
        ("mkdir -p /root/tree/bin", "local:/root/tree", "image /root/tree: Permission denied"),
        ("mkdir -m 700 /srv/closed", "local:/srv/closed", "can't be read: Permission denied"),
        ("chmod 700 /root", "local:/root", "/ of the image can't be read: Permission denied"),
        ("touch /srv/file", "local:/srv/file", "is not a directory"),
        ("true", "local:/srv/missing", "No such file"),
        ("true", "local:/proc/self/root", "too many symbolic links"),
        ("true", "local:/proc/self/cwd", "too many symbolic links"),
        ("true", "local:/proc", "on a proc file system"),
        ("ln -s /proc/self/root /srv/link", "local:/srv/link", "too many symbolic links"),
    ],
)
def test_local_is_opened_as_the_user(local: Node, prepare: str, ref: str, message: str) -> None:
    local.run(prepare, check=True)
    assert message in refused(local, "/bin/true", ref=ref)


def test_local_closed_directories_stay_closed(local: Node) -> None:
    script = "cd /srv/tree; for d in inside etc/inside opt/inside var/inside; do mkdir -p $d/open; "
    script += "echo secret > $d/open/file; chmod 700 $d; done"
    local.run(script, check=True)
    script = "cat /inside/open/file /etc/inside/open/file /opt/inside/open/file /var/inside/open/file; true"
    _, out, err = launch(local, "/bin/sh", "-c", script, ref="local:/srv/tree")
    assert (out, err.count("denied")) == ("", 4), err


@pytest.mark.parametrize("name", ["opt", "var", "etc"])
@pytest.mark.parametrize("mode", ["700", "744", "711"])
def test_local_closed_sub_directory_is_not_shown(local: Node, name: str, mode: str) -> None:
    """What C Shifter did: root went through a 0700 directory and showed what is in it."""
    script = f"cd /srv/tree/{name}; mkdir open; echo secret > open/file; echo secret > file; chmod {mode} ."
    local.run(script, check=True)
    script = f"cat /{name}/open/file /{name}/file; id -un"
    _, out, _ = launch(local, "/bin/sh", "-c", script, ref="local:/srv/tree")
    assert out == "alice\n"


def test_local_with_special_and_huge_files(local: Node) -> None:
    script = "cd /srv/tree; mkfifo fifo etc/fifo var/fifo; truncate -s 1T sparse etc/sparse var/sparse; "
    script += "python3 -c 'import socket; s = socket.socket(socket.AF_UNIX); s.bind(\"socket\")'"
    local.run(script, check=True)
    script = SCRIPT + "; stat -c %s /sparse /etc/sparse /var/sparse"
    out = works(local, "/bin/sh", "-c", script, ref="local:/srv/tree")
    assert out.split() == ["data", "alice", *["1099511627776"] * 3]


@pytest.mark.parametrize("where", [".", "etc"])
def test_local_with_100000_entries(local: Node, where: str) -> None:
    local.run(f"cd /srv/tree/{where}; seq 100000 | sed s/^/entry/ | xargs touch", check=True)
    assert "more than 1024 entries" in refused(local, "/bin/true", ref="local:/srv/tree")


def test_local_brings_mounts_along_and_uncovers_nothing(local: Node) -> None:
    for name in ("data", "etc/sub", "usr/lib/sub", "opt/x/sub", "var/lib/sub"):
        local.write(f"/srv/tree/{name}/hidden", "hidden\n")
        local.mount("tmpfs", f"/srv/tree/{name}", "tmpfs", 8, "mode=755")
        local.write(f"/srv/tree/{name}/shown", "shown\n")
    local.write("/srv/site/f", "site\n")
    local.conf(allowLocalChroot=1, siteFs=["/home:/home", "/srv/site:/usr/lib/new/site", "/srv/site:/usr/other"])
    for name in ("data", "etc/sub", "usr/lib/sub", "opt/x/sub", "var/lib/sub"):
        out = works(local, "/bin/sh", "-c", f"ls /{name}; cat /{name}/shown", ref="local:/srv/tree")
        assert out == "shown\nshown\n", name
        script = f"grep ' /{name} ' /proc/self/mountinfo | cut -d' ' -f6 | tail -n 1"
        options = works(local, "/bin/sh", "-c", script, ref="local:/srv/tree").strip().split(",")
        assert {"ro", "nosuid", "nodev", "noexec"} <= set(options), options
    out = works(local, "/bin/cat", "/usr/lib/new/site/f", "/usr/other/f", "/usr/lib/hello.txt", ref="local:/srv/tree")
    assert out == "site\nsite\nhello from the image\n"
    script = "touch /usr/new || touch /usr/lib/new/new || touch /usr/lib/x || touch /etc/x || echo read-only"
    assert works(local, "/bin/sh", "-c", f"({script}) 2>/dev/null", ref="local:/srv/tree") == "read-only\n"


def test_local_root_of_the_node(local: Node) -> None:
    out = works(local, "/bin/sh", "-c", "id -un; cat /etc/hostname; ls /run; cat /host-marker/secret", ref="local:/")
    assert out == "alice\nnode1\nsecret\n"
    done = local.shifter("--image=local:/", "/bin/sh", "-c", "ls /root /run/shifter; cat /etc/shadow; true")
    assert done.stdout == ""  # shadow is the empty, generated one


def test_local_tree_that_changes_is_not_followed_out(local: Node) -> None:
    """An entry which is a symlink to the node's files stays a symlink of the container."""
    local.run("ln -s /host-marker/secret /srv/tree/link; ln -s ../../../host-marker /srv/tree/etc/link", check=True)
    done = local.shifter("--image=local:/srv/tree", "/bin/sh", "-c", "cat /link /etc/link/secret")
    assert (done.returncode, done.stdout) == (1, "")


# --- failures --------------------------------------------------------------------------------------------------------


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def no_magic(data: bytes) -> bytes:
    return b"\0" * 4096 + data[4096:]


def garbage_table(data: bytes) -> bytes:
    return data[:96] + b"\xa5" * (len(data) - 96)


@pytest.mark.parametrize("damage", [truncate, no_magic, garbage_table, lambda data: b"", lambda data: data[:100]])
@pytest.mark.parametrize("fmt", ["squashfs", "erofs"])
def test_damaged_image(host: Node, image: Tree, damage: Callable[[bytes], bytes], fmt: str) -> None:
    ident = host.add_image("odd", image, fmt)
    path = f"/images/{ident}.{fmt}"
    whole = host.path(path).read_bytes()
    host.write(path, damage(whole))
    code, _, err = launch(host, "/bin/true")
    assert code in (125, 126, 127), err
    if code == 125:
        assert "damaged" in err
        assert "import it again" in err or ident in err
    host.check_leaks()
    host.write(path, whole)
    assert works(host, "/bin/id", "-un") == "alice\n"


def test_no_loop_device(host: Node, image: Tree) -> None:
    host.add_image("odd", image)
    host.run(["mknod", "/dead", "c", "240", "77"], check=True)
    host.mount("/dead", "/dev/loop-control", flags=4096)
    assert "modprobe loop" in refused(host, "/bin/true")
    host.run(["umount", "/dev/loop-control"], check=True)
    assert works(host, "/bin/id", "-un") == "alice\n"


def test_run_is_full(host: Node, image: Tree) -> None:
    host.add_image("odd", image)
    works(host, "/bin/true")
    host.shifterctl("gc", "--all", check=True)
    host.run("dd if=/dev/zero of=/run/shifter/full bs=1M 2>/dev/null; true")
    before = sorted(os.listdir(host.path("/run/shifter")))
    assert "No space left" in refused(host, "/bin/true")
    assert sorted(os.listdir(host.path("/run/shifter"))) == before
    assert sorted(os.listdir(host.path("/run/shifter/udi/5001"))) == ["lock"]
    host.run(["rm", "/run/shifter/full"], check=True)
    assert works(host, "/bin/id", "-un") == "alice\n"


def test_build_timeout(host: Node, image: Tree) -> None:
    host.add_image("odd", image)
    works(host, "/bin/true")
    images = os.listdir(host.path("/run/shifter/images"))
    host.conf(udiBuildTimeout=1)  # also makes the UDI outdated
    holder = host.popen(["flock", f"/run/shifter/images/{images[0]}", "sleep", "60"])
    host.run(f"while flock -n /run/shifter/images/{images[0]} true; do sleep 0.05; done", check=True)
    assert "udiBuildTimeout" in refused(host, "/bin/true")
    holder.kill()
    host.run(["sh", "-c", "kill $(pidof sleep); true"])
    host.conf()
    assert works(host, "/bin/id", "-un") == "alice\n"


def place_fifo(path: Path) -> None:
    os.mkfifo(path)


def place_device(path: Path) -> None:
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(5, 0))


def place_sparse_file(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 28)


def place_loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("fmt", ["squashfs", "erofs"])
@pytest.mark.parametrize("place", [place_fifo, place_device, place_sparse_file, place_loop])
def test_what_is_unpacked_ahead_may_be_anything(
    host: Node, image: Tree, tmp_path: Path, place: Callable[[Path], None], fmt: str
) -> None:
    tree = image.copy(tmp_path / "odd")
    for path in ("lib64/ld-linux-x86-64.so.2", "lib/x86_64-linux-gnu/libc.so.6", "lib64/libc.so.6"):
        (tree.path / path).parent.mkdir(parents=True, exist_ok=True)
        place(tree.path / path)
    host.add_image("odd", tree, fmt)
    assert works(host, "/bin/sh", "-c", SCRIPT) == "data\nalice\n"
