"""What the builder loads. Each module of the standard library that it would import costs as much as all of the mounting."""

import marshal
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shifter.fields import encode
from tests.images import Tree
from tests.node import PREFIX, REPO, STAGE, Node

LIBEXEC = f"{PREFIX}/libexec/shifter/python"

EXTENSIONS = {"_ctypes", "grp", "pwd", "select", "syslog", "fcntl", "_signal", "_thread"}
"""Modules in C that the build path may import: built in on Debian, extension modules of some other Pythons."""

START = {
    "_abc", "_codecs", "_frozen_importlib", "_frozen_importlib_external", "_imp", "_io", "_stat", "_thread", "_warnings",
    "_weakref", "abc", "builtins", "codecs", "encodings", "encodings.aliases", "encodings.ascii", "encodings.utf_8",
    "encodings.latin_1", "errno", "genericpath", "io", "marshal", "os", "os.path", "posix", "posixpath", "stat", "sys",
    "time", "winreg", "zipimport", "_collections_abc", "__main__", "atexit", "_sre", "itertools",
}  # fmt: skip
"""What a Python that does nothing has loaded, or has frozen or built in; `python -I -S -c pass` says which of them."""

OURS = {
    "shifter", "shifter._build", "shifter.config", "shifter.errors", "shifter.fields", "shifter.limits", "shifter.request",
    "shifter.suggest", "shifter.volumes",
    "shifter.images", "shifter.images.meta", "shifter.images.reference", "shifter.images.store",
    "shifter.linux", "shifter.linux.identity", "shifter.linux.loop", "shifter.linux.paths", "shifter.linux.syscalls",
    "shifter.udi", "shifter.udi.assembly", "shifter.udi.binds", "shifter.udi.build", "shifter.udi.etc", "shifter.udi.host",
    "shifter.udi.image_mounts", "shifter.udi.pins", "shifter.udi.plan", "shifter.udi.reap", "shifter.udi.records",
    "shifter.udi.run", "shifter.udi.session", "shifter.udi.sources", "shifter.udi.targets",
}  # fmt: skip


def imported(stderr: str) -> set[str]:
    """Names in the report of -X importtime; it lists what is imported by a statement, built in or not."""
    return {line.rpartition("|")[2].strip() for line in stderr.splitlines() if line.startswith("import time:")} - {
        "imported package"
    }


def bundled() -> set[str]:
    """Modules that came with builder.pyc itself (tools/bundle.py), for which there was nothing left to import."""
    loader = marshal.loads((STAGE.joinpath(LIBEXEC[1:]) / "builder.pyc").read_bytes()[16:])
    (modules,) = [value for value in loader.co_consts if isinstance(value, tuple) and value and len(value[0]) == 3]
    return {name for name, _, _ in modules}


@pytest.fixture
def traced(tiny_node: Node) -> tuple[list[str], str]:
    """All files that a builder opened on its way to a UDI, and what the door said."""
    tiny_node.shifter("--image=tiny:1", "true", check=True)  # the base
    tiny_node.shifterctl("gc", "--all", check=True)
    strace = ["strace", "-qq", "-f", "-u", "alice", "-o", "/tmp/trace", "-e", "trace=open,openat,execve", "-s", "400"]
    done = tiny_node.run([*strace, f"{PREFIX}/bin/shifter", "-v", "--image=tiny:1", "true"], check=True)
    lines = tiny_node.read("/tmp/trace").splitlines()
    (pid,) = {line.split()[0] for line in lines if "builder.pyc" in line and "execve(" in line}
    mine = [line for line in lines if line.split()[0] == pid]
    start = next(index for index, line in enumerate(mine) if "execve(" in line)
    opened = [line for line in mine[start:] if " = -1 " not in line]
    return [match[1] for line in opened if (match := re.search(r'"(/[^"]*)"', line))], done.stderr


