"""Volumes: what users mount, where it is looked for, where it may lie, and every way in which it is refused."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.images import Tree
from tests.node import PREFIX, Node
from tests.system.mounting import flags, mounts, refused, works

CONF = "/etc/shifter/udiRoot.conf"


def test_volumes(site: Node) -> None:
    site.write("/srv/a/sub/file", "sub\n")
    options = ["--volume=/srv/a:/mnt;/srv/b:/srv/data:ro", "--volume=/srv/b:/mnt/sub"]
    assert works(site, "cat /mnt/file /srv/data/file /mnt/sub/file", *options) == "a\nb\nb\n"
    table = mounts(site, *options)
    assert {"nosuid", "nodev"} <= flags(table["/mnt"])
    assert "rw" in flags(table["/mnt"])
    assert {"nosuid", "nodev", "ro"} <= flags(table["/srv/data"])
    assert works(site, "echo x > /mnt/new; cat /srv/a/new 2>/dev/null; cat /mnt/new", *options) == "x\n"
    assert site.read("/srv/a/new") == "x\n"


def test_nested_volumes_in_any_order(site: Node) -> None:
    site.mkdir("/srv/a/sub")
    for options in (["/srv/a:/mnt", "/srv/b:/mnt/sub"], ["/srv/b:/mnt/sub", "/srv/a:/mnt"]):
        assert works(site, "cat /mnt/file /mnt/sub/file", *(f"--volume={o}" for o in options)) == "a\nb\n"


def test_volume_option_replaces_the_variable(site: Node) -> None:
    env = {"SHIFTER_VOLUME": "/srv/a:/mnt"}
    assert works(site, "cat /mnt/file", env=env) == "a\n"
    assert works(site, "cat /srv/data/file; ls /mnt", "--volume=/srv/b:/srv/data", env=env) == "b\n"


def test_volume_sub_mounts_keep_their_flags(site: Node) -> None:
    for name, options in (("ro", "ro"), ("noexec", "noexec"), ("plain", "rw")):
        site.run(
            f"mkdir /srv/a/{name}; touch /srv/a/{name}/hidden; mount -t tmpfs -o {options} x /srv/a/{name}", check=True
        )
        site._expected.add(f"/srv/a/{name}")
    table = mounts(site, "--volume=/srv/a:/mnt")
    for name in ("ro", "noexec", "plain"):
        assert {"nosuid", "nodev", name.replace("plain", "rw")} <= flags(table[f"/mnt/{name}"])
    assert works(site, "ls /mnt/*/", "--volume=/srv/a:/mnt").count("hidden") == 0
    table = mounts(site, "--volume=/srv/a:/mnt:ro")
    assert all("ro" in flags(table[f"/mnt{name}"]) for name in ("", "/ro", "/noexec", "/plain"))


REFUSED = [
    ("/root/x:/mnt", "volume /root/x: Permission denied"),
    ("/home/bob/x:/mnt", "volume /home/bob/x: Permission denied"),
    ("/srv/missing:/mnt", "volume /srv/missing: No such file or directory"),
    ("/srv/single/:/mnt", "volume /srv/single/: Not a directory"),
    ("/srv/single/x:/mnt", "volume /srv/single/x: Not a directory"),
    ("/srv/single:/mnt", "/mnt is a directory in the container; the file /srv/single can't be mounted on it"),
    ("/srv/fifo:/mnt", "volume /srv/fifo: neither a directory nor a regular file"),
    ("/dev/null:/bin/true", "volume /dev/null: neither a directory nor a regular file"),
    ("/srv/socket:/bin/true", "volume /srv/socket: neither a directory nor a regular file"),
    ("/srv/data:/mnt", "volume /srv/data: only the image has it, and content of an image can't be mounted elsewhere"),
    ("/proc/version:/bin/true", "on a proc file system"),
    ("/proc:/mnt", "on a proc file system"),
    ("/proc/self:/mnt", "on a proc file system"),
    ("/proc/self/fd:/mnt", "on a proc file system"),
    ("/proc/self/root:/mnt", "volume /proc/self/root: too many symbolic links"),
    ("/proc/self/cwd:/mnt", "volume /proc/self/cwd: too many symbolic links"),
    ("/proc/self/fd/3:/mnt", "volume /proc/self/fd/3: "),
    ("/proc/self/root/srv:/mnt", "too many symbolic links"),
    ("/dev/fd/3:/mnt", "volume /dev/fd/3: "),
    ("/srv/tocwd:/mnt", "too many symbolic links"),
    ("/srv/toproc:/mnt", "on a proc file system"),
    ("/srv/loop:/mnt", "too many symbolic links"),
    ("/proc/self/ns/mnt:/mnt", "volume /proc/self/ns/mnt: "),
    ("/run/shifter:/mnt", "volume /run/shifter: this mount can't be shown elsewhere"),
    ("/run/shifter/udi/5001:/mnt", "Permission denied"),
    ("/srv/a:/bin/busybox/x", "/bin/busybox/x leads through a file of the container"),
    ("/srv/a:/sys/x", "belongs to the system"),
    ("/srv/a:/home/bob/x", "/home/bob/x can't be reached in the container: Permission denied"),
    ("/srv/a:/home/x", "/home/x does not exist in the container, and you can't make it in /home: Permission denied"),
    ("/srv/a:/home/toetc/new", "/home/toetc/new (really /etc/new) can't be a volume's target"),
    ("/srv/a:/home/todev/shm/new", "really /dev/shm/new"),
    ("/srv/a:/home/tonew/etc/x", "really /etc/x"),
    ("/srv/a:/mnt;/srv/single:/mnt/", "have the same target"),
    ("/srv/a:/root/x", "/root/x can't be reached in the container: Permission denied"),
    ("/srv/a:/bin/busybox", "/bin/busybox is a file in the container; the directory /srv/a can't be mounted on it"),
    *((f"/srv/a:{t}", "belongs to the system") for t in ("/etc", "/etc/ssh", "/var", "/var/lib", "/var/tmp/x")),
    *((f"/srv/a:{t}", "belongs to the system") for t in ("/proc", "/proc/1", "/sys", "/sys/fs/cgroup", "/dev")),
    *((f"/srv/a:{t}", "belongs to the system") for t in ("/dev/shm", "/run", "/run/x", "/opt/udiImage", "/opt", "/")),
    *((f"/srv/a:{t}", "belongs to the system") for t in ("/opt/udiImage/x", "//etc", "/./etc", "/etc/", "/opt//udiImage")),
    *((f"/srv/a:{t}", "belongs to the system") for t in ("/toetc", "/tovar/lib", "/todev", "/toroot", "/torun", "/toopt")),
    ("/srv/a:/toproc/self/cwd", ""),
    ("/srv/a:/mnt:rec", "'rec' is no flag"),
    ("/srv/a:/mnt:rw", "'rw' is no flag"),
    ("/srv/a", "where to?"),
    ("srv/a:/mnt", "not an absolute path"),
]  # fmt: skip


def test_volume_refused(node: Node, linked: Tree) -> None:
    node.add_image("tiny:1", linked)
    script = "mkdir -p /root/x /home/bob/x /srv/a; echo single > /srv/single; ln -s /proc/self/cwd /srv/tocwd; "
    links = "ln -s /etc /home/toetc; ln -s /dev /home/todev; ln -s / /home/tonew; mkfifo /srv/fifo; "
    node.run(script + links + "ln -s /proc/self /srv/toproc; ln -s loop /srv/loop", check=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(node.path("/srv") / "socket"))
    for volume, message in REFUSED:
        assert message in refused(node, f"--volume={volume}", cwd="/srv/a"), volume


@pytest.fixture(scope="session")
def linked(image: Tree, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    """An image whose links lead to what the system reserves; and directories whose names only begin like those."""
    tree = image.copy(tmp_path_factory.mktemp("linked") / "x")
    for name, text in {
        "toetc": "etc",
        "tovar": "/var",
        "todev": "/dev",
        "toroot": "/",
        "torun": "run",
        "toopt": "/opt",
        "toproc": "/proc",
    }.items():
        (tree.path / name).symlink_to(text)
    for name in ("etcetera", "various", "process", "device", "opt/udiImages", "opt/ud"):
        (tree.path / name).mkdir()
    yield tree


def test_volume_targets_that_only_begin_like_reserved_ones(node: Node, linked: Tree) -> None:
    node.add_image("tiny:1", linked)
    node.write("/srv/a/file", "a\n")
    for target in (
        "/etcetera",
        "/various",
        "/process",
        "/device",
        "/opt/udiImages",
        "/opt/ud",
        "/var/tmp",
        "/tmp",
        "/home",
    ):
        assert works(node, f"cat {target}/file", f"--volume=/srv/a:{target}") == "a\n"


def test_volume_of_several_is_refused_as_a_whole(site: Node) -> None:
    assert "/home/missing" in refused(site, "--volume=/srv/a:/mnt;/srv/b:/home/missing")
    assert "/srv/missing" in refused(site, "--volume=/srv/a:/mnt", "--volume=/srv/missing:/b")
    assert works(site, "ls /mnt") == ""


def test_volume_in_a_site_directory_and_own_home(site: Node) -> None:
    site.run("mkdir -p /home/alice/from /home/alice/on; echo mine > /home/alice/from/file", "alice", check=True)
    assert works(site, "cat /home/alice/on/file", "--volume=/home/alice/from:/home/alice/on") == "mine\n"


@pytest.fixture
def fuse(site: Node) -> Iterator[Callable[[str], None]]:
    """Mounts a FUSE file system of alice's on /srv/fuse, whose server never answers."""
    fd = os.open("/dev/fuse", os.O_RDWR)
    site.mkdir("/srv/fuse")

    def mount(options: str) -> None:
        data = f"fd={fd},rootmode=40000,user_id=5001,group_id=5001{options}"
        site.mount("fuse", "/srv/fuse", "fuse", 6, data)

    try:
        yield mount
    finally:
        os.close(fd)


