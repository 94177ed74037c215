"""Sessions in images of every kind: with an ssh of their own wherever and whatever it is, without a shell, with traps.

One node, whose job has ssh to itself.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.job import SETUP, Job
from tests.images import Tree
from tests.node import PREFIX, Cluster, Node, cluster

MULTI = '#!/bin/sh\necho "${0##*/} of the image"\n'
"""A program with several names, as dropbear or busybox is one."""
UDI = "/opt/udiImage"


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """One node with private propagation, for the many images."""
    with cluster(1) as made:
        made.conf(allowLocalChroot=1)
        yield made
        made.check_leaks()


def script(path: Path, text: str = MULTI, mode: int = 0o755) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def link(path: str, target: str) -> Callable[[Path], None]:
    """A symbolic link instead of what is there; what it may lead to, is /usr/lib/multi."""

    def make(root: Path) -> None:
        script(root / "usr/lib/multi")
        there = root / path.lstrip("/")
        there.parent.mkdir(parents=True, exist_ok=True)
        if there.is_dir() and not there.is_symlink():
            shutil.rmtree(there)
        there.unlink(missing_ok=True)
        os.symlink(target, there)

    return make


def merged(root: Path) -> None:
    """/bin is /usr/bin."""
    script(root / "usr/bin/ssh")
    (root / "bin/busybox").replace(root / "usr/bin/busybox")
    shutil.rmtree(root / "bin")
    os.symlink("usr/bin", root / "bin")


def hard_link(root: Path) -> None:
    os.link(root / "bin/busybox", root / "usr/bin/ssh")


def everywhere(root: Path) -> None:
    for place in ("usr/local/bin/ssh", "bin/ssh", "usr/bin/scp", "usr/bin/sftp"):
        script(root / place)
    script(root / "usr/bin/ssh", "#!/bin/sh\necho not the first on a PATH\n")


OWN = "ssh of the image\n"
# What the image has as /usr/bin/ssh, and what that says when it is asked for another host; None: our own ssh is asked.
PROGRAMS: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "a program": (lambda root: script(root / "usr/bin/ssh"), OWN),
    "in many places": (everywhere, OWN),
    "/bin is /usr/bin": (merged, OWN),
    "a hard link to busybox": (hard_link, "ssh: applet not found\n"),
    "absolute link": (link("/usr/bin/ssh", "/usr/lib/multi"), OWN),
    "relative link": (link("/usr/bin/ssh", "../lib/multi"), OWN),
    "link that leads out and back": (link("/usr/bin/ssh", "../../../../../usr/lib/multi"), OWN),
    "link to a file of the node": (link("/usr/bin/ssh", "../../../../../../etc/machine-id"), None),
    "link to a program of the node": (link("/usr/bin/ssh", "/opt/shifter/bin/shifter"), None),
    "link to what anybody may write": (link("/usr/bin/ssh", "/tmp/ssh"), None),
    "link to our own": (link("/usr/bin/ssh", f"{UDI}/bin/ssh"), None),
    "link to a home": (link("/usr/bin/ssh", "/home/alice/ssh"), None),
    "magic link": (link("/usr/bin/ssh", "/proc/self/exe"), None),
    "dangling link": (link("/usr/bin/ssh", "/nowhere"), None),
    "loop": (link("/usr/bin/ssh", "ssh"), None),
    "FIFO": (lambda root: os.mkfifo(root / "usr/bin/ssh"), None),
    "device": (lambda root: os.mknod(root / "usr/bin/ssh", 0o20666, os.makedev(1, 5)), None),
    "not executable": (lambda root: script(root / "usr/bin/ssh", mode=0o644), None),
    "root's alone": (lambda root: script(root / "usr/bin/ssh", mode=0o700), None),
    "setuid root": (lambda root: script(root / "usr/bin/ssh", mode=0o4755), OWN),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_ssh_of_an_image_is_covered_whatever_it_is(nodes: Cluster, image: Tree, tmp_path: Path, kind: str) -> None:
    make, says = PROGRAMS[kind]
    tree = image.copy(tmp_path / "tree")
    make(tree.path)
    nodes.add_image("docker:odd:1", tree, "VFS")
    for path in ("/tmp/ssh", "/home/alice/ssh"):
        nodes[0].write(path, "#!/bin/sh\necho of the node\n", 0o755, "alice")
    with Job(nodes, "odd:1") as job:
        for name in ("ssh", "/usr/bin/ssh", "/bin/ssh") if kind == "in many places" else ("ssh", "/usr/bin/ssh"):
            assert job.run(name, "node1", "echo $0 in; hostname").stdout.split() == ["sh", "in", "node1"]
        assert job.sh("cd /tmp; scp -q node1:/etc/hostname x; sftp -q -b /dev/null node1; rm x") == ""
        # Nothing else of the image has changed: what a link leads to, other names of a program.
        assert job.sh(
            "sh /usr/lib/multi; hostname" if "link" in kind and kind != "a hard link to busybox" else "hostname"
        ).endswith("node1\n")
        done = job.run("ssh", "no.such.host.invalid", check=False)
        assert (done.stdout + done.stderr).startswith(says or "Pseudo-terminal"), done
        assert not any(
            "/tmp/ssh" in line or "/home" in line for line in job.sh(f"grep {UDI} /proc/self/mountinfo").splitlines()
        )


def directory(root: Path) -> None:
    script(root / "usr/bin/ssh/ssh")


def own_udi_image(root: Path) -> None:
    for name in ("bin/ssh", "sbin/sshd", "libexec/ssh.real", "etc/sshd_config"):
        script(root / "opt/udiImage" / name)


def opt_is_a_file(root: Path) -> None:
    shutil.rmtree(root / "opt")
    (root / "opt").write_text("")


def conda(root: Path) -> None:
    """An ssh that comes with its libraries, first on the PATH."""
    for name in ("ssh", "scp", "sftp"):
        script(root / "opt/conda/bin" / name)


def profile(root: Path) -> None:
    script(root / "etc/profile", "PATH=/usr/bin:/bin\nfor f in /etc/profile.d/*.sh; do . $f; done\n")


def profile_directory(root: Path) -> None:
    profile(root)
    script(root / "etc/profile.d/a.sh", "PATH=$PATH:/a\n")


def profile_link(root: Path) -> None:
    profile(root)
    script(root / "usr/share/profiles/a.sh", "PATH=$PATH:/a\n")
    os.symlink("/usr/share/profiles", root / "etc/profile.d")


def profile_elsewhere(target: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        profile(root)
        os.symlink(target, root / "etc/profile.d")

    return make


def profile_file(root: Path) -> None:
    profile(root)
    (root / "etc/profile.d").write_text("")


PATH = "/image/bin:/bin:/usr/bin"
WHOLE = f"{PATH}:{UDI}/bin"
# What is odd about the image, and the PATH of a login shell in it.
IMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "/usr/bin/ssh is a directory": (directory, WHOLE),
    "/opt/udiImage is a link": (link(UDI, "/etc"), WHOLE),
    "/opt/udiImage is a link to the node": (link(UDI, "/tmp"), WHOLE),
    "/opt/udiImage is a file": (lambda root: script(root / "opt/udiImage"), WHOLE),
    "/opt/udiImage is the image's": (own_udi_image, WHOLE),
    "/usr/local/bin is a link to the node": (link("/usr/local/bin", "/tmp"), WHOLE),
    "/opt is a link": (link("/opt", "usr/lib"), WHOLE),
    "/opt is a file": (opt_is_a_file, WHOLE),
    "/var/empty is a link": (link("/var/empty", "/tmp"), WHOLE),
    "/var/hostsfile is a link": (link("/var/hostsfile", "/etc/passwd"), WHOLE),
    "another tty group": (lambda root: script(root / "etc/group", "root:x:0:\ntty:x:7:\nalice:x:5:\n"), WHOLE),
    "an ssh of conda": (conda, WHOLE),
    "/etc/profile": (profile, WHOLE),
    "/etc/profile.d": (profile_directory, f"{WHOLE}:/a"),
    "/etc/profile.d is a link": (profile_link, f"{WHOLE}:/a"),
    "/etc/profile.d is a link to the node": (profile_elsewhere("/tmp"), WHOLE),
    "/etc/profile.d is a dangling link": (profile_elsewhere("/nowhere"), WHOLE),
    "/etc/profile.d is a loop": (profile_elsewhere("profile.d"), WHOLE),
    "/etc/profile.d is a file": (profile_file, WHOLE),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_sessions_in_an_odd_image(nodes: Cluster, image: Tree, tmp_path: Path, kind: str) -> None:
    make, path = IMAGES[kind]
    tree = image.copy(tmp_path / "tree")
    make(tree.path)
    nodes.add_image(
        "docker:odd:1", tree, "VFS", env={"PATH": f"/opt/conda/bin:{PATH}" if kind == "an ssh of conda" else PATH}
    )
    for name in ("a.sh", "ssh"):
        nodes[0].write(f"/tmp/{name}", "echo of the node\n", 0o755, "alice")
    with Job(nodes, "odd:1") as job:
        script = "echo $PATH; tty; stat -c %U:%G:%a $(tty); cat /var/hostsfile; env | grep SHIFTER_LOGIN || exit 0\n"
        done = job.run("ssh", "-tt", "node1", input=f"stty -echo; PS1=; echo BEG''IN\n{script}")
        first, tty, *rest = done.stdout.replace("\r", "").rpartition("BEGIN\n")[2].splitlines()
        assert first.removeprefix("/opt/conda/bin:") == path and tty.startswith("/dev/pts/")
        assert rest == ["alice:tty:620", "node1"]
        assert job.sh("scp -q node1:/etc/hostname /tmp/x; rm /tmp/x; sh /tmp/ssh") == "of the node\n"


def test_directory_of_the_node_as_image(nodes: Cluster, image: Tree, tmp_path: Path) -> None:
    """What is mounted within it comes along, also into /etc/profile.d."""
    node = nodes[0]
    tree = image.copy(tmp_path / "tree")
    profile_directory(tree.path)
    script(tree.path / "usr/bin/ssh")
    tree.copy(node.path("/home/alice/tree"))
    node.run("chown -R alice /home/alice/tree", check=True)
    node.mkdir("/srv/more")
    node.write("/srv/more/b.sh", "PATH=$PATH:/b\n")
    node.mount("/srv/more", "/home/alice/tree/etc/profile.d", "", 4096)
    with Job(nodes, "/home/alice/tree", kind="local") as job:
        assert job.run("ssh", "node1", input="echo $PATH\n").stdout.endswith(f":{UDI}/bin:/b\n")
        assert job.sh("/usr/bin/ssh node1 hostname; ssh elsewhere") == "node1\nssh of the image\n"
    node.run("umount /home/alice/tree/etc/profile.d; rm -r /home/alice/tree", check=True)


def test_image_that_lets_nobody_in(nodes: Cluster, image: Tree, tmp_path: Path) -> None:
    """What sshd takes from the image, and what it says then."""
    tree = image.copy(tmp_path / "tree")
    script(tree.path / "etc/nologin", "closed\n")
    nodes.add_image("docker:closed:1", tree, "VFS")
    with Job(nodes, "closed:1") as job:
        done = job.run("ssh", "node1", "true", check=False)
        assert done.returncode == 254 and "not allowed because /etc/nologin exists" in done.stderr


def test_image_without_a_shell(nodes: Cluster, tmp_path: Path) -> None:
    """One static program: commands, scp and sftp work, and what would need a shell is told."""
    root = tmp_path / "tree"
    script(root / "usr/bin/cat")
    shutil.copy2("/bin/busybox", root / "usr/bin/cat")
    for name in ("hostname", "env", "printf"):
        os.link(root / "usr/bin/cat", root / "usr/bin" / name)
    nodes.add_image("docker:bare:1", Tree(root), "VFS", env={"PATH": "/usr/bin", "A": "1"})
    with Job(nodes, "bare:1") as job:
        assert job.run("cat", "/etc/passwd").stdout.splitlines()[1].endswith(f":/home/alice:{UDI}/libexec/shell")
        assert job.ssh("node1", "hostname") == "node1\n"
        assert job.ssh("node1", "  printf  %s=%s~\\t  a=b  c ", check=False) == ""
        assert job.ssh("node1", "printf %s,%s a=b ~c") == "a=b,~c"
        assert "A=1\n" in job.ssh("node1", "env")
        for protocol in ("-q", "-Oq"):
            job.run("scp", protocol, "node1:/etc/group", "/tmp/x")
            assert job.run("cat", "/tmp/x").stdout == job.run("cat", "/etc/group").stdout
        job.run("sftp", "-q", "-b", "-", "node1", input="rm /tmp/x\n")
        no_shell = "shifter: this image has no shell (/bin/sh), so"
        for command, status, said in (
            ("hostname; id", 127, f"{no_shell} ; in a command means nothing; name a program"),
            ("cat 'a b'", 127, f"{no_shell} ' in a command means nothing"),
            ("cat\ncat", 127, f"{no_shell} a new line in a command means nothing"),
            ("A=1 cat", 127, f"{no_shell} variables and ~ mean nothing"),
            ("nothing", 127, "shifter: nothing: not found in the container"),
            ("/etc", 126, "shifter: /etc: Permission denied"),
        ):
            done = job.run("ssh", "node1", command, check=False)
            assert done.returncode == status and done.stderr.startswith(said), (command, done)
        done = job.run("ssh", "-tt", "node1", check=False)
        assert done.returncode == 127 and f"{no_shell} none can be started; name a program" in done.stdout
        done = job.run(check=False)
        assert done.returncode == 127 and no_shell in done.stderr


def test_volumes_and_site_directories_over_what_is_covered(node: Node, image: Tree, tmp_path: Path) -> None:
    """They are wanted as they are. A mount point that is made beside a covered program uncovers nothing."""
    tree = image.copy(tmp_path / "tree")
    for place in ("usr/bin", "bin", "usr/local/bin"):
        script(tree.path / place / "ssh")
    node.add_image("docker:odd:1", tree)
    node.write("/srv/bin/ssh", "#!/bin/sh\necho of the site\n", 0o755)
    node.write("/home/alice/mine", "#!/bin/sh\necho of the user\n", 0o755, "alice")
    node.conf(siteFs=["/home:/home", "/srv/bin:/usr/local/bin", "/srv/bin:/usr/bin/made"])
    with Job([node], "odd:1", "-v", "/home/alice/mine:/bin/ssh", "-v", "/home/alice/mine:/usr/bin/new") as job:
        assert (
            job.sh("/bin/ssh node1; /usr/local/bin/ssh node1; /usr/bin/new")
            == "of the user\nof the site\nof the user\n"
        )
        assert job.sh("/usr/bin/ssh node1 hostname; /usr/bin/ssh elsewhere") == f"node1\n{OWN}"


def test_udi_image_of_an_older_version(node: Node, image: Tree) -> None:
    """A copy that the site has not renewed: said in one line, and no job with half of what it needs."""
    node.add_image("docker:tiny:1", image)
    node.run(f"cp -r {PREFIX}/libexec/shifter/opt/udiImage /srv/old; rm -r /srv/old/image", check=True)
    node.conf(udiImagePath="/srv/old")
    done = node.run([SETUP, "-u", "alice", "-N", "node1/1", "--job", "17", "docker", "tiny:1"])
    assert done.returncode == 1 and done.stderr.startswith("setupRoot: the udiImage lacks bin/ssh or image/ssh: ")


def test_only_the_udi_of_a_job_with_an_sshd_is_changed(node: Node, image: Tree, tmp_path: Path) -> None:
    tree = image.copy(tmp_path / "tree")
    script(tree.path / "usr/bin/ssh")
    profile(tree.path)
    node.add_image("docker:odd:1", tree)
    with Job([node], "odd:1", "--no-sshd") as job:
        assert (
            job.sh("/usr/bin/ssh; ls /etc/profile.d 2>/dev/null || :; ls -l /opt/udiImage/image | grep -c ' 0 '")
            == f"{OWN}3\n"
        )
    done = node.shifter("--image=odd:1", "/usr/bin/ssh")
    assert done.stdout == OWN
