"""The fuzzer of the door's parsing: running its targets, keeping their corpus small, and the lines that it reaches.

`make fuzz`, `make fuzz-merge` and `make fuzz-coverage` call it as a program, the test as a module. A target is a name of
the program build/fuzz/fuzzer (tests/fuzz/main.c). Its corpus, one file per input, is in tests/fuzz/corpus.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
BUILD = REPO / "build/fuzz"
CORPUS = Path(__file__).parent / "corpus"
NEW = BUILD / "new"
SHARES = {"options": 26, "request": 6, "document": 26, "reference": 26, "environment": 16}
"""The targets, and how many of a hundred inputs each gets."""
SOURCES = tuple(f"shifter/door/{name}.c" for name in ("fields", "parse", "environment"))
MAX_LENGTH = 4400  # longer than a path may be

ENVIRONMENT = {
    "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
    # Memory that was freed is kept from being used again for a while; the default would be 256 MiB of it.
    "ASAN_OPTIONS": "quarantine_size_mb=8:detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def run(target: str, *arguments: str, artifacts: Path, program: Path = BUILD) -> str:
    """Run a target; return what it says. Raises RuntimeError, with the end of that, when an input broke it.

    The input is then in *artifacts*.
    """
    command = [str(program / target), f"-max_len={MAX_LENGTH}", f"-artifact_prefix={artifacts}/", *arguments]
    done = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=ENVIRONMENT, check=False)
    said = done.stderr.decode(errors="replace")
    if done.returncode != 0:
        raise RuntimeError(f"{target}: exit status {done.returncode}; its input is in {artifacts}\n{said[-4000:]}")
    return said


def fuzz(target: str, new: Path, runs: int, seconds: int = 0, seed: int = 0) -> int:
    """Fuzz *target* from its corpus; what is found goes to *new*. Returns the number of executions."""
    new.mkdir(parents=True, exist_ok=True)
    limits = [f"-runs={-1 if seconds else runs}", f"-max_total_time={seconds}", f"-seed={seed}"]
    words = ["-print_final_stats=1", f"-dict={Path(__file__).parent / 'door.dict'}"]
    said = run(target, *limits, *words, str(new), str(CORPUS / target), artifacts=new.parent)
    return int(re.findall(r"stat::number_of_executed_units: (\d+)", said)[0])


def merge(target: str) -> None:
    """Make the corpus of *target* the smallest set of inputs that reaches all that it and the new ones reach."""
    with tempfile.TemporaryDirectory(dir=BUILD) as name:
        smallest, old = Path(name), CORPUS / target
        old.mkdir(parents=True, exist_ok=True)
        sources = [str(path) for path in (old, NEW / target) if path.is_dir()]
        run(target, "-merge=1", name, *sources, artifacts=NEW)
        for file in old.iterdir():
            file.unlink()
        for file in smallest.iterdir():
            (old / file.name[:12]).write_bytes(file.read_bytes())


def unreached(corpus: Path = CORPUS) -> dict[str, tuple[int, list[int]]]:
    """Return for each source how many of its lines are code, and those that no input of *corpus* reaches."""
    with tempfile.TemporaryDirectory(dir=BUILD) as name:
        profiles = []
        for target in SHARES:
            profiles.append(f"{name}/{target}.profraw")
            command = [str(BUILD / "coverage" / target), "-runs=0", str(corpus / target)]
            environment = ENVIRONMENT | {"LLVM_PROFILE_FILE": profiles[-1]}
            subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, check=True)
        merged = f"{name}/all.profdata"
        subprocess.run(["llvm-profdata", "merge", "-o", merged, *profiles], check=True)
        command = ["llvm-cov", "export", "-format=lcov", f"-instr-profile={merged}", str(BUILD / "coverage/fuzzer")]
        report = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = {}
    for part in report.split("end_of_record"):
        source = next((source for source in SOURCES if f"{source}\n" in part), None)
        if source:
            counts = {int(line): int(count) for line, count in re.findall(r"^DA:(\d+),(\d+)", part, re.MULTILINE)}
            found[source] = len(counts), [line for line, count in sorted(counts.items()) if count == 0]
    return found


def print_coverage() -> None:
    """Print the share of lines that are reached, and the text of those that are not."""
    for source, (lines, missing) in unreached().items():
        print(f"{source}: {lines - len(missing)} of {lines} lines, {100 * (lines - len(missing)) / lines:.1f} %")
        text = (REPO / source).read_text().splitlines()
        for line in missing:
            print(f"  {line}: {text[line - 1].strip()}")


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("fuzz", "merge", "coverage"))
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs of all targets together")
    parser.add_argument("--seconds", type=int, default=0, help="time for each target, in place of a number")
    arguments = parser.parse_args()
    NEW.mkdir(parents=True, exist_ok=True)
    if arguments.what == "coverage":
        print_coverage()
        return
    for target in SHARES:
        start = time.monotonic()
        if arguments.what == "merge":
            merge(target)
            continue
        share = arguments.runs * SHARES[target] // 100
        done = fuzz(target, NEW / target, share, arguments.seconds, seed=int(time.time()))
        print(
            json.dumps({"target": target, "executions": done, "seconds": round(time.monotonic() - start)}), flush=True
        )


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(str(error))
