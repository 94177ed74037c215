"""Resource limits as udiRoot.conf gives them: ``NAME=SOFT[:HARD]``, names as in limits.conf(5). Part of the build path."""

RLIM_INFINITY = 0xFFFFFFFFFFFFFFFF

RLIMITS = {
    "cpu": 0,
    "fsize": 1,
    "data": 2,
    "stack": 3,
    "core": 4,
    "rss": 5,
    "nproc": 6,
    "nofile": 7,
    "memlock": 8,
    "as": 9,
    "locks": 10,
    "sigpending": 11,
    "msgqueue": 12,
    "nice": 13,
    "rtprio": 14,
}
"""Name -> RLIMIT_NAME of <asm-generic/resource.h>."""


def parse(item: str) -> "tuple[int, int, int]":
    """Return (resource, soft, hard) of one limit, in the units of setrlimit(2); hard is soft if it is not given.

    Raises ValueError.
    """
    name, equals, values = item.partition("=")
    if not equals or name not in RLIMITS:
        raise ValueError(f"{item!r} is not NAME=SOFT[:HARD], NAME one of {', '.join(sorted(RLIMITS))}")
    soft, _, hard = values.partition(":")
    first = _value(soft, item)
    second = _value(hard, item) if ":" in values else first
    if first > second:
        raise ValueError(f"{item!r}: the soft limit is above the hard one")
    return RLIMITS[name], first, second


def _value(text: str, item: str) -> int:
    if text == "unlimited":
        return RLIM_INFINITY
    if not (text.isascii() and text.isdigit()) or int(text[:20]) >= RLIM_INFINITY or len(text) > 20:
        raise ValueError(f"{item!r}: {text!r} is neither a number nor unlimited")
    return int(text)
