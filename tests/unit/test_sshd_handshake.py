"""Asking an sshd for its host key: of those who answer something else. Real ones: tests/cluster, by every setupRoot."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shifter.sshd import SshError, handshake
from shifter.sshd.trust import string

VERSION = b"SSH-2.0-x\r\n"
NAMES = [handshake.KEX, *[b"x"] * 9]
KEXINIT = bytes([handshake.SSH_MSG_KEXINIT]) + bytes(16) + b"".join(map(string, NAMES)) + bytes(5)


@contextlib.contextmanager
def server(act: Callable[[socket.socket], object]) -> Iterator[int]:
    """Somebody on a port of 127.0.0.1 who does *act* with the first connection, and closes it."""

    def serve() -> None:
        with contextlib.suppress(OSError), listener.accept()[0] as peer:
            act(peer)
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(65536):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            thread.join()


def answer(data: bytes, seconds: float = 20) -> bytes:
    with server(lambda peer: peer.sendall(data)) as port:
        return handshake.host_key("127.0.0.1", port, seconds)


def packet(payload: bytes) -> bytes:
    return handshake._packet(payload)


def test_host_key_is_what_was_sent() -> None:
    reply = packet(bytes([handshake.SSH_MSG_KEX_ECDH_REPLY]) + string(b"key") + string(b"Q") + string(b"signature"))
    assert answer(b"welcome\r\n" + VERSION + packet(KEXINIT) + reply) == b"key"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"x" * 100_000,
        b"line\n" * 2 + b"x" * 100_000,
        b"SSH-1.5-old\n",
        VERSION,
        VERSION + b"\xff\xff\xff\xff\x04",
        VERSION + b"\x00\x00\x00\x00\x00",
        VERSION + b"\x00\x00\x00\x05\x05" + bytes(4),
        VERSION + packet(b""),
        VERSION + packet(b"\x01disconnect"),
        VERSION + packet(KEXINIT),
        VERSION + packet(KEXINIT) + packet(b"\x01"),
        VERSION + packet(KEXINIT) + packet(bytes([handshake.SSH_MSG_KEX_ECDH_REPLY])),
    ],
)
def test_no_host_key(data: bytes) -> None:
    assert answer(data) == b""


@given(
    st.lists(
        st.sampled_from([VERSION, packet(KEXINIT), packet(b"\x1f"), b"\0\0\0", b"\n", b"SSH-", b"\xff"]), max_size=6
    )
)
@settings(max_examples=50, deadline=None)
def test_any_bytes(parts: list[bytes]) -> None:
    with contextlib.suppress(OSError, SshError):
        assert isinstance(answer(b"".join(parts)), bytes)


def test_kex_that_is_not_offered() -> None:
    other = KEXINIT.replace(string(handshake.KEX), string(b"diffie-hellman-group14-sha256"))
    with pytest.raises(SshError, match="KexAlgorithms leave out curve25519-sha256"):
        answer(VERSION + packet(other))


def test_who_sends_a_byte_now_and_then_is_given_up() -> None:
    def dribble(peer: socket.socket) -> None:
        while True:
            peer.sendall(b"x")
            time.sleep(0.05)

    with server(dribble) as port, pytest.raises(TimeoutError):
        handshake.host_key("127.0.0.1", port, 0.5)


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        handshake.host_key("127.0.0.1", port, 5)
