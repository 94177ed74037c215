"""The keys of one job: a CA and a login key that every node derives alike, a host key that each node makes for itself.

From the master secret (`secret`) HKDF-SHA256 gives 32-byte seeds of Ed25519 keys. What goes into it is what the workload
manager tells all nodes alike: cluster, uid, job, restart count; and the purpose. So nodes agree without a message, and no
key of another job, another user, or an earlier run of the same job fits.

**Validity is for ever.** Certificates are valid from 0 to the last second there is: nobody but the nodes of this job
trusts their CA, which nobody stores, so time limits would add nothing but logins that fail where a clock is wrong.

**Two generations** of a master (see `secret`): keys are made from the first; the CA and login keys of both are accepted.

`files` gives everything that the builder writes below `/opt/udiImage/etc` but the configuration files.
"""

import _hashlib
import _socket
import binascii
import os
from collections.abc import Iterable, Sequence

from shifter.sshd import SshError
from shifter.sshd.ed25519 import Key

ETC = "/opt/udiImage/etc"
MAX_KEYS = 100
"""Public keys that may log in, the job's own among them: sshd tries them one after the other."""
MAX_PRINCIPALS = 256
"""Names in one certificate: SSHKEY_CERT_MAX_PRINCIPALS of OpenSSH."""
MAX_NAMES = 65536
"""Names and addresses of all nodes of a job."""

_FOREVER = 2**64 - 1
_SSH2_CERT_TYPE_HOST = 2
_KIND = b"ssh-ed25519"
_MAX_NAME = 253
_NAME = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")


class Job:
    """What all nodes of a job know alike, and its keys are derived from."""

    def __init__(self, cluster: str, uid: int, job: str, restart: int) -> None:
        self.cluster = cluster
        self.uid = uid
        self.job = job
        self.restart = restart


class File:
    """One file below ETC: what setupRoot hands to the builder."""

    def __init__(self, name: str, data: bytes, mode: int, owner: int) -> None:
        self.name = name
        self.data = data
        self.mode = mode
        self.owner = owner


def derive(master: bytes, job: Job, purpose: str) -> Key:
    """Return the key of *job* for *purpose* (``ca``, ``login``); the same on every node."""
    words = (job.cluster, str(job.uid), job.job, str(job.restart), purpose)
    # With its length before each word no two jobs have the same text: ("a", "bc") is not ("ab", "c").
    info = b"".join(map(string, (word.encode("utf-8", "surrogateescape") for word in words)))
    # HKDF-SHA256 (RFC 5869) of 32 bytes, which is one block.
    extracted = _hashlib.hmac_digest(b"shifter ssh keys 1", master, "sha256")
    return Key(_hashlib.hmac_digest(extracted, info + b"\x01", "sha256"))


def node_names(names: Iterable[str]) -> list[str]:
    """Return *names* of nodes in lower case, addresses in canonical form, each once, sorted by their bytes.

    Raises SshError for one that is neither ``[A-Za-z0-9._-]{1,253}`` (and no option) nor an address, and for more than
    MAX_NAMES: they go into lines of configuration files, certificates and command lines.
    """
    found: set[str] = set()
    for name in names:
        if 0 < len(name) <= _MAX_NAME and name[0] != "-" and _NAME.issuperset(name):
            found.add(name.lower())
        else:
            found.add(canonical_address(name))
        if len(found) > MAX_NAMES:
            raise SshError(f"more than {MAX_NAMES} names of nodes")
    return sorted(found, key=str.encode)


def canonical_address(text: str) -> str:
    """Return the IPv4 or IPv6 address *text* as ssh spells it. Raises SshError."""
    family = _socket.AF_INET6 if ":" in text else _socket.AF_INET
    try:
        return _socket.inet_ntop(family, _socket.inet_pton(family, text))
    except (OSError, ValueError):
        if "%" in text:
            raise SshError(f"{text[:260]!a}: an address with a scope means another node on each node") from None
        raise SshError(f"{text[:260]!a} is neither the name of a node nor an address") from None


