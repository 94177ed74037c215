"""The volume grammar and the refused targets."""

import ast
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shifter.errors import ConfigError, UsageError
from shifter.volumes import (
    SITE_FLAGS,
    SiteMount,
    UserVolume,
    Volume,
    parse_site,
    parse_user,
    site_target_refusal,
    user_target_refusal,
)


def site(text: str) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(volume.source, volume.target, volume.flags) for volume in parse_site(text, "udiRoot.conf:3")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" ; ;;", []),
        ("/home", [("/home", "/home", ())]),
        ("/home:/users", [("/home", "/users", ())]),
        ("/home:ro", [("/home", "/home", ("ro",))]),
        ("/home:/users:slave:REC:ro", [("/home", "/users", ("ro", "rec", "slave"))]),
        (" /a:/b ;\t/c:/d ", [("/a", "/b", ()), ("/c", "/d", ())]),
        ('"/a;x:/b c ";/d', [("/a;x", "/b c ", ()), ("/d", "/d", ())]),
        (r"/a\:b:/c\;d", [("/a:b", "/c;d", ())]),
        (r"/a\\b:/c\"d", [("/a\\b", '/c"d', ())]),
        ("/a..b:/c", [("/a..b", "/c", ())]),
        ("/opt/x;/var/x;/tmp", [("/opt/x", "/opt/x", ()), ("/var/x", "/var/x", ()), ("/tmp", "/tmp", ())]),
        ("/\N{SNOWMAN} @~:/x", [("/\N{SNOWMAN} @~", "/x", ())]),
    ],
)
def test_site(text: str, expected: list[tuple[str, str, tuple[str, ...]]]) -> None:
    assert site(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("home", "'home' is not an absolute path"),
        ("/a:b", "'b' is no flag; known: ro, rec, slave, private"),
        ("/a:/b:rw", "'rw' is no flag"),
        ("/a:/b: ro", "' ro' is no flag"),
        ("/a:/b:", "'' is no flag"),
        ("/a:/b:ro:ro", "flag ro is given twice"),
        ("/a:/b:slave:private", "exclude each other"),
        ("/a:/b:perNodeCache=size=1G", "is no flag"),
        ("/a/../b", "'..' is not allowed"),
        ("/a\x1b:/b", "control characters"),
        ("/a\x85:/b", "control characters"),
        ('"/a:/b', "not closed"),
        ('"/a:/b" x', "follows a closing quote"),
        ('/a"b:/c', "must surround"),
        (r"/a\b", "backslash"),
        ("/a\\", "backslash"),
        ("/a:/etc/x", "'/etc/x' can't be a target"),
        ("/proc", "can't be a target"),
    ],
)
def test_site_errors(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_site(text, "udiRoot.conf:3")
    assert str(caught.value).startswith("udiRoot.conf:3: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/a", "where to?"),
        ("/a:ro", "'ro' is not an absolute path"),
        ("/a:/b:rec", "'rec' is no flag; known: ro"),
        ("/a:/etc", "it is /etc"),
        ("/a:/opt", "it holds /opt/udiImage"),
        ("/a:/", "it holds /etc"),
        ("/a:/./dev//shm", "it is below /dev"),
    ],
)
def test_user_errors(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_user(text)
    assert message in str(caught.value)


def test_user() -> None:
    assert parse_user("/a:/data;/b:/var/tmp:ro") == [
        UserVolume("/a", "/data", ()),
        UserVolume("/b", "/var/tmp", ("ro",)),
    ]


@pytest.mark.parametrize(
    "path",
    ["/", "//", "/.", "/etc", "/etc/", "/etc/x", "/var", "/var/tmp/x", "/var/run", "/proc/self", "/sys", "/dev", "/run"]
    + ["/opt", "/opt/udiImage", "/opt/udiImage/bin", "/opt/./udiImage"],
)
def test_targets_refused_to_users(path: str) -> None:
    assert user_target_refusal(path)


@pytest.mark.parametrize("path", ["/etcetera", "/various", "/opt/udiImageX", "/opt/x", "/var/tmp", "/data", "/tmp"])
def test_targets_open_to_users(path: str) -> None:
    assert user_target_refusal(path) is None


@pytest.mark.parametrize("path", ["/", "/etc", "/var/", "/opt", "/proc", "/sys/fs", "/dev/shm", "/etc/ssh"])
def test_targets_refused_to_sites(path: str) -> None:
    assert site_target_refusal(path)


@pytest.mark.parametrize("path", ["/opt/cray", "/var/lib/x", "/home", "/device", "/run/munge"])
def test_targets_open_to_sites(path: str) -> None:
    assert site_target_refusal(path) is None


CHARACTERS = (
    st.sampled_from('ab:;\\" ./\N{SNOWMAN}\udcff')
    | st.characters(min_codepoint=0x20, exclude_categories=["Cs", "Cc"])
    | st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF)
)  # what a file name may hold: any byte that is no control character
PATHS = st.text(CHARACTERS, max_size=8).map(lambda tail: "/x" + tail).filter(lambda path: ".." not in path.split("/"))
FLAGS = st.sets(st.sampled_from(SITE_FLAGS)).filter(lambda flags: not {"slave", "private"} <= flags)
READ_ONLY = st.booleans()


