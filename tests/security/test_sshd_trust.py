"""Logins with the real OpenSSH between what `shifter.sshd` makes: who gets in, and whom the client believes.

One virtual node is every node of the job: sshd runs there as alice, on port 1204 of 127.0.0.1, which has several names.
"""

import os
import random
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from shifter.sshd import authorized, config, trust
from shifter.sshd.ed25519 import Key
from shifter.sshd.trust import ETC, Job
from tests.node import BUILD, Node

SITE, OLD = b"s" * 32, b"o" * 32
JOB = Job("cluster", 5001, "77", 0)
NAMES = ("Node1", "node1.example", "127.0.0.1")
SSH = "/opt/udiImage/bin/ssh"
SERVER = b"""\
# a site's template
PermitRootLogin yes
Match all
    PasswordAuthentication yes
    AuthorizedKeysFile /dev/null
    ForceCommand /bin/false
"""
CLIENT = b"Host *\n    Port 9\n    StrictHostKeyChecking no\n    KexAlgorithms curve25519-sha256\n"


@pytest.fixture
def node() -> Iterator[Node]:
    """A node with private propagation only: nothing of what is tested here mounts, or looks at mounts."""
    with Node() as made:
        yield made
        made.check_leaks()


def put(node: Node, files: Sequence[trust.File], *only: str) -> None:
    """Write files below ETC as the builder does; *only* those of these names if any is given."""
    for file in files:
        if not only or file.name in only:
            node.write(
                f"{ETC}/{file.name}", file.data, file.mode, next(u for u in node.users.values() if u.uid == file.owner)
            )


def prepare(node: Node, masters: Sequence[bytes] = (SITE,), job: Job = JOB, further: Sequence[bytes] = ()) -> None:
    """Make /opt/udiImage: the distribution's OpenSSH as the real programs, our wrapper, our files."""
    for directory in ("etc", "bin", "libexec"):
        node.mkdir(f"/opt/udiImage/{directory}")
    wrapper = (BUILD / "udi-client").read_bytes()
    for name in ("ssh", "scp", "sftp"):
        node.write(f"/opt/udiImage/bin/{name}", wrapper, 0o755)
        node.write(f"/opt/udiImage/libexec/{name}.real", Path(f"/usr/bin/{name}").read_bytes(), 0o755)
    put(node, trust.files(job, masters, NAMES, further))
    server, _ = config.server_config(SERVER, config.Server("alice", 1204, ["127.0.0.1"]))
    client, _ = config.client_config(CLIENT, 1204)
    node.write(f"{ETC}/{config.SERVER_FILE}", server)
    node.write(f"{ETC}/{config.CLIENT_FILE}", client)
    node.write(f"{ETC}/{config.NODES}", config.nodes_file([*NAMES, "node2", "::1"]))
    node.write("/etc/hosts", "127.0.0.1 localhost node1 node1.example node2 outside\n")


@contextmanager
def sshd(node: Node, user: str = "alice") -> Iterator["subprocess.Popen[str]"]:
    """The sshd of the UDI, which has said that it listens."""
    daemon = node.popen(["/usr/sbin/sshd", "-D", "-e", "-f", f"{ETC}/{config.SERVER_FILE}"], user)
    assert daemon.stderr is not None
    said = ""
    while "Server listening on 127.0.0.1 port 1204" not in said:
        line = daemon.stderr.readline()
        assert line, said
        said += line
    try:
        yield daemon
    finally:
        daemon.kill()
        daemon.wait()


def ssh(node: Node, *words: str, user: str = "alice", **options: Any) -> "subprocess.CompletedProcess[str]":
    return node.run([SSH, *words], user, **options)


def believed(node: Node, *words: str) -> None:
    done = ssh(node, *words, "id", "-un")
    assert (done.returncode, done.stdout, done.stderr) == (0, "alice\n", ""), done


def refused(node: Node, text: str, *words: str, user: str = "alice") -> None:
    done = ssh(node, *words, "true", user=user)
    assert done.returncode == 255 and text in done.stderr, done


HOSTILE = {
    "settings": """\
Host *
    Port 9
    User root
    IdentityFile /nonexistent
    ProxyCommand /bin/false
    ControlMaster auto
    ControlPath ~/cm
    StrictHostKeyChecking no
    UserKnownHostsFile ~/known
    HostName outside
    RemoteCommand touch ~/hostile
""",
    "broken": "Host none\n    NoSuchOption yes\nMatch exec\n",
    "directory": None,
}


