"""What a UDI is made of besides the image: siteFs, volumes, /dev, /proc, /sys, generated files."""

import pytest

from tests.images import Tree
from tests.node import Node
from tests.system.mounting import flags, mounts, refused, works

CONF = "/etc/shifter/udiRoot.conf"


# --- siteFs ----------------------------------------------------------------------------------------------------------


def test_site_flags(site: Node) -> None:
    site.run("mkdir /srv/a/sub; mount -t tmpfs -o noexec tmpfs /srv/a/sub; touch /srv/a/sub/below", check=True)
    site._expected.add("/srv/a/sub")
    entries = ["/srv/a:/plain", "/srv/a:/ro:ro", "/srv/a:/rec:rec", "/srv/a:/rr:REC:ro:private", "/srv/b:/s:slave"]
    site.conf(siteFs=["/home:/home", *entries])
    table = mounts(site)
    for target in ("/plain", "/ro", "/rec", "/rr", "/s"):
        assert {"nosuid", "nodev"} <= flags(table[target])
        assert ("ro" in flags(table[target])) == (target in ("/ro", "/rr"))
    assert "/plain/sub" not in table
    assert "/ro/sub" not in table
    assert {"noexec", "nosuid", "nodev", "rw"} <= flags(table["/rec/sub"])
    assert {"noexec", "ro"} <= flags(table["/rr/sub"])
    shared = site.shared
    assert ("master:" in table["/plain"].propagation) == shared
    assert ("master:" in table["/s"].propagation) == shared
    assert "master:" not in table["/rr"].propagation
    assert not any("shared:" in mount.propagation for mount in table.values())
    assert works(site, "touch /plain/x && rm /srv/a/x 2>/dev/null || ls /plain/x /rec/sub").split()[-1] == "below"


def test_site_file(site: Node) -> None:
    site.conf(siteFs=["/srv/single:/single:ro;/srv/single:/usr/lib/new/single", "/srv/single:/usr/lib/hello.txt"])
    script = "cat /single /usr/lib/new/single /usr/lib/hello.txt"
    assert works(site, script) == "single\n" * 3
    site.conf(siteFs="/srv/single:/usr/lib")
    assert (
        f"/usr/lib is a directory in the container; the file /srv/single can't be mounted on it (siteFs at {CONF}:2)"
        in refused(site)
    )
    site.conf(siteFs="/srv/a:/usr/lib/hello.txt")
    assert "/usr/lib/hello.txt is a file in the container" in refused(site)
    site.conf(siteFs="/srv/a:/usr/lib/hello.txt/below")
    assert "/usr/lib/hello.txt" in refused(site)


def test_site_targets_that_are_missing(site: Node) -> None:
    targets = [
        "/top", "/global/a/b", "/global/a/c", "/opt/tool", "/var/new/deep", "/run/new", "/mnt/x",
        "/usr/local/site/x", "/usr/lib/site/x", "/usr/lib/site/y", "/usr/site", "/srv/data/deep/er",
    ]  # fmt: skip
    site.conf(siteFs=[f"/srv/a:{target}" for target in targets])
    assert works(site, "cat " + " ".join(f"{target}/file" for target in targets)) == "a\n" * len(targets)
    # What was there is still there, and nothing of it can be written.
    assert works(site, "cat /usr/lib/hello.txt /srv/data/file; ls /usr/bin | grep -c .").startswith(
        "hello from the image\ndata\n"
    )
    script = "for d in /usr /usr/lib /usr/lib/site /srv/data /global /global/a /opt /; do touch $d/new && echo $d; done"
    assert works(site, f"({script}) 2>/dev/null; true") == ""
    table = mounts(site)
    overlays = {mount.target for mount in table.values() if mount.fstype == "overlay" and mount.source == "udi"}
    assert overlays == {"/etc", "/usr", "/usr/lib", "/mnt", "/srv/data"}
    assert all("ro" in flags(table[target]) for target in overlays)


