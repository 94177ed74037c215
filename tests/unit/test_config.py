"""udiRoot.conf: syntax, keys, includes, ownership."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shifter import config
from shifter.errors import ConfigError
from shifter.volumes import SITE_FLAGS, SiteMount

ROOT = Path(__file__).parents[2]
OWNERS = (0, os.getuid())
Load = Callable[..., config.Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Return a function that writes udiRoot.conf and loads it."""

    def write_and_load(text: str | bytes, head: str = "imagePath=/images\n") -> config.Config:
        file = tmp_path / "udiRoot.conf"
        file.write_bytes(head.encode() + (text if isinstance(text, bytes) else text.encode()))
        file.chmod(0o644)
        return config.load(str(file), OWNERS)

    return write_and_load


def error_of(load: Load, text: str | bytes, **keywords: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, **keywords)
    return str(caught.value)


def test_defaults(load: Load) -> None:
    result = load("")
    assert result.entries() == [
        ("imagePath", "/images", result.where("imagePath")),
        ("defaultImageType", "docker", "default"),
        ("allowLocalChroot", False, "default"),
        *((key, [], "default") for key in ("siteFs", "siteEnv", "siteEnvAppend", "siteEnvPrepend", "siteEnvUnset")),
        ("mountPropagationStyle", "slave", "default"),
        ("devpts", "auto", "default"),
        ("usersToImport", [], "default"),
        ("maxGroupCount", 0, "default"),
        ("udiIdleTime", 300, "default"),
        ("udiMaxAge", 43200, "default"),
        ("udiMaxPerUser", 16, "default"),
        ("udiBuildTimeout", 120, "default"),
        ("udiImagePath", "", "default"),
        ("system", "", "default"),
        ("sshdPort", "1204", "default"),
        ("sshdInterface", "", "default"),
        ("sshdLimits", [], "default"),
        ("sshSecretFile", "", "default"),
        ("sharedNodeSshd", False, "default"),
        ("prologFailure", "job", "default"),
        ("slurmBinPath", "/usr/bin", "default"),
    ]
    assert result.where("imagePath").endswith("/udiRoot.conf:1")


def test_syntax(load: Load) -> None:
    result = load(
        "\n# comment\n   # indented = comment\n\tallowLocalChroot \t=  yes  \r\n"
        "siteEnv = A=1 \\\n# within a value\n   B=2\\\n\tC=3=4 \\\n\nudiIdleTime=5m"
    )
    assert result.allowLocalChroot is True
    assert result.siteEnv == ["A=1", "B=2", "C=3=4"]
    assert result.where("siteEnv").endswith(":6")
    assert result.udiIdleTime == 300


def test_lists_accumulate_and_scalars_are_replaced(load: Load) -> None:
    result = load("siteEnv=A=1\ndevpts=host\nsiteEnv=A=2 B=\nsiteFs=/a\nsiteFs=/b:/c:ro\ndevpts=private\n")
    assert result.siteEnv == ["A=1", "A=2", "B="]
    assert [str(mount) for mount in result.siteFs] == ["/a:/a", "/b:/c:ro"]
    assert [mount.where.rpartition(":")[2] for mount in result.siteFs] == ["5", "6"]
    assert result.devpts == "private"
    assert result.where("devpts").endswith(":7")
    assert result.where("siteEnv").count(":") == 2


def test_last_line_of_a_continued_value_is_not_read_twice(load: Load) -> None:
    assert load("siteEnv=A=1 \\\n  B=2\n").siteEnv == ["A=1", "B=2"]


