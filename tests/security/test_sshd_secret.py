"""Secrets of sites and users: read as their owner only, whatever a user has put there, and nodes that start together agree.

What runs is the installed package, as root in a node, as setupRoot would run it.
"""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node import PREFIX, Node
from tests.security.fuse import LOOKUP, UserFuse

PYTHON = f"{PREFIX}/libexec/shifter/python"
ALICE = "Account(5001, 5001, (6001, 6002), '/home/alice')"
START = f"""
import os, sys
sys.path.insert(0, {PYTHON!r})
from shifter.linux import drop
from shifter.sshd import SshError, secret
from shifter.sshd.secret import Account
def show(function, *args):
    try:
        print(repr(function(*args)))
    except SshError as error:
        print("refused:", error)
def user_secret(account, limit=20.0):
    return secret.of_user(account, True, limit)[0]
def legacy_key(account):
    return secret.of_user(account, False)[1]
def at_home(command):
    if os.fork() == 0:
        os.chdir("/home/alice")
        drop.become(5001, 5001, ())
        os.execl("/bin/sh", "sh", "-c", command)
    assert os.wait()[1] == 0, command
"""


@pytest.fixture
def node() -> Iterator[Node]:
    """A node with private propagation only: nothing of what is tested here mounts, or looks at mounts."""
    with Node() as made:
        yield made
        made.check_leaks()


def python(node: Node, code: str, *before: str) -> str:
    done = node.run([*before, "/usr/bin/python3", "-I", "-B", "-c", START + code])
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def user_secret(node: Node, account: str = ALICE) -> str:
    return python(node, f"show(user_secret, {account})").strip()


def refused(said: str, *words: str) -> None:
    assert said.startswith("refused: ") and said.count("\n") <= 1, said
    for word in words:
        assert word in said, said


def test_secret_is_made_once_and_is_the_users_alone(node: Node) -> None:
    first = user_secret(node)
    assert len(eval(first)) == 32
    assert user_secret(node) == first
    directory = node.path("/home/alice/.udiRoot")
    assert os.listdir(directory) == ["secret"]
    for path, mode in ((directory, 0o40700), (directory / "secret", 0o100600)):
        info = path.stat()
        assert (info.st_uid, info.st_gid, info.st_mode) == (5001, 5001, mode)
    assert user_secret(node, "Account(5002, 5002, (6001,), '/home/bob')") != first


def test_nodes_that_start_together_agree(node: Node) -> None:
    """Three at once where there is nothing, not even the directory: 100 times of 100 all have the same 32 bytes."""
    code = """
import select
os.umask(0)
def start(home, gate):
    read, write = os.pipe()
    if os.fork() == 0:
        os.read(gate, 1)
        try:
            answer = user_secret(Account(5001, 5001, (), home))
        except BaseException as error:
            answer = str(error).encode()
        os.write(write, answer)
        os._exit(0)
    os.close(write)
    return read
agreed = 0
for number in range(100):
    home = f"/home/alice/{number}"
    os.mkdir(home); os.chown(home, 5001, 5001)
    gate, opener = os.pipe()
    pipes = [start(home, gate) for _ in range(3)]
    os.write(opener, b"123")
    answers = {os.read(pipe, 1000) for pipe in pipes}
    for fd in (*pipes, gate, opener):
        os.close(fd)
    for _ in range(3):
        os.wait()
    left = os.listdir(home + "/.udiRoot")
    if len(answers) == 1 and len(answers.copy().pop()) == 32 and left == ["secret"]:
        agreed += 1
    else:
        print(number, answers, left)
print("agreed", agreed)
"""
    assert python(node, code) == "agreed 100\n"


