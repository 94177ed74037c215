"""Mutants: proof that the tests would notice a missing check. ``make mutants`` runs them all, or MUTANTS="NAME ...".

A mutant is a patch in tests/security/mutants that takes one check away. Its first lines say what it is:

    # test: TEST_ID            a test that has to notice; several such lines are possible
    # what: SENTENCE           what is missing then
    # invariant: N             the row of the table in docs/security.md; several numbers are possible
    # second-line: SENTENCE    (perhaps) why a single check is not missed, so that the patch takes several away

The tests are run in a copy of the tree: first without any patch, where they have to pass, then once for each patch. A
mutant is killed if its test fails by an assertion, a leak or a time-out. Anything else is a finding: it survived, or it is
broken (no patch, no build, no such test, a test that stumbles).
"""

import argparse
import dataclasses
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PATCHES = REPO / "tests/security/mutants"
AT_A_TIME = 2
TIMEOUT = 300
"""Seconds for one build or one run of a mutant's tests."""

_HEADER = re.compile(r"# (test|what|invariant|second-line): (.+)\n")
_HUNK = re.compile(r"@@ -\d+(?:,\d+)? \+\d+(?:,\d+)? @@.*\n")
_NOTICED = re.compile(
    r"(failed on teardown with \")?(assert |AssertionError|Failed|[\w.]*Leak|subprocess.TimeoutExpired)"
    r"|[\w.]*NodeError: (?s:.*)[\s.](AssertionError|Failed: )"  # in a process of the node
)
"""What a test says that noticed something. A KeyError or the like says only that it stumbled."""


class MutantError(Exception):
    """A mutant that can't be tried."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One patch. *hunks*: file name to pairs of (text that is there, text in its place)."""

    name: str
    tests: tuple[str, ...]
    what: str
    invariants: tuple[int, ...]
    second_line: str
    hunks: dict[str, list[tuple[str, str]]]

    def apply(self, tree: Path) -> dict[Path, str]:
        """Return the files of *tree* that the patch changes, with their new text; nothing is written.

        Raises MutantError unless the text of each hunk is there exactly, and once.
        """
        changed = {}
        for name, hunks in self.hunks.items():
            text = (tree / name).read_text()
            for old, new in hunks:
                if text.count(old) != 1:
                    raise MutantError(f"{self.name}: {name} has its text {text.count(old)} times:\n{old}")
                text = text.replace(old, new)
            changed[tree / name] = text
        return changed


def read(path: Path) -> Mutant:
    """Read a patch. Raises MutantError for one that is none."""
    header: dict[str, list[str]] = {"test": [], "what": [], "invariant": [], "second-line": []}
    hunks: dict[str, list[tuple[str, str]]] = {}
    lines = path.read_text().splitlines(keepends=True)
    while lines and (match := _HEADER.fullmatch(lines[0])):
        header[match[1]].append(match[2])
        del lines[0]
    file: list[tuple[str, str]] | None = None
    for line in lines:
        if line.startswith("+++ b/"):
            file = hunks[line[6:].strip()] = []
        elif file is not None and _HUNK.fullmatch(line):
            file.append(("", ""))
        elif file and line[0] in " +-" and not line.startswith("--- a/"):
            old, new = file[-1]
            file[-1] = (old + line[1:] * (line[0] != "+"), new + line[1:] * (line[0] != "-"))
    if not header["test"] or len(header["what"]) != 1 or not header["invariant"] or not hunks:
        raise MutantError(f"{path.name}: it needs `# test:`, `# what:`, `# invariant:` and a patch")
    invariants = tuple(int(number) for number in header["invariant"][0].split(","))
    return Mutant(
        path.stem, tuple(header["test"]), header["what"][0], invariants, "".join(header["second-line"]), hunks
    )


def read_all(names: Sequence[str] = ()) -> list[Mutant]:
    """Read all patches, or those of *names*. Raises MutantError."""
    paths = [PATCHES / f"{name}.patch" for name in names] or sorted(PATCHES.glob("*.patch"))
    if missing := [path.stem for path in paths if not path.exists()]:
        raise MutantError(f"no such mutant: {' '.join(missing)}")
    return [read(path) for path in paths]


@dataclasses.dataclass(frozen=True)
class Result:
    """*state*: killed, SURVIVED, or BROKEN with the reason in *text*."""

    state: str
    seconds: float
    text: str = ""


