#!/usr/bin/env python3
"""How long a launch takes: Shifter beside what a user would pick instead. See README.md for what each row means."""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.common import CROWD, LAB, TREE, UID, CommandFailed, launch, run, run_as_user

TRUE = "/bin/true"
REST = 0.02
"""Seconds before each sample, in which the kernel finishes what the preparation left behind."""
RUNTIME = Path(f"/run/user/{UID}")
PACKAGES = ("bubblewrap", "crun", "runc", "charliecloud-runtime", "libsquashfuse0", "fuse3", "podman", "conmon")
"""The peers and what of them decides on their speed."""


class Row(NamedTuple):
    """One line of the table. ``set_up`` makes what it needs, outside of the measured time, and returns the command."""

    key: str
    title: str
    set_up: Callable[[], list[str]]
    before: Callable[[], None] | None = None
    processes: int = 1
    step: int = 0
    image: str = ""
    """The format of the image, if the row is one of ours."""


# -- peers -------------------------------------------------------------------------------------------------------------


def native() -> list[str]:
    """The command itself."""
    return [TRUE]


def bubblewrap() -> list[str]:
    """A read-only root, devices, procfs and /home."""
    return ["bwrap", "--ro-bind", str(TREE), "/", "--dev", "/dev", "--proc", "/proc", "--bind", "/home", "/home", TRUE]


def oci(runtime: str, *options: str) -> list[str]:
    """A rootless bundle, the same for both: what ``runc spec --rootless`` writes, reduced to what a launch needs."""
    bundle = RUNTIME / f"{runtime}.bundle"
    run_as_user("mkdir", bundle)
    run_as_user("runc", "spec", "--rootless", "--bundle", bundle)
    path = bundle / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    variables = [f"{name}={value}" for name, value in common.environment(common.USER, UID).items()]
    config["process"].update(args=[TRUE], terminal=False, env=variables)
    del config["hostname"]
    config["root"] = {"path": str(TREE), "readonly": True}
    config["linux"]["namespaces"] = [{"type": kind} for kind in ("user", "mount", "pid")]
    mounts = [mount for mount in config["mounts"] if mount["destination"] not in ("/dev/mqueue", "/sys/fs/cgroup")]
    home = {"destination": "/home", "type": "none", "source": "/home", "options": ["rbind", "rw"]}
    config["mounts"] = [*mounts, home]
    path.write_text(json.dumps(config), encoding="utf-8")
    return [runtime, "--root", str(RUNTIME / f"{runtime}.state"), *options, "run", "--bundle", str(bundle), "bench"]


def ch_run(image: Path, *options: str) -> list[str]:
    """Charliecloud with /home; of a SquashFS file it is the FUSE server itself."""
    return ["ch-run", "--bind=/home", *options, str(image), "--", TRUE]


def ch_run_squashfuse(compression: str) -> list[str]:
    """A mount point for each process that may run at once."""
    for number in range(CROWD):
        (RUNTIME / f"{compression}{number}").mkdir(exist_ok=True)
    return ch_run(LAB / f"{compression}.sqfs", f"--mount={RUNTIME}/{compression}{{}}")


def podman() -> list[str]:
    """Rootless, the tree imported once; what costs time and is not needed (network, cgroup) is off."""
    base = ["podman", "--storage-driver=overlay", "--cgroup-manager=cgroupfs"]
    with subprocess.Popen(["tar", "-C", TREE, "--exclude=./dev/*", "-c", "."], stdout=subprocess.PIPE) as tar:
        run_as_user(*base, "import", "-", "bench", stdin=tar.stdout)
    options = ["--rm", "--network=none", "--cgroups=disabled", "--ulimit=host", "--volume=/home:/home"]
    return [*base, "run", *options, "localhost/bench", TRUE]


# -- ours --------------------------------------------------------------------------------------------------------------


def ours(image_format: str, volumes: int = 0) -> Callable[[], list[str]]:
    """The command in the image of one format, with so many directories of the user's as volumes."""

    def set_up() -> list[str]:
        for number in range(volumes):
            run("install", "-d", "-o", str(UID), f"/home/volumes/{number}")
        return with_volumes(common.ours(image_format, TRUE), volumes)

    return set_up


def with_volumes(command: list[str], volumes: int) -> list[str]:
    """The command with so many volumes, each on a mount point that the image lacks."""
    return [*command[:-1], *(f"--volume=/home/volumes/{n}:/data/{n}" for n in range(volumes)), command[-1]]


def warm(volumes: int = 0) -> None:
    """Leave the UDI built and pinned."""
    launch(with_volumes(common.ours("squashfs", TRUE), volumes))