def test_login_as_it_should_be(node: Node) -> None:
    """All names of the node, three tools, a jump; nothing is written to the home, and no configuration of it matters."""
    prepare(node)
    with sshd(node):
        for text in HOSTILE.values():
            node.run("rm -rf .ssh; mkdir -m 700 .ssh", "alice", check=True)
            if text is None:
                node.mkdir("/home/alice/.ssh/config")
            else:
                node.write("/home/alice/.ssh/config", text, 0o600, "alice")
            for words in (
                ["node1"],
                ["NODE1"],
                ["alice@node1.example"],
                ["ssh://127.0.0.1:1204"],
                ["-J", "node1", "127.0.0.1"],
            ):
                believed(node, *words)
            assert sorted(os.listdir(node.path("/home/alice"))) == [".ssh"]
        assert os.listdir(node.path("/home/alice/.ssh")) == ["config"]
        node.write("/home/alice/a b", "text", 0o600, "alice")
        for words in (["scp", "a b", "node1:c"], ["scp", "-O", "node1:c", "d"], ["scp", "scp://node1/d", "."]):
            node.run(["/opt/udiImage/bin/" + words[0], *words[1:]], "alice", check=True)
        node.run(["/opt/udiImage/bin/sftp", "-b", "-", "node1"], "alice", input="rename d e\n", check=True)
        assert node.read("/home/alice/e") == "text"
        # Every other host: the image's own ssh, with the user's configuration.
        node.run("rmdir .ssh/config", "alice", check=True)
        node.write("/home/alice/.ssh/config", str(HOSTILE["broken"]), 0o600, "alice")
        done = node.run([SSH, "outside", "true"], "alice")
        assert done.returncode == 255 and "/home/alice/.ssh/config" in done.stderr


def test_nobody_else_gets_in(node: Node) -> None:
    """Keys of other jobs, restarts, users and clusters; other users with all that they can read; root; passwords."""
    prepare(node)
    plain = ["-F", "/dev/null", "-p", "1204", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    plain += ["-o", "IdentitiesOnly=yes", "-o", "KexAlgorithms=curve25519-sha256"]
    others = {
        "job": Job("cluster", 5001, "78", 0),
        "restart": Job("cluster", 5001, "77", 1),
        "user": Job("cluster", 5002, "77", 0),
        "cluster": Job("cluste", 5001, "r77", 0),
    }
    with sshd(node) as daemon:
        for name, job in others.items():
            put_key(node, f"/home/alice/{name}", trust.derive(SITE, job, "login"))
            refused(node, "Permission denied (publickey)", *plain, "-i", name, "node1")
        put_key(node, "/home/alice/ca", trust.derive(SITE, JOB, "ca"))
        put_key(node, "/home/alice/right", trust.derive(SITE, JOB, "login"))
        refused(node, "Permission denied (publickey)", *plain, "-i", "ca", "node1")
        assert ssh(node, *plain, "-i", "right", "node1", "true").returncode == 0
        # bob: our client with alice's files, his own key, alice's public key as his; and any other name with the right key.
        refused(node, "Permission denied", "alice@node1", user="bob")
        node.run("mkdir -m 700 .ssh; ssh-keygen -q -t ed25519 -N '' -f .ssh/own", "bob", check=True)
        for public in ("own.pub", "stolen.pub"):
            node.run(f"cp {ETC}/id_ed25519.pub .ssh/{public}", "bob", check=True)
            key = public.removesuffix(".pub")
            refused(
                node, "Permission denied (publickey)", *plain, "-i", f"/home/bob/.ssh/{key}", "alice@node1", user="bob"
            )
        for user in ("root", "bob", "nobody"):
            refused(node, "Permission denied (publickey)", *plain, "-i", "right", f"{user}@node1")
        assert daemon.poll() is None
    for name in ("id_ed25519", "ssh_host_ed25519_key"):
        assert node.run(["cat", f"{ETC}/{name}"], "bob").returncode != 0


def put_key(node: Node, path: str, ours: Key) -> None:
    key = Ed25519PrivateKey.from_private_bytes(ours.seed)
    node.write(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), 0o600, "alice")