def test_volume_on_a_file_system_that_refuses_root(site: Node, fuse: Callable[[str], None]) -> None:
    fuse("")
    message = "volume /srv/fuse: its file system refuses root (Permission denied); mount it with allow_other"
    assert message in refused(site, "--volume=/srv/fuse:/mnt")


def test_volume_on_a_file_system_that_hangs(site: Node, fuse: Callable[[str], None]) -> None:
    fuse(",allow_other")
    site.conf(udiBuildTimeout=1)
    start = time.monotonic()
    assert "opening volume /srv/fuse/sub as the user: it took longer than udiBuildTimeout" in refused(
        site, "--volume=/srv/fuse/sub:/mnt"
    )
    assert time.monotonic() - start < 20
    assert works(site, "id -un") == "alice\n"


# --- files, and mount points that are missing -------------------------------------------------------------------------


def test_files_as_volumes(site: Node) -> None:
    options = ["--volume=/srv/single:/usr/lib/hello.txt", "--volume=/srv/single:/usr/lib/new/one;/srv/single:/two:ro"]
    script = "cat /usr/lib/hello.txt /usr/lib/new/one /two; echo x 2>/dev/null > /two || echo closed"
    site.run(["chown", "alice", "/srv/single"], check=True)
    assert works(site, script, *options) == "single\n" * 3 + "closed\n"
    assert works(site, "echo more >> /usr/lib/hello.txt; cat /usr/lib/new/one", *options) == "single\nmore\n"
    site.write("/srv/other", "other\n", owner="alice")
    site.run("mv /srv/other /srv/single", check=True)  # another file of the same name: another UDI
    assert works(site, "cat /two", *options) == "other\n"


