"""Asking an sshd for its host key: the first half of a key exchange (RFC 4253, RFC 8731), with whoever answers.

As ssh-keyscan does it, without starting that in the UDI: that costs a launch, in front of every job. Nothing that comes is
believed, executed or written; it is compared with what must come. By `_socket`: `socket` takes longer to load than that to do.
"""

import _socket
import contextlib
import os
import time

from shifter.sshd import SshError
from shifter.sshd.trust import string

SSH_MSG_KEXINIT = 20
SSH_MSG_KEX_ECDH_INIT = 30
SSH_MSG_KEX_ECDH_REPLY = 31
MAX_PACKET = 65536
MAX_BANNER = 8192
"""Bytes of a packet (RFC 4253 asks for 35,000), and of the lines before the version."""
KEX = b"curve25519-sha256"
HOST_KEY = b"ssh-ed25519-cert-v01@openssh.com"
_LISTS = 10
"""Name lists of a KEXINIT: key exchange and host key first, then of each direction cipher, MAC, compression, language."""
_BASE_POINT = bytes([9]) + bytes(31)


def host_key(address: str, port: int, seconds: float) -> bytes:
    """Return the host key, or certificate, of the sshd at *address* and *port*, as it goes over the wire; b"" if none comes.

    Raises SshError for an sshd that knows no KEX, OSError if nobody answers within *seconds*.
    """
    deadline = time.monotonic() + seconds
    family = _socket.AF_INET6 if ":" in address else _socket.AF_INET
    with contextlib.closing(_socket.socket(family, _socket.SOCK_STREAM)) as peer:
        peer.settimeout(seconds)
        peer.connect((address, port))
        peer.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
        answer = _Answer(peer, deadline)
        peer.sendall(b"SSH-2.0-shifter_setupRoot\r\n")
        if not answer.has_version():
            return b""
        offered = answer.packet()
        if offered[:1] != bytes([SSH_MSG_KEXINIT]):
            return b""
        lists = _strings(offered[17:], _LISTS)
        if KEX not in lists[0].split(b","):
            raise SshError(
                f"the sshd's KexAlgorithms leave out {KEX.decode()}, with which setupRoot asks whether it is the right one"
            )
        # Everything else as the other side likes it best: it will never be used.
        wanted = [KEX, HOST_KEY, *lists[2:]]
        own = bytes([SSH_MSG_KEXINIT]) + os.urandom(16) + b"".join(map(string, wanted)) + bytes(5)
        peer.sendall(_packet(own) + _packet(bytes([SSH_MSG_KEX_ECDH_INIT]) + string(_BASE_POINT)))
        reply = answer.packet()
    return _strings(reply[1:], 1)[0] if reply[:1] == bytes([SSH_MSG_KEX_ECDH_REPLY]) else b""


class _Answer:
    """What comes from the other side, until the deadline."""

    def __init__(self, peer: _socket.socket, deadline: float) -> None:
        self.peer = peer
        self.deadline = deadline
        self.data = b""

    def has_version(self) -> bool:
        """Read the lines up to the other side's version; False if that is none of SSH 2."""
        while True:
            line, end, rest = self.data.partition(b"\n")
            if end:
                self.data = rest
                if line.startswith(b"SSH-"):
                    return line.startswith((b"SSH-2.0-", b"SSH-1.99-"))
            elif len(self.data) > MAX_BANNER or not self._more():
                return False

    def packet(self) -> bytes:
        """Return the payload of the next packet, b"" if there is none."""
        head = self._take(5)
        length, padding = int.from_bytes(head[:4], "big"), head[4:]
        if not padding or not padding[0] < length <= MAX_PACKET:
            return b""
        return self._take(length - 1)[: length - 1 - padding[0]]

    def _take(self, length: int) -> bytes:
        """Return the next *length* bytes, b"" if they don't come."""
        while len(self.data) < length:
            if not self._more():
                return b""
        taken, self.data = self.data[:length], self.data[length:]
        return taken

    def _more(self) -> bool:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.peer.settimeout(left)
        block = self.peer.recv(MAX_PACKET)
        self.data += block
        return bool(block)


def _packet(payload: bytes) -> bytes:
    padding = 16 - (len(payload) + 5) % 8  # to a multiple of 8, and at least 4
    return (len(payload) + padding + 1).to_bytes(4, "big") + bytes([padding]) + payload + bytes(padding)


def _strings(data: bytes, count: int) -> list[bytes]:
    """Return the first *count* strings of *data*, empty ones where it is cut off."""
    found = []
    for _ in range(count):
        size = int.from_bytes(data[:4], "big")
        found.append(data[4 : 4 + size])
        data = data[4 + size :]
    return found