def test_quoted_items(load: Load) -> None:
    result = load('siteEnv="A=b  c" B="d "C=\t"\t\tD=e\nsiteEnvUnset=X "Y=z"')
    assert result.siteEnv == ["A=b  c", 'B="d', "C=\t", "D=e"]
    assert result.siteEnvUnset == ["X", "Y"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense\n", ":2: expected 'key = value', not 'nonsense'"),
        ("siteFS=/a\n", ":2: unknown key 'siteFS'; did you mean 'siteFs'?"),
        ("udiIdelTime=3\n", "did you mean 'udiIdleTime'?"),
        ("somethingElse=3\n", "unknown key 'somethingElse'"),
        ("x" * 5000 + "=3\n", "unknown key 'xxx"),
        ("=3\n", "unknown key ''"),
        ("siteEnv=A=1 \\\n", ":2: the value goes on"),
        ("siteEnv=A\n", ":2: siteEnv: 'A' is not NAME=VALUE"),
        ("siteEnv=1A=2\n", "'1A=2' is not NAME=VALUE"),
        ('siteEnv="A=2\n', "a double quote is not closed"),
        ('siteEnv="A=2"B=3\n', "follows a closing quote"),
        ("siteEnvUnset=A-B\n", "'A-B' is not the name of an environment variable"),
        ("siteFs=/a:b\n", ":2: '/a': 'b' is no flag"),
        ("allowLocalChroot=maybe\n", ":2: allowLocalChroot: 'maybe' is neither"),
        ("allowLocalChroot=\n", "is neither"),
        ("udiIdleTime=-1\n", ":2: udiIdleTime: '-1' is not a duration"),
        ("udiIdleTime=5 m\n", "is not a duration"),
        ("udiIdleTime=\N{SUPERSCRIPT TWO}\n", "is not a duration"),
        ("udiIdleTime=99999999999999d\n", "is not a duration"),
        ("udiIdleTime=101d\n", "is not between 0 seconds and 100 days"),
        ("udiBuildTimeout=0\n", "is not between 1 seconds"),
        ("udiMaxPerUser=0\n", "is not a number from 1 to"),
        ("maxGroupCount=x\n", "is not a number from 0 to"),
        ("defaultImageType=Docker\n", "is not one of docker, custom, id, local"),
        ("mountPropagationStyle=shared\n", "is not one of private, slave"),
        ("imagePath=images\n", "is not an absolute path"),
        ("imagePath=/a/../b\n", "without '..'"),
        ("imagePath=\n", "is not an absolute path"),
        ("usersToImport=a:b\n", "'a:b' is not a user name"),
        ("siteEnv=A=\x1b[2J\n", r":2: control character '\x1b'"),
        ("siteEnv=A=\0\n", r"control character '\x00'"),
        ("sitePreMountHook=/x\n", ":2: sitePreMountHook is not supported: this version runs no site hooks"),
        ("module_mpi_siteEnv=A=1\n", "this version has no modules"),
        ("defaultModules=mpi\n", "this version has no modules"),
        ("mountUdiRootWritable=1\n", "always read-only"),
        ("mountUdiRootWritable=x\n", "'x' is neither"),
    ],
)
def test_errors_are_located(load: Load, text: str, message: str) -> None:
    error = error_of(load, text)
    assert "/udiRoot.conf:2: " in error
    assert message in error


def test_image_path_is_required(load: Load) -> None:
    assert "imagePath is not set" in error_of(load, "siteFs=/a\n", head="")


def test_old_keys_are_ignored(load: Load) -> None:
    result = load("cpPath=/bin/cp\nmountUdiRootWritable=0\nsitePostMountHook=\nimageGateway=http://a http://b\n")
    assert [key for key, _ in result.ignored] == ["cpPath", "mountUdiRootWritable", "sitePostMountHook", "imageGateway"]
    assert result.ignored[0][1].endswith(":2")


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0), ("300", 300), ("90s", 90), ("5m", 300), ("12h", 43200), ("2d", 172800)]
)
def test_durations(load: Load, text: str, seconds: int) -> None:
    assert load(f"udiIdleTime={text}").udiIdleTime == seconds


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("YES", True), ("true", True), ("0", False), ("no", False), ("False", False)]
)
def test_booleans(load: Load, text: str, value: bool) -> None:
    assert load(f"allowLocalChroot={text}").allowLocalChroot is value