@pytest.mark.parametrize(
    "target",
    [
        "/new",
        "/new/deep/er",
        "/usr/lib/new",
        "/usr/lib/very/deep/inside",
        "/opt/new",
        "/opt/new/er",
        "/mnt/x",
        "/bin/new",
    ],
)
@pytest.mark.parametrize("fmt", ["squashfs"])
def test_targets_that_the_image_lacks(node: Node, image: Tree, target: str, fmt: str) -> None:
    """On the UDI's own root, or in a read-only cover of one directory of the image; everything else stays as it was."""
    node.add_image("tiny:1", image, fmt)
    node.write("/srv/a/file", "a\n")
    before = mounts(node)
    look = "cd /; find bin usr opt mnt srv -xdev | grep -v new | sort | md5sum; stat -c '%a %u %n' /usr/lib /bin /mnt"
    assert works(node, f"cat {target}/file", f"--volume=/srv/a:{target}") == "a\n"
    listed = works(node, look)
    assert works(node, look, f"--volume=/srv/a:{target}").splitlines()[1:] == listed.splitlines()[1:]
    table = mounts(node, f"--volume=/srv/a:{target}")
    assert sum(mount.fstype == "overlay" for mount in table.values()) <= 2  # /etc, and at most this one
    assert all("ro" in flags(mount) for name, mount in table.items() if mount.fstype == "overlay")
    assert set(before) <= set(table)
    for made in ("touch", "mkdir"):
        done = node.shifter("--image=tiny:1", f"--volume=/srv/a:{target}", made, f"{os.path.dirname(target)}/other")
        assert done.returncode != 0


