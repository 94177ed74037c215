"""shifterimg import with the real tools: every kind of source, hostile ones, interrupted ones, full disks."""

import io
import json
import os
import signal
import stat
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from tests.node import IMAGES, Node

LINES = {
    "a/f": b"text",
    "bin/tool": b"#!/bin/sh\n",
    "n" * 120 + "/" + "m" * 120: b"long name",
    "odd\xff\n".encode("latin-1").decode("utf-8", "surrogateescape"): b"",
}
TEMPORARY = "/var/tmp"

Member = tuple[tarfile.TarInfo, bytes]


def archive(*extra: Member, mode: int = 0o640) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name, data in LINES.items():
            info, _ = member(name, data, mode)
            tar.addfile(info, io.BytesIO(data))
        for info, data in extra:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def member(name: str, data: bytes = b"", mode: int = 0o644, kind: bytes = tarfile.REGTYPE, link: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.type, info.linkname, info.mtime, info.uid = len(data), mode, kind, link, 1_000_000, 1234
    return info, data


def imported(node: Node, source: str, tag: str, *options: str, user: str = "root") -> Path:
    """Import, and return the image file as the host sees it."""
    done = node.shifterimg("import", *options, source, tag, user=user, check=True)
    identifier = done.stdout.strip()
    (file,) = (path for path in node.path(IMAGES).glob(f"{identifier}.*") if path.suffix != ".meta")
    return file


def contents(file: Path, to: Path) -> dict[str, tuple[str, bytes]]:
    """Unpack an image as root; path -> mode as ls writes it, and content or link target."""
    if file.suffix == ".squashfs":
        subprocess.run(["unsquashfs", "-q", "-n", "-d", str(to), str(file)], check=True, stdout=subprocess.DEVNULL)
    else:
        subprocess.run(
            ["fsck.erofs", f"--extract={to}", "--preserve", str(file)], check=True, stdout=subprocess.DEVNULL
        )
    found = {}
    for path in sorted(to.rglob("*")):
        status = path.lstat()
        assert (status.st_uid, status.st_gid) == (0, 0), path
        assert not os.listxattr(path, follow_symlinks=False), path
        data = os.readlink(path).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(to))] = (stat.filemode(status.st_mode), data)
    return found


def left(node: Node) -> list[str]:
    """What is in the store and in TMPDIR that is neither a whole image nor a tag."""
    names = os.listdir(node.path(IMAGES))
    whole = {name.partition(".")[0] for name in names if name.endswith((".squashfs", ".erofs"))}
    found = [name for name in names if name not in ("tags", ".lock") and name.partition(".")[0] not in whole]
    tags = node.path(f"{IMAGES}/tags")
    found += [name for name in (os.listdir(tags) if tags.exists() else []) if os.readlink(tags / name) not in whole]
    return found + [name for name in os.listdir(node.path(TEMPORARY)) if name.startswith("shifterimg")]


@pytest.mark.parametrize("fmt", ["squashfs", "erofs"])
@pytest.mark.parametrize("compression", ["none", "gzip", "bzip2", "xz", "zstd"])
def test_tar(node: Node, tmp_path: Path, fmt: str, compression: str) -> None:
    data = archive(member("h", kind=tarfile.LNKTYPE, link="a/f"), member("l", kind=tarfile.SYMTYPE, link="../../etc"))
    if compression != "none":
        data = subprocess.run([compression, "-c"], input=data, capture_output=True, check=True).stdout
    node.write("/root/image.tar", data)
    file = imported(node, "/root/image.tar", "docker:t:1", "--format", fmt)
    assert file.suffix == f".{fmt}"
    found = contents(file, tmp_path / "out")
    assert {name: found[name][1] for name in LINES} == LINES
    assert found["a/f"][0] == "-rw-r--r--"
    assert found["h"] == found["a/f"]
    assert found["l"] == ("lrwxrwxrwx", b"../../etc")
    assert (tmp_path / "out/h").samefile(tmp_path / "out/a/f") or fmt == "erofs"  # its fsck doesn't restore hard links
    assert int((tmp_path / "out/a/f").stat().st_mtime) == 1_000_000 or fmt == "erofs"
    assert not left(node)


