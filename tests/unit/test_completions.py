"""Completion of the commands of jobs, run by bash and fish themselves; all shells know each of their options."""

import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from shifter.cli import setup_root, unsetup_root

COMPLETIONS = Path(__file__).resolve().parents[2] / "completions"
FILE = COMPLETIONS / "shifter.bash"

SCRIPT = """
source /usr/share/bash-completion/bash_completion
source "$0"
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${#COMP_LINE} COMP_TYPE=9
"_$1" 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


def offered(*words: str) -> set[str]:
    """What is offered for the last of *words*."""
    done = subprocess.run(["bash", "-c", SCRIPT, FILE, *words], capture_output=True, text=True, timeout=20, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.parametrize(("name", "command"), [("setupRoot", setup_root), ("unsetupRoot", unsetup_root)])
def test_every_option_is_offered(name: str, command: ModuleType) -> None:
    options = set(command.PARSER.by_name)
    assert offered(name, "-") == options
    assert offered(name, "--js") == {"--json"}


def offered_by_fish(line: str) -> set[str]:
    """What fish offers for the last word of *line*."""
    script = f"source {COMPLETIONS}/shifter.fish; complete -C $argv[1]"
    done = subprocess.run(["fish", "-N", "-c", script, line], capture_output=True, text=True, timeout=20, check=True)
    assert done.stderr == ""
    return {entry.partition("\t")[0] for entry in done.stdout.splitlines()}


@pytest.mark.parametrize(("name", "command"), [("setupRoot", setup_root), ("unsetupRoot", unsetup_root)])
def test_every_option_is_offered_by_fish_and_zsh(name: str, command: ModuleType) -> None:
    assert offered_by_fish(f"{name} -") | {"-h"} == set(command.PARSER.by_name)
    text = (COMPLETIONS / "shifter.zsh").read_text()
    function = text.partition(f"_shifter_{name.removesuffix('Root')}() {{")[2].partition("\n}")[0]
    known = set(re.findall(r"(?<![\w-])--?[a-zA-Z][a-z-]*", re.sub(r"\[.*?\].*|\([^)]*\)", "", function)))
    # -s and -S are options of _arguments itself, too.
    assert known - {"-s", "-S"} == set(command.PARSER.by_name) - {"-s"}
    subprocess.run(["zsh", "-n", COMPLETIONS / "shifter.zsh"], check=True)


def test_what_fish_offers_after_an_option() -> None:
    assert "nobody" in offered_by_fish("setupRoot -u nob")
    assert offered_by_fish("setupRoot -u nobody ") == {"docker", "custom", "id", "local"}
    assert "/usr/" in offered_by_fish("setupRoot local /us")
    assert offered_by_fish("shifterctl logs --j") == {"--job"}


def test_what_follows_an_option() -> None:
    assert "nobody" in offered("setupRoot", "-u", "nob")
    assert offered("setupRoot", "-u", "nobody", "") == {"docker", "custom", "id", "local"}
    assert offered("setupRoot", "--restart", "") == set()
    assert "/usr" in offered("setupRoot", "local", "/us")
    assert "logs" in offered("shifterctl", "l") and offered("shifterctl", "logs", "--j") == {"--job"}