def test_several_missing_targets_in_one_directory(site: Node) -> None:
    options = [f"--volume=/srv/{name}:/usr/lib/{name}/x/{name}" for name in "ab"] + ["--volume=/srv/a:/usr/lib/a/x/c"]
    script = "cat /usr/lib/a/x/a/file /usr/lib/b/x/b/file /usr/lib/a/x/c/file /usr/lib/hello.txt"
    assert works(site, script, *options) == "a\nb\na\nhello from the image\n"


def test_targets_of_every_kind_in_one_directory(node: Node, image: Tree, tmp_path: Path) -> None:
    """What is found out for one of them, of the directory that they share, holds for the others and for no link in it."""
    tree = image.copy(tmp_path / "x")
    (tree.path / "several/there/deep").mkdir(parents=True)
    (tree.path / "several/file").write_text("of the image\n")
    (tree.path / "several/link").symlink_to("there/deep")
    (tree.path / "several/out").symlink_to("../srv/new/out")
    (tree.path / "several/file-link").symlink_to("/several/file")
    (tree.path / "nowhere").symlink_to("srv/later/on")
    node.add_image("tiny:1", tree)
    node.run("mkdir /srv/a; echo a > /srv/a/file; echo single > /srv/single", check=True)
    places = ("/several/link", "/several/out", "/several/new", "/several/newer", "/nowhere/1", "/nowhere/2")
    options = [f"--volume=/srv/a:{place}" for place in places]
    options += [f"--volume=/srv/single:{place}" for place in ("/several/made", "/several/file-link", "/nowhere/3")]
    script = "cat /several/link/file /several/there/deep/file /several/out/file /srv/new/out/file /several/new*/file "
    script += "/nowhere/?/file /srv/later/on/1/file /several/made /several/file /nowhere/3; ls /several /srv/later/on"
    shown = "a\n" * 9 + "single\n" * 3 + "/several:\nfile\nfile-link\nlink\nmade\nnew\nnewer\nout\nthere\n"
    assert works(node, script, *options) == f"{shown}\n/srv/later/on:\n1\n2\n3\n"


def test_volume_where_a_link_leads_a_mount_of_the_site(node: Node, image: Tree, tmp_path: Path) -> None:
    """The volume lies in what the site mounts there: the mount point that is found before that mount would be hidden."""
    tree = image.copy(tmp_path / "x")
    (tree.path / "site").symlink_to("data")
    node.add_image("tiny:1", tree)
    node.run(
        "mkdir -p /srv/site /srv/a /srv/b; echo a > /srv/a/file; echo b > /srv/b/file; chown alice /srv/site",
        check=True,
    )
    node.conf(siteFs=["/srv/site:/site"])
    options = ["--volume=/srv/a:/data/1", "--volume=/srv/b:/data/2"]
    for _ in range(2):  # made, found
        assert works(node, "cat /data/1/file /site/2/file", *options) == "a\nb\n"
        node.shifterctl("gc", "--all", check=True)
    assert node.run("ls /srv/site", check=True).stdout == "1\n2\n"


def test_site_and_user_need_mount_points_in_the_same_directory(site: Node) -> None:
    """One cover for both: a second one would hide what is mounted in the first."""
    site.conf(siteFs=["/home:/home", "/srv/a:/usr/lib/site"])
    script = "cat /usr/lib/site/file /usr/lib/user/file /usr/lib/site/sub/file"
    site.run("mkdir /srv/a/sub", "alice", check=True)
    options = ["--volume=/srv/b:/usr/lib/user", "--volume=/srv/b:/usr/lib/site/sub"]
    assert works(site, script, *options) == "a\nb\nb\n"


@pytest.mark.parametrize("spelling", ["/mnt/", "//mnt", "/mnt//", "/./mnt", "/mnt/.", " /mnt"])
def test_spelling_of_a_target_changes_nothing(site: Node, spelling: str) -> None:
    assert works(site, "cat /mnt/file", f"--volume= /srv/a:{spelling.strip()} ;") == "a\n"
    assert works(site, "cat /new/file", f"--volume=/srv/a:{spelling.strip().replace('mnt', 'new')}") == "a\n"