# What alice has at .udiRoot (in her home, as herself) -> words of the one line that refuses it.
TRAPS = {
    "mkdir -m 700 real; ln -s real .udiRoot": ("/home/alice/.udiRoot/secret", "Not a directory"),
    "ln -s /root .udiRoot": ("/home/alice/.udiRoot/secret", "Not a directory"),
    "mkfifo .udiRoot": ("/home/alice/.udiRoot/secret", "Not a directory"),
    "touch .udiRoot": ("/home/alice/.udiRoot/secret", "Not a directory"),
    "mkdir -m 770 .udiRoot": ("can be written by others (mode 0770)", "chmod go-w"),
    "mkdir -m 500 .udiRoot": ("/home/alice/.udiRoot/secret", "Permission denied"),
    "mkdir -m 700 .udiRoot; ln -s /etc/shadow .udiRoot/secret": ("is a symbolic link", "remove it"),
    "mkdir -m 700 .udiRoot; ln -s /dev/zero .udiRoot/secret": ("is a symbolic link",),
    "mkdir -m 700 .udiRoot; ln -s nowhere .udiRoot/secret": ("is a symbolic link",),
    "mkdir -m 700 .udiRoot; mkfifo -m 600 .udiRoot/secret": ("is not a regular file",),
    "mkdir -m 700 .udiRoot .udiRoot/secret": ("is not a regular file",),
    "mkdir -m 700 .udiRoot; umask 077; head -c 33 /dev/urandom > .udiRoot/secret": ("is longer than 32 bytes",),
    "mkdir -m 700 .udiRoot; umask 077; head -c 31 /dev/urandom > .udiRoot/secret": ("has 31 bytes", "remove it"),
    "mkdir -m 700 .udiRoot; umask 077; truncate -s 1T .udiRoot/secret": ("is longer than 32 bytes",),
    "mkdir -m 700 .udiRoot; umask 027; head -c 32 /dev/urandom > .udiRoot/secret": (
        "can be read by others (mode 0640)",
    ),
}


def test_traps_in_a_home_are_refused_in_one_line(node: Node) -> None:
    code = f"""
for trap in {list(TRAPS)!r}:
    at_home("chmod -Rf u+rwx .udiRoot; rm -rf .udiRoot real; " + trap)
    show(user_secret, {ALICE})
"""
    said = python(node, code).splitlines()
    for line, words in zip(said, TRAPS.values(), strict=True):
        refused(line, *words, "or let the site set sshSecretFile")


def test_files_of_root_and_of_others_are_never_taken(node: Node) -> None:
    """As setupRoot is root, it could read them all; and a user can have a hard link where the kernel lets them."""
    node.mkdir("/home/alice/.udiRoot", 0o700, "alice")
    node.write("/home/alice/.udiRoot/secret", b"x" * 32, 0o600, "root")
    refused(user_secret(node), "Permission denied")
    node.write("/home/alice/.udiRoot/secret", b"x" * 32, 0o444, "bob")
    refused(user_secret(node), "belongs to uid 5002, not to uid 5001")
    node.call(lambda: os.chown("/home/alice/.udiRoot", 5002, 5002))
    node.call(lambda: os.chmod("/home/alice/.udiRoot", 0o755))
    refused(user_secret(node), "~/.udiRoot belongs to uid 5002")
    node.mkdir("/home/closed", 0o700, "bob")
    refused(
        user_secret(node, "Account(5001, 5001, (), '/home/closed')"), "/home/closed/.udiRoot/secret: Permission denied"
    )
    refused(user_secret(node, "Account(5001, 5001, (), '')"), "no absolute path")
    refused(user_secret(node, "Account(5001, 5001, (), '/home/none')"), "No such file")


SWAPPER = """
import ctypes, os
exchange = lambda one, other: ctypes.CDLL(None).renameat2(-100, one, -100, other, 2)
os.symlink("/home/loot", "link")
os.symlink("/home/loot/secret", "own/link")
while True:
    exchange(b"link", b".udiRoot")
    exchange(b"link", b".udiRoot")
    exchange(b"own/link", b".udiRoot/secret")
    exchange(b"own/link", b".udiRoot/secret")
"""


def test_swapped_while_it_is_read(node: Node) -> None:
    """alice swaps directory and file for links to root's while root asks: her own 32 bytes or a refusal, nothing else."""
    node.run("mkdir -m 700 .udiRoot own; umask 077; printf %032d 7 > .udiRoot/secret", "alice", check=True)
    node.mkdir("/home/loot", 0o755)
    node.write("/home/loot/secret", b"R" * 32, 0o444)
    swapper = node.popen(["/usr/bin/python3", "-c", SWAPPER], "alice", cwd="/home/alice")
    said = python(node, f"for _ in range(100): show(user_secret, {ALICE})").splitlines()
    assert swapper.poll() is None
    swapper.kill()
    swapper.wait()
    assert {line for line in said if not line.startswith("refused: ")} == {repr(b"%032d" % 7)}
    assert len(said) == 100 and len(set(said)) > 1