def only_image() -> None:
    """Leave the image mounted, and no UDI."""
    warm()
    for directory in Path(f"/run/shifter/udi/{UID}").iterdir():
        if directory.is_dir():
            (directory / "record").unlink()
            run("umount", directory / "ns")
            (directory / "ns").unlink()
            directory.rmdir()
    if not any(Path("/run/shifter/images").iterdir()):
        raise CommandFailed("the image should still be mounted")


def nothing() -> None:
    """Leave neither a UDI nor a mounted image."""
    run(common.SHIFTERCTL, "gc", "--all")
    for left in ("udi/*/*/record", "images/*"):
        if any(Path("/run/shifter").glob(left)):
            raise CommandFailed(f"shifterctl gc --all left /run/shifter/{left}")


# -- the table ---------------------------------------------------------------------------------------------------------

ROWS = (
    Row("native", "native true", native),
    Row("repeated", "Shifter, repeated", ours("squashfs"), warm, image="squashfs"),
    Row("first-mounted", "Shifter, first, image mounted", ours("squashfs"), only_image, image="squashfs"),
    Row("repeated-10", "Shifter, repeated, 10 volumes", ours("squashfs", 10), lambda: warm(10), image="squashfs"),
    Row("first-30", "Shifter, first, image mounted, 30 volumes", ours("squashfs", 30), only_image, image="squashfs"),
    Row("first-squashfs", "Shifter, first, not mounted, squashfs zstd", ours("squashfs"), nothing, image="squashfs"),
    Row("first-erofs", "Shifter, first, not mounted, EROFS", ours("erofs"), nothing, image="erofs"),
    Row("first-directory", "Shifter, first, directory", ours("directory"), nothing, image="directory"),
    Row("bwrap", "bubblewrap, directory", bubblewrap),
    Row("crun", "crun, directory", lambda: oci("crun", "--cgroup-manager=disabled")),
    Row("runc", "runc, directory", lambda: oci("runc")),
    Row("ch-run", "ch-run, directory", lambda: ch_run(TREE)),
    Row("ch-run-gzip", "ch-run, SquashFUSE gzip", lambda: ch_run_squashfuse("gzip")),
    Row("ch-run-zstd", "ch-run, SquashFUSE zstd", lambda: ch_run_squashfuse("zstd")),
    Row("podman", "podman, rootless, overlay", podman),
    Row("64-native", "64 at once: native true", native, processes=CROWD),
    Row("64-one", "64 at once: Shifter, one user, from nothing", ours("squashfs"), nothing, CROWD, 0, "squashfs"),
    Row("64-users", "64 at once: Shifter, 64 users, from nothing", ours("squashfs"), nothing, CROWD, 1, "squashfs"),
    Row("64-gzip", "64 at once: ch-run, SquashFUSE gzip", lambda: ch_run_squashfuse("gzip"), processes=CROWD),
)

References = dict[int, tuple[str, str]]
REFERENCES: References = {1: ("native", "ch-run-gzip"), CROWD: ("64-native", "64-gzip")}
"""What the ratios of rows with this many processes refer to: native, and SquashFUSE on gzip."""

Budget = tuple[str, str, str, float]
BUDGETS: tuple[Budget, ...] = (
    ("first launch, image mounted / SquashFUSE gzip", "first-mounted", "ch-run-gzip", 0.8),
    ("first launch, not mounted, squashfs zstd / SquashFUSE gzip", "first-squashfs", "ch-run-gzip", 1.2),
    ("first launch, not mounted, EROFS / SquashFUSE gzip", "first-erofs", "ch-run-gzip", 1.0),
    ("64 at once, one user, from nothing / 64 SquashFUSE gzip", "64-one", "64-gzip", 0.25),
    ("repeated / native", "repeated", "native", 2.2),
    ("repeated, 10 volumes / without", "repeated-10", "repeated", 1.5),
)


# -- the run -----------------------------------------------------------------------------------------------------------


def measure(rows: list[Row], number: int) -> dict[str, Any]:
    """Set the rows up and take ``number`` interleaved samples of each; what can't be run here is left out, with why."""
    if formats := sorted({row.image for row in rows} - {""}):
        common.install_ours(formats)
    commands: dict[str, list[str]] = {}
    samples: dict[str, list[int]] = {}
    unavailable: dict[str, str] = {}
    for row in rows:
        try:
            commands[row.key] = row.set_up()
            sample(row, commands[row.key])
            samples[row.key] = []
        except (CommandFailed, OSError) as error:
            unavailable[row.key] = str(error)
    before = common.machine()
    for turn in range(number):
        print(f"\rround {turn + 1} of {number}", end="", file=sys.stderr, flush=True)
        for row in random.sample(rows, len(rows)):
            if row.key in samples:
                try:
                    samples[row.key].append(sample(row, commands[row.key]))
                except CommandFailed as error:
                    unavailable[row.key] = f"round {turn + 1}: {error}"
                    del samples[row.key]
    print(file=sys.stderr)
    return {
        "machine": before,
        "load_after": common.machine()["load"],
        "commands": commands,
        "samples_ns": samples,
        "unavailable": unavailable,
    }