def test_no_overlay_where_nothing_is_missing(site: Node) -> None:
    site.conf(siteFs=["/home:/home", "/srv/a:/usr/lib", "/srv/a:/new"])
    overlays = [m.target for m in mounts(site).values() if m.fstype == "overlay" and m.source == "udi"]
    assert overlays == ["/etc"]


def test_site_below_another(site: Node) -> None:
    site.mkdir("/srv/a/there")
    for order in (["/srv/a:/data", "/srv/b:/data/there"], ["/srv/b:/data/there", "/srv/a:/data"]):
        site.conf(siteFs=order)
        assert works(site, "cat /data/file /data/there/file") == "a\nb\n"
    site.conf(siteFs=["/srv/a:/data", "/srv/b:/data/missing"])
    assert f"/data/missing does not exist in the container (siteFs at {CONF}:3)" in refused(site)
    assert not site.exists("/srv/a/missing")
    site.conf(siteFs=["/home:/home", "/srv/b:/tmp/missing"])
    assert f"/tmp/missing does not exist on the node, and is not made inside /tmp (siteFs at {CONF}:3)" in refused(site)
    assert not site.exists("/tmp/missing")


def test_site_target_through_symlinks(node: Node, image: Tree, tmp_path_factory: pytest.TempPathFactory) -> None:
    tree = image.copy(tmp_path_factory.mktemp("links") / "x")
    links = {
        "data": "/usr/lib/../lib",
        "up": "../../../../srv",
        "gone": "/var/gone",
        "deep": "usr/lib/no",
        "etcl": "/etc",
    }
    for name, text in links.items():
        (tree.path / name).symlink_to(text)
    node.add_image("tiny:1", tree, "VFS")
    node.write("/srv/a/file", "a\n")
    node.conf(siteFs=[f"/srv/a:{t}" for t in ("/data/new", "/up/new", "/gone", "/gone2", "/deep/er")])
    script = (
        "cat /data/new/file /usr/lib/new/file /up/new/file /srv/new/file /gone/file /var/gone/file /usr/lib/no/er/file"
    )
    assert works(node, script) == "a\n" * 7
    assert sorted(node.run("ls /srv /var /usr/lib").stdout.split()) == sorted(
        node.run("ls /srv /var /usr/lib").stdout.split()
    )
    assert not node.exists("/srv/new")
    assert not node.exists("/var/gone")
    for target in ("/etcl", "/etcl/new"):
        node.conf(siteFs=[f"/srv/a:{target}"])
        message = f"{target} is a symbolic link of the image to {target.replace('l', '')}, which can't be a target"
        assert message in refused(node)


def test_site_source_missing(site: Node) -> None:
    site.conf(siteFs=["/home:/home", "/srv/missing:/x"])
    assert f"siteFs source /srv/missing: No such file or directory ({CONF}:3)" in refused(site)
    site.run("ln -s loop /srv/loop", check=True)
    site.conf(siteFs=["/srv/loop:/x"])
    assert f"({CONF}:2)" in refused(site)


def test_late_mounts_of_the_node(site: Node) -> None:
    """What an automounter does: with slave, the default, a UDI that exists already sees it, and sees it go."""
    site.run("mkdir /srv/a/auto /srv/b/auto /tmp/auto; chmod 777 /tmp/auto", check=True)
    site.conf(siteFs=["/home:/home", "/srv/a:/a", "/srv/b:/b:private"])
    look = "readlink /proc/self/ns/mnt; ls /a/auto /b/auto /tmp/auto | grep -v :"
    before = works(site, look).split()
    for path in ("/srv/a/auto", "/srv/b/auto", "/tmp/auto"):
        site.run(f"mount -t tmpfs -o mode=755 tmpfs {path} && touch {path}/late", check=True)
    assert works(site, look).split() == before + (["late", "late"] if site.shared else [])
    for path in ("/srv/a/auto", "/srv/b/auto", "/tmp/auto"):
        site.run(["umount", path], check=True)
    assert works(site, look).split() == before
    site.conf(siteFs=["/srv/a:/a", "/srv/b:/b:slave"], mountPropagationStyle="private")
    before = works(site, look).split()
    for path in ("/srv/a/auto", "/srv/b/auto"):
        site.run(f"mount -t tmpfs -o mode=755 tmpfs {path} && touch {path}/late", check=True)
    assert works(site, look).split() == before + (["late"] if site.shared else [])
    site.run("umount /srv/a/auto /srv/b/auto", check=True)