def test_home_that_never_answers(node: Node) -> None:
    """A dead server: one line after the limit. The child that hangs there is the user's, and yet not theirs to look into."""
    fuse = UserFuse({LOOKUP: 0})
    try:
        node.mkdir("/home/dead", 0o755)
        node.mount("alice", "/home/dead", "fuse", data=fuse.options(5001))
        call = "show(user_secret, Account(5001, 5001, (), '/home/dead'), 3.0)"
        asking = node.popen(["/usr/bin/python3", "-I", "-B", "-c", START + call])
        child = _child_of(node, asking.pid)
        for name in ("mem", "environ", "maps"):
            assert node.run(["head", "-c", "1", f"/proc/{child}/{name}"], "alice").returncode != 0
        out, err = asking.communicate(timeout=60)
        assert asking.returncode == 0, err
        refused(out, "/home/dead/.udiRoot/secret: no answer within 3 s", "is its server down?")
        assert LOOKUP in fuse.asked
    finally:
        fuse.end()
        node.run(["umount", "--lazy", "/home/dead"], check=True)


def _child_of(node: Node, pid: int) -> int:
    """The child of *pid* (of the host) that has become alice, as the node counts."""
    for _ in range(1000):
        for process in node.processes():
            if process.uid == 5001 and f"\nPPid:\t{pid}\n" in Path(f"/proc/{process.pid}/status").read_text():
                return process.nspid
        time.sleep(0.005)
    raise AssertionError("no child")


def test_child_that_its_user_kills(node: Node) -> None:
    """An answer counts only when it is whole."""
    code = f"""
def die(account):
    import signal
    os.kill(os.getpid(), signal.SIGKILL)
show(secret._as_user, {ALICE}, die, "/home/alice/x", 10)
"""
    refused(python(node, code), "/home/alice/x: the process that read it was killed")