def test_modules(tiny_node: Node) -> None:
    """The list itself: whoever adds an import to the build path has to measure it, and to add it here."""
    tiny_node.shifter("--image=tiny:1", "true", check=True)
    record = tiny_node.run("cat /run/shifter/udi/5001/*/record", check=True).stdout.split("\0")
    request = [field for field in record if field.startswith(("shifter=", "uid=", "gid=", "groups=", "ns="))]
    items = [(key, value) for key, _, value in (field.partition("=") for field in request)]
    tiny_node.write("/tmp/request", encode([*items, ("ref", "tiny:1"), ("end", "request")]))
    script = (
        "exec 4<> /run/shifter/udi/5001/lock; "
        f"exec $(readlink -f /usr/bin/python3) -I -S -B -X importtime {LIBEXEC}/builder.pyc 4 < /tmp/request 3> /tmp/answer"
    )
    done = tiny_node.run(["bash", "-c", script])
    assert "\0ok=" in tiny_node.read("/tmp/answer"), (tiny_node.read("/tmp/answer"), done.stderr)
    found = imported(done.stderr) | bundled()
    assert found >= {"shifter.udi.build", "shifter.udi.reap", "_ctypes"}
    # `time` and the like are built in: an import statement for them is free.
    free = set(sys.builtin_module_names)
    assert found - EXTENSIONS - START - free == OURS


def test_start_is_that_of_an_empty_program() -> None:
    """The list of what is loaded anyway is no loophole: it is what Python does for `pass`."""
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-S", "-X", "importtime", "-c", "pass"], capture_output=True, text=True, check=True
    )
    loaded = imported(done.stderr)
    assert not {"os", "site", "re", "enum", "typing", "contextlib"} & loaded
    assert loaded <= START | set(sys.builtin_module_names)


def test_files(traced: tuple[list[str], str]) -> None:
    opened, said = traced
    assert "built now" in said
    python = [path for path in opened if path.endswith((".py", ".pyc", ".zip", ".pth", ".egg-info", ".dist-info"))]
    assert python
    # The encodings package belongs to Python's own start: it decodes file names, and is not frozen.
    outside = [path for path in python if not path.startswith(LIBEXEC + "/")]
    assert [path for path in outside if not re.match(r"/usr/lib/python3\.\d+/encodings/", path)] == []
    assert [path for path in python if path.endswith(".py")] == []
    libraries = {Path(path).name.split(".")[0] for path in opened if "/lib-dynload/" in path and path.endswith(".so")}
    assert libraries <= EXTENSIONS


def test_source_of_the_build_path_has_no_other_import() -> None:
    """The same from the text: also what only an error path would import."""
    pattern = re.compile(r"^[ ]*(?:import|from) +([\w.]+)", re.M)
    allowed = EXTENSIONS | {"posix", "errno", "time", "sys", "_sha256", "_sha2", "shifter"}
    for name in sorted(OURS - {"shifter"}):
        path = REPO.joinpath("shifter", *name.split(".")[1:])
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        text = re.sub(r"^if MYPY:\n(?:[ ]+.*\n|\n)+", "", source.read_text(), flags=re.M)
        assert {found.split(".")[0] for found in pattern.findall(text)} <= allowed, name


def test_installed_tree_is_byte_compiled(image: Tree) -> None:
    """A .py without its .pyc would cost 11 ms, at every launch: the builder never writes one (-B)."""
    root = Path(f"{STAGE}{LIBEXEC}")
    for name in sorted(OURS):
        path = root.joinpath(*name.split("."))
        candidates = [
            path / "__init__.pyc",
            path.with_suffix(".pyc"),
            *path.parent.glob(f"__pycache__/{path.name}.*.pyc"),
        ]
        candidates += path.glob("__pycache__/__init__.*.pyc")
        assert any(candidate.exists() for candidate in candidates), name


def test_prolog_and_epilog_load_no_command_line() -> None:
    """Each job waits for them, on each of its nodes; and nothing that is taken down needs cryptography."""
    code = f"import sys; sys.path.insert(0, '{STAGE}{LIBEXEC}'); import shifter.wlm.node; print(*sys.modules)"
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-S", "-B", "-c", code], check=True, stdout=subprocess.PIPE, text=True
    )
    assert {"click", "cryptography"}.isdisjoint(name.partition(".")[0] for name in done.stdout.split())
