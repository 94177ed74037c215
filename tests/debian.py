"""A real Debian as an image, from the packages that are installed on this machine: quick, and without a network.

What makes a Debian is its essential packages and what they depend on. Of each the files are copied that dpkg says belong
to it, and then the little is done that their scripts would have done: accounts, alternatives, the loader's cache. Nothing
of the machine's own is copied: no account, no name, no key.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tests.images import Tree

WITHOUT = re.compile(r"/usr/share/(doc|info|locale|man|lintian|bug)/")
"""Half of the files, and nothing of it is used by a program."""

_FIELDS = "${db:Status-Status}\t${Package}\t${Version}\t${Essential}\t${Provides}\t${Pre-Depends}, ${Depends}\n"


def debian(base: Path, extra: Iterable[str] = ()) -> Tree:
    """The essential packages and *extra* ones, with all that they depend on; made once below *base*, also as squashfs.

    It is made again when another version of a package is installed, or when this recipe changes.
    """
    packages = _closure(extra)
    key = hashlib.sha256("\n".join([Path(__file__).read_text(), *packages]).encode()).hexdigest()[:16]
    place = base / f"debian-{key}"
    with open(base / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several runs of the tests may want it at once
        if not place.exists():
            new = base / f"debian-{key}.new"
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            _make(new / "tree", [package.split("=")[0] for package in packages])
            Tree(new / "tree").pack("squashfs")
            new.rename(place)
        os.utime(place)
    return Tree(place / "tree")


def _closure(extra: Iterable[str]) -> list[str]:
    """Sorted NAME=VERSION of the essential packages, of *extra* and of what these depend on, as far as it is installed."""
    if shutil.which("dpkg-query") is None:
        raise FileNotFoundError("the image of a Debian is made from this machine's packages, and it has no dpkg-query")
    versions: dict[str, str] = {}
    needs: dict[str, list[str]] = {}
    provided: dict[str, str] = {}
    wanted = list(extra)
    for line in _said("dpkg-query", "-W", "-f", _FIELDS).splitlines():
        status, name, version, essential, provides, depends = line.split("\t")
        if status != "installed":
            continue
        versions[name] = version
        needs[name] = [
            re.sub(r"[ :(].*", "", word.strip()) for group in depends.split(",") for word in group.split("|")
        ]
        provided |= {re.sub(r" .*", "", word.strip()): name for word in provides.split(",")}
        wanted += [name] if essential == "yes" else []
    if missing := [name for name in wanted if name not in versions]:
        raise FileNotFoundError(f"not installed on this machine: {' '.join(missing)}")
    found: set[str] = set()
    while wanted:
        name = wanted.pop()
        name = name if name in versions else provided.get(name, "")
        if name and name not in found:
            found.add(name)
            wanted += needs[name]
    return [f"{name}={versions[name]}" for name in sorted(found)]


def _make(tree: Path, packages: list[str]) -> None:
    """Write the root file system."""
    names: dict[str, None] = {}
    for name in _said("dpkg-query", "-L", *packages).splitlines():
        if name.startswith("/") and not WITHOUT.match(name):
            # Packages say /bin/sh where the file is /usr/bin/sh; /bin is among the names, as the link that it is.
            real = os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name))
            if os.path.lexists(real):
                names |= dict.fromkeys([*_links_above(name), real])
    tree.mkdir(mode=0o755)
    listed = "".join(f".{name}\0" for name in names if name != "/.").encode()
    copy = "tar -C / -c --null --no-recursion -T - | tar -C $0 -xp --numeric-owner"
    subprocess.run(["bash", "-o", "pipefail", "-c", copy, str(tree)], input=listed, check=True)
    for table in ("passwd", "group"):
        shutil.copyfile(tree / f"usr/share/base-passwd/{table}.master", tree / f"etc/{table}")
    shutil.copyfile(tree / "usr/share/base-files/profile", tree / "etc/profile")
    (tree / "etc/hostname").write_text("debian\n")
    _alternatives(tree)
    _said("ldconfig", "-r", str(tree))


def _links_above(name: str) -> list[str]:
    """Top-level directories that are links on the machine (/bin, /lib, ...): a merged /usr is part of the image."""
    top = "/" + name.split("/")[1]
    return [top] if os.path.islink(top) else []


def _alternatives(tree: Path) -> None:
    """What the image's packages are known by in general, e.g. awk: links that no package has."""
    for state in Path("/var/lib/dpkg/alternatives").iterdir():
        link, chosen = state.read_text().splitlines()[1], Path("/etc/alternatives", state.name)
        if chosen.is_symlink() and os.path.lexists(f"{tree}{os.readlink(chosen)}"):
            for path, target in ((f"{tree}{link}", str(chosen)), (f"{tree}{chosen}", os.readlink(chosen))):
                if not os.path.lexists(path):
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    os.symlink(target, path)


def _said(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