def test_include(load: Load, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.conf").write_text("siteEnv=B=2\ninclude=b.conf\ndevpts=host\n")
    (tmp_path / "sub/b.conf").write_text("siteEnv=C=3\n")
    result = load(f"siteEnv=A=1\ninclude = sub/a.conf\nsiteEnv=D=4\ninclude = {tmp_path}/sub/b.conf\n")
    assert result.siteEnv == ["A=1", "B=2", "C=3", "D=4", "C=3"]
    assert result.where("devpts") == f"{tmp_path}/sub/a.conf:3"
    assert [Path(path).name for path, _ in result.files] == ["udiRoot.conf", "a.conf", "b.conf", "b.conf"]
    assert result.files[1][1].st_ino == (tmp_path / "sub/a.conf").stat().st_ino


def test_include_errors_name_both_places(load: Load, tmp_path: Path) -> None:
    (tmp_path / "bad.conf").write_text("\nnonsense\n")
    assert error_of(load, "include=bad.conf") == f"{tmp_path}/bad.conf:2: expected 'key = value', not 'nonsense'"
    error = error_of(load, "include=none.conf")
    assert error == f"{tmp_path}/udiRoot.conf:2: can't read {tmp_path}/none.conf: No such file or directory"
    os.mkfifo(tmp_path / "fifo")
    assert error_of(load, "include=fifo").endswith("/fifo is not a regular file")
    assert "is not a regular file" in error_of(load, "include=.")
    (tmp_path / "writable.conf").touch()
    (tmp_path / "writable.conf").chmod(0o666)
    assert f"{tmp_path}/udiRoot.conf:2: {tmp_path}/writable.conf is writable by" in error_of(
        load, "include=writable.conf"
    )


def test_include_cycles_and_depth(load: Load, tmp_path: Path) -> None:
    (tmp_path / "link.conf").symlink_to("udiRoot.conf")
    assert "includes itself" in error_of(load, "include=link.conf")
    for number in range(4):
        (tmp_path / f"{number}.conf").write_text(f"include={number + 1}.conf\n")
    (tmp_path / "4.conf").write_text("devpts=host\n")
    assert load("include=2.conf").devpts == "host"
    assert f"{tmp_path}/2.conf:1: includes nest deeper than 4 files" in error_of(load, "include=0.conf")
    assert "more than 64 files" in error_of(load, "include=4.conf\n" * 64)


def test_file_checks(load: Load, tmp_path: Path) -> None:
    file = tmp_path / "udiRoot.conf"
    load("")
    file.chmod(0o664)
    with pytest.raises(ConfigError, match=r"udiRoot.conf is writable by group or others .*chmod go-w"):
        config.load(str(file), OWNERS)
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="belongs to uid"):
        config.load(str(file), (12345,))
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match=f"{tmp_path} is writable"):
        config.load(str(file), OWNERS)
    tmp_path.chmod(0o700)
    with pytest.raises(ConfigError, match="No such file"):
        config.load(str(tmp_path / "other"), OWNERS)
    file.write_bytes(b"#" * (config.MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="is larger than"):
        config.load(str(file), OWNERS)


CONFIG_BYTES = st.lists(
    st.one_of(
        st.binary(max_size=20),
        st.sampled_from([*(key.encode() for key in config.KEYS), b"include", b"module_a_b", b"cpPath"]),
        st.sampled_from([b"=", b"\n", b" ", b'"', b"\\", b"\\\n", b"#", b"/a:/b", b"A=1", b"\xff", b"1", b"5m"]),
    ),
    max_size=30,
).map(b"".join)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(CONFIG_BYTES)
def test_any_bytes_load_or_give_a_located_error(load: Load, tmp_path: Path, data: bytes) -> None:
    try:
        load(data)
    except ConfigError as error:
        located = re.match(rf"{re.escape(str(tmp_path))}/udiRoot\.conf:(\d+): .", str(error))
        assert located
        assert 2 <= int(located[1]) <= 2 + data.count(b"\n")
        assert all(char.isprintable() or "\udc80" <= char <= "\udcff" for char in str(error))


FILE_NAME = st.text('ab:;\\" ./=#\N{SNOWMAN}\udcfe\udcff', max_size=6).map(lambda tail: f"/x{tail.strip()}x")
PATH = FILE_NAME.filter(lambda path: ".." not in path.split("/"))
WORD = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,6}", fullmatch=True)
ASSIGNMENT = st.builds("{}={}".format, WORD, st.text('ab=#:"', max_size=6) | st.text("ab=#\\: \t", max_size=6))
MOUNT = st.builds(
    lambda source, target, flags: str(
        SiteMount(source, target, tuple(flag for flag in SITE_FLAGS if flag in flags), "")
    ),
    PATH,
    PATH,
    st.sets(st.sampled_from(["ro", "rec", "slave"])),
)
VALUES: dict[str, st.SearchStrategy[object]] = {
    "imagePath": PATH,
    "defaultImageType": st.sampled_from(["docker", "custom", "id", "local"]),
    "allowLocalChroot": st.booleans(),
    "siteFs": st.lists(MOUNT, max_size=3),
    "siteEnv": st.lists(ASSIGNMENT, max_size=3),
    "siteEnvAppend": st.lists(ASSIGNMENT, max_size=3),
    "siteEnvPrepend": st.lists(ASSIGNMENT, max_size=3),
    "siteEnvUnset": st.lists(WORD, max_size=3),
    "mountPropagationStyle": st.sampled_from(["private", "slave"]),
    "devpts": st.sampled_from(["auto", "host", "private"]),
    "usersToImport": st.lists(WORD, max_size=3),
    "maxGroupCount": st.integers(0, 65536),
    "udiIdleTime": st.integers(0, 8640000),
    "udiMaxAge": st.integers(1, 8640000),
    "udiMaxPerUser": st.integers(1, 10000),
    "udiBuildTimeout": st.integers(1, 8640000),
    "udiImagePath": st.just("/global/udiImage"),
    "system": WORD,
    "sshdPort": st.sampled_from(["1204", "1204-1299", "65535"]),
    "sshdInterface": st.sampled_from(["ib0", "eth0:1", "x" * 15]),
    "sshdLimits": st.lists(st.sampled_from(["nofile=1024", "memlock=0:unlimited", "core=unlimited"]), max_size=3),
    "sshSecretFile": st.just("/etc/shifter/secret"),
    "sharedNodeSshd": st.booleans(),
    "prologFailure": st.sampled_from(["job", "drain", "ignore"]),
    "slurmBinPath": st.just("/opt/slurm/bin"),
}