def sample(row: Row, command: list[str]) -> int:
    """Nanoseconds of one sample, after its preparation and a rest."""
    if row.before:
        row.before()
    time.sleep(REST)
    return launch(command, row.processes, row.step)


def medians(result: dict[str, Any]) -> dict[str, float]:
    """Row to median, in milliseconds."""
    return {key: median(values) / 1e6 for key, values in result["samples_ns"].items()}


def ratio(middle: dict[str, float], key: str, reference: str) -> str:
    """A ratio of two medians for the table."""
    return f"{middle[key] / middle[reference]:.2f}" if reference in middle else "-"


def report(result: dict[str, Any]) -> str:
    """Everything as Markdown: the table, what could not be run, the budgets, the machine."""
    middle = medians(result)
    lines = ["| | n | median ms | min | p95 | x native | x SquashFUSE gzip |", "|---|---:|---:|---:|---:|---:|---:|"]
    for row in ROWS:
        if row.key in middle:
            values = [value / 1e6 for value in result["samples_ns"][row.key]]
            ratios = " | ".join(ratio(middle, row.key, reference) for reference in REFERENCES[row.processes])
            numbers = f"{middle[row.key]:.2f} | {min(values):.2f} | {common.p95(values):.2f}"
            lines.append(f"| {row.title} | {len(values)} | {numbers} | {ratios} |")
        elif row.key in result["unavailable"]:
            lines.append(f"| {row.title} | could not be run: {result['unavailable'][row.key]} | | | | | |")
    lines += ["", "Rows of 64 at once refer to 64 native processes and to 64 ch-run with SquashFUSE.", ""]
    return "\n".join([*lines, *budgets(middle), "", *common.describe(result)]) + "\n"


def budgets(middle: dict[str, float]) -> list[str]:
    """What the project wants to hold, beside what was measured."""
    lines = []
    for text, key, reference, limit in BUDGETS:
        if key in middle and reference in middle:
            lines.append(f"| {text} | {limit} | {ratio(middle, key, reference)} |")
    if "first-30" in middle and "first-mounted" in middle:
        each = (middle["first-30"] - middle["first-mounted"]) / 30
        lines.append(f"| first launch, image mounted: milliseconds for each of 30 volumes | 0.15 | {each:.3f} |")
    peers = {row.title: middle[row.key] for row in ROWS if row.key in middle and row.processes == 1 and not row.image}
    peers.pop(ROWS[0].title, None)
    if peers and "repeated" in middle:
        fastest = min(peers, key=lambda title: peers[title])
        lines.append(f"| repeated / fastest peer ({fastest}) | 1 | {middle['repeated'] / peers[fastest]:.2f} |")
    return ["| budget | at most | measured |", "|---|---:|---:|", *lines] if lines else []


def plot(result: dict[str, Any], path: Path) -> None:
    """Medians as bars, ours in another colour, with a line up to the 95th percentile."""
    middle = medians(result)
    rows = [row for row in reversed(ROWS) if row.key in middle]
    figure = Figure(figsize=(9, 0.36 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    heights = [middle[row.key] for row in rows]
    tails = [max(common.p95(result["samples_ns"][row.key]) / 1e6 - middle[row.key], 0) for row in rows]
    colours = ["tab:blue" if row.image else "tab:gray" for row in rows]
    bars = axes.barh([row.title for row in rows], heights, xerr=[[0] * len(rows), tails], color=colours)
    axes.bar_label(bars, [f"{height:.3g}" for height in heights], padding=4, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(right=3 * max(heights, default=1))
    axes.set_xlabel("milliseconds from fork to exit of /bin/true: median, 95th percentile")
    axes.set_title("A launch in the same Debian 12 tree, as an ordinary user")
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run the benchmark and write launch.json, launch.md and launch.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    common.add_options(parser, number=40)
    parser.add_argument("--rows", metavar="KEY,...", help=f"only these: {', '.join(row.key for row in ROWS)}")
    options = parser.parse_args()
    wanted = options.rows.split(",") if options.rows else [row.key for row in ROWS]
    if unknown := set(wanted) - {row.key for row in ROWS}:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    rows = [row for row in ROWS if row.key in wanted]
    common.prepare(options.work)
    versions = common.versions(PACKAGES)
    result = common.in_lab(options.work, options.stage, lambda: measure(rows, options.number)) | {"versions": versions}
    common.write(options.results, "launch", result, report(result))
    plot(result, options.results / "launch.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
