"""Archives of strangers as a tree in memory: layers, links, hostile names, damage."""

import bz2
import gzip
import io
import lzma
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shifter.errors import ImageError
from shifter.images.meta import Meta
from shifter.images.sources import Directory, Layers, open_source
from shifter.images.tree import FILE, Node, Tree, permissions

Member = tuple[str, bytes, str]
"""Name, type, and content or link target."""

D, F, S, H = tarfile.DIRTYPE, tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


def tar(members: list[Member], mode: int = 0o755) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, kind, text in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode = kind, mode
            data = text.encode() if kind == F else b""
            info.size, info.linkname = len(data), text if kind in (S, H) else ""
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def layers(path: Path, *content: list[Member] | bytes, whiteouts: bool = True) -> Layers:
    paths = []
    for number, members in enumerate(content):
        file = path / f"{number}.tar"
        file.write_bytes(members if isinstance(members, bytes) else tar(members))
        paths.append(str(file))
    return Layers(paths, whiteouts, Meta())


def shown(source: Layers | Directory) -> dict[str, str]:
    """Path -> content, `-> target` of a symbolic link, `/` of a directory."""
    tree = source.scan(lambda _: None)
    found, files = {}, []
    for path, node in tree.walk():
        found[path] = {"directory": "/", "symlink": f"-> {node.target}"}.get(node.kind, "")
        if node.kind == FILE and node.path == path:
            files.append(node)
    contents: dict[str | None, str] = {}

    def emit(node: Node, data: IO[bytes]) -> None:
        contents[node.path] = data.read(node.size).decode()

    source.copy(files, emit)
    for path, node in tree.walk():
        if node.kind == FILE:
            found[path] = contents[node.path]
    return found


def test_members(tmp_path: Path) -> None:
    source = layers(
        tmp_path, [("./a/", D, ""), ("./a/f", F, "1"), ("a/l", S, "../../x"), ("h", H, "./a/f"), ("/b/c", F, "2")]
    )
    assert shown(source) == {"a": "/", "a/f": "1", "a/l": "-> ../../x", "h": "1", "b": "/", "b/c": "2"}


def test_the_last_member_of_a_name_counts(tmp_path: Path) -> None:
    source = layers(
        tmp_path, [("a", F, "1"), ("d/x", F, "1"), ("a", F, "2"), ("d", D, ""), ("e", D, ""), ("e", F, "3")]
    )
    assert shown(source) == {"a": "2", "d": "/", "d/x": "1", "e": "3"}


def test_layers_and_whiteouts(tmp_path: Path) -> None:
    lower: list[Member] = [
        ("d/a", F, "1"),
        ("d/b", F, "1"),
        ("o/x", F, "1"),
        ("o/y/z", F, "1"),
        ("f", F, "1"),
        ("t/u", F, "1"),
    ]
    upper: list[Member] = [("d/.wh.a", F, ""), ("o/n", F, "2"), ("o/.wh..wh..opq", F, ""), ("f", D, ""), ("t", S, "/d")]
    upper += [("d/.wh.missing", F, ""), ("nowhere/.wh.x", F, ""), (".wh..wh.plnk", D, ""), ("f/g", F, "2")]
    expected = {"d": "/", "d/b": "1", "f": "/", "f/g": "2", "o": "/", "o/n": "2", "t": "-> /d"}
    assert shown(layers(tmp_path, lower, upper)) == expected


def test_a_whiteout_leaves_what_its_own_layer_brings(tmp_path: Path) -> None:
    source = layers(
        tmp_path, [("d/a", F, "1"), ("f", F, "1")], [("d/b", F, "2"), (".wh.d", F, ""), ("f", F, "2"), (".wh.f", F, "")]
    )
    assert shown(source) == {"d": "/", "d/b": "2", "f": "2"}


def test_whiteout_names_mean_nothing_in_a_plain_archive(tmp_path: Path) -> None:
    assert shown(layers(tmp_path, [("a", F, "1"), (".wh.a", F, "")], whiteouts=False)) == {"a": "1", ".wh.a": ""}