def test_client_believes_only_the_node_that_it_asked_for(node: Node) -> None:
    prepare(node)
    own = trust.files(JOB, [SITE], NAMES)
    foreign = trust.files(Job("cluster", 5001, "76", 0), [SITE], NAMES)
    host = ("ssh_host_ed25519_key", "ssh_host_ed25519_key-cert.pub")
    with sshd(node):
        believed(node, "node1")
        refused(node, "Host key verification failed", "node2")  # a node of the job, but not this one
        put(node, foreign, "ssh_known_hosts")  # the same node, seen from another job
        refused(node, "Host key verification failed", "node1")
    put(node, own, "ssh_known_hosts")
    put(node, foreign, *host)  # an old job's sshd on our port
    with sshd(node):
        refused(node, "Host key verification failed", "node1")
    put(node, own, *host)
    node.call(lambda: os.unlink(f"{ETC}/{host[1]}"))  # a host key, and no certificate
    with sshd(node):
        refused(node, "no matching host key type found", "node1")


def test_nodes_agree_while_a_site_rotates_its_secret(node: Node) -> None:
    """Each step of the rotation beside the one before: whoever is server and whoever is client."""
    prepare(node)
    steps = ([OLD], [OLD, SITE], [SITE, OLD], [SITE])
    client = ("id_ed25519", "id_ed25519.pub", "ssh_known_hosts")
    for server in range(4):
        put(node, trust.files(JOB, steps[server], NAMES))
        with sshd(node):
            for other in range(4):
                put(node, trust.files(JOB, steps[other], NAMES), *client)
                if abs(server - other) <= 1:
                    believed(node, "node1")
                elif abs(server - other) == 3:
                    refused(node, "Host key verification failed", "node1")


def test_further_keys_of_every_kind_get_in(node: Node, tmp_path: Path) -> None:
    kinds = {"ed25519": [], "rsa": ["-b", "2048"], "ecdsa": ["-b", "521"]}
    brought = b""
    for kind, words in kinds.items():
        subprocess.run(["ssh-keygen", "-q", "-t", kind, *words, "-N", "", "-f", tmp_path / kind], check=True)
        brought += (tmp_path / f"{kind}.pub").read_bytes()
    prepare(node, further=authorized.parse_keys(brought, "keys"))
    with sshd(node):
        for kind in kinds:
            node.write(f"/home/alice/{kind}", (tmp_path / kind).read_bytes(), 0o600, "alice")
            node.call(lambda: os.chmod(f"{ETC}/id_ed25519", 0))
            believed(node, "-o", "IdentitiesOnly=yes", "-i", f"/home/alice/{kind}", "node1")


def test_what_holds_whatever_the_template_says(node: Node) -> None:
    """The real sshd, asked what holds (`sshd -T`), with a template that tries everything."""
    prepare(node)
    template = b"\n".join(
        [
            b'Port 22\nPort=23\n \tport\t24\n"Port" 25\nPo"rt" 26\nListenAddress 0.0.0.0:27',
            b"AllowUsers *\nDenyUsers alice\nAllowGroups root\nDenyGroups *",
            b"PasswordAuthentication yes\nPermitEmptyPasswords yes\nChallengeResponseAuthentication yes\nSkeyAuthentication yes",
            b"AuthenticationMethods any\nPubkeyAuthentication no\nDSAAuthentication no\nHostbasedAuthentication yes",
            b"AuthorizedKeysFile %h/.ssh/authorized_keys\nAuthorizedKeysCommand /bin/cat\nAuthorizedKeysCommandUser root",
            b"TrustedUserCAKeys /tmp/ca\nAuthorizedPrincipalsFile /tmp/p\nHostKey /tmp/k\nHostDSAKey /tmp/k\nHostKeyAgent /tmp/s",
            b"HostCertificate /tmp/c\nPermitUserEnvironment yes\nStrictModes no\nUsePAM yes\nPidFile /tmp/pid",
            b'ChrootDirectory /tmp\nSubsystem sftp /bin/false\nSubsystem "sftp" /bin/false\nSubsystem other /bin/other',
            b"Include /etc/ssh/sshd_config\nPermitRootLogin yes\nX\x0bPort 22\n\x00Port 22\nMaxStartups 5:40:60",
            b"ClientAliveInterval 33\nLogLevel VERBOSE\nmatch user alice\nPermitRootLogin yes\nClientAliveInterval 44",
        ]
    )
    text, warnings = config.server_config(template, config.Server("alice", 1204, ["127.0.0.1"]), "/x/sshd_config")
    node.write(f"{ETC}/{config.SERVER_FILE}", text)
    asked = ["/usr/sbin/sshd", "-T", "-f", f"{ETC}/{config.SERVER_FILE}", "-C", "user=alice,host=h,addr=127.0.0.1"]
    said = node.run(asked, "alice", check=True).stdout.splitlines()
    for line in (
        *("port 1204", "listenaddress 127.0.0.1:1204", "allowusers alice", "permitrootlogin no", "usepam no"),
        *("passwordauthentication no", "permitemptypasswords no", "kbdinteractiveauthentication no", "strictmodes yes"),
        *("authenticationmethods publickey", "pubkeyauthentication yes", "hostbasedauthentication no", "pidfile none"),
        *(f"authorizedkeysfile {ETC}/user_auth_keys", "authorizedkeyscommand none", "trustedusercakeys none"),
        *(
            "authorizedprincipalsfile none",
            "permituserenvironment no",
            "chrootdirectory none",
            "clientaliveinterval 33",
        ),
        *(f"hostkey {ETC}/ssh_host_ed25519_key", f"hostcertificate {ETC}/ssh_host_ed25519_key-cert.pub"),
        *(f"subsystem sftp {config.SFTP_SERVER}", "subsystem other /bin/other", "loglevel VERBOSE", "x11forwarding no"),
        *("maxstartups 5:40:60", "hostkeyagent none"),
    ):
        assert line in said, (line, said)
    for keyword in ("port", "listenaddress", "allowusers", "hostkey", "hostcertificate", "subsystem sftp"):
        assert len([line for line in said if line.startswith(f"{keyword} ")]) == 1, keyword
    assert not [line for line in said if line.startswith(("denyusers", "allowgroups", "denygroups"))]
    numbers = [int(warning.split(":")[1]) for warning in warnings]
    kept = {b"Subsystem other", b"ClientAliveInterval 33", b"LogLevel", b"MaxStartups", b"PermitRootLogin yes\nClient"}
    lines = template.split(b"\n")
    stays = [n for n, line in enumerate(lines, 1) if line.startswith(tuple(kept)) and n < numbers[-1]]
    assert sorted([*numbers, *stays]) == list(range(1, lines.index(b"match user alice") + 2))


