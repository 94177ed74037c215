"""The keys of one job: a CA and a login key that every node derives alike, a host key that each node makes for itself.

From the master secret (`secret`) HKDF-SHA256 gives 32-byte seeds of Ed25519 keys. What goes into it is what the workload
manager tells all nodes alike: cluster, uid, job, restart count; and the purpose. So nodes agree without a message, and no
key of another job, another user, or an earlier run of the same job fits.

**Validity is for ever.** Certificates are valid from 0 to the last second there is: nobody but the nodes of this job
trusts their CA, which nobody stores, so time limits would add nothing but logins that fail where a clock is wrong.

**Two generations** of a master (see `secret`): keys are made from the first; the CA and login keys of both are accepted.

`files` gives everything that the builder writes below `/opt/udiImage/etc` but the configuration files.
"""

import base64
import binascii
import ipaddress
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    SSHCertificateBuilder,
    SSHCertificateType,
    load_ssh_public_key,
)

from shifter.sshd import SshError

ETC = "/opt/udiImage/etc"
MAX_KEYS = 100
"""Public keys that may log in, the job's own among them: sshd tries them one after the other."""
MAX_PRINCIPALS = 256
"""Names in one certificate: SSHKEY_CERT_MAX_PRINCIPALS of OpenSSH."""
MAX_NAMES = 65536
"""Names and addresses of all nodes of a job."""

_FOREVER = 2**64 - 1
_NAME = re.compile(r"(?!-)[A-Za-z0-9._-]{1,253}", re.ASCII)


@dataclass(frozen=True)
class Job:
    """What all nodes of a job know alike, and its keys are derived from."""

    cluster: str
    uid: int
    job: str
    restart: int


@dataclass(frozen=True)
class File:
    """One file below ETC: what setupRoot hands to the builder."""

    name: str
    data: bytes
    mode: int
    owner: int


def derive(master: bytes, job: Job, purpose: str) -> Ed25519PrivateKey:
    """Return the key of *job* for *purpose* (``ca``, ``login``); the same on every node."""
    words = (job.cluster, str(job.uid), job.job, str(job.restart), purpose)
    # With its length before each word no two jobs have the same text: ("a", "bc") is not ("ab", "c").
    info = b"".join(
        struct.pack(">I", len(word)) + word for word in (word.encode("utf-8", "surrogateescape") for word in words)
    )
    seed = HKDF(algorithm=SHA256(), length=32, salt=b"shifter ssh keys 1", info=info).derive(master)
    return Ed25519PrivateKey.from_private_bytes(seed)


def node_names(names: Iterable[str]) -> list[str]:
    """Return *names* of nodes in lower case, addresses in canonical form, each once, sorted by their bytes.

    Raises SshError for one that is neither ``[A-Za-z0-9._-]{1,253}`` (and no option) nor an address, and for more than
    MAX_NAMES: they go into lines of configuration files, certificates and command lines.
    """
    found: set[str] = set()
    for name in names:
        if _NAME.fullmatch(name):
            found.add(name.lower())
        else:
            found.add(canonical_address(name))
        if len(found) > MAX_NAMES:
            raise SshError(f"more than {MAX_NAMES} names of nodes")
    return sorted(found, key=str.encode)


