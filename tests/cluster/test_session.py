"""A session of ssh is what `shifter` is on the other node: environment, groups, mounts; and all of ssh works over it.

Three nodes, one job in a real Debian that has an ssh of its own. Everything is done by the user, inside.
"""

import hashlib
import os
import shlex
from collections.abc import Iterator

import pytest

import tests.debian
from shifter.images import meta
from tests.cluster.job import Job
from tests.conftest import scratch
from tests.node import PREFIX, Cluster, cluster

ENV = {
    "PATH": "/opt/tool/bin:/usr/local/bin:/usr/bin:/bin",
    "QUOTES": "a'b\"c`d\\",
    "DOLLAR": "$HOME ${PATH} $(id)",
    "NEWLINES": "one\nPermitRootLogin yes\nPort 1\n",
    "EQUALS": "=a=b=",
    "UNICODE": "köln 東京 \udcff",
    "BLANKS": "  x  ",
    "EMPTY": "",
    "LONG": "x" * 30000,
    "Port": "22",
    "-o": "ProxyCommand=id",
    "HOME": "/of/the/image",
    "USER": "nobody",
    "SHELL": "/bin/false",
    "MAIL": "/of/the/image",
    "TZ": "Asia/Tokyo",
    "TMPDIR": "/nonexistent",
    "SSH_AUTH_SOCK": "/nonexistent",
    "LD_LIBRARY_PATH": "/nonexistent",
    "OPENSSL_CONF": "/nonexistent",
}
ACCOUNT = {"USER": "alice", "LOGNAME": "alice", "HOME": "/home/alice", "SHELL": "/bin/bash"}
SHELLS = {"_", "PWD", "OLDPWD", "SHLVL"}
"""What a shell adds to its own environment."""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """Three nodes with private propagation only: nothing of what is tested here depends on it. alice's shell is bash."""
    with cluster(3) as made:
        ident = made.add_image("docker:debian:1", tests.debian.debian(scratch(), ["openssh-client", "rsync"]))
        described = meta.Meta(format="squashfs", env=[f"{key}={value}" for key, value in ENV.items()])
        made[0].write(f"/images/{ident}.meta", meta.format(described))
        for node in made:
            node.run("sed -i 's|:/home/alice:.*|:/home/alice:/bin/bash|' /etc/passwd", check=True)
        yield made
        made.check_leaks()


@pytest.fixture(scope="module")
def job(nodes: Cluster) -> Iterator[Job]:
    with Job(nodes, "debian:1") as made:
        yield made


def variables(text: str) -> dict[str, str]:
    """What `env -0` has printed."""
    return dict(item.split("=", 1) for item in text.split("\0") if "=" in item)


