"""udiImage: the static OpenSSH for /opt/udiImage of every container. `make udiImage` builds it, `make install` installs it.

Built from the distribution's source package (udi_source.py), with the distribution's patches, for the prefix
/opt/udiImage. It needs nothing of the image that it runs in: no loader, no C library, no shell. Linked with the static
glibc, libcrypto, libsodium and zlib where they are; else with musl and OpenSSH's own cryptography (Ed25519 only).

    udi_image.py build            into build/udi-image/tree, if it is not there from the same source, flags and compiler
    udi_image.py fetch            the distribution's newest source package, which the next build takes
    udi_image.py install TARGET   into TARGET, every file by rename; a template that the site edited is kept
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from udi_source import SourceError, sha256, source

HERE = Path("build/udi-image")
TREE = HERE / "tree"
RECIPE = Path("udiImage")
TEMPLATES = ("sshd_config", "ssh_config")

PROGRAMS = {
    # What: where, below the prefix. sshd is three programs since 9.8.
    "sshd": "sbin",
    "sshd-session": "libexec",
    "sshd-auth": "libexec",
    "sftp-server": "libexec",
    "ssh": "bin",
    "scp": "bin",
    "sftp": "bin",
    "ssh-keygen": "bin",
    "ssh-add": "bin",
    "ssh-agent": "bin",
    "ssh-keyscan": "bin",
}
ONLY_NEWER = ("sshd-session", "sshd-auth")
CLIENT = Path("build/udi-client")
CLIENTS = ("ssh", "scp", "sftp")
"""In bin they are the program that decides who does the work (udiImage/client.c); the real ones are libexec/NAME.real.

image/NAME is an empty file, on which the builder mounts an image's own program, where ours covers that.
"""
SHELL = Path("build/udi-shell")
SERVERS = ("sshd", "sshd-session", "sshd-auth")
"""What udiImage/session.c is linked into."""
DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin:/opt/udiImage/bin"

CONFIGURE = [
    "--prefix=/opt/udiImage",
    "--sysconfdir=/opt/udiImage/etc",
    "--libexecdir=/opt/udiImage/libexec",
    "--with-privsep-path=/var/empty",
    f"--with-default-path={DEFAULT_PATH}",
    "--with-pid-dir=/run",
    # What would need something that is not there: libraries, services, files of root's.
    "--without-pam",
    "--without-selinux",
    "--without-kerberos5",
    "--without-libedit",
    "--without-ldns",
    "--without-audit",
    "--without-xauth",
    "--disable-pkcs11",
    "--disable-lastlog",
    "--disable-utmp",
    "--disable-utmpx",
    "--disable-wtmp",
    "--disable-wtmpx",
    "--disable-libutil",
    "--disable-pututline",
    "--disable-pututxline",
    "--disable-etc-default-login",
    "--disable-strip",
    # It would add -pie, which undoes -static-pie; LINK says what is wanted.
    "--without-pie",
]
# configure adds what the compiler has of -ftrapv, -fzero-call-used-regs, -ftrivial-auto-var-init, FORTIFY and others.
CFLAGS = "-O2 -g0 -fstack-protector-strong"
WRAP = "-Wl,--wrap=connect,--wrap=accept"
CURVES = "-Wl,--wrap=crypto_scalarmult_curve25519," + ",".join(
    f"-u,crypto_sign_ed25519{name}" for name in ("", "_open", "_keypair")
)
WRAP_SERVER = "-Wl,--wrap=execve,--wrap=execv"
HARDEN = "-Wl,-z,relro,-z,now,-z,noexecstack,-z,separate-code"

MODERN = "chacha20-poly1305@openssh.com,aes256-ctr,aes192-ctr,aes128-ctr"


class ImageError(Exception):
    """udiImage can't be built; the text is one line."""


class Toolchain:
    """Compiler, C library and flags."""

    def __init__(self) -> None:
        multiarch = _output("gcc", "-print-multiarch").strip()
        archives = [
            Path(_output("gcc", f"-print-file-name={name}").strip())
            for name in ("libc.a", "libcrypto.a", "libz.a", "libsodium.a")
        ]
        if all(archive.is_absolute() for archive in archives):
            self.libc, self.compiler, self.archives = "glibc", "gcc", archives
            self.cflags = f"{CFLAGS} -fPIE"
            # The archive comes before OpenSSH's own objects, so that what is asked for by name is libsodium's.
            self.link = f"-static-pie {HARDEN} {WRAP} {CURVES} {archives[-1]}"
            self.objects = ["sockets", "curve25519"]
            self.configure = CONFIGURE
            self.packages = ["libc6-dev", "libssl-dev", "zlib1g-dev", "libsodium-dev"]
            self.ciphers = f"aes128-gcm@openssh.com,aes256-gcm@openssh.com,{MODERN}"
        elif shutil.which("musl-gcc"):
            self.libc, self.compiler = "musl", "musl-gcc"
            self.archives = [Path(_output("musl-gcc", "-print-file-name=libc.a").strip())]
            # Linux's own headers are not on musl-gcc's path, and its -static-pie asks for a loader.
            self.cflags = f"{CFLAGS} -idirafter /usr/include -idirafter /usr/include/{multiarch}"
            self.link = f"-static -no-pie {HARDEN} {WRAP}"
            self.objects = ["sockets", "crypt"]
            self.configure = [*CONFIGURE, "--without-openssl", "--without-zlib"]
            self.packages = ["musl-dev"]
            self.ciphers = MODERN
        else:
            raise ImageError(
                "neither static libraries (libssl-dev, zlib1g-dev, libsodium-dev, libc6-dev) nor musl-tools are installed"
            )
        self.version = _output(self.compiler, "--version").splitlines()[0]


