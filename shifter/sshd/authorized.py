"""The public keys that users bring: files like authorized_keys, parsed and printed anew.

Most jobs bring none, and what judges curves and moduli takes 45 ms to load: so it is imported where it is needed.
"""

import binascii

from shifter.sshd import SshError
from shifter.sshd.trust import MAX_KEYS, string

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
        blob = binascii.a2b_base64(words[1] if len(words) > 1 else b"", strict_mode=True)
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
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    text = kind + b" " + binascii.b2a_base64(b"".join(map(string, fields)), newline=False)
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
