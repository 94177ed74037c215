"""What `make install` puts where, with which owner and mode; all into a DESTDIR of the test's own."""

import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images import Tree
from tests.node import REPO, STAGE, Node


def make(*words: str, umask: int = 0o022) -> str:
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/nonexistent"}
    done = subprocess.run(
        ["make", "-s", *words], cwd=REPO, umask=umask, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def dest(tmp_path: Path) -> Iterator[Path]:
    make("install", f"DESTDIR={tmp_path}", umask=0o077)
    yield tmp_path


def files(top: Path) -> dict[str, os.stat_result]:
    return {str(path.relative_to(top)): path.lstat() for path in top.rglob("*")}


def test_owner_and_modes_whatever_the_umask(dest: Path) -> None:
    found = files(dest)
    assert stat.S_IMODE(found["opt/shifter/bin/shifter"].st_mode) == 0o4755
    for name, info in found.items():
        assert (info.st_uid, info.st_gid) == (0, 0), name
        if stat.S_ISDIR(info.st_mode):
            assert stat.S_IMODE(info.st_mode) == 0o755, name
        elif stat.S_ISREG(info.st_mode) and name != "opt/shifter/bin/shifter":
            program = re.match(
                r"opt/shifter/(libexec/shifter/opt/udiImage/(bin|sbin|libexec)/|lib/shifter/slurm-task$)", name
            )
            executable = name.startswith(("opt/shifter/bin/", "opt/shifter/sbin/")) or program
            assert stat.S_IMODE(info.st_mode) == (0o755 if executable else 0o644), name
    assert [name for name, info in found.items() if info.st_mode & 0o6000] == ["opt/shifter/bin/shifter"]


def test_the_door_is_static(dest: Path) -> None:
    """musl-gcc's -static-pie silently asks for a loader; a loader is code that a caller's environment can steer."""
    said = subprocess.run(
        ["readelf", "-lW", dest / "opt/shifter/bin/shifter"], capture_output=True, text=True, check=True
    ).stdout
    assert "INTERP" not in said
    assert "DYNAMIC" not in said
    assert "GNU_STACK" in said
    assert " RWE " not in said


def test_nothing_names_the_checkout(dest: Path) -> None:
    for path in dest.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert str(REPO).encode() not in path.read_bytes(), path


def test_byte_code_is_complete_and_never_checked(dest: Path) -> None:
    tree = dest / "opt/shifter/libexec/shifter/python"
    compiled = [tree / "builder.pyc"]
    for source in tree.rglob("*.py"):
        compiled.append(source.parent / "__pycache__" / f"{source.stem}.{sys.implementation.cache_tag}.pyc")
    for path in compiled:
        assert path.read_bytes()[4:8] == b"\1\0\0\0", path  # hash-based, unchecked (PEP 552)
    assert (tree / "shifter/_build.py").read_text().count("checkout") == 0
    assert not (tree / "shifter/door").exists()


def test_configuration_is_kept(dest: Path) -> None:
    conf = dest / "etc/shifter/udiRoot.conf"
    assert conf.read_bytes() == (dest / "etc/shifter/udiRoot.conf.example").read_bytes()
    conf.write_text("mine\n")
    make("install", f"DESTDIR={dest}")
    assert conf.read_text() == "mine\n"
    assert not [path for path in dest.rglob("*") if path.name.endswith((".new", ".old"))]


def test_over_a_running_installation(dest: Path) -> None:
    """Who opened a file, or a directory, of the old installation keeps it."""
    door = (dest / "opt/shifter/bin/shifter").stat().st_ino
    tree = os.open(dest / "opt/shifter/libexec/shifter/python", os.O_PATH)
    with open(dest / "opt/shifter/bin/shifter", "rb") as old:
        before = old.read()
        make("install", f"DESTDIR={dest}")
        old.seek(0)
        assert old.read() == before
    assert (dest / "opt/shifter/bin/shifter").stat().st_ino != door
    assert os.fstat(tree).st_ino != (dest / "opt/shifter/libexec/shifter/python").stat().st_ino
    os.close(tree)


def test_manual_pages_and_completions(dest: Path) -> None:
    """Each page can be read without a warning of the formatter, and what it refers to is there."""
    pages = {path.name: path for path in (dest / "opt/shifter/share/man").rglob("*.[1-8]")}
    assert {"shifter.1", "setupRoot.8", "unsetupRoot.8", "shifter-sshd.7"} <= set(pages)
    for name, path in pages.items():
        command = ["man", "--warnings", "--encoding=UTF-8", "--local-file", str(path)]
        done = subprocess.run(command, cwd=dest / "opt/shifter/share/man", capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "") and "NAME" in done.stdout, (name, done.stderr)
        for other, section in re.findall(r"^\.BR ([-\w.]+) \((\d)\)", path.read_text(), re.M):
            ours = other.lower().startswith(("shifter", "setuproot", "unsetuproot", "udiroot"))
            assert not ours or f"{other}.{section}" in pages, (name, other)
    for name in ("shifter", "shifterimg", "shifterctl", "setupRoot", "unsetupRoot"):
        completion = dest / "opt/shifter/share/bash-completion/completions" / name
        assert f"complete -F _{name} {name}\n" in completion.read_text()


def test_uninstall(dest: Path) -> None:
    (dest / "opt/shifter/bin/of-the-site").write_text("x")
    (dest / "etc/shifter/udiRoot.conf").write_text("mine\n")
    (dest / "var/lib/shifter/images/x.squashfs").write_text("x")
    make("uninstall", f"DESTDIR={dest}")
    left = {name for name, info in files(dest).items() if not stat.S_ISDIR(info.st_mode)}
    assert left == {"opt/shifter/bin/of-the-site", "etc/shifter/udiRoot.conf", "var/lib/shifter/images/x.squashfs"}
    (dest / "opt/shifter/bin/of-the-site").unlink()
    make("uninstall", f"DESTDIR={dest}")
    assert not (dest / "opt/shifter").exists()


def test_commands_start_in_a_node(node: Node) -> None:
    """With nothing but the installation: no checkout, no virtual environment, a hostile environment."""
    for user in ("root", "alice"):
        for command in ("shifterctl", "shifterimg"):
            done = node.run([command, "--help"], user=user, env={"PYTHONPATH": "/tmp", "PYTHONHOME": "/tmp"})
            assert (done.returncode, done.stderr) == (0, "")
            assert command in done.stdout
    version = node.shifter("--version")
    assert "0.1.0" in version.stdout


def test_the_stage_is_an_installation() -> None:
    assert (STAGE / "opt/shifter/bin/shifter").stat().st_mode & 0o7777 == 0o4755


def test_after_an_upgrade_of_the_interpreter_the_launch_says_what_to_do(tmp_path: Path, image: Tree) -> None:
    """Byte code of another Python version: one line, no traceback; and right again after the installation is."""
    subprocess.run(["cp", "-a", STAGE, tmp_path / "stage"], check=True)
    code = tmp_path / "stage/opt/shifter/libexec/shifter/python/builder.pyc"
    good = code.read_bytes()
    with Node(install=tmp_path / "stage") as node:
        node.add_image("docker:tiny:1", image)
        code.write_bytes(b"\x00\x0d" + good[2:])
        done = node.shifter("--image=tiny:1", "true")
        assert done.returncode == 125 and done.stderr.count("\n") == 1
        assert "another Python" in done.stderr and "run: make install" in done.stderr
        code.write_bytes(good)
        assert node.shifter("--image=tiny:1", "true").returncode == 0
        node.check_leaks()
