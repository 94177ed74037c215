"""Keys, certificates and names of a job: made with cryptography, judged by ssh-keygen."""

import base64
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shifter.sshd import SshError, authorized, trust
from shifter.sshd.config import nodes_file
from shifter.sshd.trust import Job

JOB = Job("cluster", 5001, "77", 0)


def raw(job: Job, purpose: str = "login", master: bytes = b"m" * 32) -> bytes:
    return trust.derive(master, job, purpose).public


def keygen(tmp_path: Path, *words: str) -> Path:
    path = tmp_path / "-".join(words)
    subprocess.run(["ssh-keygen", "-q", *words, "-N", "", "-C", "a comment", "-f", path], check=True)
    return path.with_name(path.name + ".pub")


def test_every_node_derives_the_same_and_nothing_else_does() -> None:
    """Pinned: a node of another version of Shifter must agree too."""
    assert raw(JOB).hex() == "79e9ab8a9cc2fdfbdca34a614d0e568e9ce53a666ed1a28f96fad90c8a4b9cea"
    assert raw(JOB, "ca").hex() == "96baa429a40adaeb304a2a75cf59de099b63c3d43abe2f3febbbab63cc264eae"
    others = [Job("cluste", 5001, "77", 0), Job("cluster", 500, "177", 0), Job("cluster", 5001, "7", 70)]
    others += [Job("cluster", 5001, "770", 0), Job("cluster", 5001, "77", 1), Job("", 5001, "77", 0)]
    keys = {raw(job, purpose) for job in [JOB, *others] for purpose in ("ca", "login")}
    assert len(keys | {raw(JOB, master=b"n" * 32)}) == 2 * 7 + 1


words = st.text(alphabet=st.sampled_from("1a\0\x04\udcff "), max_size=4)


@settings(max_examples=40, deadline=None)
@given(words, words, words, words)
def test_no_two_jobs_share_a_key(cluster: str, job: str, other_cluster: str, other_job: str) -> None:
    same = (cluster, job) == (other_cluster, other_job)
    assert (raw(Job(cluster, 1, job, 1)) == raw(Job(other_cluster, 1, other_job, 1))) == same


def test_certificate_as_ssh_keygen_reads_it(tmp_path: Path) -> None:
    names = ["node1", "Node1.Example", "10.0.0.7", "FD00::0:1"]
    job = Job("cluster", 5001, "77", 3)
    written = {file.name: file for file in trust.files(job, [b"m" * 32], names)}
    path = tmp_path / "host-cert.pub"
    path.write_bytes(written["ssh_host_ed25519_key-cert.pub"].data)
    said = subprocess.run(["ssh-keygen", "-L", "-f", path], capture_output=True, text=True, check=True).stdout
    assert "ssh-ed25519-cert-v01@openssh.com host certificate" in said
    assert 'Key ID: "shifter job 77 restart 3 uid 5001 node 10.0.0.7"' in said
    assert "Serial: 77\n" in said and "Valid: forever\n" in said and "Critical Options: (none)" in said
    principals = said.partition("Principals: ")[2].partition("Critical")[0].split()
    assert principals == ["10.0.0.7", "fd00::1", "node1", "node1.example"]
    for name in ("ssh_host_ed25519_key", "id_ed25519"):
        assert (written[name].mode, written[name].owner) == (0o400, 5001)
        private = tmp_path / name
        private.write_bytes(written[name].data)
        private.chmod(0o400)
        public = subprocess.run(["ssh-keygen", "-y", "-f", private], capture_output=True, check=True).stdout
        assert public.split()[:2] == written[f"{name}.pub"].data.split()
    assert {
        (file.mode, file.owner) for name, file in written.items() if name not in ("ssh_host_ed25519_key", "id_ed25519")
    } == {(0o444, 0)}
    assert written["user_auth_keys"].data == written["id_ed25519.pub"].data
    assert written["ssh_known_hosts"].data.startswith(b"@cert-authority * ssh-ed25519 ")


def test_hostile_job_ids_stay_in_the_key_id(tmp_path: Path) -> None:
    for job in ('7"\n\x1b[2J', "9" * 30, "", "x" * 5000, "\udcff"):
        files = trust.files(Job("c", 5001, job, 0), [b"m" * 32], ["n"])
        path = tmp_path / "x-cert.pub"
        path.write_bytes(next(file.data for file in files if file.name.endswith("cert.pub")))
        said = subprocess.run(["ssh-keygen", "-L", "-f", path], capture_output=True, text=True, check=True).stdout
        assert "\x1b" not in said and "Serial: 0\n" in said


def test_two_secrets_make_keys_of_the_first_and_accept_both() -> None:
    def files(*masters: bytes) -> dict[str, bytes]:
        return {file.name: file.data for file in trust.files(JOB, masters, ["n"])}

    new, old, both = files(b"n" * 32), files(b"o" * 32), files(b"n" * 32, b"o" * 32)
    assert both["id_ed25519"] != old["id_ed25519"] and both["id_ed25519.pub"] == new["id_ed25519.pub"]
    for name in ("user_auth_keys", "ssh_known_hosts"):
        assert both[name] == new[name] + old[name]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a b",
        "a\n",
        "a\nb",
        'a"',
        "a'b",
        "a%h",
        "a@b",
        "*",
        "!a",
        "?",
        "a,b",
        "-oProxyCommand=x",
        "a/b",
        "a:b",
        "é",
        "a" * 254,
    ]
    + ["[::1]", "fe80::1%eth0", "1.2.3.4:5", "a\0", "::g", "#a", "|1|a"],
)
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(SshError) as caught:
        trust.node_names(["good", name])
    assert str(caught.value).isascii() and str(caught.value).isprintable()


