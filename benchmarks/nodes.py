"""What the benchmarks on virtual nodes share: their command line, and the table of where setupRoot's time goes."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import common
from tests.node import CLONE_NEWNS, MS_PRIVATE, MS_REC, mount, unshare


def setup_steps(cycles: Sequence[dict[str, float]], total: float) -> list[str]:
    """Lines of a table: the median of each step of `setupRoot --json`, in ms, and what is left of *total*."""
    lines = ["", "Where setupRoot's time goes:", "", "| step | ms |", "|---|---|"]
    before = 0.0
    for step in cycles[0]:
        at = median(one[step] for one in cycles)
        lines.append(f"| {step} | {at - before:.1f} |")
        before = at
    return [*lines, f"| start of Python, its modules, and the end | {total - before:.1f} |"]


def main(
    name: str,
    about: str | None,
    rounds: int,
    packages: Sequence[str],
    measure: Callable[[int, int], dict[str, Any]],
    report: Callable[[dict[str, Any]], str],
) -> int:
    """Run the benchmark *name* by its command line and write NAME.json and NAME.md. *rounds*: how many, by default."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("-n", "--number", type=int, default=rounds, help="rounds (default: %(default)s)")
    parser.add_argument("--cycles", type=int, default=20, help="set-ups of a job by hand (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="where the results are written")
    options = parser.parse_args()
    unshare(CLONE_NEWNS)  # what the nodes share is mounted here first, and not to be seen by the host
    mount("", "/", flags=MS_REC | MS_PRIVATE)
    versions = common.versions(packages)
    result = measure(options.number, options.cycles) | {"versions": versions}
    common.write(options.results, name, result, report(result))
    return 0