@given(st.lists(st.tuples(PATHS, PATHS, FLAGS, READ_ONLY), max_size=3))
def test_printing_and_parsing_give_the_same(entries: list[tuple[str, str, set[str], bool]]) -> None:
    flags = [tuple(flag for flag in SITE_FLAGS if flag in entry[2]) for entry in entries]
    mounts = [SiteMount(entry[0], entry[1], flag, "f:1") for entry, flag in zip(entries, flags, strict=True)]
    text = ";".join(map(str, mounts))
    assert parse_site(text, "f:1") == mounts
    assert [mount.where for mount in parse_site(text, "f:1")] == ["f:1"] * len(mounts)
    volumes: list[Volume] = [UserVolume(entry[0], entry[1], ("ro",) * entry[3]) for entry in entries]
    assert parse_user(" ; ".join(map(str, volumes))) == volumes
    assert len({*map(hash, volumes)}) == len({*map(str, volumes)})


ANY_TEXT = st.one_of(
    st.text(alphabet='/:;"\\ abro\t\n'),
    st.binary(max_size=40).map(lambda data: data.decode("utf-8", "surrogateescape")),
    st.lists(
        st.sampled_from(
            ["/a", "/b c", ":", ";", '"', "\\", "ro", "REC", "slave", "private", " ", "/../", "/etc", "\x85"]
        ),
        max_size=12,
    ).map("".join),
)


@given(ANY_TEXT)
def test_any_text_parses_or_is_refused_and_never_edited(text: str) -> None:
    plain = text.replace("\\", "")
    results: list[list[Volume]] = []
    try:
        results.append([*parse_site(text, "f:1")])
    except ConfigError as error:
        assert_says_what(str(error).removeprefix("f:1: "), text)
    try:
        results.append([*parse_user(text)])
    except UsageError as error:
        assert_says_what(str(error).removeprefix("volume: "), text)
    for result in results:
        for volume in result:
            assert volume.source.replace("\\", "") in plain
            assert volume.target.replace("\\", "") in plain
            assert all(is_path(path) for path in (volume.source, volume.target))
    again = [";".join(map(str, result)) for result in results]
    for result, printed in zip(results, again, strict=True):
        read: list[Volume] = (
            [*parse_site(printed, "f:1")] if result and isinstance(result[0], SiteMount) else [*parse_user(printed)]
        )
        assert read == result


def is_path(path: str) -> bool:
    return path.startswith("/") and ".." not in path.split("/") and not any(ord(char) < 32 for char in path)


def assert_says_what(error: str, text: str) -> None:
    """One printable line that shows the part of *text* which is at fault."""
    assert all(char.isprintable() or "\udc80" <= char <= "\udcff" for char in error)
    literal = re.match(r"""(a backslash must .*near )?('([^'\\]|\\.)*'|"([^"\\]|\\.)*")""", error)
    assert literal, (text, error)
    shown = ast.literal_eval(literal[2]).removesuffix("...")
    assert shown.replace("\\", "") in text.replace("\\", "")