def test_nothing_mounted_inside_reaches_the_node(site: Node) -> None:
    base = {mount.key for mount in site.mounts()}
    works(site, "unshare -Urm sh -c 'mount -t tmpfs x /tmp; mount -t tmpfs x /home' 2>/dev/null; true")
    left = {mount.key for mount in site.mounts()} - base
    assert {key[0] for key in left} <= {"/run/shifter", "/run/shifter/store"} | {
        key[0] for key in left if key[0].startswith("/run/shifter/udi/")
    }


# --- what every UDI has ----------------------------------------------------------------------------------------------

GOOD, BAD = "gid=5,mode=620,ptmxmode=666", "mode=600,ptmxmode=666"


@pytest.mark.parametrize(
    ("devpts", "mode", "private"),
    [(GOOD, "auto", False), (BAD, "auto", True), (GOOD, "private", True), (BAD, "private", True), (BAD, "host", False)],
)
@pytest.mark.parametrize("shared", [False, True])
def test_devpts(image: Tree, devpts: str, mode: str, private: bool, shared: bool) -> None:
    with Node(shared=shared, devpts=devpts) as node:
        node.add_image("tiny:1", image)
        node.conf(devpts=mode)
        host = next(mount for mount in node.mounts() if mount.target == "/dev/pts")
        table = mounts(node)
        inside = table["/dev/pts"]
        assert (inside.dev != host.dev) == private
        assert {"nosuid", "noexec"} <= flags(inside)
        if private or devpts == GOOD:
            assert {"gid=5", "mode=620"} <= set(inside.super_options.split(","))
        script = (
            "import os; m, s = os.openpty(); t = os.fstat(s); print(t.st_gid, oct(t.st_mode & 0o777), os.ttyname(s))"
        )
        node.conf(devpts=mode, siteFs=["/home:/home", "/usr:/usr", "/lib64:/lib64", "/lib:/lib"])
        gid, perm, name = works(node, f"/usr/bin/python3 -I -S -c '{script}'").split()
        assert name.startswith("/dev/pts/")
        if private or devpts == GOOD:
            assert (gid, perm) == ("5", "0o620")
        assert works(node, "stat -c %a /dev/ptmx") == "666\n"
        node.check_leaks()


def test_kernel_file_systems(tiny_node: Node) -> None:
    table = mounts(tiny_node)
    assert {"ro", "nosuid", "nodev", "noexec"} <= flags(table["/sys"])
    assert {"nosuid", "nodev", "noexec", "rw"} <= flags(table["/proc"])
    assert "nosuid" in flags(table["/dev"])
    assert {"ro", "nosuid", "nodev"} <= flags(table["/"])
    cgroups = [mount for mount in table.values() if mount.target.startswith("/sys/fs/cgroup")]
    assert cgroups
    assert all({"ro", "nosuid", "nodev", "noexec"} <= flags(mount) for mount in cgroups)
    dev = {target for target in table if target == "/dev" or target.startswith("/dev/")}
    assert all("nodev" in flags(mount) or mount.target in dev for mount in table.values())
    assert all("nosuid" in flags(mount) for mount in table.values())


@pytest.mark.parametrize("options", ["hidepid=2", "hidepid=invisible,gid=6003", "subset=pid", ""])
def test_proc_options_are_kept(image: Tree, options: str) -> None:
    with Node(proc=options) as node:
        node.add_image("tiny:1", image)
        host = next(mount for mount in node.mounts() if mount.target == "/proc")
        inside = mounts(node)["/proc"]
        assert set(inside.super_options.split(",")) == set(host.super_options.split(","))
        if "hidepid" in options:
            assert works(node, "test -e /proc/1 || echo hidden") == "hidden\n"
        node.check_leaks()