def files(job: Job, masters: Sequence[bytes], names: Iterable[str], authorized: Iterable[bytes] = ()) -> list[File]:
    """Return the key files of a node that is known by *names* for the UDI of *job*.

    masters: the site's secrets or the user's one; authorized: further public keys, as `parse_keys` returns them.
    What has a secret is the user's, 0400: their sshd and ssh run as the user, and accept nothing that others can read.
    What says who may log in, or whom to trust, is root's: no process of the user changes it.
    """
    cas = [derive(master, job, "ca") for master in masters]
    logins = [derive(master, job, "login") for master in masters]
    host = Key.generate()
    host_public = _public(host)
    allowed = list(dict.fromkeys([*map(_public, logins), *authorized]))
    if len(allowed) > MAX_KEYS:
        raise SshError(f"{len(allowed)} public keys may log in, at most {MAX_KEYS} are possible")
    known = [b"@cert-authority * " + _public(ca) + b"\n" for ca in cas]
    return [
        File("ssh_host_ed25519_key", _private(host), 0o400, job.uid),
        File("ssh_host_ed25519_key.pub", host_public + b"\n", 0o444, 0),
        File("ssh_host_ed25519_key-cert.pub", _certificate(job, cas[0], host, node_names(names)), 0o444, 0),
        File("id_ed25519", _private(logins[0]), 0o400, job.uid),
        File("id_ed25519.pub", _public(logins[0]) + b"\n", 0o444, 0),
        File("user_auth_keys", b"".join(key + b"\n" for key in allowed), 0o444, 0),
        File("ssh_known_hosts", b"".join(known), 0o444, 0),
    ]


def _certificate(job: Job, ca: Key, host: Key, names: list[str]) -> bytes:
    """Return the host certificate for exactly *names*, which are in lower case: ssh compares so (PROTOCOL.certkeys)."""
    if not 1 <= len(names) <= MAX_PRINCIPALS:
        raise SshError(
            f"this node has {len(names)} names and addresses; a host certificate holds 1 to {MAX_PRINCIPALS}"
        )
    # Both are for the log: sshd and `ssh -v` print them. A job id that is no number leaves the serial 0, "none given".
    number = int(job.job) if job.job.isascii() and job.job.isdigit() and len(job.job) < 20 else 0
    ident = f"shifter job {job.job} restart {job.restart} uid {job.uid} node {names[0]}"
    kind = b"ssh-ed25519-cert-v01@openssh.com"
    body = b"".join(
        (
            string(kind),
            string(os.urandom(32)),  # nonce
            string(host.public),
            number.to_bytes(8, "big"),
            _SSH2_CERT_TYPE_HOST.to_bytes(4, "big"),
            string("".join(char if " " <= char <= "~" else "?" for char in ident)[:256].encode("ascii")),
            string(b"".join(string(name.encode("ascii")) for name in names)),
            (0).to_bytes(8, "big"),  # valid after
            _FOREVER.to_bytes(8, "big"),  # valid before
            string(b"") * 3,  # critical options, extensions, reserved
            string(_blob(ca)),
        )
    )
    signature = string(_KIND) + string(ca.sign(body))
    return kind + b" " + _base64(body + string(signature)) + b"\n"


def _public(key: Key) -> bytes:
    return _KIND + b" " + _base64(_blob(key))


def _private(key: Key) -> bytes:
    """Return the file of a private key that is not encrypted (PROTOCOL.key)."""
    check = os.urandom(4) * 2
    inner = check + _blob(key) + string(key.seed + key.public) + string(b"")
    inner += bytes(range(1, 1 + -len(inner) % 8))
    none = string(b"none") * 2 + string(b"")
    text = _base64(b"openssh-key-v1\0" + none + (1).to_bytes(4, "big") + string(_blob(key)) + string(inner))
    lines = [b"-----BEGIN OPENSSH PRIVATE KEY-----"]
    lines += [text[at : at + 70] for at in range(0, len(text), 70)]
    return b"\n".join([*lines, b"-----END OPENSSH PRIVATE KEY-----", b""])


def _blob(key: Key) -> bytes:
    """Return a public key as it goes over the wire (RFC 8709)."""
    return string(_KIND) + string(key.public)


def string(data: bytes) -> bytes:
    """Return *data* as a string of the ssh protocol: its length before it (RFC 4251, section 5)."""
    return len(data).to_bytes(4, "big") + data


def _base64(data: bytes) -> bytes:
    return binascii.b2a_base64(data, newline=False)