def test_tools_are_not_those_of_the_callers_path(node: Node) -> None:
    """zstd was looked for, and run as root, by the PATH of whoever called sudo."""
    for name in ("zstd", "setpriv", "mksquashfs"):
        node.write(f"/home/alice/bin/{name}", f'#!/bin/sh\necho $0 >> /root/ran\nexec /usr/bin/{name} "$@"\n', 0o755)
    node.write(
        "/root/image.tar", subprocess.run(["zstd", "-c"], input=archive(), capture_output=True, check=True).stdout
    )
    path = {"PATH": "/home/alice/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    node.shifterimg("import", "/root/image.tar", "docker:t:1", env=path, check=True)
    assert not node.path("/root/ran").exists()


@pytest.mark.parametrize("fmt", ["squashfs", "erofs"])
def test_what_grants_privilege_is_gone(node: Node, tmp_path: Path, fmt: str) -> None:
    node.mkdir("/root/r")
    node.run("cd /root/r; mkdir -p d/private tmp; chmod 1777 tmp; chmod 700 d d/private; cp /bin/true su; cp su cap; "
             "chmod 6755 su; chmod 02750 d/private; mknod null c 1 3; mknod disk b 8 0; mkfifo fifo; ln -s su link; "
             "echo secret > d/private/f; chmod 400 d/private/f", check=True)  # fmt: skip

    def capability() -> None:
        os.setxattr("/root/r/cap", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))

    node.call(capability)
    done = node.shifterimg("import", "--format", fmt, "/root/r", "custom:r", check=True)
    assert {line.partition(": left out: ")[2] for line in done.stderr.splitlines()} == {
        "FIFOs (1)", "block devices (1)", "character devices (1)"
    }  # fmt: skip
    found = contents(node.path(f"{IMAGES}/{done.stdout.strip()}.{fmt}"), tmp_path / "out")
    assert {name: mode for name, (mode, _) in found.items()} == {
        "cap": "-rwxr-xr-x", "d": "drwxr-xr-x", "d/private": "drwxr-xr-x", "d/private/f": "-r--r--r--",
        "link": "lrwxrwxrwx", "su": "-rwxr-xr-x", "tmp": "drwxrwxrwt",
    }  # fmt: skip


@pytest.mark.parametrize("fmt", ["squashfs", "erofs"])
@pytest.mark.parametrize(
    "members",
    [
        [member("../../../../../../var/tmp/evil", b"x")],
        [member("d", kind=tarfile.SYMTYPE, link="/var/tmp"), member("d/../evil", b"x")],
        [member("evil", kind=tarfile.LNKTYPE, link="/etc/passwd")],
        [member("evil", kind=tarfile.LNKTYPE, link="../../../etc/passwd")],
        [member("a", b""), member("a/evil", b"x")],
    ],
    ids=["dotdot", "dotdot-after-link", "hard-link", "hard-link-dotdot", "below-file"],
)
def test_hostile_members_are_refused(node: Node, fmt: str, members: list[Member]) -> None:
    node.write("/root/evil.tar", archive(*members))
    done = node.shifterimg("import", "--format", fmt, "/root/evil.tar", "docker:evil:1")
    assert done.returncode == 1
    assert done.stderr.startswith("shifterimg: /root/evil.tar: ")
    assert done.stderr.count("\n") == 1
    assert not left(node)
    assert not node.exists("/var/tmp/evil")
    assert node.shifterimg("lookup", "evil:1").returncode == 1


@pytest.mark.parametrize("fmt", ["squashfs", "erofs"])
def test_members_below_links_stay_inside(node: Node, tmp_path: Path, fmt: str) -> None:
    members = [
        member("d", kind=tarfile.SYMTYPE, link="/var/tmp"),
        member("d/evil", b"x"),
        member("/etc/absolute", b"y"),
    ]
    members += [member("up", kind=tarfile.SYMTYPE, link="../../../../.."), member("up/root/evil", b"z")]
    node.write("/root/evil.tar", archive(*members))
    found = contents(imported(node, "/root/evil.tar", "e:1", "--format", fmt), tmp_path / "out")
    assert (found["var/tmp/evil"][1], found["etc/absolute"][1], found["root/evil"][1]) == (b"x", b"y", b"z")
    assert not node.exists("/var/tmp/evil") and not node.exists("/etc/absolute") and not node.exists("/root/evil")


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """An OCI layout of two layers, made by umoci."""
    where = tmp_path / "oci"
    image, bundle = f"{where}:latest", tmp_path / "bundle"

    def umoci(*argv: str) -> None:
        subprocess.run(["umoci", *argv], check=True, capture_output=True)

    umoci("init", "--layout", str(where))
    umoci("new", "--image", image)
    umoci("unpack", "--image", image, str(bundle))
    root = bundle / "rootfs"
    (root / "etc").mkdir(parents=True)
    (root / "etc/one").write_text("1")
    (root / "etc/gone").write_text("1")
    (root / "su").write_text("x")
    (root / "su").chmod(0o4755)
    umoci("repack", "--refresh-bundle", "--image", image, str(bundle))
    (root / "etc/gone").unlink()
    (root / "etc/two").write_text("2")
    umoci("repack", "--refresh-bundle", "--image", image, str(bundle))
    umoci("config", "--image", image, "--clear=config.env", "--config.env=A=it's b ", "--config.env=PATH=/bin:/usr/bin",
          "--config.entrypoint=/bin/sh", "--config.entrypoint=-c", "--config.cmd=echo \"it's\"",
          "--config.workingdir=/etc")  # fmt: skip
    return where


