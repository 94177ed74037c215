"""The command line of setupRoot and unsetupRoot, as getopt_long(3) understands one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shifter import _build
from shifter.cli import setup_root, unsetup_root
from shifter.cli.arguments import Arguments, Option, Parser, number
from shifter.errors import UsageError

PARSER = Parser(
    "program",
    "WORD",
    "Does something.",
    [
        Option("-u", "--user", metavar="NAME", about="Who."),
        Option("--number", metavar="NUMBER", check=number(100)),
        Option("-v", "--verbose"),
        Option("-q", "--quiet"),
    ],
)


def parsed(*words: str) -> Arguments:
    found = PARSER.parse(words)
    assert found is not None
    return found


@pytest.mark.parametrize("words", [("-u", "a"), ("-ua",), ("--user", "a"), ("--user=a",), ("-u", "b", "-u", "a")])
def test_ways_to_give_an_argument(words: tuple[str, ...]) -> None:
    found = parsed("x", *words, "y")
    assert found.text("--user") == "a" and found.words == ["x", "y"]


def test_letters_together_and_what_looks_like_an_option() -> None:
    found = parsed("-vqu", "-x", "--number=7", "--", "-v", "-")
    assert found.last("--verbose", "--quiet") == "--quiet" and found.all("--user") == ["-x"]
    assert found.number("--number") == 7 and found.words == ["-v", "-"]
    assert parsed("-").words == ["-"] and parsed("--user=").text("--user") == ""
    assert parsed().text("--user") is None and parsed().number("--number") is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--use", "a"], "--use: there is no such option; program --help lists them"),
        (["-x"], "-x: there is no such option"),
        (["-u"], "-u needs an argument: NAME"),
        (["--verbose=1"], "--verbose takes no argument"),
        (["--number", "100"], "--number 100: it must be a number from 0 to 99"),
        (["--number", "-1"], "must be a number"),
        (["--number", "\u0663"], "must be a number"),
        (["--\x1b[2J"], "--\\x1b[2J: there is no such option"),
    ],
)
def test_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        PARSER.parse(words)
    assert message in error.value.chain()


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["-vh", "x"], ["--version"]):
        assert PARSER.parse(words) is None
    said = capsys.readouterr().out
    assert "Usage: program [OPTIONS] WORD\n" in said and "  -u, --user NAME " in said and "Who.\n" in said
    assert said.endswith(f"program {_build.VERSION} (build {_build.BUILD})\n")
    for module in (setup_root, unsetup_root):
        assert max(map(len, module.PARSER.help().splitlines())) < 120


def test_lenient_leaves_out_what_is_not_known() -> None:
    found = PARSER.parse(["-x", "--other=1", "--user=a", "word"], lenient=True)
    assert found is not None and found.text("--user") == "a"


@given(st.lists(st.text(alphabet="-u=nv ax7", max_size=6), max_size=6))
def test_any_words_are_parsed_or_refused(words: list[str]) -> None:
    try:
        PARSER.parse([word for word in words if not word.startswith("-h") and "h" not in word])
    except UsageError as error:
        assert "\n" not in error.chain()
