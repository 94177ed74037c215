"""Write what a build knows about itself: build/config.h for the door, build/_build.py for the package.

Each file is replaced only when its content changes, so that make sees no news where there is none.
"""

import argparse
import hashlib
import re
import sys
from pathlib import Path


def source_hash(package: Path) -> str:
    """Hash of every source file's name and content: a door joins only what the same sources built."""
    digest = hashlib.sha256()
    for path in sorted(p for p in package.rglob("*") if p.suffix in {".py", ".c", ".h"}):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(package)}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()[:12]


def update(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        new = path.with_name(path.name + ".new")
        new.write_text(text)
        new.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("prefix", "libexec", "conf", "python"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    for name in ("prefix", "libexec", "conf", "python"):
        value = getattr(args, name)
        if not re.fullmatch(r"(/[A-Za-z0-9._+@-]+)+", value):
            sys.exit(f"{name}={value}: an absolute path of plain characters, please")
    match = re.search(r'^VERSION = "([^"]+)"', Path("shifter/_build.py").read_text(), re.M)
    assert match
    version = match[1]
    values = {
        "VERSION": version,
        "BUILD": f"{version}-{source_hash(Path('shifter'))}",
        "PREFIX": args.prefix,
        "LIBEXEC": args.libexec,
        "CONF": args.conf,
        "PYTHON": args.python,
    }
    header = "".join(f'#define SHIFTER_{key} "{value}"\n' for key, value in values.items())
    module = "".join(f'{key} = "{value}"\n' for key, value in values.items())
    update(args.out / "config.h", f"/* Made by tools/stamp.py. */\n{header}")
    update(args.out / "_build.py", f'"""What this build knows about itself; made by `make`."""\n\n{module}')


main()
