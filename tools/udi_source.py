"""The distribution's source package of OpenSSH: fetched and verified by apt, without a change to the machine's own apt.

apt gets a configuration of its own: the machine's package sources turned into sources of source packages (the running
release, its updates and its security suite), with the machine's keys, proxies and other `Acquire` settings. Its lists
lie in a directory of ours. So what comes is what `apt-get source` would give, signed by the distribution.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Container, Iterator
from pathlib import Path

PACKAGE = "openssh"
FETCH_SECONDS = 600


class SourceError(Exception):
    """The source package can't be had; the text is one line."""


def source(cache: Path, newest: bool = False) -> Path:
    """Return the .dsc of the source package in *cache*: what is there and complete; else, or for the *newest*, fetched."""
    record = cache / "source.json"
    if record.exists() and not newest:
        files: dict[str, str] = json.loads(record.read_text())
        if all((cache / name).is_file() and sha256(cache / name) == value for name, value in files.items()):
            return cache / next(name for name in files if name.endswith(".dsc"))
    new = cache.with_name(cache.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        _fetch(new)
    except SourceError as error:
        shutil.rmtree(new)
        raise SourceError(f"can't get the source package of {PACKAGE}: {error}") from None
    files = {path.name: sha256(path) for path in sorted(new.iterdir())}
    if sum(name.endswith(".dsc") for name in files) != 1:
        raise SourceError(f"apt-get fetched {', '.join(files) or 'nothing'} instead of one source package")
    (new / "source.json").write_text(json.dumps(files, indent=1))
    shutil.rmtree(cache, ignore_errors=True)
    new.rename(cache)
    return source(cache)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(target: Path) -> None:
    """Have apt put the newest source package of the release into the empty directory *target*."""
    apt = target.with_name("apt").absolute()  # kept no longer than this: the lists are 20 MB
    shutil.rmtree(apt, ignore_errors=True)
    try:
        for name in ("lists/partial", "cache/archives/partial", "sources", "none/parts", "none/preferencesparts"):
            (apt / name).mkdir(parents=True)
        entries = list(_entries())
        if not entries:
            raise SourceError(
                "apt has no package source with component main of the running release (/etc/apt/sources.list)"
            )
        # One file for each form that apt knows.
        for suffix in ("list", "sources"):
            (apt / f"sources/source.{suffix}").write_text("\n".join(text for kind, text in entries if kind == suffix))
        settings = [line for line in _run("apt-config", "dump").splitlines() if line.startswith("Acquire")]
        # No other configuration: hooks of the machine's are not for these lists.
        settings += [
            f'Dir::Etc::{key} "{apt}/none/{key}";'
            for key in ("sourcelist", "main", "parts", "preferences", "preferencesparts")
        ]
        settings += [f'Dir::Etc::sourceparts "{apt}/sources";', f'Dir::State::lists "{apt}/lists";']
        settings += [f'Dir::Cache "{apt}/cache";', 'APT::Get::AllowUnauthenticated "false";']
        (apt / "apt.conf").write_text("\n".join(settings) + "\n")
        environment = {"APT_CONFIG": str(apt / "apt.conf")}
        said = _run("apt-get", "-q", "update", environment=environment)
        try:
            _run(
                "apt-get",
                "-q",
                "source",
                "--download-only",
                "--only-source",
                PACKAGE,
                cwd=target,
                environment=environment,
            )
        except SourceError as error:
            # `update` says why, but does not fail when a mirror can't be reached.
            reasons = [line[3:] for line in said.splitlines() if line.startswith("W: Failed to fetch")]
            raise SourceError(reasons[0] if reasons else str(error)) from None
    finally:
        shutil.rmtree(apt, ignore_errors=True)


def _entries() -> Iterator[tuple[str, str]]:
    """Yield the machine's package sources as sources of source packages: (suffix of the form, text)."""
    places = dict(
        line.split("=", 1)
        for line in _run(
            "apt-config", "shell", "list", "Dir::Etc::sourcelist/f", "parts", "Dir::Etc::sourceparts/d"
        ).splitlines()
    )
    single, parts = (Path(places[name].strip("'")) for name in ("list", "parts"))
    files = [single, *sorted(parts.glob("*.list")), *sorted(parts.glob("*.sources"))]
    suites = _Suites()
    for file in files:
        if file.is_file():
            text = file.read_text(errors="replace")
            found = source_stanzas(text, suites) if file.suffix == ".sources" else source_lines(text, suites)
            yield from ((file.suffix[1:], entry) for entry in found)


class _Suites:
    """Which suites belong to the running release: itself, its updates, its security suite; by any of their names."""

    def __init__(self) -> None:
        release = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
        self._wanted = {release, f"{release}-updates", f"{release}-security"}
        # "stable" is whatever the lists on this machine say that it is.
        form = "$(RELEASE) $(CODENAME)"
        lines = _run("apt-get", "indextargets", "--format", form, "Created-By: Packages").splitlines()
        self._codenames = {words[0]: words[1] for line in lines if len(words := line.split()) == 2}

    def __contains__(self, suite: object) -> bool:
        return self._codenames.get(str(suite), suite) in self._wanted


def source_lines(text: str, suites: Container[str]) -> Iterator[str]:
    """Yield the lines of a sources.list that are in *suites* and have component main, as `deb-src`."""
    for line in text.splitlines():
        match = re.fullmatch(r"\s*deb(?:-src)?\s+(?:\[([^]]*)\]\s+)?(\S+)\s+(\S+)\s+([^#]*)(?:#.*)?", line)
        if match and match[3] in suites and "main" in match[4].split():
            options = [word for word in (match[1] or "").split() if not word.startswith("arch")]
            words = ["deb-src", *([f"[{' '.join(options)}]"] if options else []), match[2], match[3], "main"]
            yield " ".join(words) + "\n"


def source_stanzas(text: str, suites: Container[str]) -> Iterator[str]:
    """Yield the stanzas of a deb822 .sources file that have *suites* with component main, as `Types: deb-src`."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for stanza in re.split(r"\n\s*\n", "\n".join(lines)):
        # A line that begins with a blank goes on with the field above.
        fields = {name.lower(): value for name, value in re.findall(r"(?m)^([\w-]+):((?:.*)(?:\n[ \t].*)*)", stanza)}
        wanted = [suite for suite in fields.get("suites", "").split() if suite in suites]
        off = fields.get("enabled", "").strip().lower() in ("no", "false", "off", "0", "without", "disable")
        if off or not wanted or "main" not in fields.get("components", "").split():
            continue
        fields |= {"types": " deb-src", "suites": " " + " ".join(wanted), "components": " main"}
        fields.pop("architectures", None)
        yield "".join(f"{name}:{value}\n" for name, value in fields.items())


def _run(*command: str, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
    """Run a tool and return all that it said. Raises SourceError with the line that says most when it fails."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=os.environ | {"LC_ALL": "C.UTF-8"} | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=FETCH_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise SourceError(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise SourceError(f"{command[0]} took longer than {FETCH_SECONDS} s") from None
    if done.returncode != 0:
        errors = [line for line in done.stdout.splitlines() if line.startswith("E:")]
        raise SourceError(f"{command[0]}: {errors[0] if errors else f'exit status {done.returncode}'}")
    return done.stdout
