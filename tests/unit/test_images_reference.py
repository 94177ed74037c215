"""Names of images: the grammar of shifter/images/reference.py, and the file names of tags."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shifter.errors import FormatError, UsageError
from shifter.images import reference
from shifter.images.reference import ImageReference, decode_tag, encode_tag, parse

TAG = string.ascii_letters + string.digits + "_.-+:@/"
ID = string.ascii_letters + string.digits + "_.-"
ANY_TEXT = st.text(st.characters(codec="utf-8") | st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF))
NEAR_MISS = st.text(TAG + " %\\\0\n~\u00e9\udcff", max_size=300)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("debian:12", "docker:debian:12"),
        ("debian", "docker:debian:latest"),
        ("docker:debian", "docker:debian:latest"),
        ("docker:docker:20", "docker:docker:20"),
        ("r:5000/foo/bar", "docker:r:5000/foo/bar:latest"),
        ("r:5000/foo/bar:1", "docker:r:5000/foo/bar:1"),
        ("debian@sha256:ab", "docker:debian@sha256:ab"),
        ("custom:alice/tool:3", "custom:alice/tool:3"),
        ("Docker:x", "docker:Docker:x"),
        ("id:0a.b-c_", "id:0a.b-c_"),
        ("id:-", "id:-"),
        ("local:/", "local:/"),
        ("local://a//b/./c/", "local:/a/b/c"),
        ("local:/a b:c%", "local:/a b:c%"),
        ("local:/...", "local:/..."),
    ],
)
def test_canonical_form(text: str, expected: str) -> None:
    assert str(parse(text)) == expected
    assert str(parse(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        ":x",
        "docker:",
        "custom:",
        "id:",
        "local:",
        "a b",
        "a;b",
        "docker:u$IFS",
        "-x",
        "/x",
        ".x",
        "x/",
        "x:",
        "x@",
    ]
    + [
        "id:.",
        "id:..",
        "id:.x",
        "id:a/b",
        "id:a:b",
        "local:a",
        "local:/a/../b",
        "local:/a\nb",
        "local:/a\x7f",
        "caf\u00e9",
    ]
    + ["x" * 256, "a/" * 90 + "b", "id:" + "x" * 253, "local:/" + "x" * 4096],
)
def test_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 250


def test_nothing_is_deleted_silently() -> None:
    with pytest.raises(UsageError, match="the character ';' is not allowed in a docker name"):
        parse("docker:u;touch")


def test_default_type() -> None:
    assert str(parse("a:1", "custom")) == "custom:a:1"
    assert str(parse("abc", "id")) == "id:abc"
    assert str(parse("/opt", "local")) == "local:/opt"
    with pytest.raises(UsageError, match="no defaultImageType"):
        parse("a:1", "")
    assert str(parse("docker:a:1", "")) == "docker:a:1"


def test_longest_names() -> None:
    assert len(encode_tag(parse("docker:" + "x" * 241))) == 255
    with pytest.raises(UsageError, match="too long"):
        parse("docker:" + "x" * 242)
    assert parse("local:/" + "x" * 4094).name == "/" + "x" * 4094


@given(
    st.sampled_from(["", "docker:", "custom:", "id:", "local:", "local:/"]),
    ANY_TEXT | NEAR_MISS,
    st.sampled_from(reference.KINDS),
)
def test_every_text_is_canonical_or_refused(prefix: str, text: str, default: str) -> None:
    try:
        ref = parse(prefix + text, default)
    except UsageError as error:
        assert str(error).isprintable()
        return
    assert parse(str(ref), default) == ref
    if ref.kind == "local":
        assert ref.name.startswith("/")
        assert ".." not in ref.name.split("/")
        assert "\0" not in ref.name
    else:
        assert set(ref.name) <= set(TAG if ref.kind != "id" else ID)
        assert decode_tag(encode_tag(ref)) == ref


@given(st.sampled_from(["docker", "custom"]), st.text(TAG, min_size=1, max_size=80))
def test_tag_file_names(kind: str, name: str) -> None:
    try:
        ref = parse(f"{kind}:{name}")
    except UsageError:
        return
    file_name = encode_tag(ref)
    assert "/" not in file_name
    assert file_name not in (".", "..")
    assert decode_tag(file_name) == ref


@given(st.text(TAG.replace("/", "%25F"), max_size=60).map("docker:".__add__) | ANY_TEXT)
def test_file_names_are_read_strictly(file_name: str) -> None:
    """Only what encode_tag writes is a tag: two file names never mean the same image."""
    try:
        ref = decode_tag(file_name)
    except FormatError:
        return
    assert encode_tag(ref) == file_name


@pytest.mark.parametrize(
    "file_name", ["", "x", "docker:x", "docker:a%2fb:1", "docker:a%41:1", "docker:%2F:1", ".new-1", "docker:a%:1"]
)
def test_what_is_no_tag(file_name: str) -> None:
    with pytest.raises(FormatError):
        decode_tag(file_name)


def test_equality_and_hash() -> None:
    assert parse("a") == parse("docker:a:latest") != parse("custom:a")
    assert len({parse("a"), parse("a:latest")}) == 1
    assert parse("a") != "docker:a:latest"
    assert repr(ImageReference("id", "x")) == "ImageReference('id', 'x')"
