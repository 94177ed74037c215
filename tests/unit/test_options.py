"""The option table and its parser."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shifter import options
from shifter.errors import UsageError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "found", "rest"),
    [
        ([], [], []),
        (["ls", "-l"], [], ["ls", "-l"]),
        (["-v", "ls", "-v"], [("verbose", None)], ["ls", "-v"]),
        (["--", "-v"], [], ["-v"]),
        (["-v", "--", "--", "x"], [("verbose", None)], ["--", "x"]),
        (["-", "-v"], [], ["-", "-v"]),
        (["", "-v"], [], ["", "-v"]),
        (["--image=a", "x"], [("image", "a")], ["x"]),
        (["--image", "a", "x"], [("image", "a")], ["x"]),
        (["--image", "--verbose"], [("image", "--verbose")], []),
        (["--image", "--", "x"], [("image", "--")], ["x"]),
        (["--image="], [("image", "")], []),
        (["--image", ""], [("image", "")], []),
        (["--env=A=b=c"], [("env", "A=b=c")], []),
        (["-ia", "-i", "b"], [("image", "a"), ("image", "b")], []),
        (["-i=a"], [("image", "=a")], []),
        (["-vEia", "x"], [("verbose", None), ("clearenv", None), ("image", "a")], ["x"]),
        (["-vi", "a", "x"], [("verbose", None), ("image", "a")], ["x"]),
        (["--workdir", "/p"], [("workdir", None)], ["/p"]),
        (["--workdir=/p"], [("workdir", "/p")], []),
        (["--workdir="], [("workdir", "")], []),
        (["-w", "/p"], [("workdir", None)], ["/p"]),
        (["-w/p"], [("workdir", "/p")], []),
        (["-vw"], [("verbose", None), ("workdir", None)], []),
        (["-wv"], [("workdir", "v")], []),
        (["--entry=x"], [("entrypoint", "x")], []),
        (["--entrypoint", "x"], [("entrypoint", None)], ["x"]),
        (["-V", "/a:/b", "--volume=/c:/d"], [("volume", "/a:/b"), ("volume", "/c:/d")], []),
        (["--help", "--version"], [("help", None), ("version", None)], []),
    ],
)
def test_parse(words: list[str], found: list[tuple[str, str | None]], rest: list[str]) -> None:
    assert options.parse(words) == (found, rest)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nonsense"], "unknown option '--nonsense'"),
        (["--nonsense=1"], "unknown option '--nonsense'"),
        (["--imag=a"], "unknown option '--imag'"),
        (["--=a"], "unknown option '--'"),
        (["-vx"], "unknown option '-vx'"),
        (["-\N{SNOWMAN}"], "unknown option '-\N{SNOWMAN}'"),
        (["-n"], "unknown option '-n'"),
        (["--image"], "option '--image' needs a value"),
        (["-vi"], "option '-i' needs a value"),
        (["--verbose=1"], "option '--verbose' takes no value"),
        (["--verbose="], "option '--verbose' takes no value"),
        (["--help", "--nonsense"], "unknown option '--nonsense'"),
    ],
)
def test_usage_errors(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        options.parse(words)
    assert str(caught.value) == message


WORDS = st.one_of(
    st.sampled_from(["-", "--", "-vE", "-i", "-w/x", "--image", "--image=a", "--workdir", "--env-file", "ls", "--x"]),
    st.text(alphabet="-=viwVEeax/", max_size=6),
)


@given(st.lists(WORDS, max_size=8))
def test_parse_never_loses_a_word(words: list[str]) -> None:
    try:
        found, rest = options.parse(words)
    except UsageError:
        return
    assert words[len(words) - len(rest) :] == rest
    assert {name for name, _ in found} <= {option.name for option in options.OPTIONS}


def test_table_is_consistent() -> None:
    names = [name for option in options.OPTIONS for name in (option.name, *option.aliases)]
    shorts = [option.short for option in options.OPTIONS if option.short]
    assert len(set(names)) == len(names)
    assert len(set(shorts)) == len(shorts)
    for option in options.OPTIONS:
        assert bool(option.metavar) == (option.argument != options.NONE)
        assert option.help.endswith(".")


def test_c_header_compiles_to_the_same_table(tmp_path: Path) -> None:
    (tmp_path / "options.h").write_text(options.c_header())
    (tmp_path / "main.c").write_text(
        '#include <stdio.h>\n#include "options.h"\n'
        "int main(void) {\n"
        "    for (size_t i = 0; i < sizeof OPTION_TABLE / sizeof *OPTION_TABLE; i++) {\n"
        "        const struct option_entry *e = &OPTION_TABLE[i];\n"
        '        printf("%s %d %d %d\\n", e->name, e->short_name, e->argument, e->id);\n'
        "    }\n"
        "}\n"
    )
    program = tmp_path / "main"
    subprocess.run(["gcc", "-Wall", "-Wextra", "-Werror", "-o", program, tmp_path / "main.c"], check=True)
    kinds = [options.NONE, options.REQUIRED, options.OPTIONAL]
    expected = []
    for number, option in enumerate(options.OPTIONS):
        for name in (option.name, *option.aliases):
            short = ord(option.short) if option.short and name == option.name else 0
            expected.append(f"{name} {short} {kinds.index(option.argument)} {number}")
    assert subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines() == expected


@pytest.mark.parametrize("file", ["man/shifter.1", "completions/shifter.bash", "completions/shifter.zsh"])
def test_manual_and_completions_know_every_option(file: str) -> None:
    text = (ROOT / file).read_text().replace("\\-", "-")
    for option in options.OPTIONS:
        for name in (option.name, *option.aliases):
            assert f"--{name}" in text, f"{file} lacks --{name}"
        if option.short:
            assert f"-{option.short}" in text, f"{file} lacks -{option.short}"


def test_fish_completions_know_every_option() -> None:
    text = (ROOT / "completions/shifter.fish").read_text()
    for option in options.OPTIONS:
        for name in (option.name, *option.aliases):
            assert f"-l {name} " in text
        if option.short:
            assert f"-s {option.short} " in text
