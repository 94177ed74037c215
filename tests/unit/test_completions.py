"""bash completion of the commands of jobs, run by bash itself; it knows each of their options."""

import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from shifter.cli import setup_root, unsetup_root

FILE = Path(__file__).resolve().parents[2] / "completions/shifter.bash"

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


def test_what_follows_an_option() -> None:
    assert "nobody" in offered("setupRoot", "-u", "nob")
    assert offered("setupRoot", "-u", "nobody", "") == {"docker", "custom", "id", "local"}
    assert offered("setupRoot", "--restart", "") == set()
    assert "/usr" in offered("setupRoot", "local", "/us")
    assert "logs" in offered("shifterctl", "l") and offered("shifterctl", "logs", "--j") == {"--job"}