@pytest.mark.parametrize("kind", ["oci", "oci-archive", "docker-archive", "docker-archive.gz"])
def test_oci(node: Node, tmp_path: Path, layout: Path, kind: str) -> None:
    if kind == "oci":
        node.run(["mkdir", "-p", "/root/image:1"], check=True)
        subprocess.run(["cp", "-a", f"{layout}/.", str(node.path("/root/image:1"))], check=True)
    else:
        out = tmp_path / "archive.tar"
        target = f"{kind.removesuffix('.gz')}:{out}" + (":some/image:1" if kind.startswith("docker") else "")
        subprocess.run(["skopeo", "--insecure-policy", "copy", "-q", f"oci:{layout}:latest", target], check=True)
        data = out.read_bytes()
        if kind.endswith(".gz"):
            data = subprocess.run(["gzip"], input=data, capture_output=True, check=True).stdout
        node.write("/root/image:1", data)
    found = contents(imported(node, "/root/image:1", "o:1"), tmp_path / "out")
    assert {name: data for name, (_, data) in found.items()} == {
        "etc": b"", "etc/one": b"1", "etc/two": b"2", "su": b"x"
    }  # fmt: skip
    assert found["su"][0] == "-rwxr-xr-x"
    said = json.loads(node.shifterimg("inspect", "--json", "o:1", check=True).stdout)
    assert said["entrypoint"] == ["/bin/sh", "-c"]
    assert said["cmd"] == ['echo "it\'s"']
    assert said["workdir"] == "/etc"
    assert sorted(said["env"]) == ["A=it's b ", "PATH=/bin:/usr/bin"]
    assert not left(node)


def blob(layout: Path, descriptor: dict[str, str]) -> Path:
    return layout / "blobs" / descriptor["digest"].replace(":", "/")


def test_oci_layer_that_is_not_what_its_digest_says(node: Node, layout: Path) -> None:
    index = json.loads((layout / "index.json").read_text())
    manifest = json.loads(blob(layout, index["manifests"][0]).read_text())
    layer = blob(layout, manifest["layers"][1])
    data = bytearray(layer.read_bytes())
    data[-1] ^= 1
    layer.write_bytes(data)
    node.run(["mkdir", "-p", "/root/image"], check=True)
    subprocess.run(["cp", "-a", f"{layout}/.", str(node.path("/root/image"))], check=True)
    done = node.shifterimg("import", "/root/image", "o:1")
    assert done.returncode == 1
    assert "/root/image is no image that skopeo can read" in done.stderr
    assert not left(node)


def slow_source(node: Node) -> None:
    node.mkdir("/root/big/etc")
    node.run("truncate -s 20G /root/big/zeros", check=True)


