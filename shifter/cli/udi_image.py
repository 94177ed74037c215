"""shifterctl udi-image: the OpenSSH that containers get, what it was built from, and whether the distribution has newer.

It is linked statically: an update of the distribution's packages reaches it only when it is built again.
"""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import click

from shifter import _build
from shifter.cli import text
from shifter.errors import FormatError, ShifterError
from shifter.images.helper import ENVIRONMENT

UPDATE = "make udiImage-update && make install"


@click.command("udi-image", short_help="Show the OpenSSH for containers.")
@click.option("--json", "as_json", is_flag=True, help="Print its manifest as a JSON object.")
def command(as_json: bool) -> None:
    """Show the OpenSSH for containers: version, source, patches, programs, and whether there is a newer one.

    What is newer is what apt's lists say, as `apt-get update` left them.
    """
    directory = Path(_build.LIBEXEC).parent / "opt/udiImage"
    manifest = load(directory / "manifest.json")
    built = {SOURCE_PACKAGE: manifest["packageVersion"], **manifest["libraries"]}
    known = available(list(built))
    newer = {name: version for name, version in known.items() if is_newer(version, built[name])}
    unknown = [name for name in built if name not in known]
    if as_json:
        document = manifest | {"path": str(directory), "newer": newer, "unknown": unknown}
        text.write(json.dumps(document, indent=2) + "\n")
        return
    rows = [
        ("path", str(directory)),
        ("version", f"OpenSSH {manifest['version']}"),
        ("package", f"{manifest['name']} {manifest['packageVersion']} ({manifest['distribution']})"),
        ("libraries", f"{manifest['libc']}; " + ", ".join(f"{n} {v}" for n, v in manifest["libraries"].items())),
        ("compiler", manifest["compiler"]),
        ("configure", " ".join(manifest["configure"])),
        ("flags", f"{manifest['cflags']} {manifest['ldflags']}"),
        *(("patch", name) for name in manifest["patches"]),
        *(("source", f"{value}  {name}") for name, value in manifest["sources"].items()),
        *(("program", f"{value}  {name}") for name, value in manifest["programs"].items()),
        *(("newer", f"{name} {version}: {UPDATE}") for name, version in newer.items()),
        *(("newer", f"unknown for {name}: apt's lists don't have it (apt-get update)") for name in unknown),
    ]
    text.write(text.table(("WHAT", "VALUE"), rows if newer or unknown else [*rows, ("newer", "none")]))


SOURCE_PACKAGE = "openssh-client"
"""The binary package that always has its source's version, and is known where no sources of source packages are."""


def load(path: Path) -> dict[str, Any]:
    """Return the manifest. Raises ShifterError when none is installed, FormatError when it is not a manifest."""
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ShifterError(
            f"{path} is not there: Shifter was installed without its OpenSSH (make WITH_SSHD=0)"
        ) from None
    except ValueError:
        raise FormatError(f"{path}: not a JSON document; make install writes it anew") from None
    if not isinstance(manifest, dict) or KEYS - manifest.keys():
        raise FormatError(f"{path}: not a manifest of this version; make install writes it anew")
    return manifest


KEYS = {
    "name", "version", "packageVersion", "distribution", "patches", "sources", "programs", "libc", "libraries",
    "compiler", "configure", "cflags", "ldflags",
}  # fmt: skip


def available(packages: list[str]) -> dict[str, str]:
    """Return the version of each package that apt would install from an archive; without those that its lists lack."""
    try:
        done = subprocess.run(
            ["apt-cache", "policy", *packages],
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        return {}
    return candidates(done.stdout.decode("utf-8", "replace"))


def candidates(policy: str) -> dict[str, str]:
    """Return what `apt-cache policy` says: package and candidate, of those that an archive has in any version."""
    found = {}
    for block in re.split(r"\n(?=\S)", policy):
        match = re.match(r"(\S+):\n.*?^  Candidate: (\S+)$", block, re.M | re.S)
        # Installed packages are known without any list: `100 /var/lib/dpkg/status`.
        archive = re.search(r"^ +-?\d+ (?!/)\S", block, re.M)
        if match and archive and match[2] != "(none)":
            found[match[1]] = match[2]
    return found


def is_newer(version: str, built: str) -> bool:
    """Return whether *version* is later than *built*, as dpkg compares them; a rebuild of the same source is not."""
    source = re.sub(r"\+b\d+$", "", version)
    return (
        subprocess.run(["dpkg", "--compare-versions", source, "gt", built], env=ENVIRONMENT, check=False).returncode
        == 0
    )