def canonical_address(text: str) -> str:
    """Return the IPv4 or IPv6 address *text* as ssh spells it. Raises SshError."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise SshError(f"{text[:260]!a} is neither the name of a node nor an address") from None
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
        raise SshError(f"{text[:260]!a}: an address with a scope means another node on each node")
    return str(address)


def files(job: Job, masters: Sequence[bytes], names: Iterable[str], authorized: Iterable[bytes] = ()) -> list[File]:
    """Return the key files of a node that is known by *names* for the UDI of *job*.

    masters: the site's secrets or the user's one; authorized: further public keys, as `parse_keys` returns them.
    What has a secret is the user's, 0400: their sshd and ssh run as the user, and accept nothing that others can read.
    What says who may log in, or whom to trust, is root's: no process of the user changes it.
    """
    cas = [derive(master, job, "ca") for master in masters]
    logins = [derive(master, job, "login") for master in masters]
    host = Ed25519PrivateKey.generate()
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


def _certificate(job: Job, ca: Ed25519PrivateKey, host: Ed25519PrivateKey, names: list[str]) -> bytes:
    """Return the host certificate for exactly *names*, which are in lower case: ssh compares so."""
    if not 1 <= len(names) <= MAX_PRINCIPALS:
        raise SshError(
            f"this node has {len(names)} names and addresses; a host certificate holds 1 to {MAX_PRINCIPALS}"
        )
    # Both are for the log: sshd and `ssh -v` print them. A job id that is no number leaves the serial 0, "none given".
    number = int(job.job) if re.fullmatch(r"[0-9]{1,19}", job.job, re.ASCII) else 0
    ident = f"shifter job {job.job} restart {job.restart} uid {job.uid} node {names[0]}"
    builder = SSHCertificateBuilder().public_key(host.public_key()).type(SSHCertificateType.HOST)
    builder = builder.serial(number).key_id(re.sub(r"[^ -~]", "?", ident)[:256].encode("ascii"))
    builder = builder.valid_principals([name.encode("ascii") for name in names])
    certificate = builder.valid_after(0).valid_before(_FOREVER).sign(ca)
    return certificate.public_bytes() + b"\n"


def _public(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def _private(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


# --- keys that users bring -------------------------------------------------------------------------------------------

# What follows the type in each kind of key: how many strings, and what the first one must be (None: anything).
_KINDS = {
    b"ssh-ed25519": (1, None),
    b"ssh-rsa": (2, None),
    b"ecdsa-sha2-nistp256": (2, b"nistp256"),
    b"ecdsa-sha2-nistp384": (2, b"nistp384"),
    b"ecdsa-sha2-nistp521": (2, b"nistp521"),
    b"sk-ssh-ed25519@openssh.com": (2, None),
    b"sk-ecdsa-sha2-nistp256@openssh.com": (3, b"nistp256"),
}
_RSA_BITS = (2048, 16384)


def parse_keys(data: bytes, where: str) -> list[bytes]:
    """Return the public keys in *data*, the content of a file like authorized_keys, as ``TYPE BASE64``.

    They are printed anew from what they mean: no option, comment or byte of the file itself goes further. A line with
    options is refused and not stripped: without its ``command=`` or ``from=`` the key would open more than it should.
    Raises SshError naming *where* and the line.
    """
    keys: dict[bytes, None] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        words = line.split()
        if not words or words[0].startswith(b"#"):
            continue
        try:
            keys[_key(words)] = None
        except ValueError as error:
            raise SshError(f"{where}:{number}: {error}") from None
        if len(keys) > MAX_KEYS:
            raise SshError(f"{where}:{number}: more than {MAX_KEYS} public keys")
    if not keys:
        raise SshError(f"{where} has no public key")
    return list(keys)


def _key(words: list[bytes]) -> bytes:
    """Return the key of one line anew. Raises ValueError, whose text shows nothing of the line."""
    kind = words[0]
    if kind not in _KINDS:
        if b"-cert-v01@openssh.com" in kind:
            raise ValueError("a certificate is no public key")
        if b"PRIVATE" in kind or kind.startswith(b"-----"):
            raise ValueError("this is no public key file; the public one ends in .pub")
        if any(word in _KINDS for word in words[1:]):
            raise ValueError("options before a key are not supported; give the key alone")
        raise ValueError("not a public key of type ssh-ed25519, ssh-rsa, ecdsa-sha2-nistp*, sk-ssh-ed25519 or sk-ecdsa")
    try:
        blob = base64.b64decode(words[1] if len(words) > 1 else b"", validate=True)
    except binascii.Error:
        raise ValueError("the key is not base64") from None
    fields = _strings(blob)
    count, first = _KINDS[kind]
    if len(fields) != count + 1 or fields[0] != kind or (first is not None and fields[1] != first):
        raise ValueError(f"the key is not of type {kind.decode()}, as its line says")
    if kind == b"ssh-rsa":
        bits = int.from_bytes(fields[2], "big").bit_length()
        if not _RSA_BITS[0] <= bits <= _RSA_BITS[1]:
            raise ValueError(f"an RSA key of {bits} bits; {_RSA_BITS[0]} to {_RSA_BITS[1]} are possible")
    # Again from the fields: one number, one encoding. Then whoever knows about curves and moduli may object.
    text = kind + b" " + base64.b64encode(b"".join(struct.pack(">I", len(field)) + field for field in fields))
    try:
        load_ssh_public_key(text)
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError(f"not a valid key of type {kind.decode()}") from None
    return text


def _strings(blob: bytes) -> list[bytes]:
    """Return the length-prefixed strings of *blob*. Raises ValueError when it is not made of whole ones."""
    found = []
    at = 0
    while at < len(blob):
        end = at + 4 + int.from_bytes(blob[at : at + 4], "big")
        if at + 4 > len(blob) or end > len(blob):
            raise ValueError("the key is cut off")
        found.append(blob[at + 4 : end])
        at = end
    return found