KINDS: dict[str, tuple[list[str], str | None]] = {
    "command": (["node2", "env -0"], None),
    "command on a terminal": (["-tt", "node2", "stty -onlcr; printf 'BE''GIN\\0'; env -0"], None),
    "login shell": (["node2"], "printf 'BE''GIN\\0'; env -0\n"),
    "login shell on a terminal": (["-tt", "node2"], "stty -onlcr; printf 'BE''GIN\\0'; env -0; exit\n"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_environment_of_a_session_is_that_of_the_container(job: Job, kind: str) -> None:
    """But for what sshd says of the user and the connection, and what a shell adds."""
    words, typed = KINDS[kind]
    there = variables(job.run("env", "-0", on=1, clean=True).stdout)
    assert there.pop("SHIFTER_JOB_ID") == "17" and there["PATH"] == ENV["PATH"] + ":/opt/udiImage/bin"
    assert {key: there[key] for key in ENV if key != "PATH"} == {key: ENV[key] for key in ENV if key != "PATH"}
    done = job.run("ssh", *words, env={"TERM": "vt220"}, clean=True, input=typed)
    found = variables(done.stdout.rpartition("BEGIN\0")[2])
    assert found.pop("SSH_CONNECTION").startswith("10.128.0.1 ") and found.pop("SSH_CLIENT").endswith(" 1204")
    if "terminal" in kind:
        assert found.pop("SSH_TTY").startswith("/dev/pts/") and found.pop("TERM") == "vt220"
    assert {key: found.pop(key) for key in ACCOUNT} == ACCOUNT
    found = {key: value for key, value in found.items() if key not in SHELLS}
    assert found == {key: value for key, value in there.items() if key not in ACCOUNT}


def test_what_the_client_sends_wins(job: Job) -> None:
    env = ("env", "LANG=de_CH.UTF-8", "LC_ALL=C", "TZ=Europe/Zurich", "DOLLAR=not accepted")
    ssh = ("ssh", "-o", "SendEnv=TZ", "-o", "SendEnv=DOLLAR", "node2", "echo $LANG $LC_ALL $TZ $DOLLAR")
    assert job.run(*env, *ssh).stdout == "de_CH.UTF-8 C Europe/Zurich $HOME ${PATH} $(id)\n"


def test_any_environment_reaches_a_session_and_none_reaches_the_sshd(job: Job) -> None:
    """100 kB in a value, every byte, thousands of variables, and those that steer a C library: a second sshd has them."""
    strange = {
        "HUGE": "y" * 100_000,
        "BYTES": bytes(set(range(1, 256)) - set(b"\r")).decode("utf-8", "surrogateescape"),
        "a-b.c": "odd name",
        "LOCALDOMAIN": "invalid",
        "HOSTALIASES": "/nonexistent",
        "GLIBC_TUNABLES": "glibc.malloc.check=3",
        "LOCPATH": "/nonexistent",
        "LC_ALL": "ja_JP.EUC-JP",
        "KRB5CCNAME": "/nonexistent",
        "SSH_AUTH_SOCK": "/nonexistent",
        **{f"MANY{number}": str(number) for number in range(3000)},
    }
    more = {"PATH": "/only/here", "TZ": "/nonexistent", "LD_PRELOAD": "/nonexistent", "LD_AUDIT": "/nonexistent"}
    words = [f"{PREFIX}/bin/shifter", "/usr/bin/env", *(f"{key}={value}" for key, value in more.items())]
    words += ["/opt/udiImage/sbin/sshd", "-D", "-e", "-p", "2300", "-f", "/opt/udiImage/etc/sshd_config"]
    daemon = job.nodes[1].popen(words, "alice", env=strange)
    try:
        job.nodes[1].wait_port(2300)
        found = variables(job.ssh("-p", "2300", "node2", "/bin/cat /proc/$$/environ"))
        assert {key: found[key] for key in (*strange, *more)} == strange | more and found["USER"] == "alice"
    finally:
        daemon.terminate()
        said = daemon.communicate(timeout=20)[1]
    assert "error" not in said and "fatal" not in said, said


def test_login_shells_keep_the_path_of_the_container(job: Job) -> None:
    """What /etc/profile of Debian makes of PATH is what `shifter bash -l` always gave, with our ssh behind it."""
    debian = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games:/opt/udiImage/bin\n"
    for shell in ("bash", "dash"):
        assert job.run(shell, "-lc", "echo $PATH").stdout == debian
        assert job.ssh("node2", f"{shell} -lc 'echo $PATH'") == debian
        script = "echo $PATH; echo ${SHIFTER_LOGIN_PATH-unset}"
        done = job.run("env", "SHIFTER_LOGIN_PATH=/a:/opt/udiImage/bin:/b", shell, "-lc", script)
        assert (done.stdout, done.stderr) == ("/a:/opt/udiImage/bin:/b\nunset\n", "")
    assert (
        job.run("bash", "-uelc", "unset PATH; . /etc/profile.d/00-shifter.sh; echo $PATH").stdout
        == "/opt/udiImage/bin\n"
    )


def test_session_is_what_shifter_is_on_that_node(job: Job) -> None:
    """Same namespace, ids, groups, capabilities, limits, signals, umask, standing with the OOM killer."""
    lines = "Uid|Gid|Groups|Cap...|NoNewPrivs|Seccomp|SigBlk|SigIgn"
    script = (
        f"cd /; id; umask; ulimit -a; readlink /proc/self/ns/*; grep -E '^({lines}):' /proc/self/status;"
        "cat /proc/self/oom_score_adj; ls -l /proc/self/fd | wc -l; cat /proc/self/mountinfo"
    )
    assert job.ssh("node2", script) == job.run("bash", "-c", script, on=1).stdout


def test_files_go_between_nodes(job: Job) -> None:
    """scp by either protocol and from node to node, sftp, rsync; though the user's shell is not silent."""
    job.nodes[0].write("/home/alice/.bashrc", "echo noise; echo more noise >&2\n", owner="alice")
    try:
        job.nodes[0].write("/home/alice/a b", os.urandom(1 << 20), owner="alice")
        job.sh(
            "mkdir /tmp/t; cd /tmp/t; F=/home/alice/'a b';"
            "scp -q \"$F\" 'node2:/tmp/a b'; scp -q 'node2:/tmp/a b' here; cmp here \"$F\";"
            "scp -q 'node2:/tmp/a b' node3:/tmp/c; scp -q scp://alice@node3//tmp/c c; cmp c \"$F\";"
            "printf 'put here /tmp/up\\nget /tmp/up down\\n' | sftp -q -b - node2 >/dev/null; cmp down \"$F\";"
        )
        job.nodes[0].write("/home/alice/.bashrc", "", owner="alice")
        job.sh(
            "cd /tmp/t; scp -Oq here node2:/tmp/old; scp -Oq node2:/tmp/old old; cmp old here;"
            "rsync -a -e ssh /tmp/t/ node2:/tmp/copy/; rsync -a node2:/tmp/copy/ /tmp/back/; diff -r /tmp/t /tmp/back"
        )
    finally:
        for node in job.nodes:
            node.run("rm -rf /tmp/* '/home/alice/a b' /home/alice/.bashrc")


def test_forwarding_and_shared_connections(job: Job) -> None:
    """-L, -R and -D to another node's sshd, whose banner says that it was reached; sessions over a ControlMaster."""
    banner = "IFS= read -r -t 20 line <&3; echo ${line%%-OpenSSH*}"
    socks = "printf '\\5\\1\\0' >&3; head -c 2 <&3 >/dev/null;"
    socks += "printf '\\5\\1\\0\\3\\5node3\\4\\264' >&3; head -c 10 <&3 >/dev/null"
    reverse = shlex.quote(f"exec 3<>/dev/tcp/127.0.0.1/5001; {banner}")
    script = f"""
        M='-S /tmp/master'; ssh -fNM $M -o ExitOnForwardFailure=yes -L 5000:node3:1204 -R 5001:node3:1204 -D 5002 node2
        exec 3<>/dev/tcp/127.0.0.1/5000; {banner}
        ssh $M node2 bash -c {shlex.quote(reverse)}
        exec 3<>/dev/tcp/127.0.0.1/5002; {socks}; {banner}
        ssh $M node2 'echo $SSH_CONNECTION'; ssh $M node2 'echo $SSH_CONNECTION'; ssh $M -O exit node2 2>/dev/null
    """
    *banners, first, second = job.run("bash", "-ec", script).stdout.splitlines()
    assert banners == ["SSH-2.0"] * 3 and first == second


def test_agent_goes_along(job: Job) -> None:
    script = """
        unset TMPDIR; eval $(ssh-agent) >/dev/null; trap 'kill $SSH_AGENT_PID' EXIT
        ssh-keygen -q -t ed25519 -N '' -f /tmp/key; ssh-add -q /tmp/key; ssh-add -l
        ssh -A node2 ssh-add -l; ssh -A node2 ssh -A node3 ssh-add -l; ! ssh node2 ssh-add -l 2>/dev/null
        rm /tmp/key*
    """
    own, *others = job.sh(script).splitlines()
    assert "ED25519" in own and others[:2] == [own, own]


CONFIGURATIONS = {
    "hostile": "Host *\n Port 9\n IdentityFile /etc/passwd\n ProxyJump nowhere\n ControlPath /tmp/%h\n ControlMaster yes\n"
    " User root\n StrictHostKeyChecking no\n UserKnownHostsFile /dev/zero\n RemoteCommand id\n RequestTTY force\n"
    ' HostName 127.0.0.9\n BindAddress 1.2.3.4\n LocalCommand id\n PermitLocalCommand yes\n Match exec "touch /tmp/ran"\n',
    "modern": "Host *\n Ciphers aes256-gcm@openssh.com\n HostKeyAlgorithms rsa-sha2-512\n Compression yes\n"
    " GSSAPIAuthentication yes\n PubkeyAcceptedAlgorithms rsa-sha2-256\n Port 9\n",
    "broken": 'Port 9\nHost *\n NoSuchOption "unterminated\n Include /dev/zero\n',
}


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_configuration_of_the_user_is_for_other_hosts(job: Job, kind: str) -> None:
    """Nothing of ~/.ssh changes anything between the nodes, on either side."""
    node = job.nodes[0]
    node.write("/home/alice/.ssh/config", CONFIGURATIONS[kind], 0o600, "alice")
    for name in ("rc", "environment", "authorized_keys", "id_ed25519"):
        node.write(f"/home/alice/.ssh/{name}", "echo of the user; exit 1\n", 0o644, "alice")
    ca = job.sh("cat /opt/udiImage/etc/ssh_known_hosts").replace("@cert-authority", "@revoked")
    node.write("/home/alice/.ssh/known_hosts", ca, 0o644, "alice")
    try:
        assert job.sh("ssh node2 hostname; scp -q /etc/hostname node2:/tmp/x; ssh node2 rm /tmp/x") == "node2\n"
        assert job.sh("/usr/bin/ssh alice@node3 hostname; ssh ssh://node3 hostname") == "node3\nnode3\n"
        assert not node.exists("/tmp/ran")
        done = job.run("ssh", "-G", "elsewhere", check=False)
        if kind == "broken":
            assert done.returncode == 255 and "Bad configuration option: nosuchoption" in done.stderr
        else:
            assert "port 9\n" in done.stdout
        job.sh("rm -f /tmp/ran")
    finally:
        node.run("rm -r /home/alice/.ssh", check=True)


def test_ssh_of_the_image_is_covered_and_kept(job: Job) -> None:
    own = tests.debian.debian(scratch(), ["openssh-client", "rsync"]).path
    assert job.sh("command -v ssh; command -v scp; command -v sftp") == "/usr/bin/ssh\n/usr/bin/scp\n/usr/bin/sftp\n"
    for name in ("ssh", "scp", "sftp"):
        assert job.sh(f"cmp /usr/bin/{name} /opt/udiImage/bin/{name}; cmp /bin/{name} /opt/udiImage/bin/{name}") == ""
        digest = hashlib.sha256((own / f"usr/bin/{name}").read_bytes()).hexdigest()
        assert job.sh(f"sha256sum </opt/udiImage/image/{name}").split()[0] == digest
    # Which of them works is decided by the host.
    who = ("env", "SHELL=/bin/sh", "ssh", "-o", "ProxyCommand=sh -c 'cat /proc/$PPID/comm >&2; true'")
    for host, program in (("elsewhere", "ssh"), ("node2", "ssh.real")):
        assert program in job.run(*who, host, check=False).stderr.splitlines()
