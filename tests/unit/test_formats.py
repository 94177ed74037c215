"""Fields, requests and records: what is written is read back; what a stranger writes is refused, and nothing else happens."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shifter import fields, request
from shifter.errors import AccessError, FormatError
from shifter.udi import records

KEYS = st.from_regex(r"[A-Za-z][A-Za-z._]{0,23}", fullmatch=True).filter(lambda key: key != "end")
VALUES = st.binary(max_size=60).map(lambda data: data.replace(b"\0", b"").decode("utf-8", "surrogateescape"))
GROUPS = st.sets(st.integers(1, request.MAX_UID), max_size=40).map(lambda found: tuple(sorted(found)))
PRINTABLE = (
    st.binary(max_size=60)
    .map(lambda data: bytes(byte for byte in data if byte >= 32 and byte != 127).decode("utf-8", "surrogateescape"))
    .filter(bool)
)


@st.composite
def requests(draw: st.DrawFn) -> request.Request:
    ids = st.integers(1, request.MAX_UID)
    namespace = draw(st.integers(0, 2**64 - 1))
    made = request.Request(draw(PRINTABLE), draw(ids), draw(ids), draw(GROUPS), namespace, draw(PRINTABLE))
    if namespace == 0 or draw(st.booleans()):
        made.once = f"{draw(st.integers(0, 2**64 - 1)):016x}"
    made.volumes = draw(st.lists(PRINTABLE, max_size=5))
    made.modules = draw(st.lists(PRINTABLE, max_size=5))
    return made


def encoded(made: request.Request) -> list[tuple[str, str]]:
    """The request as the door writes it: the canonical form, with the image as the user named it."""
    items = [("ref" if key == "image" else key, value) for key, value in made.canonical(made.ref)]
    return [*items, ("end", "request")]


# --- fields ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "value"),
    [  # from draft-eastlake-fnv, appendix C, and the reference implementation's test vectors
        (b"", 0xCBF29CE484222325),
        (b"a", 0xAF63DC4C8601EC8C),
        (b"b", 0xAF63DF4C8601F1A5),
        (b"fo", 0x08985907B541D342),
        (b"foobar", 0x85944171F73967E8),
        (b"\0", 0xAF63BD4C8601B7DF),
        (b"foobar\0", 0x34531CA7168B8F38),
        (b"hello", 0xA430D84680AABD0B),
        (b"chongo was here!\n", 0x46810940EFF5F915),
    ],
)
def test_fnv_of_known_vectors(data: bytes, value: int) -> None:
    assert fields.fnv1a64(data) == value


@given(st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=30))
def test_fields_are_read_back(items: list[tuple[str, str]]) -> None:
    assert fields.decode(fields.encode([*items, ("end", "x")]), "x") == items


@given(st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30)), max_size=5))
def test_what_is_encoded_is_legal(items: list[tuple[str, str]]) -> None:
    try:
        data = fields.encode(items)
    except FormatError:
        return
    assert data.count(b"\0") == len(items)


@given(st.binary(max_size=200), st.sampled_from([b"", b"\0end=x\0"]))
def test_any_bytes_are_fields_or_a_format_error(data: bytes, end: bytes) -> None:
    try:
        items = fields.decode(data + end, "x")
    except FormatError:
        return
    assert fields.encode([*items, ("end", "x")]) == data + end


def test_bounds_of_fields() -> None:
    room = fields.MAX_BYTES - len(b"a=\0end=x\0")
    full = fields.encode([("a", "b" * room), ("end", "x")])
    assert len(full) == fields.MAX_BYTES
    assert len(fields.decode(full, "x")) == 1
    for bad in (
        [("a", "b" * (room + 1)), ("end", "x")],
        [("a", "b\0c")],
        [("", "b")],
        [("a=", "b")],
        [("a", "\ud800")],
    ):
        with pytest.raises(FormatError):
            fields.encode(bad)
    for data in (b"", b"\0", b"end=x\0", b"a=b\0end=y\0", b"a=b\0end=x", b"a\0end=x\0", b"=b\0end=x\0", b"a=b" + full):
        with pytest.raises(FormatError):
            fields.decode(data, "x")


@given(st.integers(0, 2**64 - 1))
def test_numbers(number: int) -> None:
    assert fields.number(str(number), "n") == number


@pytest.mark.parametrize(
    "text", ["", "-1", "+1", " 1", "1 ", "01", "00", "1_0", "0x1", "1.0", "\u0661", "\u00b2", "1" * 30]
)
def test_no_numbers(text: str) -> None:
    with pytest.raises(FormatError):
        fields.number(text, "n")


def test_number_above_its_limit() -> None:
    for text, limit in (("11", 10), (str(2**64), 2**64 - 1)):
        with pytest.raises(FormatError):
            fields.number(text, "n", limit)


# --- request ---------------------------------------------------------------------------------------------------------


@given(requests())
def test_requests_are_read_back(made: request.Request) -> None:
    back = request.decode(fields.encode(encoded(made)))
    for name in request.Request.__slots__:
        assert getattr(back, name) == getattr(made, name)
    assert back.key("id") == made.key("id")


@given(st.binary(max_size=400))
def test_any_bytes_are_refused(data: bytes) -> None:
    for tail in (b"", b"\0end=request\0"):
        with pytest.raises((FormatError, AccessError)):
            request.decode(data + tail)


@given(requests(), st.data())
def test_changed_requests_are_refused_or_say_something_else(made: request.Request, data: st.DataObject) -> None:
    """Bytes replaced, removed and inserted: never anything but another legal request, or the two errors."""
    whole = bytearray(fields.encode(encoded(made)))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(whole) - 1))
        length = data.draw(st.integers(0, 6))
        whole[position : position + length] = data.draw(st.binary(max_size=6))
        if not whole:
            break
    try:
        back = request.decode(bytes(whole))
    except (FormatError, AccessError):
        return
    assert fields.encode(encoded(back)) == whole  # one legal form only: equal requests are equal bytes


@given(requests(), st.data())
def test_order_is_fixed(made: request.Request, data: st.DataObject) -> None:
    items = encoded(made)
    other = data.draw(st.permutations(items))
    if other == items:
        return
    try:
        back = request.decode(fields.encode(other))
    except (FormatError, AccessError):
        return
    assert encoded(back) == other
    assert [key for key, _ in other] == [key for key, _ in items]  # volumes and modules among themselves


def changed(**values: str) -> bytes:
    made = request.Request("1", 5001, 5001, (1, 2), 7, "debian:12")
    return fields.encode([(key, values.get(key, value)) for key, value in encoded(made)])


@pytest.mark.parametrize("key", ["uid", "gid"])
def test_root_is_refused(key: str) -> None:
    request.decode(changed())
    with pytest.raises(AccessError):
        request.decode(changed(**{key: "0"}))


@pytest.mark.parametrize(
    "values",
    [
        {"uid": "-1"}, {"uid": "4294967295"}, {"gid": "x"}, {"groups": "2,1"}, {"groups": "1,1"}, {"groups": "0,1"},
        {"groups": "1,"}, {"groups": ","}, {"groups": ",".join(map(str, range(1, 4098)))}, {"ns": "0"}, {"ns": ""},
        {"ns": str(2**64)}, {"ref": ""}, {"ref": "a\nb"}, {"ref": "a\x7f"}, {"end": "record"},
    ],
)  # fmt: skip
def test_bad_values_are_refused(values: dict[str, str]) -> None:
    with pytest.raises(FormatError):
        request.decode(changed(**values))


@given(requests(), requests())
def test_different_requests_have_different_canonical_forms(one: request.Request, other: request.Request) -> None:
    same = all(getattr(one, name) == getattr(other, name) for name in request.Request.__slots__ if name != "ref")
    assert (one.canonical("id") == other.canonical("id")) == same


# --- record ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="records belong to root")
@given(data=st.binary(max_size=300))
def test_any_bytes_are_a_record_or_none(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    directory = tmp_path_factory.getbasetemp() / "record"
    directory.mkdir(exist_ok=True)
    for content in (
        data,
        b"shifter=1\0" + data + b"\0end=record\0",
        b"shifter=1\0uid=1\0built=2\0" + data + b"\0end=record\0",
    ):
        (directory / "record").write_bytes(content)
        record = records.read(str(directory))
        assert record is None or (record.uid >= 0 and record.built >= 0 and record.get("shifter"))


def test_what_is_no_file_is_no_record(tmp_path: Path) -> None:
    assert records.read(str(tmp_path)) is None
    (tmp_path / "record").mkdir()
    assert records.read(str(tmp_path)) is None
    (tmp_path / "record").rmdir()
    os.mkfifo(tmp_path / "record")
    assert records.read(str(tmp_path)) is None
