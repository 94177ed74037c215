"""The OpenSSH of containers: what its build leaves, its installation, and logins in a UDI of nothing but busybox.

Its own directory is shown at /opt/udiImage by a siteFs line; keys and the job's part of the configuration are the
test's. sshd runs as an ordinary user, as it will in every job.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shifter.cli import udi_image
from shifter.errors import FormatError, ShifterError
from tests.images import Tree
from tests.node import PREFIX, REPO, STAGE, Node

INSTALLED = f"{PREFIX}/libexec/shifter/opt/udiImage"
STAGED = STAGE / INSTALLED.lstrip("/")
PROGRAMS = ["sbin/sshd", "libexec/sftp-server"] + [
    f"bin/{name}" for name in ("ssh", "scp", "sftp", "ssh-keygen", "ssh-add", "ssh-agent", "ssh-keyscan")
]
SSHD = "/opt/udiImage/sbin/sshd"
SSH = "/opt/udiImage/bin/ssh"


def manifest() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((STAGED / "manifest.json").read_text())
    return found


# --- what is built ---------------------------------------------------------------------------------------------------


def test_every_program_is_static_and_hardened() -> None:
    """A loader, or a library to load, would be the image's."""
    assert set(PROGRAMS) <= set(manifest()["programs"])
    for name in manifest()["programs"]:
        said = subprocess.run(["readelf", "-lWd", STAGED / name], capture_output=True, text=True, check=True).stdout
        assert "INTERP" not in said and "NEEDED" not in said, name
        assert " RWE " not in said, name
        if name not in ("bin/ssh", "bin/scp", "bin/sftp", "libexec/shell"):  # our own small ones have no privilege
            assert "GNU_RELRO" in said and "DYN (" in said and "NOW" in said, name


def test_the_manifest_tells_the_truth() -> None:
    found = manifest()
    for name, value in found["programs"].items():
        assert hashlib.sha256((STAGED / name).read_bytes()).hexdigest() == value
    for name, value in found["sources"].items():
        assert hashlib.sha256((REPO / "build/udi-image/source" / name).read_bytes()).hexdigest() == value
    said = subprocess.run([STAGED / "libexec/ssh.real", "-V"], capture_output=True, text=True, check=True).stderr
    assert f"OpenSSH_{found['version']} " in said and f"-{found['revision']}" in said
    assert any(name.endswith(".dsc") for name in found["sources"])
    assert any("CVE" in name for name in found["patches"]) and len(set(found["patches"])) == len(found["patches"])
    assert str(REPO) not in (STAGED / "manifest.json").read_text()


def test_what_is_built_is_not_built_again() -> None:
    """`make` with nothing new compiles nothing and needs no network."""
    built = (REPO / "build/udi-image/tree/bin/ssh").stat()
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    done = subprocess.run(
        ["unshare", "-n", "make", "udiImage"], cwd=REPO, env=environment, capture_output=True, text=True, check=True
    )
    assert "building" not in done.stderr
    assert (REPO / "build/udi-image/tree/bin/ssh").stat().st_mtime_ns == built.st_mtime_ns


