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
    """A symbolic link instead of what is there."""

    def make(root: Path) -> None:
        there = root / path.lstrip("/")
        there.parent.mkdir(parents=True, exist_ok=True)
        if there.is_dir() and not there.is_symlink():
            shutil.rmtree(there)
        there.unlink(missing_ok=True)
        os.symlink(target, there)

    return make


Program = Callable[[Path, str], None]
"""Puts something into the image's root as /usr/bin/NAME."""


def to(target: str) -> Program:
    return lambda root, name: link(f"/usr/bin/{name}", target.replace("NAME", name))(root)


def mode(mode: int) -> Program:
    return lambda root, name: script(root / "usr/bin" / name, mode=mode)


def everywhere(root: Path, name: str) -> None:
    for place in ("usr/local/bin", "bin"):
        script(root / place / name)
    script(root / "usr/bin" / name, "#!/bin/sh\necho not the first on a PATH\n")


def hard_link(root: Path, name: str) -> None:
    os.link(root / "bin/busybox", root / "usr/bin" / name)


def fifo(root: Path, name: str) -> None:
    os.mkfifo(root / "usr/bin" / name)


def device(root: Path, name: str) -> None:
    os.mknod(root / "usr/bin" / name, 0o20666, os.makedev(1, 5))


OWN = "NAME of the image\n"
OURS = ("Pseudo-terminal", "ssh: Could not resolve", "scp: Connection closed", "Connection closed")
# What the image has in /usr/bin, and what that says when it is asked for another host; None: our own does that.
PROGRAMS: list[tuple[str, Program, str | None]] = [
    ("program", mode(0o755), OWN),
    ("absolute link", to("/usr/lib/multi"), OWN),
    ("in many places", everywhere, OWN),
    ("link out and back", to("../../../../../usr/lib/multi"), OWN),
    ("setuid root", mode(0o4755), OWN),
    ("hard link to busybox", hard_link, "NAME: applet not found\n"),
    ("link to a file of the node", to("../../../../../../etc/machine-id"), None),
    ("link to what anybody may write", to("/tmp/ssh"), None),
    ("FIFO", fifo, None),
    ("link to a program of the node", to("/opt/shifter/bin/shifter"), None),
    ("link to our own", to(f"{UDI}/bin/NAME"), None),
    ("device", device, None),
    ("magic link", to("/proc/self/exe"), None),
    ("not executable", mode(0o644), None),
    ("dangling link", to("/nowhere"), None),
    ("loop", to("NAME"), None),
    ("link to a home", to("/home/alice/ssh"), None),
    ("root's alone", mode(0o700), None),
]
TRIPLES = [PROGRAMS[first : first + 3] for first in range(0, len(PROGRAMS), 3)]


@pytest.mark.parametrize("triple", TRIPLES, ids=lambda triple: ", ".join(kind for kind, _, _ in triple))
def test_ssh_of_an_image_is_covered_whatever_it_is(
    nodes: Cluster, image: Tree, tmp_path: Path, triple: list[tuple[str, Program, str | None]]
) -> None:
    """Of each image ssh, scp and sftp are three kinds of things."""
    tree = image.copy(tmp_path / "tree")
    script(tree.path / "usr/lib/multi")
    for name, (_, make, _) in zip(("ssh", "scp", "sftp"), triple, strict=True):
        make(tree.path, name)
    nodes.add_image("docker:odd:1", tree, "VFS")
    for path in ("/tmp/ssh", "/home/alice/ssh"):
        nodes[0].write(path, MULTI, 0o755, "alice")
    with Job(nodes, "odd:1") as job:
        for ssh in ("ssh", "/usr/bin/ssh"):
            assert job.run(ssh, "node1", "echo $0 in; hostname").stdout.split() == ["sh", "in", "node1"]
        for scp, sftp in (("scp", "sftp"), ("/usr/bin/scp", "/usr/bin/sftp")):
            assert job.sh(f"{scp} -q node1:/etc/hostname /tmp/x; rm /tmp/x; {sftp} -q -b /dev/null node1") == ""
        # Nothing else has changed: what a link leads to, other names of a program.
        assert job.sh("sh /usr/lib/multi; hostname; sh /tmp/ssh; sh /home/alice/ssh") == (
            "multi of the image\nnode1\nssh of the image\nssh of the image\n"
        )
        for name, (kind, _, says) in zip(("ssh", "scp", "sftp"), triple, strict=True):
            where = ("no.such.host.invalid:x", "/tmp/x") if name == "scp" else ("no.such.host.invalid",)
            done = job.run(name, *where, check=False)
            expected = says.replace("NAME", name) if says else OURS
            assert (done.stdout + done.stderr).startswith(expected), (kind, done)


def test_bin_is_usr_bin(nodes: Cluster, image: Tree, tmp_path: Path) -> None:
    """One program that has two paths, as in every distribution of today."""
    tree = image.copy(tmp_path / "tree")
    script(tree.path / "usr/bin/ssh")
    (tree.path / "bin/busybox").replace(tree.path / "usr/bin/busybox")
    link("/bin", "usr/bin")(tree.path)
    nodes.add_image("docker:odd:1", tree, "VFS")
    with Job(nodes, "odd:1") as job:
        for name in ("ssh", "/usr/bin/ssh", "/bin/ssh"):
            assert job.ssh("node1", "hostname") == "node1\n", name
        assert job.sh("/bin/ssh elsewhere; grep -c ' /usr/bin/ssh ' /proc/self/mountinfo") == "ssh of the image\n1\n"


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


