"""The door's parsing under libFuzzer, ASan and UBSan: every input keeps the properties that tests/fuzz/*.c check.

`make fuzz` does the same for longer; an input that broke something goes into the corpus, whose inputs run first here.
"""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SOAK
from tests.fuzz import run

FAULTS = {
    "options": ("an empty word", "parse", "if (*word)\n", "\n"),
    "request": ("a buffer that is too small", "parse", "caller->group_count + 1, 12)", "caller->group_count + 1, 6)"),
    "document": ("an id that is cut", "fields", "watch->as <= MAX_ID && ", ""),
    "reference": ("a bound that is not checked", "parse", "used + length + 2 > room || ", ""),
    "environment": ("a blank in a name", "environment", 'line += strspn(line, " \\t\\r");\n', "\n"),
}
"""Target -> fault that it shall see; source, text, and the faulty text in its place."""


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    assert (run.BUILD / "coverage/fuzzer").exists(), "make build/fuzz/fuzzer build/fuzz/coverage/fuzzer"


@pytest.mark.soak
@pytest.mark.parametrize("target", run.SHARES)
def test_no_input_breaks_the_parsing(
    target: str, tmp_path: Path, counts: dict[str, int], finding: Callable[[str], None]
) -> None:
    share = counts["fuzzed inputs"] * run.SHARES[target] // 100
    done = run.fuzz(target, tmp_path / "new", share, seed=0 if SOAK else 1)
    assert done >= share
    finding(f"{target}: {done} inputs under ASan and UBSan, every property held")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the fuzzer of a door that has all the faults."""
    directory = tmp_path_factory.mktemp("faulty")
    for path in run.SOURCES:
        code = (run.REPO / path).read_text()
        for _, source, text, wrong in FAULTS.values():
            if Path(path).stem == source:
                assert code.count(text) == 1, text
                code = code.replace(text, wrong)
        (directory / Path(path).name).write_text(code)
    sources = " ".join(str(directory / Path(path).name) for path in run.SOURCES)
    words = [f"FUZZ_DIR={directory}", f"PARSE_SRC={sources}", f"{directory}/fuzzer"]
    subprocess.run(["make", "-s", "-C", str(run.REPO), *words], check=True)
    return directory


@pytest.mark.parametrize("target", FAULTS)
def test_fuzzer_sees_a_fault(target: str, faulty: Path, tmp_path: Path) -> None:
    """Else a fuzzer that checks nothing would pass."""
    with pytest.raises(RuntimeError, match=r"not true|AddressSanitizer"):
        run.run(target, "-runs=20000", "-seed=1", str(run.CORPUS / target), artifacts=tmp_path, program=faulty)


def test_corpus_reaches_the_parsing() -> None:
    reached = run.unreached()
    assert set(reached) == set(run.SOURCES)
    for source, (lines, missing) in reached.items():
        assert lines > 50
        assert len(missing) < lines / 10, f"{source}: no input reaches the lines {missing}"


def test_corpus_is_small() -> None:
    sizes = [file.stat().st_size for target in run.SHARES for file in (run.CORPUS / target).iterdir()]
    assert sum(sizes) < 300_000
    assert len(sizes) < 3_000
