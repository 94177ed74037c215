"""Configuration files of one UDI from templates: what the real ssh understands of any of them, and which lines are named."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shifter.sshd import SshError, config
from shifter.sshd.trust import ETC

SERVER = config.Server("alice", 1204, ["10.0.0.1", "fd00::1"])


def test_what_a_site_changes_is_kept() -> None:
    template = b"# ours\n\nLogLevel DEBUG\nAcceptEnv LANG LC_*\n  Banner=/etc/issue\nForceCommand /bin/x  \nX11Forwarding yes\r\n"
    text, warnings = config.server_config(template, SERVER)
    assert text.endswith(template.replace(b"  \n", b"\n").replace(b"\r\n", b"\n")) and warnings == []
    assert b"X11Forwarding no" not in text and b"MaxStartups 512:30:1024" in text
    text, _ = config.server_config(b"", SERVER)
    assert b"\nX11Forwarding no\n" in text and b"\nListenAddress 10.0.0.1\nListenAddress fd00::1\n" in text


def test_warnings_name_the_line_that_is_overruled() -> None:
    template = b"PermitRootLogin no\nPermitRootLogin Yes\nListenAddress ::\nInclude x\nSubsystem sftp /bin/server\n"
    template += b"\x1b[2Jx\nMatch all\nPort 1"
    _, warnings = config.server_config(template, SERVER, "/udi/sshd_config")
    assert warnings == [
        "/udi/sshd_config:2: PermitRootLogin is overruled: 'PermitRootLogin no' holds",
        "/udi/sshd_config:3: ListenAddress is overruled: 'ListenAddress fd00::1' holds",
        "/udi/sshd_config:4: Include is left out: in a UDI it must have no value but its default",
        "/udi/sshd_config:5: Subsystem is overruled: the sftp subsystem is that of udiImage",
        "/udi/sshd_config:6: '\\x1b[2Jx' is left out: it is not 'Keyword value' in plain characters",
        "/udi/sshd_config:7: Match and what follows it is left out: it would override what must hold",
    ]
    _, warnings = config.server_config(b"ListenAddress ::\n", config.Server("alice", 1204))
    assert warnings == ["sshd_config:1: ListenAddress is left out: in a UDI it must have no value but its default"]
    _, warnings = config.client_config(
        b"Host *\n  Port=22\n  identityfile ~/.ssh/id\n  Include ~/x\nMatch all\n  ServerAliveInterval 5", 1204
    )
    assert [warning.split(" is ")[0] for warning in warnings] == [
        "ssh_config:2: Port",
        "ssh_config:3: identityfile",
        "ssh_config:4: Include",
    ]


@pytest.mark.parametrize("user", ["", "a\nPort 22", "a\rb", "a/b", "a:b", "a\tb", "x" * 257, "\x7f"])
def test_user_names_that_are_none(user: str) -> None:
    with pytest.raises(SshError, match="is not a user name"):
        config.server_config(b"", config.Server(user, 1204))


def test_ports_addresses_and_sizes_that_are_none() -> None:
    for port in (0, -1, 65536):
        with pytest.raises(SshError, match="is not a port"):
            config.server_config(b"", config.Server("alice", port))
        with pytest.raises(SshError, match="is not a port"):
            config.client_config(b"", port)
    for address in ("*", "10.0.0.1\nPort 22", "10.0.0.1:22", "node1", "fe80::1%lo"):
        with pytest.raises(SshError):
            config.server_config(b"", config.Server("alice", 1204, [address]))
    with pytest.raises(SshError, match="is longer than 65536 bytes"):
        config.server_config(b"#" * 65537, SERVER)


FIXED = [
    "port 1204",
    "stricthostkeychecking true",
    "identitiesonly yes",
    "hostkeyalgorithms ssh-ed25519-cert-v01@openssh.com",
    "casignaturealgorithms ssh-ed25519",
    f"globalknownhostsfile {ETC}/ssh_known_hosts",
    "userknownhostsfile none",
    "preferredauthentications publickey",
    "passwordauthentication no",
    "updatehostkeys false",
    f"identityfile {ETC}/id_ed25519",
    "hostname node1",
    "canonicalizehostname false",
]
PIECES = [
    b"Port",
    b"Host",
    b"Match",
    b"Include",
    b"IdentityFile",
    b"HostName",
    b"HostKeyAlias",
    b"ProxyJump",
    b"ProxyCommand",
]
PIECES += [
    b"StrictHostKeyChecking",
    b"UserKnownHostsFile",
    b"CertificateFile",
    b"User",
    b"CASignatureAlgorithms",
    b"dsaauthentication",
]
PIECES += [
    b"*",
    b"all",
    b"no",
    b"node1",
    b"22",
    b'"',
    b"=",
    b" ",
    b" ",
    b" ",
    b"\t",
    b"\n",
    b"\n",
    b"\n",
    b"\r",
    b"\f",
    b"\0",
    b"\\",
    b"#",
]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join))
def test_no_template_of_the_client_changes_what_must_hold(tmp_path: Path, template: bytes) -> None:
    """Asked of the real ssh (`ssh -G`). It may refuse the whole file: then a site hears of it, and nobody is misled."""
    text, _ = config.client_config(template, 1204)
    path = tmp_path / "config"
    path.write_bytes(text)
    done = subprocess.run(["/usr/bin/ssh", "-G", "-F", path, "node1"], capture_output=True, text=True, timeout=60)
    if done.returncode == 0:
        said = done.stdout.splitlines()
        assert [line for line in FIXED if line not in said] == []
        names = ("identityfile ", "certificatefile ", "hostkeyalias ", "proxyjump ", "proxycommand ")
        assert [line for line in said if line.startswith(names)] == [f"identityfile {ETC}/id_ed25519"]
