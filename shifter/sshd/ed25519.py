"""Ed25519 (RFC 8032) of the libcrypto that the interpreter itself is linked with.

The package cryptography would do, and judges the keys that users bring (authorized.py); but it takes 45 ms to load, in
front of every job, for two functions that are there anyway (EVP_PKEY_new(3), EVP_DigestSign(3), EVP_PKEY-ED25519(7)).
"""

import _hashlib
import ctypes
import os

from shifter.sshd import SshError

MYPY = False
if MYPY:
    from collections.abc import Callable

EVP_PKEY_ED25519 = 1087
"""NID_ED25519 of <openssl/obj_mac.h>."""
SEED_BYTES = 32
SIGNATURE_BYTES = 64

# What dlsym(3) finds in a library, it finds in those that this one needs: whichever libcrypto is in this process already.
_LIBRARY = ctypes.CDLL(getattr(_hashlib, "__file__", None))


def _function(name: str, result: "type | None", *arguments: type) -> "Callable[..., int]":
    function = _LIBRARY[name]
    function.restype, function.argtypes = result, arguments
    return function


_POINTER, _SIZE, _BYTES = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
_SIZE_POINTER = ctypes.POINTER(_SIZE)
_new = _function("EVP_PKEY_new_raw_private_key", _POINTER, ctypes.c_int, _POINTER, _BYTES, _SIZE)
_free = _function("EVP_PKEY_free", None, _POINTER)
_public = _function("EVP_PKEY_get_raw_public_key", ctypes.c_int, _POINTER, _BYTES, _SIZE_POINTER)
_new_context = _function("EVP_MD_CTX_new", _POINTER)
_free_context = _function("EVP_MD_CTX_free", None, _POINTER)
_init = _function("EVP_DigestSignInit", ctypes.c_int, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER)
_sign = _function("EVP_DigestSign", ctypes.c_int, _POINTER, _BYTES, _SIZE_POINTER, _BYTES, _SIZE)


class Key:
    """A key pair. *seed*: its 32 secret bytes; *public*: the 32 bytes that all may know."""

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise SshError(f"a seed of {len(seed)} bytes is none")
        self.seed = seed
        self._key = _made(_new(EVP_PKEY_ED25519, None, seed, len(seed)), "key")
        self.public = self._output(32, lambda out, size: _public(self._key, out, size))

    @classmethod
    def generate(cls) -> "Key":
        """Return a new one."""
        return cls(os.urandom(SEED_BYTES))

    def __del__(self) -> None:
        if hasattr(self, "_key"):
            _free(self._key)

    def sign(self, data: bytes) -> bytes:
        """Return the signature of *data*, 64 bytes. Raises SshError."""
        context = _made(_new_context(), "context")
        try:
            if _init(context, None, None, None, self._key) != 1:
                raise SshError("libcrypto could not begin a signature")
            return self._output(SIGNATURE_BYTES, lambda out, size: _sign(context, out, size, data, len(data)))
        finally:
            _free_context(context)

    @staticmethod
    def _output(length: int, call: "Callable[[ctypes.Array[ctypes.c_char], object], int]") -> bytes:
        """Return the *length* bytes that *call* writes."""
        out, size = ctypes.create_string_buffer(length), _SIZE(length)
        if call(out, ctypes.byref(size)) != 1 or size.value != length:
            raise SshError("libcrypto has no Ed25519")
        return out.raw


def _made(pointer: "int | None", what: str) -> int:
    """Return what libcrypto made. Raises SshError if it made none: a policy (FIPS) may forbid Ed25519."""
    if not pointer:
        raise SshError(f"libcrypto made no Ed25519 {what}; its configuration may forbid that")
    return pointer
