"""Codec of requests, records and site files: NUL-terminated ``key=value`` fields, in order.

The door reads and writes the same format in C. Bounded and strict: whoever reads validates as if a stranger had written.
Part of the build path.
"""

from shifter.errors import FormatError

MAX_BYTES = 65536
"""Upper bound of one document: a request with 4,000 groups or 100 volumes fits, a hostile one costs nothing."""


def encode(fields: "list[tuple[str, str]]") -> bytes:
    """Return *fields* as bytes. Values are file names and so may hold any byte but NUL (surrogateescape).

    Raises FormatError when a key is not a word, a value holds NUL or what no file name can, or the whole is too long.
    """
    out = bytearray()
    known = set()  # most have the key of the one before
    for key, value in fields:
        if key not in known:
            if not _is_key(key):
                raise FormatError(f"bad field name {key!r}")
            known.add(key)
        try:
            data = value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise FormatError(f"bad text in field {key!r}") from None
        if b"\0" in data:
            raise FormatError(f"NUL byte in field {key!r}")
        out += key.encode("ascii") + b"=" + data + b"\0"
    if len(out) > MAX_BYTES:
        raise FormatError(f"{len(out)} bytes of fields, at most {MAX_BYTES} are allowed")
    return bytes(out)


def decode(data: bytes, kind: str) -> "list[tuple[str, str]]":
    """Return the fields of *data*, whose last one must be ``end=KIND``, without that last one.

    Raises FormatError on anything else: too long, cut off, a field without ``=``, a bad key.
    """
    if len(data) > MAX_BYTES:
        raise FormatError(f"{len(data)} bytes, at most {MAX_BYTES} are allowed")
    if not data.endswith(b"\0end=" + kind.encode("ascii") + b"\0"):
        raise FormatError(f"not a complete {kind}")
    fields = []
    for item in data[:-1].split(b"\0"):
        key, equals, value = item.partition(b"=")
        name = key.decode("ascii", "replace")
        if not equals or not _is_key(name):
            raise FormatError(f"bad field {item[:40]!r}")
        fields.append((name, value.decode("utf-8", "surrogateescape")))
    fields.pop()
    return fields


def number(text: str, what: str, limit: int = 0xFFFFFFFFFFFFFFFF) -> int:
    """Return the decimal *text* as an int between 0 and *limit*; canonical form only (no sign, blank or leading zero).

    Raises FormatError naming *what*.
    """
    if not (text.isascii() and text.isdigit()) or len(text) > 20 or (len(text) > 1 and text[0] == "0"):
        raise FormatError(f"{what}: {text[:40]!r} is not a number")
    value = int(text)
    if value > limit:
        raise FormatError(f"{what}: {value} is larger than {limit}")
    return value


def fnv1a64(data: bytes) -> int:
    """Return the 64-bit FNV-1a hash of *data* (draft-eastlake-fnv). It only names directories; the bytes are compared too."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value


def _is_key(key: str) -> bool:
    return 0 < len(key) <= 24 and key.isascii() and key.replace(".", "").replace("_", "").isalpha()