def tty_group(root: Path) -> None:
    script(root / "etc/group", "root:x:0:\ntty:x:7:\nalice:x:5:\n")


PATH = "/opt/conda/bin:/bin:/usr/bin"
WHOLE = f"{PATH}:{UDI}/bin"
# What is odd about the image, and the PATH of a login shell in it.
IMAGES: dict[str, tuple[list[Callable[[Path], None]], str]] = {
    "udiImage is a link; no profile.d": ([link(UDI, "/etc"), profile], WHOLE),
    "udiImage is a link to the node; a profile.d": ([link(UDI, "/tmp"), profile_directory], f"{WHOLE}:/a"),
    "udiImage is a file; profile.d a link": (
        [lambda root: script(root / "opt/udiImage"), profile_link],
        f"{WHOLE}:/a",
    ),
    "udiImage is the image's; profile.d a link to the node": ([own_udi_image, profile_elsewhere("/tmp")], WHOLE),
    "opt is a link; profile.d a dangling one": ([link("/opt", "usr/lib"), profile_elsewhere("/nowhere")], WHOLE),
    "opt is a file; profile.d a loop": ([opt_is_a_file, profile_elsewhere("profile.d")], WHOLE),
    "an ssh of conda; profile.d is a file": ([conda, profile_file], WHOLE),
    "links in /var; no profile": ([link("/var/empty", "/tmp"), link("/var/hostsfile", "/etc/passwd")], WHOLE),
    "ssh is a directory; another tty group": ([directory, tty_group], WHOLE),
    "/usr/local/bin is a link to the node": ([link("/usr/local/bin", "/tmp")], WHOLE),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_sessions_in_an_odd_image(nodes: Cluster, image: Tree, tmp_path: Path, kind: str) -> None:
    makers, path = IMAGES[kind]
    tree = image.copy(tmp_path / "tree")
    for make in makers:
        make(tree.path)
    nodes.add_image("docker:odd:1", tree, "VFS", env={"PATH": PATH})
    for name in ("a.sh", "ssh"):
        nodes[0].write(f"/tmp/{name}", "echo of the node\n", 0o755, "alice")
    with Job(nodes, "odd:1") as job:
        script = "echo $PATH; tty; stat -c %U:%G:%a $(tty); cat /var/hostsfile; env | grep SHIFTER_LOGIN || exit 0\n"
        done = job.run("ssh", "-tt", "node1", input=f"stty -echo; PS1=; echo BEG''IN\n{script}")
        first, tty, *rest = done.stdout.replace("\r", "").rpartition("BEGIN\n")[2].splitlines()
        assert first == path and tty.startswith("/dev/pts/")
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
        assert job.sh("/usr/bin/ssh node1 hostname; /usr/bin/ssh elsewhere") == "node1\nssh of the image\n"


def test_udi_image_of_an_older_version(node: Node, image: Tree) -> None:
    """A copy that the site has not renewed: said in one line, and no job with half of what it needs."""
    node.add_image("docker:tiny:1", image)
    node.run(f"cp -r {PREFIX}/libexec/shifter/opt/udiImage /srv/old; rm -r /srv/old/image", check=True)
    node.conf(udiImagePath="/srv/old")
    done = node.run([SETUP, "-u", "alice", "-N", "node1/1", "--job", "17", "docker", "tiny:1"])
    assert done.returncode == 1 and done.stderr.startswith("setupRoot: the udiImage lacks bin/ssh or image/ssh: ")


def test_sshd_that_says_nothing(node: Node, image: Tree) -> None:
    """A site may have it say less; setupRoot then asks whether it listens."""
    node.add_image("docker:tiny:1", image)
    node.run(
        f"cp -r {PREFIX}/libexec/shifter/opt/udiImage /srv/own; sed -i '1i LogLevel QUIET' /srv/own/etc/sshd_config",
        check=True,
    )
    node.conf(udiImagePath="/srv/own")
    with Job([node], "tiny:1") as job:
        assert job.sh("ssh node1 hostname") == "node1\n"
        assert "listening" not in node.shifterctl("logs", "--job", "17").stdout


def test_only_the_udi_of_a_job_with_an_sshd_is_changed(node: Node, image: Tree, tmp_path: Path) -> None:
    tree = image.copy(tmp_path / "tree")
    script(tree.path / "usr/bin/ssh")
    profile(tree.path)
    node.add_image("docker:odd:1", tree)
    with Job([node], "odd:1", "--no-sshd") as job:
        assert (
            job.sh("/usr/bin/ssh; ls /etc/profile.d 2>/dev/null || :; ls -l /opt/udiImage/image | grep -c ' 0 '")
            == "ssh of the image\n3\n"
        )
    done = node.shifter("--image=odd:1", "/usr/bin/ssh")
    assert done.stdout == "ssh of the image\n"
