"""Write docs/soak/DATE.md from build/soak.json, which `make soak` leaves: counts, durations, findings, machine."""

import datetime
import json
import os
import platform
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def machine() -> str:
    """One line about what it ran on."""
    memory = next(
        line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")
    )
    model = next(
        (line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    release = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    system = f"{release}, Linux {platform.release()}, Python {platform.python_version()}"
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{os.cpu_count()} CPUs ({model}), {int(memory) >> 20} GiB; {system}; load at the end {load}"


def main() -> None:
    """Write the report."""
    source = REPO / "build/soak.json"
    done = json.loads(source.read_text())
    day = datetime.date.fromtimestamp(source.stat().st_mtime).isoformat()
    lines = [f"# Soak, {day}", "", machine(), ""]
    lines += ["Made by `make soak`. Each test runs with private mount propagation and with `/` shared.", ""]
    lines += [", ".join(f"{name}: {count}" for name, count in done["counts"].items()), ""]
    lines += ["| test | result | s |", "|---|---|---|"]
    for test in done["tests"]:
        name = test["test"].rpartition("::")[2] + ("" if test["when"] == "call" else f" ({test['when']})")
        lines.append(f"| {name} | {test['outcome']} | {test['seconds']:.0f} |")
    lines += ["", "## Findings", ""]
    for test in done["tests"]:
        lines += [f"* {test['test'].rpartition('::')[2]}: {text}" for text in test["findings"]]
    out = REPO / "docs/soak" / f"{day}.md"
    out.parent.mkdir(exist_ok=True)
    out.write_text("\n".join(lines) + "\n")
    print(f"{out.relative_to(REPO)}: {sum(test['outcome'] == 'passed' for test in done['tests'])} passed")


if __name__ == "__main__":
    main()