class Copy:
    """A copy of the working tree in *top*, with the virtual environment, the dependencies and the OpenSSH of the original."""

    def __init__(self, top: Path) -> None:
        self.top = top
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=REPO, capture_output=True, text=True, check=True).stdout.split("\0")
        for name in filter(None, names):
            if (REPO / name).exists():
                (top / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(REPO / name, top / name)  # with its time: make must not find the dependencies to be old
        (top / "build").mkdir()
        for name in ("venv", "python-deps", "udi-image"):
            (top / "build" / name).symlink_to(REPO / "build" / name)

    def build(self) -> None:
        """Bring build/stage up to date. Raises MutantError."""
        done = self._run(["make", "-s", "stage"])
        if done.returncode != 0:
            raise MutantError(f"it can't be built:\n{done.stdout}{done.stderr}")

    def failures(self, tests: Iterable[str], *options: str) -> list[tuple[str, str]]:
        """Run *tests* and return (test, message) of those that failed. Raises MutantError unless each was run."""
        report = self.top / "build/mutant.xml"
        report.unlink(missing_ok=True)
        pytest = ["build/venv/bin/python", "-B", "-m", "pytest", "-q", *options, "-p", "no:cacheprovider"]
        done = self._run([*pytest, f"--junitxml={report}", *tests])
        if done.returncode not in (0, 1) or not report.exists():
            raise MutantError(f"pytest: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
        faults = [(case, fault) for case in cases for fault in case if fault.tag in ("failure", "error")]
        said = [
            (f"{case.get('classname')}::{case.get('name')}", f"{fault.get('message')}\n{fault.text}")
            for case, fault in faults
        ]
        if not cases or any(case.find("skipped") is not None for case in cases) or bool(said) != bool(done.returncode):
            raise MutantError(f"pytest: not every test was run\n{done.stdout[-2000:]}")
        return said

    def try_mutant(self, mutant: Mutant) -> Result:
        """Apply the patch, build, run its tests, and undo it."""
        start = time.monotonic()
        originals: dict[Path, bytes] = {}
        try:
            for path, text in mutant.apply(self.top).items():
                originals[path] = path.read_bytes()
                path.write_text(text)
            self.build()
            said = [message for _, message in self.failures(mutant.tests, "-x")]
            state = "killed" if any(map(_NOTICED.match, said)) else "BROKEN" if said else "SURVIVED"
            return Result(state, time.monotonic() - start, said[0].splitlines()[0] if said else "")
        except (MutantError, subprocess.TimeoutExpired) as error:
            return Result("BROKEN", time.monotonic() - start, str(error))
        finally:
            for path, data in originals.items():
                path.write_bytes(data)

    def _run(self, words: Sequence[str | Path]) -> "subprocess.CompletedProcess[str]":
        clean = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
        return subprocess.run(words, cwd=self.top, capture_output=True, text=True, timeout=TIMEOUT, env=clean)


@contextmanager
def copies(count: int) -> Iterator["queue.SimpleQueue[Copy]"]:
    """Make *count* copies of the tree, which go at the end; whoever takes one gives it back."""
    base = REPO / "build/mutants"
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base) as top:
        free: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for number in range(count):
            free.put(Copy(Path(top) / str(number)))
        yield free


def run(mutants: Sequence[Mutant], count: int = AT_A_TIME) -> Iterator[tuple[Mutant, Result]]:
    """Try *mutants*, *count* at a time; their results come in the same order. Raises MutantError if a test fails without."""
    with copies(count) as free, ThreadPoolExecutor(count) as pool:
        tests = sorted({test for mutant in mutants for test in mutant.tests})

        def check(number: int) -> list[tuple[str, str]]:
            copy = free.get()
            copy.build()
            try:
                return copy.failures(tests[number::count]) if tests[number::count] else []
            finally:
                free.put(copy)

        def attempt(mutant: Mutant) -> Result:
            copy = free.get()
            try:
                return copy.try_mutant(mutant)
            finally:
                free.put(copy)

        if said := [f"{test}: {text[:1000]}" for found in pool.map(check, range(count)) for test, text in found]:
            raise MutantError("without any mutant a test fails:\n" + "\n".join(said))
        yield from zip(mutants, pool.map(attempt, mutants), strict=True)


def main() -> None:
    """Run the mutants that are named, or all; exit 1 if one is not killed."""
    parser = argparse.ArgumentParser(description="Take checks away one by one; the tests must notice.")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("-j", "--jobs", type=int, default=AT_A_TIME, metavar="NUMBER", help="so many at a time")
    asked = parser.parse_args()
    failed = 0
    try:
        mutants = read_all(asked.names)
        width = max(len(mutant.name) for mutant in mutants)
        for mutant, result in run(mutants, asked.jobs):
            failed += result.state != "killed"
            print(
                f"{mutant.name:{width}} {result.state:8} {result.seconds:5.0f} s  {' '.join(mutant.tests)}", flush=True
            )
            if result.state != "killed":
                print(f"    {mutant.what}\n    {result.text}", flush=True)
    except MutantError as error:
        sys.exit(f"mutants: {error}")
    print(f"{len(mutants)} mutants, {len(mutants) - failed} killed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