def build() -> None:
    """Build HERE/tree, if it is not what it would become anyway."""
    tools = Toolchain()
    dsc = source(HERE / "source")
    what = {
        "source": sha256(dsc),
        "recipe": [sha256(RECIPE / f"{name}.c") for name in (*tools.objects, "session")],
        "configure": tools.configure,
        "flags": [tools.cflags, tools.link, WRAP_SERVER],
        "programs": PROGRAMS,
        "compiler": tools.version,
        "archives": [sha256(archive) for archive in tools.archives],
    }
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError):
        if json.loads((TREE / "manifest.json").read_text())["key"] == key:
            return
    print("udiImage: building OpenSSH; this takes about a minute", file=sys.stderr)
    work = HERE / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    with open(HERE / "build.log", "w") as log:
        _compile(tools, dsc, work, log)
    manifest = _describe(tools, dsc, work) | {"key": key}
    new = HERE / "tree.new"
    shutil.rmtree(new, ignore_errors=True)
    for name, where in PROGRAMS.items():
        if (built := work / "openssh" / name).exists():
            _run(None, "strip", "--strip-unneeded", str(built))
            _check_static(built)
            (new / where).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(built, new / where / name)
            manifest["programs"][f"{where}/{name}"] = sha256(new / where / name)
        elif name not in ONLY_NEWER:
            raise ImageError(f"{name} was not built")
    (new / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    shutil.rmtree(TREE, ignore_errors=True)
    new.rename(TREE)
    shutil.rmtree(work)


def _compile(tools: Toolchain, dsc: Path, work: Path, log: Any) -> None:
    """Unpack, configure and make in *work*/openssh; what the tools say goes to *log*."""
    # apt has verified every file; dpkg-source compares them with the .dsc once more and applies the distribution's patches.
    _run(log, "dpkg-source", "--no-copy", "-x", str(dsc), str(work / "openssh"))
    # Patches touch configure.ac, but only for options that are not used here: no need for autoconf.
    (work / "openssh/configure").touch()
    link = [tools.compiler]
    for name in (*tools.objects, "session"):
        flags = [*tools.cflags.split(), f'-DDEFAULT_PATH="{DEFAULT_PATH}"']
        _run(log, tools.compiler, *flags, "-c", "-o", str(work / f"{name}.o"), str(RECIPE / f"{name}.c"))
    link += [*(f"../{name}.o" for name in tools.objects), *tools.link.split()]
    revision = dsc.stem.rpartition("-")[2]
    cflags = f'{tools.cflags} -DSSH_EXTRAVERSION=\\"{_vendor()}-{revision}\\"'
    _run(log, "./configure", *tools.configure, f"CC={tools.compiler}", f"CFLAGS={cflags}", cwd=work / "openssh")
    makefile = (work / "openssh/Makefile").read_text()
    programs = [
        name for name in PROGRAMS if name not in ONLY_NEWER or re.search(rf"^{name}\$\(EXEEXT\):", makefile, re.M)
    ]
    jobs = len(os.sched_getaffinity(0))
    server = [*link, WRAP_SERVER, "../session.o"]
    for linker, wanted in ((server, set(programs) & set(SERVERS)), (link, set(programs) - set(SERVERS))):
        _run(log, "make", f"-j{jobs}", f"LD={shlex.join(linker)}", *sorted(wanted), cwd=work / "openssh")


def _describe(tools: Toolchain, dsc: Path, work: Path) -> dict[str, Any]:
    """Return the manifest but for the programs."""
    fields = dict(re.findall(r"(?m)^(Source|Version): (.*)$", dsc.read_text()))
    epoch_version, _, revision = fields["Version"].rpartition("-")
    series = (work / "openssh/debian/patches/series").read_text().splitlines()
    return {
        "name": fields["Source"],
        "version": epoch_version.rpartition(":")[2],
        "revision": revision,
        "packageVersion": fields["Version"],
        "distribution": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
        "patches": [line.split()[0] for line in series if line.strip() and not line.startswith("#")],
        "sources": json.loads((dsc.parent / "source.json").read_text()),
        "programs": {},
        "libc": tools.libc,
        "libraries": {name: _output("dpkg-query", "-W", "-f=${Version}", name) for name in tools.packages},
        "compiler": tools.version,
        "configure": tools.configure,
        "cflags": tools.cflags,
        "ldflags": tools.link,
        "ciphers": tools.ciphers,
    }


def _vendor() -> str:
    return platform.freedesktop_os_release().get("ID", "linux").title()


def _check_static(program: Path) -> None:
    """A loader, or a library to load, would be the image's."""
    said = _output("readelf", "-lWd", str(program))
    if "INTERP" in said or "NEEDED" in said:
        raise ImageError(f"{program.name} is not static")


def install(target: Path) -> None:
    """Put programs, manifest and templates into *target*, which may hold an older udiImage and things of the site's."""
    manifest = json.loads((TREE / "manifest.json").read_text())
    old: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        old = json.loads((target / "manifest.json").read_text())
    target.mkdir(mode=0o755, parents=True, exist_ok=True)
    for name in list(manifest["programs"]):
        data = (TREE / name).read_bytes()
        if name.removeprefix("bin/") in CLIENTS:
            real = f"libexec/{name.removeprefix('bin/')}.real"
            _put(target / real, data, 0o755)
            manifest["programs"][real] = manifest["programs"][name]
            data = CLIENT.read_bytes()
            manifest["programs"][name] = hashlib.sha256(data).hexdigest()
        _put(target / name, data, 0o755)
    shell = SHELL.read_bytes()
    _put(target / "libexec/shell", shell, 0o755)
    manifest["programs"]["libexec/shell"] = hashlib.sha256(shell).hexdigest()
    for name in CLIENTS:
        _put(target / "image" / name, b"", 0o644)
    for name in set(old.get("programs", {})) - set(manifest["programs"]):
        (target / name).unlink(missing_ok=True)
    manifest["templates"] = {}
    for name in TEMPLATES:
        text = (RECIPE / "etc" / name).read_text().replace("@CIPHERS@", manifest["ciphers"]).encode()
        path = target / "etc" / name
        there = path.read_bytes() if path.exists() else text
        edited = there != text and hashlib.sha256(there).hexdigest() != old.get("templates", {}).get(f"etc/{name}")
        if edited:
            _put(path.with_name(f"{name}.new"), text, 0o644)
        else:
            _put(path, text, 0o644)
            path.with_name(f"{name}.new").unlink(missing_ok=True)
        manifest["templates"][f"etc/{name}"] = hashlib.sha256(text).hexdigest()
    _put(target / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode(), 0o644)


def uninstall(target: Path) -> None:
    """Remove what install() put into *target*, but no template that the site edited, and nothing else of the site's."""
    try:
        manifest = json.loads((target / "manifest.json").read_text())
    except FileNotFoundError:
        return
    for name, value in (manifest["programs"] | manifest["templates"]).items():
        path = target / name
        if name in manifest["programs"] or (path.exists() and sha256(path) == value):
            path.unlink(missing_ok=True)
    for name in TEMPLATES:
        (target / "etc" / f"{name}.new").unlink(missing_ok=True)
    for name in CLIENTS:
        (target / "image" / name).unlink(missing_ok=True)
    (target / "manifest.json").unlink()


def _put(path: Path, data: bytes, mode: int) -> None:
    """Into place by rename: whoever runs or opens the old file keeps it."""
    path.parent.mkdir(mode=0o755, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_bytes(data)
    new.chmod(mode)
    new.rename(path)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise ImageError(f"{command[0]} is not installed") from None
    except subprocess.CalledProcessError as error:
        raise ImageError(f"{shlex.join(command)}: {error.stderr.strip().splitlines()[-1:]}") from None


def _run(log: Any, *command: str, cwd: Path | None = None) -> None:
    try:
        done = subprocess.run(
            command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    except FileNotFoundError:
        raise ImageError(f"{command[0]} is not installed") from None
    if done.returncode != 0:
        raise ImageError(f"{command[0]} failed: see {HERE}/build.log")


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Two makes at once: the second one finds what the first has built."""
    HERE.mkdir(parents=True, exist_ok=True)
    with open(HERE / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build")
    commands.add_parser("fetch")
    for name in ("install", "uninstall"):
        commands.add_parser(name).add_argument("target", type=Path)
    args = parser.parse_args()
    # GNU make's own variables are not for OpenSSH's Makefile: its -j is ours to say, its jobserver is closed.
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
        os.environ.pop(name, None)
    os.umask(0o022)
    with _locked():
        try:
            if args.command == "build":
                build()
            elif args.command == "fetch":
                source(HERE / "source", newest=True)
            elif args.command == "install":
                install(args.target)
            else:
                uninstall(args.target)
        except (SourceError, ImageError) as error:
            sys.exit(f"udiImage: {error}; `make WITH_SSHD=0` does without the OpenSSH for containers")


if __name__ == "__main__":
    main()