def test_members_below_a_symbolic_link_stay_in_the_tree(tmp_path: Path) -> None:
    """What an unpacker that follows links on the host would write outside."""
    members: list[Member] = [
        ("usr/lib", D, ""),
        ("lib", S, "usr/lib"),
        ("abs", S, "/etc"),
        ("up", S, "../../../../tmp"),
    ]
    members += [("lib/x", F, "1"), ("abs/passwd", F, "2"), ("up/evil", F, "3"), ("q", S, "up"), ("q/r", H, "lib/x")]
    found = shown(layers(tmp_path, members))
    assert found["usr/lib/x"] == found["tmp/r"] == "1"
    assert (found["etc/passwd"], found["tmp/evil"]) == ("2", "3")
    assert not Path("/tmp/evil").exists()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../evil", F, "")], "'..' would leave the image"),
        ([("a/../../evil", F, "")], "'..' would leave the image"),
        ([("a", S, "b"), ("b", S, "a"), ("a/x", F, "")], "loop of symbolic links"),
        ([("a", F, ""), ("a/x", F, "")], "below a, which is a file"),
        ([("x", H, "/etc/passwd")], "which is no file of this image"),
        ([("x", H, "../../etc/passwd")], "'..' would leave the image"),
        ([("d", D, ""), ("x", H, "d")], "which is no file of this image"),
        ([("x", H, "x")], "which is no file of this image"),
        ([("x" * 256, F, "")], "no file can have this name"),
    ],
)
def test_hostile_members(tmp_path: Path, members: list[Member], message: str) -> None:
    with pytest.raises(ImageError) as caught:
        layers(tmp_path, members).scan(lambda _: None)
    assert message in caught.value.chain()


def test_a_path_that_only_links_make_long_enough(tmp_path: Path) -> None:
    members: list[Member] = []
    for number in range(30):  # /0 -> deep directory, and the next one below it
        members += [("/".join(["n" * 200] * 2) if not number else f"{number - 1}/" + "/".join(["n" * 200] * 2), D, "")]
        members += [(str(number), S, "/" + "/".join(["n" * 200] * 2 * (number + 1)))]
    with pytest.raises(ImageError, match="is too long"):
        list(layers(tmp_path, members).scan(lambda _: None).walk())


def test_devices_are_left_out(tmp_path: Path) -> None:
    tree = layers(
        tmp_path, [("null", tarfile.CHRTYPE, ""), ("sda", tarfile.BLKTYPE, ""), ("p", tarfile.FIFOTYPE, "")]
    ).scan(lambda _: None)
    assert not list(tree.walk())
    assert dict(tree.left_out) == {"character devices": 1, "block devices": 1, "FIFOs": 1}


@pytest.mark.parametrize(
    ("kind", "mode", "expected"),
    [
        ("file", 0o4755, 0o755),
        ("file", 0o2000, 0o444),
        ("file", 0o700, 0o755),
        ("file", 0o600, 0o644),
        ("file", 0o10, 0o555),
    ]
    + [("directory", 0o1777, 0o1777), ("directory", 0, 0o555), ("directory", 0o2770, 0o775), ("symlink", 0, 0o777)],
)
def test_permissions(kind: str, mode: int, expected: int) -> None:
    assert permissions(kind, mode) == expected


def _zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-q", "-c"], input=data, capture_output=True, check=True).stdout


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes, "gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zstd": _zstd
}  # fmt: skip


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressions_and_damage(tmp_path: Path, compression: str) -> None:
    """A whole archive is read; one that is cut off or changed anywhere is refused, never taken for a shorter one."""
    members: list[Member] = [(f"f{number}", F, os.urandom(3000).hex()) for number in range(20)]
    data = COMPRESSIONS[compression](tar(members))
    assert len(shown(layers(tmp_path, data))) == 20
    for cut in (1, 100, 600, len(data) // 2, len(data) - 11000):
        source = layers(tmp_path, data[:cut])
        with pytest.raises(ImageError):
            shown(source)
    if compression != "none":
        middle = len(data) // 2
        source = layers(tmp_path, data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :])
        with pytest.raises(ImageError):
            shown(source)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_an_archive_larger_than_all_pipes(tmp_path: Path, compression: str) -> None:
    """To tell what it is takes its first member; the decompressor is then in the midst of writing the second one."""
    (tmp_path / "x").write_bytes(COMPRESSIONS[compression](tar([("f", F, "1"), ("g", F, os.urandom(1 << 20).hex())])))
    assert [path for path, _ in open_source(str(tmp_path / "x"), "").scan(lambda _: None).walk()] == ["f", "g"]


