"""ID.meta: what C Shifter's gateway wrote is read, what we write is read by both, and an ACL never gets lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shifter.errors import ImageError
from shifter.images import meta as metadata
from shifter.images.meta import Meta, parse

GATEWAY = """\
FORMAT: squashfs
ENTRY: ['/usr/bin/tini', '--', u'run me']
CMD: ['bash']
WORKDIR: /data
USERACL: 1001, 1002,
GROUPACL: 2001
ENV: PATH=/usr/local/bin:/usr/bin
ENV: EMPTY=
ENV: URL=http://a/b: c
USER: nobody
VOLUME: /scratch
"""

VALUE = st.text(
    st.characters(codec="utf-8", exclude_characters="\0") | st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF)
)
NAME = st.text("ABCXYZ_a.0", min_size=1, max_size=8)
WORDS = st.none() | st.lists(VALUE, min_size=1, max_size=5)
ACL = st.none() | st.lists(st.integers(0, 0xFFFFFFFE), min_size=1, max_size=5).map(tuple)
METAS = st.builds(
    Meta,
    format=st.sampled_from(metadata.FORMATS),
    env=st.lists(st.builds("{}={}".format, NAME, VALUE), max_size=5),
    entry=WORDS,
    cmd=WORDS,
    workdir=st.none() | VALUE.filter(bool),
    user_acl=ACL,
    group_acl=ACL,
)


def fields(meta: Meta) -> dict[str, object]:
    return {name: getattr(meta, name) for name in Meta.__slots__}


def test_written_by_the_gateway_of_c_shifter() -> None:
    meta = parse(GATEWAY)
    assert fields(meta) == {
        "format": "squashfs",
        "entry": ["/usr/bin/tini", "--", "run me"],
        "cmd": ["bash"],
        "workdir": "/data",
        "user_acl": (1001, 1002),
        "group_acl": (2001,),
        "env": ["PATH=/usr/local/bin:/usr/bin", "EMPTY=", "URL=http://a/b: c"],
        "extra": [("USER", "nobody"), ("VOLUME", "/scratch")],
    }


@given(METAS)
def test_round_trip(meta: Meta) -> None:
    text = metadata.format(meta)
    assert fields(parse(text)) == fields(meta)
    text.encode("utf-8", "surrogateescape")


@given(METAS)
def test_c_shifter_reads_the_same(meta: Meta) -> None:
    """Its rules: first colon, trimmed, a backslash at the end swallows the next line: we never write one."""
    lines = metadata.format(meta).split("\n")
    assert not any(line.endswith("\\") for line in lines)
    plain = [line.partition(":") for line in lines if line]
    assert all(
        key in ("FORMAT", "ENV", "ENV_QUOTED", "ENTRY", "CMD", "WORKDIR", "WORKDIR_QUOTED", "USERACL", "GROUPACL")
        for key, _, _ in plain
    )
    env = [value.strip(" \t\r\v\f") for key, _, value in plain if key == "ENV"]
    assert env == [
        item
        for item in meta.env
        if item == item.strip(" \t\r\v\f") and not item.endswith("\\") and not set(item) & set("\r\n")
    ]


@given(st.text() | st.lists(st.text(), max_size=6).map(lambda lines: "\n".join(f"ENTRY: [{line}" for line in lines)))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        metadata.format(parse(text))
    except ImageError:
        pass


@given(st.lists(st.text("ab'\"\\,[]u \n\txU0d8", max_size=8), min_size=1, max_size=4))
def test_lists_as_python_writes_them(words: list[str]) -> None:
    assert parse(f"CMD: {words!r}").cmd == words


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", None),
        ("[]", None),
        ("[ ]", None),
        ("/bin/sh", ["/bin/sh"]),
        ("/bin/sh -c 'x y'", ["/bin/sh -c 'x y'"]),
        ("['a']", ["a"]),
        ("[u'a', u\"b\"]", ["a", "b"]),
        ("[\"it's\", '\\'']", ["it's", "'"]),
        ("['a',]", ["a"]),
        ("['a\\nb', '\\x41\\u00e9\\U0001F600']", ["a\nb", "A\u00e9\U0001f600"]),
        ("['\\d']", ["\\d"]),
        ("['']", [""]),
        ("[", ["["]),
        ("[ -f x ]", ["[ -f x ]"]),
        ("['a', 'b\\\\']", ["a", "b\\"]),
        ("['\\udcff']", ["\udcff"]),
    ],
)
def test_entry(value: str, expected: list[str] | None) -> None:
    assert parse(f"ENTRY: {value}").entry == expected


@pytest.mark.parametrize(
    "value",
    [
        "['a'",
        "['a' 'b']",
        "['a'] x",
        "['a', b]",
        "['a\\']",
        "['\\ud800']",
        "['\\x4']",
        "['\\U00110000']",
        "['a\\x00']",
        '["a',
    ]
    + ["['a', \\", "['a',, 'b']"],
)
def test_lists_that_cant_be_read(value: str) -> None:
    with pytest.raises(ImageError) as caught:
        parse(f"FORMAT: VFS\nCMD: {value}\n", "/images/x.meta")
    assert caught.value.chain().startswith("/images/x.meta line 2: ")


@pytest.mark.parametrize("key", ["USERACL", "GROUPACL"])
@pytest.mark.parametrize(
    "value",
    [
        "x",
        "1,x",
        "1 2",
        "-1",
        "0x10",
        "1,2\\",
        ",",
        " , ",
        "4294967295",
        "99999999999999999999999",
        "1;2",
        "\u0661",
        "01",
        "1.",
    ],
)
def test_an_acl_that_cant_be_read_refuses_the_image(key: str, value: str) -> None:
    with pytest.raises(ImageError):
        parse(f"{key}: {value}\n")


def test_an_acl_is_given_once() -> None:
    with pytest.raises(ImageError, match="line 3"):
        parse("USERACL: 1\nENV: A=b\nUSERACL: 2\n")


@pytest.mark.parametrize("value", ["", "Squashfs", "squashfs,erofs", "nfs", "SQUASHFS"])
def test_unknown_format(value: str) -> None:
    with pytest.raises(ImageError):
        parse(f"FORMAT: {value}\n")


def test_a_backslash_at_the_end_is_data() -> None:
    """C Shifter would join the next line and so lose a variable."""
    meta = parse("ENV: PS1=\\u\\\nENV: A=b\nWORKDIR: /x\\\nCMD: x\\\n")
    assert (meta.env, meta.workdir, meta.cmd) == (["PS1=\\u\\", "A=b"], "/x\\", ["x\\"])


def test_what_is_skipped() -> None:
    meta = parse("# ENV: A=b\nno colon\nENV: =x\nENV: novalue\nENV:C=d\r\n\n :x\nWORKDIR:\n")
    assert meta.env == ["C=d"]
    assert meta.format == "VFS"
    assert meta.workdir is None


def test_acl() -> None:
    open_to_all, users, groups, both = (
        Meta(),
        Meta(user_acl=(1, 2)),
        Meta(group_acl=(5,)),
        Meta(user_acl=(1,), group_acl=(5,)),
    )
    assert open_to_all.allows(9, 9, [])
    assert users.allows(2, 9, []) and not users.allows(9, 1, [2])
    assert groups.allows(9, 5, []) and groups.allows(9, 9, (4, 5)) and not groups.allows(5, 9, [])
    assert both.allows(1, 9, []) and both.allows(9, 9, [5]) and not both.allows(2, 2, [2])


@pytest.mark.parametrize(
    "meta", [Meta(user_acl=()), Meta(group_acl=()), Meta(env=["A=\0"]), Meta(cmd=["\ud800"]), Meta(workdir="\0")]
)
def test_what_cant_be_written(meta: Meta) -> None:
    with pytest.raises(ImageError):
        metadata.format(meta)
