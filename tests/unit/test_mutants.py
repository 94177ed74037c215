"""The mutants (tools/mutants.py) fit the tree, the tests and the table of invariants; one of them really runs."""

import re
import subprocess
import sys

import mutants
import pytest

from tests.node import REPO


def rows() -> list[int]:
    """The numbers of the rows of the table of invariants."""
    text = (REPO / "docs/security.md").read_text().partition("\n## Invariants\n")[2].partition("\n## ")[0]
    return [int(number) for number in re.findall(r"^\| (\d+) \| ", text, re.M)]


def test_every_invariant_has_a_mutant() -> None:
    assert rows() == list(range(1, len(rows()) + 1)) and len(rows()) > 30
    named = {number for mutant in mutants.read_all() for number in mutant.invariants}
    assert named == set(rows())


def test_patches_apply_and_change_something() -> None:
    for mutant in mutants.read_all():
        changed = mutant.apply(REPO)
        assert changed and all(path.read_text() != text for path, text in changed.items()), mutant.name
        assert all(name.startswith("shifter/") for name in mutant.hunks), mutant.name


def test_the_tests_that_they_name_exist() -> None:
    tests = {test for mutant in mutants.read_all() for test in mutant.tests}
    pytest_ = [sys.executable, "-B", "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *sorted(tests)]
    done = subprocess.run(pytest_, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


def test_patch_that_does_not_apply_is_told() -> None:
    mutant = mutants.read_all(["many-volumes"])[0]
    for old in ("no such text\n", "\n"):
        broken = mutants.Mutant("x", mutant.tests, "", (1,), "", {"shifter/udi/sources.py": [(old, "")]})
        with pytest.raises(mutants.MutantError, match=r"has its text \d+ times"):
            broken.apply(REPO)


def test_one_mutant_is_killed_and_one_survives() -> None:
    killed = mutants.read_all(["reserved-by-its-name"])[0]
    comment = {"shifter/volumes.py": [("# unescaped blanks", "# Unescaped blanks")]}
    survivor = mutants.Mutant("survivor", killed.tests, "", (1,), "", comment)
    states = {mutant.name: result.state for mutant, result in mutants.run([killed, survivor], 1)}
    assert states == {"reserved-by-its-name": "killed", "survivor": "SURVIVED"}


def test_stumbling_is_no_killing() -> None:
    """What pytest says of a test that failed for another reason than that it noticed something."""
    for said, noticed in (
        ("AssertionError: assert 0 == 1", True),
        ("assert '' == 'x'", True),
        ("Failed: left on the host:", True),
        ('failed on teardown with "tests.node.Leak: left behind in node1:', True),
        ("subprocess.TimeoutExpired: Command ...", True),
        (
            "tests.node.NodeError: Traceback (most recent call last):\n  File ...\n_pytest.outcomes.Failed: DID NOT RAISE",
            True,
        ),
        ("tests.node.NodeError: Traceback (most recent call last):\n  File ...\nKeyError: 1", False),
        ("KeyError: 'Uid'", False),
        ('failed on setup with "AssertionError', False),
        ("ModuleNotFoundError: No module named 'shifter'", False),
    ):
        assert bool(mutants._NOTICED.match(said)) == noticed, said
