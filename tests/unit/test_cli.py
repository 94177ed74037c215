"""What the commands print: help from the table, errors once, nothing that a terminal could act on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shifter import _build, fields, options
from shifter.cli import shifter, shifterctl, text
from shifter.errors import ConfigError, ShifterError, UsageError
from shifter.udi import inventory, records
from tests.unit.test_options import WORDS

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


def test_help_names_every_option(capsys: Capture) -> None:
    assert shifter.main(["help"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith("Usage: shifter [OPTION]... [--] [COMMAND [ARGUMENT]...]\n")
    for option in options.OPTIONS:
        assert f"--{option.name}" in printed.out
        assert option.help.split()[0] in printed.out
    assert "--workdir[=PATH]" in printed.out
    assert "--image [TYPE:]TAG" in printed.out


def test_version(capsys: Capture) -> None:
    assert shifter.main(["version"]) == 0
    assert capsys.readouterr().out == f"shifter {_build.VERSION} (build {_build.BUILD})\n"


def test_usage_error(capsys: Capture) -> None:
    assert shifter.main(["usage", "unknown option '--\x1b[2J'"]) == 125
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "shifter: unknown option '--\\x1b[2J'\nTry 'shifter --help'.\n"


@pytest.mark.parametrize("words", [[], ["bogus"], ["help", "x"]])
def test_called_by_hand(words: list[str], capsys: Capture) -> None:
    assert shifter.main(words) == 125
    assert "is run by the command shifter" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "arguments", "status"), [("shifter", ["help"], 125), ("shifterctl", ["config"], 1)])
def test_standard_output_that_fails(name: str, arguments: list[str], status: int) -> None:
    code = f"import sys; from shifter.cli.{name} import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-B", "-c", code, *arguments]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert result.returncode == status
    assert result.stderr.count("\n") == 1
    assert "No space left on device" in result.stderr
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


@given(st.lists(WORDS, max_size=8))
def test_click_parses_as_the_door_does(words: list[str]) -> None:
    command = shifter.ShifterCommand()
    try:
        found, rest = options.parse(words)
    except UsageError as error:
        with pytest.raises(click.UsageError) as caught:
            command.make_context("shifter", list(words))
        assert caught.value.message == str(error)
        return
    context = command.make_context("shifter", list(words))
    assert context.args == rest
    for option in options.OPTIONS:
        values = [value for name, value in found if name == option.name]
        actual = context.params[option.name.replace("-", "_")]
        if option.repeatable:
            assert actual == tuple(values)
        elif option.argument == options.NONE:
            assert actual is bool(values)
        else:
            assert actual == ((values[-1] or "") if values else None)


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain \N{SNOWMAN}", "plain \N{SNOWMAN}"),
        ("a\nb\x1b\x9b", "a\\x0ab\\x1b\\x9b"),
        ("\udcff", "\\xff"),
        ("\u202e\U000e0001", "\\u202e\\U000e0001"),
    ],
)
def test_escape(raw: str, shown: str) -> None:
    assert text.escape(raw) == shown


@given(st.text())
def test_escaped_text_is_printable(raw: str) -> None:
    assert text.escape(raw).isprintable()


@pytest.mark.parametrize(
    ("seconds", "shown"), [(-5, "0s"), (0.9, "0s"), (59, "59s"), (60, "1m"), (7199, "1h"), (86400, "1d"), (9e6, "104d")]
)
def test_duration(seconds: float, shown: str) -> None:
    assert text.duration(seconds) == shown


def test_table() -> None:
    assert text.table(("A", "B"), [("xx", "1\n"), ("y", "")]) == "A   B\nxx  1\\x0a\ny\n"


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    file = tmp_path / "udiRoot.conf"
    file.write_text(f"imagePath={tmp_path}\nsiteFs=/nowhere:/x;/tmp\nsiteEnv=A=1 B=2\nsiteEnv=C=3\ncpPath=/bin/cp\n")
    file.chmod(0o644)
    return file


def test_config_check(conf: Path, capsys: Capture) -> None:
    assert shifterctl.main(["config", "check", str(conf)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"warning: {conf}:5: cpPath has no meaning any more and is ignored",
        f"warning: {conf}:2: siteFs /nowhere is not a directory here",
        f"{conf}: ok",
    ]
    conf.write_text("siteFs=x\n")
    assert shifterctl.main(["config", "check", str(conf)]) == 1
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"shifterctl: {conf}:1: 'x' is not an absolute path\n")


def test_config_check_takes_a_relative_path(conf: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(conf.parent)
    assert shifterctl.main(["config", "check", conf.name]) == 0


def test_config_show(conf: Path, capsys: Capture) -> None:
    assert shifterctl.main(["config", "show", str(conf)]) == 0
    lines = [line.split(None, 2) for line in capsys.readouterr().out.splitlines()]
    assert ["siteEnv", f"{conf}:3", "A=1 B=2"] in lines
    assert ["siteEnv", f"{conf}:4", "C=3"] in lines
    assert ["udiIdleTime", "default", "300"] in lines
    assert ["allowLocalChroot", "default", "0"] in lines
    assert shifterctl.main(["config", "show", "--json", str(conf)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["siteFs"] == {"value": ["/nowhere:/x", "/tmp:/tmp"], "where": f"{conf}:2"}
    assert document["allowLocalChroot"] == {"value": False, "where": "default"}


@pytest.mark.parametrize("words", [[], ["config"], ["--help"], ["ps", "-h"]])
def test_shifterctl_help(words: list[str], capsys: Capture) -> None:
    assert shifterctl.main(words) == 0
    assert "Usage: shifterctl" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["bogus"], ["gc", "--bogus"], ["release"]])
def test_shifterctl_usage_errors_are_one_line(words: list[str], capsys: Capture) -> None:
    assert shifterctl.main(words) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("shifterctl: ")
    assert printed.err.count("\n") == 1


def udi(uid: int, volumes: list[str]) -> inventory.Udi:
    values = [("uid", str(uid)), ("image", "abc"), ("ref", "docker:a:1\x1b"), ("built", "12")]
    values += [("volume", volume) for volume in volumes]
    return inventory.Udi(records.Record("/run/shifter/udi/7/00ff", values, 34.5), [1, 2], None)


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Replace what needs a node with UDIs; return the list of calls."""
    calls: list[object] = []

    def collect(conf: str, everything: bool, keep_images: bool) -> list[str]:
        calls.append((conf, everything, keep_images))
        return ["UDI 7/00ff\x1b"]

    def udis(path: str | None) -> list[inventory.Udi]:
        calls.append(path)
        return [udi(1000, ["/a/b:/c"]), udi(1001, [])]

    def release(path: str) -> list[str]:
        calls.append(path)
        return []

    for function in (collect, udis, release):
        monkeypatch.setattr(inventory, function.__name__, function)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return calls