PIECES = [
    "Port",
    "Match",
    "AllowUsers",
    "PermitRootLogin",
    "HostKey",
    "HostDSAKey",
    "AuthorizedKeysFile",
    "UsePAM",
    "Include",
]
PIECES += ["Subsystem", "PidFile", "sftp", "yes", "all", "user", "alice", "22", "other", "skeyauthentication"]
PIECES += ['"', "=", "\\", "#", "\0", "\r", "\f", "\v", "é", *[" ", "\t", "\n"] * 8]
HELD = [
    "allowusers alice",
    f"authorizedkeysfile {ETC}/user_auth_keys",
    f"hostkey {ETC}/ssh_host_ed25519_key",
    "listenaddress 127.0.0.1:1204",
    "permitrootlogin no",
    "pidfile none",
    "port 1204",
    "usepam no",
]


def test_templates_of_random_words_change_nothing(node: Node) -> None:
    """sshd refuses a file, or holds what must hold: it never understands a line that we took for something else."""
    prepare(node)
    chance = random.Random(1204)
    for number in range(60):
        template = "".join(chance.choices(PIECES, k=chance.randrange(40))).encode()
        text, _ = config.server_config(template, config.Server("alice", 1204, ["127.0.0.1"]))
        node.write(f"/home/alice/{number}", text)
    asked = "/usr/sbin/sshd -T -C user=alice,host=h,addr=127.0.0.1 -f $PWD/$f 2>/dev/null"
    keywords = tuple(line.partition(" ")[0] + " " for line in HELD)
    accepted = 0
    for said in node.run(f"for f in *; do echo ==; {asked}; done", "alice").stdout.split("==\n")[1:]:
        if said:
            accepted += 1
            assert sorted(line for line in said.splitlines() if line.startswith(keywords)) == HELD
    assert accepted > 5


def test_odd_names_of_users_in_allowusers(node: Node) -> None:
    """A directory service's names: what means something in a pattern does not."""
    prepare(node)
    for name in (
        "alice",
        "al?ce",
        "a-l.i_c",
        "DOMAIN\\alice",
        "alice@domain",
        "*",
        "!alice",
        "ali ce",
        "ali#ce",
        '"',
        "älice",
    ):
        text, _ = config.server_config(b"", config.Server(name, 1204, ["127.0.0.1"]))
        node.write(f"{ETC}/{config.SERVER_FILE}", text)
        asked = ["/usr/sbin/sshd", "-T", "-f", f"{ETC}/{config.SERVER_FILE}"]
        said = node.run(asked, "alice", check=True).stdout
        pattern = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "?" * len(c.encode()) for c in name)
        assert f"\nallowusers {pattern}\n" in said