def test_the_drop_is_complete_and_read_back(node: Node) -> None:
    code = "drop.become(5001, 5001, (0, 6001, 6002)); print(open('/proc/thread-self/status').read())"
    status = dict(re.findall(r"^(\w+):\t(.*)$", python(node, code), re.M))
    assert status["Uid"].split() == ["5001"] * 4 and status["Gid"].split() == ["5001"] * 4
    assert status["Groups"].split() == ["6001", "6002"]
    assert {int(status[f"Cap{name}"], 16) for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
    assert status["NoNewPrivs"] == "1"
    for ids in ("0, 5001, ()", "5001, 0, ()", "-1, 5001, ()"):
        said = node.run(["/usr/bin/python3", "-I", "-c", START + f"drop.become({ids})"])
        assert said.returncode == 1 and "nothing is run for uid 0 or gid 0" in said.stderr


def test_root_that_can_not_drop_reads_nothing(node: Node) -> None:
    """A container or a prolog with a reduced bounding set."""
    node.write("/home/alice/.udiRoot/secret", b"x" * 32, 0o600, "alice")
    node.call(lambda: os.chmod("/home/alice/.udiRoot", 0o700))
    for missing in ("setuid", "setgid", "setpcap"):
        reduced = ("setpriv", f"--bounding-set=-{missing}", "--inh-caps=-all")
        refused(python(node, f"show(user_secret, {ALICE})", *reduced), "Operation not permitted")


def test_groups_of_the_user_count_for_their_home(node: Node) -> None:
    node.mkdir("/home/shared", 0o770)
    node.call(lambda: os.chown("/home/shared", 0, 6001))
    assert len(eval(user_secret(node, "Account(5001, 5001, (0, 6001), '/home/shared')"))) == 32
    refused(user_secret(node, "Account(5001, 5001, (6002,), '/home/shared')"), "Permission denied")


KEY = "/home/alice/.udiRoot/id_rsa.key.pub"
# What alice does -> what legacy_key says of KEY, what key_file says of it.
KEYS = {
    "true": ("None", f"refused: {KEY}: No such file"),
    "mkdir -m 700 .udiRoot": ("None", f"refused: {KEY}: No such file"),
    f"printf 'ssh-rsa AAAA' > {KEY}": ("b'ssh-rsa AAAA'", "b'ssh-rsa AAAA'"),
    f"chmod 664 {KEY}": (f"refused: {KEY} can be written by others (mode 0664); run: chmod go-w",) * 2,
    f"chmod 600 {KEY}; truncate -s 1T {KEY}": (f"refused: {KEY} is longer than 65536 bytes",) * 2,
    f"rm {KEY}; ln -s /etc/shadow {KEY}": (f"refused: {KEY} is a symbolic link", f"refused: {KEY}: Permission denied"),
    f"rm {KEY}; ln -s /dev/zero {KEY}": (f"refused: {KEY} is a symbolic link", f"refused: {KEY} is not a regular file"),
    f"rm {KEY}; mkfifo {KEY}": (f"refused: {KEY} is not a regular file",) * 2,
}


def test_legacy_key_and_key_files_of_the_user(node: Node) -> None:
    code = f"""
for act in {list(KEYS)!r}:
    at_home("umask 022; " + act)
    show(legacy_key, {ALICE})
    show(secret.key_file, {ALICE}, {KEY!r})
show(secret.key_file, {ALICE}, "../root/x")
show(secret.key_file, {ALICE}, "/proc/self/environ")
show(secret.key_file, {ALICE}, "/home/alice/a\\nb\\x1b")
"""
    said = python(node, code).splitlines()
    expected = [text for pair in KEYS.values() for text in pair]
    expected += [
        "refused: ../root/x: the path of a key file must be absolute",
        "refused: /proc/self/environ: Permission denied",
        "refused: /home/alice/a?b?: No such file",
    ]
    for line, words in zip(said, expected, strict=True):
        assert line.startswith(words), (line, words)


SECRET = "/etc/shifter/secret"
GOOD = "0123456789abcdef" * 4
# Content of the file -> words of the refusal.
CONTENTS = {
    "": "has 0 secrets",
    f"{GOOD}\n{GOOD}\n": "has 2 secrets, of which 1 differ",
    f"{GOOD}\n{GOOD}00\n{GOOD}11\n": "has 3 secrets",
    f"{GOOD}\n{GOOD[2:]}\n": f"{SECRET}:2: it must have one or two lines",
    f"{GOOD}g0": f"{SECRET}:1: ",
    f"{GOOD}0": f"{SECRET}:1: ",
    "0" * 5000: "is longer than 4096 bytes",
}
# What root does with the good file -> words of the refusal.
MISTAKES = {
    f"rm {SECRET}": f"{SECRET}: No such file",
    f"chmod 640 {SECRET}": "can be read by others (mode 0640)",
    f"chown alice {SECRET}": f"{SECRET} belongs to uid 5001; it must belong to root",
    "chmod 775 /etc/shifter": "/etc/shifter is writable by group or others",
    f"mv {SECRET} /home/alice/s; ln -s /home/alice/s {SECRET}": "/home/alice belongs to uid 5001",
    f"rm {SECRET}; mkfifo -m 600 {SECRET}": "is not a regular file",
    f"rm {SECRET}; mkdir -m 700 {SECRET}": "is not a regular file",
}


def test_secret_file_of_the_site(node: Node) -> None:
    code = f"""
def write(text):
    os.system("rm -rf {SECRET}; chmod 755 /etc/shifter; umask 077; : > {SECRET}")
    open({SECRET!r}, "w").write(text)
    show(secret.site_secrets, {SECRET!r})
write("# new\\n{GOOD.upper()}ff\\n\\n {GOOD}\\n")
for text in {list(CONTENTS)!r}:
    write(text)
for mistake in {list(MISTAKES)!r}:
    write({GOOD!r})
    assert os.system(mistake) == 0
    show(secret.site_secrets, {SECRET!r})
"""
    said = python(node, code).splitlines()
    assert eval(said[0]) == [bytes.fromhex(GOOD + "ff"), bytes.fromhex(GOOD)]
    for line, words in zip(said[1:], [*CONTENTS.values()], strict=False):
        refused(line, "sshSecretFile: ", words)
        assert GOOD[:20] not in line
    rest = said[1 + len(CONTENTS) :]
    assert {eval(line)[0] for line in rest[::2]} == {bytes.fromhex(GOOD)}
    for line, words in zip(rest[1::2], MISTAKES.values(), strict=True):
        refused(line, "sshSecretFile: ", words)