def test_gc_and_release(as_root: list[object], capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shifterctl.main(["gc"]) == 0
    assert shifterctl.main(["gc", "--all", "--keep-images"]) == 0
    monkeypatch.chdir("/usr")
    assert shifterctl.main(["release", "lib/"]) == 0
    assert as_root == [(_build.CONF, False, False), (_build.CONF, True, True), "/usr/lib"]
    assert capsys.readouterr().out == "UDI 7/00ff\\x1b\n" * 2


def test_ps(as_root: list[object], capsys: Capture) -> None:
    assert shifterctl.main(["ps"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["UID", "JOB", "IMAGE", "BUILT", "USED", "PROCESSES", "VOLUMES"]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["1000", "-", "docker:a:1\\x1b"],
        ["1001", "-", "docker:a:1\\x1b"],
    ]
    assert lines[1].endswith("ago  2          /a/b:/c")
    assert shifterctl.main(["ps", "--json", "--path", "/a/../b"]) == 0
    assert [row["uid"] for row in json.loads(capsys.readouterr().out)] == [1000, 1001]
    assert as_root == [None, "/b"]


def test_only_root_sees_mounts(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert shifterctl.main(["ps", "--path", "/a"]) == 1
    assert capsys.readouterr().err == "shifterctl: ps --path: only root can see what is mounted in a UDI\n"


def fake_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (tmp_path / "bin").mkdir()
    door = tmp_path / "bin/shifter"
    door.write_text("#!/bin/sh\n" + script)
    door.chmod(0o755)
    monkeypatch.setattr(_build, "PREFIX", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)


def test_ps_of_a_user_asks_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    record = [("shifter", "b"), ("uid", "7"), ("image", "abc"), ("volume", "/a:/b"), ("volume", "/c:/d")]
    record += [("ref", "docker:a:1"), ("built", "12"), ("end", "record")]
    (tmp_path / "out").write_bytes(b"00ff 34\0" + fields.encode(record) + b"00fe 35\0" + fields.encode(record))
    fake_door(tmp_path, monkeypatch, f'[ "$*" = --udi-list ] && cat {tmp_path}/out\n')
    assert shifterctl.main(["ps", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["key"], row["used"], row["volumes"]) for row in rows] == [
        ("00ff", 34, ["/a:/b", "/c:/d"]),
        ("00fe", 35, ["/a:/b", "/c:/d"]),
    ]


def test_ps_says_why_the_door_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    fake_door(tmp_path, monkeypatch, "echo 'shifter: lost its bit' >&2; exit 125\n")
    assert shifterctl.main(["ps"]) == 1
    assert capsys.readouterr().err == "shifterctl: lost its bit\n"
    monkeypatch.setattr(_build, "PREFIX", "/nowhere")
    assert shifterctl.main(["ps"]) == 1
    assert capsys.readouterr().err == "shifterctl: can't run /nowhere/bin/shifter: No such file or directory\n"


def test_errors_are_chained(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def fail(*arguments: str) -> None:
        raise ShifterError("outer") from ConfigError("inner")

    monkeypatch.setattr(shifterctl, "ask_door", fail)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert shifterctl.main(["ps"]) == 1
    assert capsys.readouterr().err == "shifterctl: outer: inner\n"