def test_without_the_source_package_make_says_how_to_do_without(tmp_path: Path) -> None:
    """Nothing to fetch it from, and what is in the cache is not what apt has verified."""
    for name in ("Makefile", "udiImage", "tools"):
        (shutil.copytree if (REPO / name).is_dir() else shutil.copy)(REPO / name, tmp_path / name)
    (tmp_path / "shifter").mkdir()
    cache = tmp_path / "build/udi-image/source"
    shutil.copytree(REPO / "build/udi-image/source", cache)
    with next(cache.glob("*.debian.tar.*")).open("r+b") as file:
        file.write(b"x")
    (tmp_path / "apt.conf").write_text('Acquire::Retries "0";\n')
    done = subprocess.run(
        ["unshare", "-n", "make", "-s", "udiImage"],
        cwd=tmp_path,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "APT_CONFIG": str(tmp_path / "apt.conf")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("udiImage: can't get the source package of openssh: Failed to fetch ")
    assert "make WITH_SSHD=0" in lines[0]
    assert sorted(path.name for path in (tmp_path / "build/udi-image").iterdir()) == [".lock", "source"]


def test_make_without_sshd_leaves_it_out() -> None:
    said = subprocess.run(
        ["make", "-n", "install", "deps-build", "WITH_SSHD=0"], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout
    assert "udi_image.py build" not in said and "libssl-dev" not in said
    assert '[[ "0" == 0 ]] ||' in said  # in front of the installation's last step


# --- where it is installed -------------------------------------------------------------------------------------------


@pytest.fixture
def installer(tmp_path: Path) -> Iterator[Any]:
    """Run tools/udi_image.py with a command on a directory, and return that; of the programs only the smallest one."""
    shutil.copytree(REPO / "udiImage", tmp_path / "udiImage")
    tree = tmp_path / "build/udi-image/tree"
    (tree / "libexec").mkdir(parents=True)
    shutil.copyfile(STAGED / "libexec/sftp-server", tree / "libexec/sftp-server")
    shutil.copyfile(STAGED / "libexec/shell", tmp_path / "build/udi-shell")
    found = manifest()
    found["programs"] = {name: value for name, value in found["programs"].items() if name == "libexec/sftp-server"}
    (tree / "manifest.json").write_text(json.dumps(found))
    target = tmp_path / "installed"

    def run(command: str = "install") -> Path:
        subprocess.run(["python3", "-B", REPO / "tools/udi_image.py", command, target], cwd=tmp_path, check=True)
        return target

    yield run


def test_an_edited_template_is_kept_and_the_new_one_put_beside_it(installer: Any) -> None:
    target = installer()
    shipped = (target / "etc/sshd_config").read_text()
    (target / "etc/sshd_config").write_text("mine\n")
    (target / "etc/of-the-site").write_text("theirs\n")
    installer()
    assert (target / "etc/sshd_config").read_text() == "mine\n"
    assert (target / "etc/sshd_config.new").read_text() == shipped
    assert not (target / "etc/ssh_config.new").exists()
    (target / "etc/sshd_config").write_text(shipped)
    installer()
    assert sorted(path.name for path in (target / "etc").iterdir()) == ["of-the-site", "ssh_config", "sshd_config"]


def test_what_nobody_edited_follows_the_installation(installer: Any) -> None:
    """Templates of an older version, programs that it had, and programs that run while they are replaced."""
    target = installer()
    shipped = (target / "etc/ssh_config").read_text()
    old = json.loads((target / "manifest.json").read_text())
    (target / "etc/ssh_config").write_text("of an older version\n")
    old["templates"]["etc/ssh_config"] = hashlib.sha256(b"of an older version\n").hexdigest()
    old["programs"]["libexec/gone"] = ""
    (target / "libexec/gone").write_text("x")
    (target / "manifest.json").write_text(json.dumps(old))
    with open(target / "libexec/sftp-server", "rb") as held:
        installer()
        assert os.fstat(held.fileno()).st_nlink == 0 and held.read(4) == b"\x7fELF"
    assert (target / "etc/ssh_config").read_text() == shipped
    assert {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()} == {
        "manifest.json",
        *("libexec/sftp-server", "libexec/shell", "etc/ssh_config", "etc/sshd_config"),
        *("image/ssh", "image/scp", "image/sftp"),
    }


def test_uninstall_leaves_what_the_site_edited(installer: Any) -> None:
    target = installer()
    (target / "etc/ssh_config").write_text("mine\n")
    installer()
    installer("uninstall")
    assert [str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()] == ["etc/ssh_config"]
    installer("uninstall")  # and once more, where no manifest is


# --- shifterctl udi-image --------------------------------------------------------------------------------------------


def test_shifterctl_shows_what_is_installed() -> None:
    """And whether there is a newer one; where apt has no lists, that it is not known."""
    found = manifest()
    with Node() as node:
        document = json.loads(node.shifterctl("udi-image", "--json", user="alice").stdout)
        assert found.items() <= document.items() and document["path"] == INSTALLED
        node.run("rm -rf /var/lib/apt/lists; mkdir /var/lib/apt/lists", check=True)
        shown = node.shifterctl("udi-image", user="alice")
        assert shown.returncode == 0, shown.stderr
        values = [*found["sources"].values(), *found["programs"].values(), *found["patches"], found["packageVersion"]]
        assert all(value in shown.stdout for value in values)
        assert "unknown for openssh-client: apt's lists" in shown.stdout and "none" not in shown.stdout.split()


def test_shifterctl_where_none_is_installed(tmp_path: Path) -> None:
    with pytest.raises(ShifterError, match=r"manifest.json is not there: .*WITH_SSHD=0"):
        udi_image.load(tmp_path / "manifest.json")
    for text in ("", "[]", '{"name": "openssh"}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(FormatError, match=r"manifest.json: not .*; make install writes it anew"):
            udi_image.load(tmp_path / "manifest.json")


POLICY = """\
openssh-client:
  Installed: {installed}
  Candidate: 1:9.2p1-2+deb12u10
  Version table:
{table}
 *** 1:9.2p1-2+deb12u6 100
        100 /var/lib/dpkg/status
libssl-dev:
  Installed: (none)
  Candidate: (none)
  Version table:
zlib1g-dev:
  Installed: 1:1.2.13.dfsg-1
  Candidate: 1:1.2.13.dfsg-1
  Version table:
 *** 1:1.2.13.dfsg-1 500
        500 http://mirror.example.org/debian bookworm/main amd64 Packages
        100 /var/lib/dpkg/status
"""


def test_only_what_an_archive_has_counts_as_available() -> None:
    archive = "     1:9.2p1-2+deb12u10 500\n        500 http://mirror.example.org/debian bookworm/main amd64 Packages"
    found = udi_image.candidates(POLICY.format(installed="(none)", table=archive))
    assert found == {"openssh-client": "1:9.2p1-2+deb12u10", "zlib1g-dev": "1:1.2.13.dfsg-1"}
    assert udi_image.candidates(POLICY.format(installed="x", table="")) == {"zlib1g-dev": "1:1.2.13.dfsg-1"}


@pytest.mark.parametrize(
    ("version", "newer"),
    [
        ("1:9.2p1-2+deb12u11", True),
        ("1:9.2p1-2+deb12u10", False),
        ("1:9.2p1-2+deb12u9", False),
        ("1:9.2p1-2+deb12u10+b2", False),
        ("2:1.0-1", True),
    ],
)
def test_newer_as_dpkg_compares(version: str, newer: bool) -> None:
    assert udi_image.is_newer(version, "1:9.2p1-2+deb12u10") is newer


# --- logins ----------------------------------------------------------------------------------------------------------


class Login:
    """An sshd of alice's in a UDI of the tiny image, with keys, and our clients in the same UDI."""

    def __init__(self, node: Node) -> None:
        self.node = node
        node.conf(siteFs=["/home:/home", f"{INSTALLED}:/opt/udiImage"])
        self.inside("mkdir -m 700 ~/.job")
        self.admit("ed25519")
        self.inside(
            "cd ~/.job; /opt/udiImage/bin/ssh-keygen -q -t ed25519 -N '' -f host;"
            'echo "[127.0.0.1]:2204 $(cat host.pub)" > known;'
            "(echo Port 2204; echo ListenAddress 127.0.0.1; echo HostKey ~/.job/host; echo AllowUsers alice;"
            "echo AuthorizedKeysFile ~/.job/authorized; cat /opt/udiImage/etc/sshd_config) > sshd_config;"
            "(echo Port 2204; echo UserKnownHostsFile ~/.job/known; echo StrictHostKeyChecking yes;"
            "echo IdentitiesOnly yes; echo BatchMode yes; cat /opt/udiImage/etc/ssh_config) > ssh_config"
        )
        self.daemon = node.popen(
            [f"{PREFIX}/bin/shifter", "--image=tiny:1", SSHD, "-D", "-e", "-f", "/home/alice/.job/sshd_config"], "alice"
        )
        end = time.monotonic() + 20
        while "Server listening" not in (line := self.daemon.stderr.readline()):  # type: ignore[union-attr]
            assert line and time.monotonic() < end, f"sshd ended: {line}"

    def admit(self, kind: str, *options: str) -> None:
        """Make a key that may log in."""
        words = " ".join(options)
        self.inside(
            f"/opt/udiImage/bin/ssh-keygen -q -t {kind} {words} -N '' -f ~/.job/{kind};"
            f"cat ~/.job/{kind}.pub >> ~/.job/authorized; chmod 600 ~/.job/authorized"
        )

    def inside(self, command: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a shell command in the UDI."""
        done = self.node.shifter("--image=tiny:1", "/bin/sh", "-c", command, **options)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def ssh(
        self, command: str, *options: str, key: str = "ed25519", check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Log in and run a command."""
        words = " ".join(options)
        return self.inside(
            f"exec {SSH} -F ~/.job/ssh_config -i ~/.job/{key} {words} 127.0.0.1 '{command}'", check, timeout=120
        )

    def close(self) -> str:
        """End the sshd; return what it said."""
        self.daemon.send_signal(signal.SIGTERM)
        return self.daemon.communicate(timeout=30)[1]


@pytest.fixture
def login(tiny_node: Node) -> Iterator[Login]:
    made = Login(tiny_node)
    yield made
    made.close()


def test_login_in_an_image_of_nothing_but_busybox(login: Login) -> None:
    """Commands and their status, standard input and output, a terminal of its own, every kind of key, compression."""
    done = login.ssh('id -un; cat /etc/issue; echo "$SSH_CONNECTION"; exit 7', check=False)
    assert done.returncode == 7, done.stderr
    assert done.stdout.splitlines()[:2] == ["alice", "Tiny"] and done.stdout.splitlines()[2].startswith("127.0.0.1 ")
    for kind, options in (("rsa", ("-b", "2048")), ("ecdsa", ())):
        login.admit(kind, *options)
        assert login.ssh("echo in", key=kind).stdout == "in\n"
    said = login.ssh("echo in", "-v").stderr
    assert "kex: algorithm: curve25519-sha256" in said
    assert "cipher: aes128-gcm@openssh.com" in said
    assert "compression: zlib@openssh.com" in login.ssh("echo in", "-v", "-C").stderr
    # A terminal: its name, owner, group and mode, and the size of the caller's.
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (33, 77))
    command = "tty; stat -c %U:%G:%a $(tty); stty size"
    words = [f"{INSTALLED}/bin/ssh", "-F", ".job/ssh_config", "-i", ".job/ed25519", "-tt", "127.0.0.1", command]
    out = login.node.popen(words, "alice", stdin=theirs).communicate(timeout=60)[0]
    lines = out.replace("\r", "").splitlines()
    assert lines[0].startswith("/dev/pts/") and lines[1:] == ["alice:tty:620", "33 77"], out
    os.close(ours)
    os.close(theirs)


def test_a_terminal_where_the_node_has_no_proper_devpts(propagation: str, image: Tree) -> None:
    """The node's /dev/pts has no gid, as on some machines: the UDI has one of its own, and sshd a right terminal."""
    with Node(shared=propagation == "shared", devpts="mode=600,ptmxmode=666") as node:
        node.add_image("docker:tiny:1", image)
        login = Login(node)
        done = login.ssh("tty; stat -c %U:%G:%a $(tty)", "-tt")
        login.close()
        assert done.stdout.replace("\r", "").splitlines() == ["/dev/pts/0", "alice:tty:620"], done.stdout + done.stderr
        node.check_leaks()


def test_files_go_both_ways(login: Login) -> None:
    """scp by sftp and by its old protocol, sftp, and a session over a ControlMaster."""
    node = login.node
    node.write("/home/alice/big", os.urandom(3 << 20), owner="alice")
    options = "-F ~/.job/ssh_config -i ~/.job/ed25519"
    for scp in ("scp", "scp -O"):
        login.inside(f"cd && /opt/udiImage/bin/{scp} -q {options} big 127.0.0.1:there && cmp big there && rm there")
        login.inside(f"cd && /opt/udiImage/bin/{scp} -q {options} 127.0.0.1:big back && cmp big back && rm back")
    login.inside(
        f"cd && printf 'put big up\nget up down\n' | /opt/udiImage/bin/sftp -q {options} -b - 127.0.0.1 && cmp big down"
    )
    master = f"{options} -o ControlPath=/tmp/master"
    login.inside(f"{SSH} {master} -fMN 127.0.0.1 && {SSH} {master} 127.0.0.1 true && {SSH} {master} -O exit 127.0.0.1")


def test_only_the_user_with_a_key_of_the_job(login: Login) -> None:
    login.inside("/opt/udiImage/bin/ssh-keygen -q -t ed25519 -N '' -f ~/.job/other")
    refused = "Permission denied (publickey)."
    assert refused in login.ssh("true", key="other", check=False).stderr
    for user in ("root", "bob"):
        assert refused in login.ssh("true", "-l", user, check=False).stderr
    # What a client would have to ask for is not even offered.
    assert refused in login.ssh("true", "-o PreferredAuthentications=password,keyboard-interactive", check=False).stderr
    for setting in ("KexAlgorithms=diffie-hellman-group14-sha256", "MACs=hmac-sha1 -c aes128-ctr"):
        assert "no matching" in login.ssh("true", f"-o {setting}", check=False).stderr


def test_64_logins_at_once(login: Login) -> None:
    """MaxStartups' default drops a third of them."""
    script = f"for i in $(seq 64); do {SSH} -F ~/.job/ssh_config -i ~/.job/ed25519 127.0.0.1 echo $i & done; wait"
    done = login.inside(script, timeout=300)
    assert sorted(map(int, done.stdout.split())) == list(range(1, 65)), done.stderr


def test_the_daemon_ends_at_sigterm_and_says_nothing_odd(login: Login) -> None:
    assert login.ssh("true").returncode == 0
    said = login.close()
    assert login.daemon.returncode == 0 and "Received signal 15; terminating." in said
    assert "error" not in said and "fatal" not in said and "Unsupported" not in said and "Deprecated" not in said


def test_sockets_without_delay_and_no_configuration_of_libcrypto(login: Login) -> None:
    """TCP_NODELAY before connect; an image's openssl.cnf could name modules, which would be loaded from the image."""
    login.node.write("/home/alice/openssl.cnf", "nonsense", owner="alice")
    done = login.node.run(
        f"strace -f -e trace=openat,connect,setsockopt {INSTALLED}/libexec/ssh.real "
        "-F ~/.job/ssh_config -i ~/.job/ed25519 127.0.0.1 true",
        "alice",
        env={"OPENSSL_CONF": "/home/alice/openssl.cnf"},
        check=True,
    )
    lines = [line for line in done.stderr.splitlines() if "sin_port" in line or "TCP_NODELAY" in line]
    assert "TCP_NODELAY, [1]" in lines[0] and "connect(" in lines[1], lines
    assert "openssl.cnf" not in done.stderr