def test_many_names() -> None:
    names = [f"Node{number % 10000}" for number in range(20000)]
    listed = nodes_file(names).split(b"\n")
    assert len(listed) == 10001 and listed[-1] == b"" and listed[:-1] == sorted(set(listed[:-1]))
    with pytest.raises(SshError, match="more than 65536 names"):
        trust.node_names(map(str, range(70000)))
    with pytest.raises(SshError, match="this node has 257 names"):
        trust.files(JOB, [b"m" * 32], map("n{}".format, range(257)))
    with pytest.raises(SshError, match="this node has 0 names"):
        trust.files(JOB, [b"m" * 32], [])


@pytest.mark.parametrize("kind", [["-t", "ed25519"], ["-t", "rsa", "-b", "2048"], ["-t", "ecdsa", "-b", "384"]])
def test_keys_are_printed_anew(tmp_path: Path, kind: list[str]) -> None:
    text = keygen(tmp_path, *kind).read_bytes()
    kept = b" ".join(text.split()[:2])
    assert authorized.parse_keys(b"# a file\r\n\n\t" + text.replace(b"\n", b"\r\n") + text, "keys") == [kept]


def security_key(kind: bytes, *fields: bytes) -> bytes:
    blob = b"".join(len(field).to_bytes(4, "big") + field for field in (kind, *fields))
    return kind + b" " + base64.b64encode(blob)


def test_security_keys(tmp_path: Path) -> None:
    point = base64.b64decode(keygen(tmp_path, "-t", "ecdsa", "-b", "256").read_bytes().split()[1])[-65:]
    ed25519 = base64.b64decode(keygen(tmp_path, "-t", "ed25519").read_bytes().split()[1])[-32:]
    for key in (
        security_key(b"sk-ssh-ed25519@openssh.com", ed25519, b"ssh:"),
        security_key(b"sk-ecdsa-sha2-nistp256@openssh.com", b"nistp256", point, b"ssh:"),
    ):
        assert authorized.parse_keys(key + b" comment", "keys") == [key]
        path = tmp_path / "sk.pub"
        path.write_bytes(key + b"\n")
        subprocess.run(["ssh-keygen", "-l", "-f", path], capture_output=True, check=True)


REFUSED: dict[str, Callable[[bytes], bytes]] = {
    "has no public key": lambda _: b"\n# nothing\n",
    "1: options before a key": lambda key: b'command="/bin/sh" ' + key,
    "2: options before a key": lambda key: key + b"restrict,pty " + key,
    "1: this is no public key file": lambda _: b"-----BEGIN OPENSSH PRIVATE KEY-----\n",
    "1: not a public key": lambda key: b'command="x\ty"\x0b' + key.replace(b"ssh-ed25519", b"ssh-dss"),
    "1: the key is not base64": lambda key: key.replace(b"AAAA", b"A!AA"),
    "1: the key is not of type ssh-ed25519": lambda _: b"ssh-ed25519",
    "1: the key is not of type ssh-rsa": lambda key: key.replace(b"ssh-ed25519", b"ssh-rsa"),
    "1: a certificate is no": lambda key: key.replace(b"ssh-ed25519", b"ssh-ed25519-cert-v01@openssh.com"),
    "1: the key is cut off": lambda key: b" ".join(
        [key.split()[0], base64.b64encode(base64.b64decode(key.split()[1])[:-1])]
    ),
    "1: not a valid key of type ssh-ed25519": lambda _: security_key(b"ssh-ed25519", b"x" * 31),
    "1: not a valid key of type ecdsa": lambda _: security_key(
        b"ecdsa-sha2-nistp256", b"nistp256", b"\x04" + b"x" * 64
    ),
    "1: an RSA key of 1024 bits": lambda _: security_key(b"ssh-rsa", b"\1\0\1", b"\0" + b"\xff" * 128),
    "1: an RSA key of 80000 bits": lambda _: security_key(b"ssh-rsa", b"\1\0\1", b"\0" + b"\xff" * 10000),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_keys_that_are_refused(tmp_path: Path, reason: str) -> None:
    key = keygen(tmp_path, "-t", "ed25519").read_bytes()
    with pytest.raises(SshError) as caught:
        authorized.parse_keys(REFUSED[reason](key), "/keys")
    assert str(caught.value).startswith("/keys") and reason in str(caught.value)
    assert base64.b64encode(b"\0\0") not in str(caught.value).encode()


def test_number_of_keys_is_bounded() -> None:
    keys = [security_key(b"ssh-ed25519", raw(Job("c", number, "1", 0))) for number in range(1, 101)]
    assert len(authorized.parse_keys(b"\n".join(keys), "keys")) == 100
    with pytest.raises(SshError, match="101 public keys may log in, at most 100"):
        trust.files(JOB, [b"m" * 32], ["n"], keys)
    with pytest.raises(SshError, match="keys:101: more than 100 public keys"):
        authorized.parse_keys(b"\n".join([*keys, security_key(b"ssh-ed25519", raw(JOB))]), "keys")


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [b"ssh-ed25519", b"ssh-rsa", b"AAAA", b" ", b"\n", b"\r", b"\0", b"\xff", b'"', b"=", b",", b"A", b"#"]
        )
    )
)
def test_any_bytes_are_keys_or_refused(parts: list[bytes]) -> None:
    with pytest.raises(SshError):
        authorized.parse_keys(b"".join(parts), "keys")