def printed(key: str, value: object, apart: bool) -> str:
    """The lines that set *key*; apart: one for each item of a list, else one that goes on over several lines."""
    if not isinstance(value, list):
        return f"{key} = {int(value) if isinstance(value, bool) else value}\n"
    if key == "siteFs":
        items, joint = value, " ; \\\n"
    else:
        items = [f'"{item}"' if re.search("[ \t]", item) or item.endswith("\\") else item for item in value]
        joint = " \\\n# between\n\t"
    return "".join(f"{key}={item}\n" for item in items) if apart else f"{key} = {joint.join(items)}\n"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.fixed_dictionaries({}, optional=VALUES).map(lambda some: {"imagePath": "/x", **some}), st.booleans())
def test_what_is_printed_is_read(load: Load, values: dict[str, object], apart: bool) -> None:
    text = "# written by the test\n" + "".join(printed(key, value, apart) for key, value in values.items())
    first = load(text.encode("utf-8", "surrogateescape"), head="")
    found = {key: value for key, value, _ in first.entries()}
    assert {key: found[key] for key in values} == values
    again = "".join(printed(key, value, not apart) for key, value in found.items())
    second = load(again.encode("utf-8", "surrogateescape"), head="")
    assert {key: value for key, value, _ in second.entries()} == found


def test_every_key_is_printed_and_read() -> None:
    assert set(VALUES) == set(config.KEYS)


def test_the_example_works_as_shipped_and_shows_every_key(tmp_path: Path) -> None:
    text = (ROOT / "udiRoot.conf.example").read_text()
    file = tmp_path / "udiRoot.conf"
    file.write_text(text)
    file.chmod(0o644)
    result = config.load(str(file), OWNERS)
    assert result.imagePath == "/var/lib/shifter/images"
    assert [str(mount) for mount in result.siteFs] == ["/home:/home"]
    assert result.siteEnv == ["SHIFTER_RUNTIME=1"]
    assert result.defaultImageType == "docker"
    file.write_text(
        "".join(
            line.removeprefix("#") if line.startswith("#") and line[1:2].isalpha() else line
            for line in text.splitlines(True)
        )
    )
    everything = config.load(str(file), OWNERS)
    assert set(everything.settings) == set(config.KEYS)
    without_default = {"udiImagePath", "system", "sshdInterface", "sshdLimits", "sshSecretFile"}
    for key in set(config.KEYS) - {"imagePath", "siteFs", "siteEnv"} - without_default:
        assert getattr(everything, key) == getattr(config.Config(), key), f"the example shows another default of {key}"


def test_manual_names_every_key() -> None:
    text = (ROOT / "man/udiRoot.conf.5").read_text()
    for key in (*config.KEYS, "include"):
        assert key in text


def test_loads_only_what_the_build_path_may_load(tmp_path: Path) -> None:
    code = "import sys; before = set(sys.modules); import shifter.config; print(*sorted(set(sys.modules) - before))"
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    allowed = {"_ctypes", "errno", "_struct"}
    assert {name for name in result.stdout.split() if name.partition(".")[0] != "shifter"} <= allowed
