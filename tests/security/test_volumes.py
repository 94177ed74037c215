"""Attacks by volumes: paths that somebody swaps while root looks at them, links through procfs, and what mounts hide."""

import contextlib
import subprocess
from collections.abc import Collection, Iterator

import pytest

from tests.node import Node
from tests.system.mounting import refused, works

SWAP = """
import ctypes, sys
libc = ctypes.CDLL(None)
one, other = (name.encode() for name in sys.argv[1:])
print("ready", flush=True)
while True:
    libc.renameat2(-100, one, -100, other, 2)  # RENAME_EXCHANGE
"""

SECRETS = ("/root/vault", "/home/bob/vault")


@pytest.fixture
def vault(tiny_node: Node) -> Node:
    """A node with directories that alice can't enter, each with a file that anybody could read if they could reach it."""
    for path in SECRETS:
        tiny_node.write(f"{path}/secret", "secret\n")
    tiny_node.run("chmod 700 /root; chown -R bob /home/bob; chmod 700 /home/bob", check=True)
    return tiny_node


@contextlib.contextmanager
def swapping(node: Node, one: str, other: str, user: str = "alice") -> Iterator[None]:
    """*user* exchanges two names, as fast as they can."""
    process = node.popen(["/usr/bin/python3", "-c", SWAP, one, other], user, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield
    finally:
        process.kill()
        process.communicate()


def attempts(count: int, built: Collection[object]) -> Iterator[int]:
    """At least *count* numbers, and as many more as it takes until one was *built*: a test of refusals only shows little.

    How often one is, is chance; of twenty times as many some are, unless something is wrong.
    """
    for number in range(20 * count):
        if number >= count and built:
            return
        yield number
    assert built, "no build got through"


@pytest.mark.soak
@pytest.mark.parametrize("to", [*SECRETS, "/root", "/proc/1/root/root/vault", "/proc/self/fd", "/run/shifter"])
def test_source_that_is_swapped_for_a_link(vault: Node, counts: dict[str, int], to: str) -> None:
    """Whatever it is at the moment, it is opened with the user's rights: all that appears inside is the user's own."""
    vault.write("/home/alice/data/file", "own\n", owner="alice")
    vault.run("chown alice data; ln -s $1 link".replace("$1", to), "alice", cwd="/home/alice", check=True)
    built: list[int] = []
    with swapping(vault, "/home/alice/data", "/home/alice/link"):
        for number in attempts(counts["builds while a path is swapped"], built):
            volume = f"--volume=/home/alice/data:/data/{number}"
            done = vault.shifter(
                "--image=tiny:1", volume, "sh", "-c", f"cat /data/{number}/*; cd /data/{number}; find ."
            )
            assert "secret" not in done.stdout, done
            if done.returncode == 125:
                assert done.stderr.count("\n") == 1, done
            else:
                built.append(number)
    vault.shifterctl("gc", "--all", check=True)
    assert works(vault, "id -un") == "alice\n"


@pytest.mark.soak
@pytest.mark.parametrize("to", ["/etc", "/dev", "/proc", "/", "/run"])
def test_target_that_is_swapped_for_a_link(vault: Node, counts: dict[str, int], to: str) -> None:
    """A mount point in a directory of the user's: the volume lies there or nowhere, never on what the system owns."""
    vault.write("/srv/a/marker", "mounted\n")
    vault.run("mkdir on; ln -s $1 link".replace("$1", to), "alice", cwd="/home/alice", check=True)
    names = " ".join(f"{path}/marker" for path in ("", "/etc", "/dev", "/proc", "/run"))
    with swapping(vault, "/home/alice/on", "/home/alice/link"):
        for number in range(counts["builds while a path is swapped"]):
            volume = f"--volume=/srv/a:/home/alice/on/{number % 3}".removesuffix("/0")
            done = vault.shifter("--image=tiny:1", volume, "sh", "-c", f"ls {names} 2>/dev/null; cat /etc/issue")
            assert done.stdout in ("Tiny\n", ""), done
            assert done.returncode != 125 or done.stderr.count("\n") == 1, done
    for path in ("", "/etc", "/dev", "/run"):
        assert not vault.exists(f"{path}/1") and not vault.exists(f"{path}/2")
    vault.shifterctl("gc", "--all", check=True)
    assert works(vault, "id -un") == "alice\n"


@pytest.mark.soak
@pytest.mark.parametrize("other", ["link", "moved"])
def test_directory_of_many_targets_that_is_swapped(vault: Node, counts: dict[str, int], other: str) -> None:
    """It is opened once for all of them: they lie in that directory, whatever its name leads to by now."""
    vault.write("/srv/a/marker", "mounted\n")
    for directory in ("on", "moved"):
        vault.run(f"mkdir {directory} {directory}/1 {directory}/2", "alice", cwd="/home/alice", check=True)
    vault.run("ln -s /etc link", "alice", cwd="/home/alice", check=True)
    options = [f"--volume=/srv/a:/home/alice/on/{number}" for number in range(1, 5)]
    script = "find / -xdev -name marker; find /etc /dev /run -name marker; cat /etc/issue; cat /home/alice/*/*/marker"
    built: list[int] = []
    with swapping(vault, "/home/alice/on", f"/home/alice/{other}"):
        for number in attempts(counts["builds while a path is swapped"], built):
            done = vault.shifter("--image=tiny:1", *options, f"--volume=/srv/a:/data/{number}", "sh", "-c", script)
            assert set(done.stdout.splitlines()) <= {"Tiny", "mounted"}, done
            if done.returncode == 125:
                assert done.stderr.count("\n") == 1, done
            else:  # whatever the script's status: the names are swapped while it reads them, too
                built.append(number)
    for path in ("/etc", "/dev", "/run"):
        assert not any(vault.exists(f"{path}/{number}") for number in range(1, 5))
    vault.shifterctl("gc", "--all", check=True)
    assert works(vault, "id -un") == "alice\n"


@pytest.mark.soak
def test_mount_point_that_another_user_swaps_while_it_is_made(vault: Node, counts: dict[str, int]) -> None:
    """In a directory that everybody can write: bob can't make alice's builder create anything in a third place."""
    vault.write("/srv/a/marker", "mounted\n")
    vault.mkdir("/home/shared", mode=0o777)
    vault.mkdir("/home/alice/private", owner="alice", mode=0o700)
    vault.run("mkdir on; ln -s /home/alice/private link", "bob", cwd="/home/shared", check=True)
    with swapping(vault, "/home/shared/on", "/home/shared/link", "bob"):
        for number in range(counts["builds while a path is swapped"]):
            done = vault.shifter("--image=tiny:1", f"--volume=/srv/a:/home/shared/on/{number}/x", "true")
            assert done.returncode in (0, 125), done
            assert done.returncode == 0 or done.stderr.count("\n") == 1, done
    # A link is followed for alice as in any program of hers; what is made is hers, and empty.
    made = vault.run("find /home/shared /home/alice -mindepth 2 ! -user alice", check=True).stdout
    assert made == ""


LINKS = {
    "fd": "/proc/self/fd/0",
    "root": "/proc/self/root",
    "cwd": "/proc/self/cwd",
    "thread": "/proc/thread-self/fd/0",
    "thread-root": "/proc/thread-self/root/root/vault",
    "dev-fd": "/dev/fd/0",
    "stdin": "/dev/stdin",
    "init": "/proc/1/root/root",
    "exe": "/proc/self/exe",
    "namespace": "/proc/self/ns/mnt",
    "map": "/proc/self/map_files",
    "net": "/proc/self/net",
}


@pytest.mark.parametrize("link", LINKS)
def test_magic_links_mean_the_builders_files(vault: Node, link: str) -> None:
    """As the source, as a link that is the source, and as a link on the way."""
    vault.run(["ln", "-s", LINKS[link], "/home/alice/link"], "alice", check=True)
    for source in (LINKS[link], f"{LINKS[link]}/vault", "/home/alice/link", "/home/alice/link/vault"):
        done = vault.shifter("--image=tiny:1", f"--volume={source}:/x", "cat", "/x")
        assert (done.returncode, done.stdout) == (125, ""), (source, done)
        assert done.stderr.count("\n") == 1


def test_what_a_mount_hides_stays_hidden(vault: Node) -> None:
    """Bound around, from above, from inside, by a volume in a volume: what the site covered is never uncovered."""
    vault.write("/srv/data/closed/secret", "secret\n")
    vault.write("/srv/data/open/file", "open\n")
    vault.run("mount -t tmpfs -o mode=755,ro cover /srv/data/closed", check=True)
    for options in (
        ["--volume=/srv/data:/x"],
        ["--volume=/srv:/x"],
        ["--volume=/:/x"],
        ["--volume=/srv/data:/x;/srv/data/closed:/x/open"],
        ["--volume=/srv/data:/x", "--volume=/srv/data:/x/open"],
    ):
        found = works(
            vault, "find /x -name secret 2>/dev/null; cat /x/closed/secret 2>/dev/null || echo none", *options
        )
        assert found == "none\n", options
        script = (
            "unshare -Urm sh -c 'umount /x/closed; umount -l /x/closed; umount /x; find /x -name secret' 2>/dev/null"
        )
        assert works(vault, f"{script}; true", *options) == "", options
    vault.run(["umount", "/srv/data/closed"], check=True)


def test_hidden_by_a_mount_of_the_site_too(vault: Node) -> None:
    """A volume that is found inside is what the node has there, with its mounts."""
    vault.write("/gpfs/home/alice/closed/secret", "secret\n", owner="alice")
    vault.run("mount -t tmpfs -o mode=755 cover /gpfs/home/alice/closed; chown alice /gpfs/home/alice", check=True)
    vault.conf(siteFs=["/gpfs/home:/home:rec"])
    assert works(vault, "find /x -name secret", "--volume=/home/alice:/x") == ""
    vault.run(["umount", "/gpfs/home/alice/closed"], check=True)


@pytest.mark.parametrize(
    ("site", "source", "shown"),
    [
        ("/gpfs/a:/scratch", "/scratch2", "outside\n"),
        ("/gpfs/a:/scratch", "/scratch", "inside\n"),
        ("/gpfs/a:/scratch", "/scratch/", "inside\n"),
        ("/gpfs/a:/scratch", "//scratch//.", "inside\n"),
        ("/gpfs/a:/scratch2", "/scratch", "shorter\n"),
        ("/gpfs/a:/scratch/a", "/scratch", "shorter\n"),
    ],
)
def test_prefixes_are_no_paths(vault: Node, site: str, source: str, shown: str) -> None:
    for path, text in (("/gpfs/a", "inside"), ("/scratch2", "outside"), ("/scratch", "shorter")):
        vault.write(f"{path}/file", f"{text}\n")
    vault.conf(siteFs=["/home:/home", site])
    assert works(vault, "cat /x/file", f"--volume={source}:/x") == shown


def test_read_only_directory_of_the_site_stays_so(vault: Node) -> None:
    """A volume does not give what a siteFs withholds by its own flag: the user names the node's directory, with its rights."""
    vault.write("/srv/a/file", "a\n")
    vault.run(["chmod", "777", "/srv/a"], check=True)
    vault.conf(siteFs=["/home:/home", "/srv/a:/site:ro"])
    script = "touch /site/new 2>/dev/null || echo closed; mkdir /site/deep 2>/dev/null || echo closed"
    assert works(vault, script) == "closed\nclosed\n"
    message = refused(vault, "--volume=/home:/site/new")
    assert "/site/new does not exist in the container, and /site is read-only" in message
    assert not vault.exists("/srv/a/new")