def test_target_is_made_with_the_users_rights(site: Node) -> None:
    for target in ("/home/alice/new/dir", "/tmp/new/dir", "/home/alice/deep"):
        assert works(site, f"cat {target}/file", f"--volume=/srv/a:{target}") == "a\n"
        assert site.run(["stat", "-c", "%U %a", target], check=True).stdout == "alice 755\n"
    assert works(site, "cat /home/alice/new/file", "--volume=/srv/single:/home/alice/new/file") == "single\n"
    assert site.run("stat -c '%U %a %s' /home/alice/new/file", check=True).stdout == "alice 644 0\n"
    site.run("rm -r /tmp/new", check=True)


def test_target_in_another_volume(site: Node) -> None:
    """A volume inside of another one: its mount point is made in the directory behind that, if the user may."""
    options = ["--volume=/srv/a:/data;/srv/b:/data/b"]
    assert works(site, "cat /data/b/file /data/file", *options) == "b\na\n"
    assert site.run(["stat", "-c", "%U", "/srv/a/b"], check=True).stdout == "alice\n"
    site.mkdir("/srv/closed")
    message = refused(site, "--volume=/srv/closed:/data;/srv/b:/data/b")
    assert "/data/b does not exist in the container, and you can't make it in /data: Permission denied" in message
    message = refused(site, "--volume=/srv/b:/data:ro;/srv/a:/data/new")
    assert "/data/new does not exist in the container, and /data is read-only" in message


def test_target_behind_links_of_the_image(node: Node, image: Tree, tmp_path: Path) -> None:
    tree = image.copy(tmp_path / "x")
    (tree.path / "data").symlink_to("/home")
    (tree.path / "later").symlink_to("usr/lib/not/yet")
    node.add_image("tiny:1", tree)
    node.write("/srv/a/file", "a\n")
    node.mkdir("/home/alice/on", owner="alice")
    assert works(node, "cat /home/alice/on/file", "--volume=/srv/a:/data/alice/on") == "a\n"
    assert works(node, "cat /home/alice/new/file", "--volume=/srv/a:/data/alice/new") == "a\n"
    assert works(node, "cat /usr/lib/not/yet/there/file", "--volume=/srv/a:/later/there") == "a\n"


# --- where a source is looked for -------------------------------------------------------------------------------------


@pytest.fixture
def remapped(site: Node) -> Node:
    """A node whose /gpfs/users is /users in every container; it has a /users of its own, which nobody sees inside."""
    site.write("/gpfs/users/alice/file", "inside\n", owner="alice")
    site.write("/users/alice/file", "host\n", owner="alice")
    site.write("/users/alice/only/file", "host only\n", owner="alice")
    site.run("chown alice /gpfs/users/alice /users/alice", check=True)
    site.conf(siteFs=["/home:/home", "/gpfs/users:/users"])
    return site


def said(node: Node, volume: str) -> str:
    """What -v says about where the volume was found."""
    done = node.shifter("-v", "--image=tiny:1", f"--volume={volume}", "true", check=True)
    (line,) = [line for line in done.stderr.splitlines() if "  bind " in line and "(volume " in line]
    return line.rpartition("  bind ")[2]


def test_source_is_looked_for_inside_first(remapped: Node) -> None:
    assert works(remapped, "cat /mnt/file", "--volume=/users/alice:/mnt") == "inside\n"
    assert said(remapped, "/users/alice/:/x") == (
        f"/gpfs/users/alice on /x rec (volume /users/alice/:/x, found inside, by siteFs at {CONF}:3)"
    )
    assert works(remapped, "cat /mnt/alice/file", "--volume=/users:/mnt") == "inside\n"
    assert works(remapped, "cat /mnt/file", "--volume=/gpfs/users/alice:/mnt") == "inside\n"
    assert works(remapped, "cat /users/alice/file", "--volume=/srv/a:/mnt") == "inside\n"


def test_source_that_is_only_on_the_node(remapped: Node) -> None:
    volume = "--volume=/users/alice/only:/mnt"
    assert works(remapped, "cat /mnt/file", volume) == "host only\n"
    assert said(remapped, "/users/alice/only:/x") == (
        "/users/alice/only on /x rec (volume /users/alice/only:/x, found on the node)"
    )
    remapped.write("/gpfs/users/alice/only/file", "inside now\n", owner="alice")
    assert works(remapped, "cat /mnt/file", volume) == "inside now\n"  # though a UDI with the other one was there