def started(node: Node, fmt: str) -> "subprocess.Popen[str]":
    process = node.popen(["/opt/shifter/bin/shifterimg", "import", "--format", fmt, "/root/big", "big:1"],
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if any(name.startswith(".partial-") and not name.endswith(".lock") for name in os.listdir(node.path(IMAGES))):
            time.sleep(0.3)
            return process
        time.sleep(0.01)
    raise AssertionError("the import has not begun")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted(node: Node, number: signal.Signals) -> None:
    slow_source(node)
    process = started(node, "squashfs")
    process.send_signal(number)
    assert process.communicate(timeout=20)[1].strip() == "shifterimg: interrupted; nothing is left behind"
    assert process.returncode == 128 + number
    assert not left(node)
    assert not [p for p in node.processes() if "mksquashfs" in p.cmdline]


@pytest.mark.parametrize("fmt", ["squashfs", "erofs"])
def test_killed(node: Node, fmt: str) -> None:
    """SIGKILL leaves a directory that no image is in, and no process; the next import removes it."""
    node.write("/root/small.tar", archive())
    old = imported(node, "/root/small.tar", "big:1")
    slow_source(node)
    if fmt == "erofs":
        node.mount("tmpfs", "/var/tmp", "tmpfs", 0, "mode=1777,size=1g")
    process = started(node, fmt)
    process.kill()
    process.communicate()
    time.sleep(0.2)
    assert not [p for p in node.processes() if "mksquashfs" in p.cmdline or "mkfs.erofs" in p.cmdline]
    assert left(node)
    assert node.shifterimg("lookup", "big:1", check=True).stdout.strip() == old.stem
    assert imported(node, "/root/small.tar", "small:1").exists()
    assert not left(node)


def test_killed_between_its_last_steps(node: Node) -> None:
    """The files of an image that never got its tag go too; those of one that has it stay."""
    node.write("/root/small.tar", archive())
    file = imported(node, "/root/small.tar", "small:1")
    orphan = "0" * 64
    for name, identifier in (("1-a", orphan), ("1-b", file.stem)):
        node.write(f"{IMAGES}/.partial-{name}.lock", "", 0o600)
        node.write(f"{IMAGES}/.partial-{name}/identifier", identifier)
    node.write(f"{IMAGES}/{orphan}.meta", "FORMAT: squashfs\n")
    node.write("/root/other.tar", archive(mode=0o777))
    other = imported(node, "/root/other.tar", "other:1")
    assert {name for name in os.listdir(node.path(IMAGES)) if not name.startswith((file.stem, other.stem))} == {
        "tags",
        ".lock",
    }
    assert file.exists()


@pytest.mark.parametrize("fmt", ["squashfs", "erofs"])
def test_full_disk(node: Node, fmt: str) -> None:
    node.mkdir("/small")
    node.mount("tmpfs", "/small", "tmpfs", 0, "mode=755,size=300k")
    node.conf(imagePath="/small")
    node.write("/root/r/random", os.urandom(2 << 20))
    done = node.shifterimg("import", "--format", fmt, "/root/r", "r:1")
    assert done.returncode == 1, done
    assert "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(node.path("/small")) == []
    node.mount("tmpfs", "/var/tmp", "tmpfs", 0, "mode=1777,size=100k")
    node.conf()
    if fmt == "erofs":
        done = node.shifterimg("import", "--format", fmt, "/root/r", "r:1")
        assert "No space left on device" in done.stderr
        assert not left(node)


def test_another_acl_is_another_image(node: Node) -> None:
    """So to import the same files for everybody can't open an image that was imported for some."""
    node.write("/root/small.tar", archive())
    private = imported(node, "/root/small.tar", "private:1", "--user", "alice")
    public = imported(node, "/root/small.tar", "public:1")
    assert private != public
    assert [stat.S_IMODE(path.stat().st_mode) for path in (private, private.with_suffix(".meta"))] == [0o600, 0o600]
    assert [stat.S_IMODE(path.stat().st_mode) for path in (public, public.with_suffix(".meta"))] == [0o644, 0o644]


def test_tools_get_no_privilege(node: Node) -> None:
    node.mkdir("/store", owner="carol")
    node.conf(imagePath="/store")
    slow_source(node)
    node.run("chmod 600 /root/big/zeros; chmod 700 /root/big", check=True)
    process = node.popen(["/opt/shifter/bin/shifterimg", "import", "/root/big", "big:1"], stderr=subprocess.PIPE)
    status = ""
    deadline = time.monotonic() + 20
    while not status and time.monotonic() < deadline:
        for found in node.processes():
            if found.comm == "mksquashfs":
                status = Path(f"/proc/{found.pid}/status").read_text()
    process.send_signal(signal.SIGTERM)
    process.communicate()
    lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert lines["Uid"].split() == ["5003"] * 4
    assert lines["Gid"].split() == ["5003"] * 4
    assert lines["Groups"].split() == []
    assert lines["NoNewPrivs"] == "1"
    assert int(lines["CapEff"], 16) == int(lines["CapPrm"], 16) == 0
    assert os.listdir(node.path("/store")) == []