# --- /etc ------------------------------------------------------------------------------------------------------------


def test_generated_files(tiny_node: Node) -> None:
    tiny_node.run("rm -f /etc/localtime", check=True)
    tiny_node.write("/etc/localtime", b"TZif-test")
    tiny_node.write("/etc/machine-id", "0123456789abcdef0123456789abcdef\n")
    script = "cd /etc; cat localtime machine-id hosts resolv.conf; grep ^hosts nsswitch.conf; cat shadow gshadow; readlink mtab"
    expected = tiny_node.read("/etc/localtime") + tiny_node.read("/etc/machine-id") + tiny_node.read("/etc/hosts")
    assert (
        works(tiny_node, script) == expected + tiny_node.read("/etc/resolv.conf") + "hosts: files dns\n/proc/mounts\n"
    )
    passwd = works(tiny_node, "cat /etc/passwd").splitlines()
    assert passwd[0] == "root:x:0:0:root:/root:/sbin/nologin"
    assert "alice:x:5001:5001:Alice:/home/alice:/bin/sh" in passwd
    group = works(tiny_node, "cat /etc/group").splitlines()
    assert {"tty:x:5:", "alice:x:5001:alice", "proj:x:6001:alice", "lab:x:6002:alice", "root:x:0:"} <= set(group)


def test_missing_and_linked_files_of_the_node(tiny_node: Node) -> None:
    tiny_node.write("/run/resolve/stub", "nameserver 192.0.2.1\n")
    tiny_node.run("cd /etc; rm -f machine-id localtime hosts; ln -sf ../run/resolve/stub resolv.conf", check=True)
    assert (
        works(tiny_node, "cat /etc/resolv.conf; ls /etc/hosts /etc/machine-id /etc/localtime 2>/dev/null; true")
        == "nameserver 192.0.2.1\n"
    )
    for script in ("rm /run/resolve/stub", "ln -sfn resolv.conf /etc/resolv.conf", "rm /etc/resolv.conf"):
        tiny_node.run(script, check=True)
        assert works(tiny_node, "test ! -e /etc/resolv.conf && id -un") == "alice\n"
    tiny_node.run("mkdir /etc/resolv.conf", check=True)
    assert "/etc/resolv.conf is not a regular file" in refused(tiny_node)


def test_imported_users(tiny_node: Node) -> None:
    tiny_node.conf(usersToImport="bob daemon")
    names = [line.split(":")[0] for line in works(tiny_node, "cat /etc/passwd").splitlines()]
    assert {"root", "alice", "bob", "daemon", "nobody"} == set(names)
    assert "carol" not in names
    tiny_node.conf(usersToImport="nosuchuser")
    assert "usersToImport names the account 'nosuchuser'" in refused(tiny_node)


def test_login_shell_that_the_image_lacks(tiny_node: Node) -> None:
    passwd = tiny_node.read("/etc/passwd")
    for shell, expected in (
        ("/bin/zsh", "/bin/sh"),
        ("/bin/ash", "/bin/ash"),
        ("/etc/issue", "/bin/sh"),
        ("/bin", "/bin/sh"),
        ("", "/bin/sh"),
        ("zsh", "/bin/sh"),
    ):
        tiny_node.write("/etc/passwd", passwd.replace(":/home/alice:/bin/sh", f":/home/alice:{shell}"))
        assert works(tiny_node, "grep ^alice /etc/passwd").strip().endswith(f":{expected}"), shell


def test_no_var_tmp_on_the_node(tiny_node: Node) -> None:
    tiny_node.run("umount /var/tmp; rmdir /var/tmp", check=True)
    assert works(tiny_node, "id -un") == "alice\n"
    tiny_node.run("mkdir -m 1777 /var/tmp; mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs /var/tmp", check=True)