def test_names_that_only_begin_like_a_target_of_the_site(remapped: Node) -> None:
    remapped.write("/users2/file", "another\n")
    assert works(remapped, "cat /mnt/file", "--volume=/users2:/mnt") == "another\n"
    assert "volume /users2/alice: No such file" in refused(remapped, "--volume=/users2/alice:/mnt")


def test_source_inside_must_be_what_it_is_on_the_node(remapped: Node) -> None:
    """A link that leads elsewhere inside, or a mount that is not seen there, is not guessed about."""
    script = "ln -s /users/alice/only out; ln -s ../../../srv/a up; ln -s file link; mkdir sub; ln -s . here"
    remapped.run(script, "alice", cwd="/gpfs/users/alice", check=True)
    for name in ("out", "up"):
        message = refused(remapped, f"--volume=/users/alice/{name}:/mnt")
        assert (
            f"volume /users/alice/{name} (on the node /gpfs/users/alice/{name}): a link, or a mount that siteFs"
            in message
        )
    assert works(remapped, "cat /mnt/file", "--volume=/users/alice/here:/mnt") == "inside\n"
    assert works(remapped, "cat /new", "--volume=/users/alice/link:/new") == "inside\n"
    remapped.run("mount -t tmpfs -o mode=755 x /gpfs/users/alice/sub && touch /gpfs/users/alice/sub/seen", check=True)
    assert f"a mount that siteFs at {CONF}:3 does not show" in refused(remapped, "--volume=/users/alice/sub:/mnt")
    remapped.conf(siteFs=["/home:/home", "/gpfs/users:/users:rec"])
    assert works(remapped, "ls /mnt", "--volume=/users/alice/sub:/mnt") == "seen\n"
    remapped.run(["umount", "/gpfs/users/alice/sub"], check=True)


def test_source_inside_with_the_users_rights(remapped: Node) -> None:
    remapped.write("/gpfs/users/bob/file", "bob's\n", owner="bob")
    remapped.run(
        "chown bob /gpfs/users/bob; chmod 700 /gpfs/users/bob; mkdir -p /users/bob; chmod 755 /users/bob", check=True
    )
    assert works(remapped, "ls /mnt 2>/dev/null || echo closed", "--volume=/users/bob:/mnt") == "closed\n"
    assert "Permission denied" in refused(remapped, "--volume=/users/bob/file:/mnt")


# --- many, and odd names ----------------------------------------------------------------------------------------------

NAMES = (
    "a b",
    "col:on",
    "semi;colon",
    'quo"te',
    "back\\slash",
    "ünïcödé 目录",
    "$HOME `id`",
    "-rf",
    "a\u2028b",
    "x" * 255,
)


@pytest.mark.parametrize("name", NAMES)
def test_names_that_need_care(site: Node, name: str) -> None:
    site.write(f"/srv/a/{name}/file", "odd\n")
    escaped = "".join("\\" + char if char in '\\:;"' else char for char in name)
    assert works(site, "cat /mnt/*/file", f"--volume=/srv/a/{escaped}:/mnt/{escaped}") == "odd\n"
    assert works(site, "cat /mnt/file", f"--volume=/srv/a/{escaped}:/mnt") == "odd\n"


def test_thirty_volumes(site: Node) -> None:
    volumes = [f"--volume=/srv/{'ab'[n % 2]}:/data/{n}" for n in range(30)]
    assert works(site, "cat /data/*/file | sort | uniq -c | tr -s ' '", *volumes) == " 15 a\n 15 b\n"


def test_calls_for_each_volume(site: Node) -> None:
    """What a volume costs does not grow unseen: the system calls of a first launch, by door and builder, for each of 40."""
    site.shifter("--image=tiny:1", "true", check=True)  # the base, and the image
    strace = ["strace", "-qq", "-f", "-u", "alice", "-o", "/tmp/trace", f"{PREFIX}/bin/shifter", "--image=tiny:1"]
    calls = []
    for number in (2, 42):
        site.run([*strace, *(f"--volume=/srv/a:/data/{n}" for n in range(number)), "true"], cwd="/", check=True)
        calls.append(len([line for line in site.read("/tmp/trace").splitlines() if "resumed>" not in line]))
    assert 10 < (calls[1] - calls[0]) / 40 < 16


def test_the_same_volume_twice_is_one(site: Node) -> None:
    options = ["--volume=/srv/a:/new;/srv/a:/new", "--volume=/srv/a:/new"]
    assert works(site, "grep -c ' /new ' /proc/self/mountinfo", *options) == "1\n"