def test_a_damaged_header_is_not_the_end(tmp_path: Path) -> None:
    data = bytearray(tar([("a", F, "1"), ("b", F, "2"), ("c", F, "3")]))
    data[1024 + 100] ^= 0x55
    with pytest.raises(ImageError, match=r"0\.tar"):
        layers(tmp_path, bytes(data)).scan(lambda _: None)


def test_headers_that_would_fill_the_memory(tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    with pytest.raises(ImageError) as caught:
        layers(tmp_path, header.tobuf(tarfile.GNU_FORMAT)).scan(lambda _: None)
    assert "impossible size" in caught.value.chain()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_bytes_of_any_kind_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(tar([("a/b", F, "text"), ("c", S, "a"), ("n" * 150, F, "x"), ("h", H, "a/b")]))
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    for start in range(0, len(content), 512):  # so that more than the checksum is tried
        block = content[start : start + 512]
        if data.draw(st.booleans()) and block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            content[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    try:
        shown(layers(tmp_path, bytes(content)))
    except ImageError:
        pass


def test_directory(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a/f").write_text("1")
    (root / "h").hardlink_to(root / "a/f")
    (root / "l").symlink_to("/etc")
    os.mkfifo(root / "p")
    source = Directory(str(root))
    assert shown(source) == {"a": "/", "a/f": "1", "h": "1", "l": "-> /etc"}
    tree = source.scan(lambda _: None)
    assert tree.root.children["h"] is tree.root.children["a"].children["f"]
    assert dict(tree.left_out) == {"FIFOs": 1}


def test_a_directory_that_changes_meanwhile(tmp_path: Path) -> None:
    """A file that is replaced by a link to a secret between the two readings is not followed."""
    (tmp_path / "r/d").mkdir(parents=True)
    (tmp_path / "r/d/f").write_text("1234")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/f").write_text("5678")
    for change in ("parent", "file", "size"):
        source = Directory(str(tmp_path / "r"))
        nodes = [node for _, node in source.scan(lambda _: None).walk() if node.kind == FILE]
        if change == "parent":
            (tmp_path / "r/d").rename(tmp_path / "r2")
            (tmp_path / "r/d").symlink_to("../secret")
        elif change == "file":
            (tmp_path / "r/d/f").rename(tmp_path / "r/d/g")
            (tmp_path / "r/d/f").symlink_to("../../secret/f")
        else:
            (tmp_path / "r/d/f").write_text("12345")
        with pytest.raises((ImageError, OSError)):
            source.copy(nodes, lambda node, data: None)
        if change == "parent":
            (tmp_path / "r/d").unlink()
            (tmp_path / "r2").rename(tmp_path / "r/d")
        elif change == "file":
            (tmp_path / "r/d/g").rename(tmp_path / "r/d/f")


def test_what_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello, this is no archive at all" * 100)
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    for name in ("text", "empty", "fifo"):
        with pytest.raises(ImageError) as caught:
            open_source(str(tmp_path / name), str(tmp_path)).scan(lambda _: None)
        assert name in caught.value.chain()


def test_deep_trees_need_no_recursion() -> None:
    tree = Tree()
    for depth in range(1, 2000):
        tree.add("d/" * depth + "f", Node(FILE, 0o644, 0, layer=1))
        if depth % 500 == 0:
            tree.opaque("d", 1)
    assert sum(1 for _ in tree.walk()) == 2 * 1999


def test_times_that_squashfs_cant_hold(tmp_path: Path) -> None:
    assert Node(FILE, 0, -5).mtime == 0
    assert Node(FILE, 0, 1e12).mtime == 0xFFFFFFFF
