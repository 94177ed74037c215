#!/usr/bin/env python3
"""How fast files are inside a UDI, against the same image mounted bare. See README.md for what each row means."""

import argparse
import random
import shutil
import sys
from collections import Counter
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.common import IMAGES, LAB, TREE, UID, run, run_as_user

FILES = 3000
SMALL = 16 * 1024
"""Bytes of the largest file that counts as small."""
BARE = Path("/srv/bare")
HOME = Path("/home") / common.USER
"""On a siteFs, so the same programs are seen in the UDI and in the bare image."""
FORMAT = "squashfs"
PACKAGES = ("squashfs-tools", "mmdebstrap")

MODULE_NAMES = """
argparse ast asyncio base64 bdb bz2 calendar cmd code codecs colorsys compileall concurrent.futures configparser
copy csv ctypes dataclasses datetime decimal difflib dis doctest email.message email.parser enum filecmp fileinput
fractions ftplib functools getopt getpass gettext glob graphlib gzip hashlib hmac html.parser http.client
http.cookiejar http.server imaplib inspect ipaddress json logging.config lzma mailbox mimetypes
multiprocessing.pool netrc optparse pathlib pdb pickle pickletools pkgutil platform plistlib poplib pprint profile
pstats queue random sched secrets selectors shelve shlex shutil smtplib socketserver sqlite3 ssl statistics
stringprep subprocess symtable sysconfig tarfile tempfile textwrap timeit tokenize trace tracemalloc typing
unittest.mock urllib.request urllib.robotparser uuid venv wave weakref xml.dom.minidom xml.etree.ElementTree
xml.sax.saxutils xmlrpc.client xmlrpc.server zipapp zipfile zoneinfo
"""
MODULES = MODULE_NAMES.split()

IMPORTS = f"""
import time
start = time.perf_counter_ns()
for name in {MODULES!r}:
    __import__(name)
print(time.perf_counter_ns() - start)
"""

Test = tuple[str, str, list[str]]
TESTS: tuple[Test, ...] = (
    ("read", f"stat, open, read of {FILES} small files", [str(HOME / "reader"), str(HOME / "list")]),
    ("import", f"import of {len(MODULES)} Python modules", ["/usr/bin/python3", "-I", "-B", str(HOME / "imports.py")]),
)
PLACES = ("bare", "bare again", "UDI")


def furnish() -> list[str]:
    """Put the programs into the user's home, mount the image bare; return the files that are read."""
    common.install_ours([FORMAT])
    identifier = (IMAGES / "tags" / common.reference(FORMAT)).readlink()
    BARE.mkdir()
    run("mount", "-o", "loop,ro,nosuid,nodev", IMAGES / f"{identifier}.{FORMAT}", BARE)
    run("mount", "--bind", "/home", BARE / "home")
    candidates = sorted(path for path in (TREE / "usr").rglob("*") if is_small(path))
    names = [f"/{path.relative_to(TREE)}" for path in candidates[:: len(candidates) // FILES][:FILES]]
    shutil.copy(LAB / "reader", HOME / "reader")
    (HOME / "list").write_text("\n".join(names) + "\n", encoding="utf-8")
    (HOME / "imports.py").write_text(IMPORTS, encoding="utf-8")
    return names


def is_small(path: Path) -> bool:
    """A regular file of at most SMALL bytes that everybody may read."""
    status = path.lstat()
    return path.is_file() and not path.is_symlink() and status.st_size <= SMALL and bool(status.st_mode & 0o004)


def sample(place: str, command: list[str]) -> int:
    """Nanoseconds that the program itself measured at one place."""
    if place == "UDI":
        return int(run_as_user(*common.ours(FORMAT, *command)))
    return int(run("chroot", f"--userspec={UID}:{UID}", "--groups=", BARE, *command))


def file_systems(names: list[str]) -> dict[str, int]:
    """On what kind of file system, as the UDI's mount table says, how many of the files are."""
    mounts = {}
    for line in run_as_user(*common.ours(FORMAT, "/bin/cat", "/proc/self/mountinfo")).splitlines():
        words = line.split()
        mounts[Path(words[4])] = words[words.index("-") + 1]
    return dict(Counter(next(mounts[parent] for parent in Path(name).parents if parent in mounts) for name in names))


def measure(number: int) -> dict[str, Any]:
    """``number`` rounds; each takes every test at every place, in random order, with warm caches."""
    names = furnish()
    samples: dict[str, dict[str, list[int]]] = {key: {place: [] for place in PLACES} for key, _, _ in TESTS}
    turns = [(key, place, command) for key, _, command in TESTS for place in PLACES]
    for _, place, command in turns:
        sample(place, command)
    before = common.machine()
    for _ in range(number):
        for key, place, command in random.sample(turns, len(turns)):
            samples[key][place].append(sample(place, command))
    return {
        "machine": before,
        "load_after": common.machine()["load"],
        "file_systems": file_systems(names),
        "samples_ns": samples,
    }


def report(result: dict[str, Any]) -> str:
    """Everything as Markdown. A ratio is that of the two samples of one round."""
    lines = ["| | n | median ms | min | p95 | ratio to bare: median | 5 % | 95 % |", "|---" + "|---:" * 7 + "|"]
    verdicts = []
    for key, title, _ in TESTS:
        samples = result["samples_ns"][key]
        ratios = {place: list(map(truediv, samples[place], samples["bare"])) for place in PLACES}
        for place in PLACES:
            values = [value / 1e6 for value in samples[place]]
            numbers = f"{len(values)} | {median(values):.2f} | {min(values):.2f} | {common.p95(values):.2f}"
            low, high = spread(ratios[place])
            lines.append(f"| {title}: {place} | {numbers} | {median(ratios[place]):.3f} | {low:.3f} | {high:.3f} |")
        low, high = spread(ratios["bare again"])
        where = "within" if low <= median(ratios["UDI"]) <= high else "NOT within"
        verdicts.append(f"{title}: the UDI's median ratio is {where} the spread of bare against bare.")
    kinds = result["file_systems"]
    found = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
    overlay = "yes" if "overlay" in kinds else "no"
    verdicts.append(f"The files lie on (mount table of the UDI): {found}. Overlay on the path: {overlay}.")
    return "\n".join([*lines, "", *(f"* {verdict}" for verdict in verdicts), "", *common.describe(result)]) + "\n"


def spread(ratios: list[float]) -> tuple[float, float]:
    """The 5th and the 95th percentile."""
    return -common.p95([-value for value in ratios]), common.p95(ratios)


def main() -> int:
    """Run the benchmark and write files.json and files.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    common.add_options(parser, number=40)
    options = parser.parse_args()
    common.prepare(options.work)
    versions = common.versions(PACKAGES)
    result = common.in_lab(options.work, options.stage, lambda: measure(options.number)) | {"versions": versions}
    common.write(options.results, "files", result, report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
