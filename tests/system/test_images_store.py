"""The image store as users, its owner and root see it; who may use what; files that nobody should trust."""

import json
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from shifter.errors import AccessError, ConfigError, ImageError, UsageError
from shifter.images import reference
from shifter.images.store import Store, check_access
from tests.images import Tree
from tests.node import IMAGES, Node

ID = "5fa90b2c"
GATEWAY_META = (
    "FORMAT: squashfs\nENTRY: ['/usr/bin/tini', '--']\nCMD: ['bash']\nWORKDIR: /data\nUSERACL: 5001,77\n"
    "ENV: PATH=/usr/bin\nENV: PS1=\\u\\\nENV: LAST=1\nUSER: nobody\n"
)


def store_in(node: Node, function: Callable[[Store], None], path: str = IMAGES) -> None:
    """Call *function* with the store, as root in the node."""

    def run() -> None:
        store = Store.open(path)
        try:
            function(store)
        finally:
            store.close()

    node.call(run)


def put(
    node: Node, identifier: str = ID, meta: str = "FORMAT: squashfs\n", mode: int = 0o600, owner: str = "root"
) -> None:
    node.write(f"{IMAGES}/{identifier}.meta", meta, mode, owner)
    node.write(f"{IMAGES}/{identifier}.squashfs", "image", mode, owner)


def refused(node: Node, kind: type[Exception], message: str, path: str = IMAGES) -> None:
    def look(store: Store) -> None:
        with pytest.raises(kind, match=message):
            store.image(ID).close()

    store_in(node, look, path)


def test_files_of_the_gateway_of_c_shifter(node: Node) -> None:
    put(node, meta=GATEWAY_META)

    def look(store: Store) -> None:
        image = store.image(ID)
        assert image.meta.env == ["PATH=/usr/bin", "PS1=\\u\\", "LAST=1"]
        assert os.read(image.fd, 100) == b"image"
        assert not os.get_inheritable(image.fd)
        assert image.path == f"{IMAGES}/{ID}.squashfs"
        assert [(uid, path) for uid, path, _ in image.watches] == [(0, f"{IMAGES}/{ID}.meta"), (0, image.path)]
        assert image.watches[1][2].st_ino == os.stat(image.path).st_ino
        check_access(image, 5001, 1, [])
        with pytest.raises(AccessError, match="uid 5002"):
            check_access(image, 5002, 1, [5001])
        image.close()

    store_in(node, look)


def test_directory_image(node: Node) -> None:
    node.write(f"{IMAGES}/{ID}.meta", "FORMAT: VFS\n")
    node.write(f"{IMAGES}/{ID}./etc/x", "1")

    def look(store: Store) -> None:
        image = store.image(ID)
        assert os.listdir(image.fd) == ["etc"]
        image.close()

    store_in(node, look)
    assert ID in node.shifterimg("images", check=True).stdout
    node.shifterimg("rm", f"id:{ID}", check=True)
    assert os.listdir(node.path(IMAGES)) == [".lock"]


@pytest.mark.parametrize("fmt", ["ext4", "xfs", "cramfs"])
def test_formats_that_are_not_mounted(node: Node, fmt: str) -> None:
    put(node, meta=f"FORMAT: {fmt}\n")
    refused(node, ImageError, f"format {fmt} is not mounted: import the image again")


def test_root_squash(node: Node) -> None:
    """Everything is private to the account; all that root itself needs is to stat the directory."""
    node.mkdir("/site", owner="carol")
    node.mkdir("/site/images", mode=0o700, owner="carol")
    node.write(f"/site/images/{ID}.meta", "FORMAT: squashfs\n", 0o600, "carol")
    node.write(f"/site/images/{ID}.squashfs", "image", 0o600, "carol")
    node.mkdir("/site/images/tags", 0o700, "carol")

    def tag() -> None:
        os.symlink(ID, "/site/images/tags/docker:x:1")

    node.call(tag)

    def look(store: Store) -> None:
        assert (store.owner, store.group) == (5003, 5003)
        assert store.resolve(reference.parse("x:1")) == ID
        store.image(ID).close()
        assert os.open("/root", os.O_RDONLY) >= 0  # root again

    store_in(node, look, "/site/images")
    node.run("chown root /site; chmod 700 /site", check=True)  # now a directory above is not for the account

    def closed() -> None:
        with pytest.raises(ImageError, match="every directory above it must be searchable by everybody"):
            Store.open("/site/images")

    node.call(closed)


@pytest.mark.parametrize("what", ["meta", "squashfs"])
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ("chmod 620 {}", AccessError, "is writable by group or others"),
        ("chmod 602 {}", AccessError, "is writable by group or others"),
        ("chown alice {}", AccessError, "belongs to uid 5001"),
        ("mv {} {}x; ln -s {}x {}", ImageError, "is a symbolic link"),
        ("rm {}; mkfifo {}", ImageError, "is not a regular file"),
        ("rm {}; mkdir {}", ImageError, "is not a regular file"),
        ("rm {}", ImageError, "does not exist"),
    ],
)
def test_files_that_others_could_change(
    node: Node, what: str, change: str, kind: type[Exception], message: str
) -> None:
    put(node)
    node.run(change.replace("{}", f"{IMAGES}/{ID}.{what}"), check=True)
    refused(node, kind, message)


def test_a_huge_metadata_file(node: Node) -> None:
    put(node, meta="FORMAT: squashfs\n" + "# \n" * 400_000)
    refused(node, ImageError, "is larger than 1048576 bytes")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("chmod 777 /images", "/images is writable by group or others"),
        ("mkdir -p /s/images; chown alice /s", "/s belongs to uid 5001"),
        ("mkdir -p /s/images; chmod g+w /s", "/s is writable by group or others"),
        ("mkdir -p /s/r; ln -s /s/r /s/images; chown -h alice /s/images", "/s/images belongs to uid 5001"),
    ],
)
def test_directories_that_others_could_change(node: Node, change: str, message: str) -> None:
    node.run(change, check=True)
    path = "/s/images" if "/s" in change else IMAGES

    def look() -> None:
        with pytest.raises(ConfigError, match=message):
            Store.open(path)

    node.call(look)


def test_tags_that_others_could_change(node: Node) -> None:
    put(node)
    node.tag_image("docker:x:1", ID)
    node.run("chmod 777 /images/tags", check=True)

    def look(store: Store) -> None:
        with pytest.raises(AccessError, match="tags is writable"):
            store.resolve(reference.parse("x:1"))

    store_in(node, look)


@pytest.mark.parametrize("target", ["../../etc/shadow", "", ".hidden", "a/b", "x y"])
def test_a_tag_can_only_name_an_image(node: Node, target: str) -> None:
    node.mkdir(f"{IMAGES}/tags")
    node.call(lambda: os.symlink(target or " ", f"{IMAGES}/tags/docker:x:1"))

    def look(store: Store) -> None:
        with pytest.raises(ImageError, match="docker:x:1"):
            store.resolve(reference.parse("x:1"))

    store_in(node, look)


def test_identifiers_stay_in_the_store(node: Node) -> None:
    node.write("/outside.meta", "FORMAT: squashfs\n")
    node.write("/outside.squashfs", "image")

    def look(store: Store) -> None:
        for identifier in ("../outside", "../etc/passwd", "..", "", "a/b", ".x", "a\0b"):
            with pytest.raises(ImageError):
                store.image(identifier)
        assert store.resolve(reference.parse("id:abc")) == "abc"
        with pytest.raises(UsageError):
            store.resolve(reference.parse("local:/"))

    store_in(node, look)


def test_suggestions_name_no_image_of_others(node: Node) -> None:
    put(node, "public")
    put(node, "secret", "FORMAT: squashfs\nUSERACL: 5001\n")
    for tag, identifier in (
        ("debian:12", "public"),
        ("debian:13", "secret"),
        ("debian:1", "dangling"),
        ("ubuntu:24", "public"),
    ):
        node.tag_image(f"docker:{tag}", identifier)

    def look(store: Store) -> None:
        for caller, message in (
            ((5001, 5001, []), r"no image docker:debian:14; did you mean docker:debian:12 or docker:debian:13[?]$"),
            ((5002, 5002, [5001]), r"no image docker:debian:14; did you mean docker:debian:12[?]$"),
            (None, r"no image docker:debian:14$"),
        ):
            with pytest.raises(ImageError, match=message):
                store.resolve(reference.parse("debian:14"), caller)
        with pytest.raises(ImageError, match=r"no image docker:something-else:latest$"):
            store.resolve(reference.parse("something-else"), (5001, 5001, []))

    store_in(node, look)


def test_what_the_build_path_imports() -> None:
    """Only what is built in, _ctypes and our own: every other module costs time at each launch."""
    code = "import sys; from shifter.images import store; print(*sys.modules)"
    root = Path(__file__).resolve().parents[2]
    out = subprocess.run(
        ["/usr/bin/python3", "-I", "-S", "-B", "-c", f"import sys; sys.path.insert(0, {str(root)!r}); {code}"],
        check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    plain = subprocess.run(
        ["/usr/bin/python3", "-I", "-S", "-B", "-c", "import sys; print(*sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert {name for name in set(out) - set(plain) if not name.startswith("shifter")} <= {"_ctypes", "errno", "fcntl"}


# --- shifterimg ------------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(node: Node, image: Tree) -> Node:
    """public:1 and 2 (one image), private:1 (alice and group proj), made by shifterimg from the tiny image."""
    node.mkdir("/srv/r")
    subprocess.run(["cp", "-a", f"{image.path}/.", str(node.path("/srv/r"))], check=True)
    node.shifterimg("import", "/srv/r", "public:1", check=True)
    identifier = node.shifterimg("lookup", "public:1", check=True).stdout.strip()
    node.tag_image("docker:public:2", identifier)
    node.shifterimg("import", "-u", "alice", "-g", "lab", "/srv/r", "custom:private:1", check=True)
    return node


def names(node: Node, user: str) -> list[str]:
    return [
        entry["reference"] for entry in json.loads(node.shifterimg("images", "--json", user=user, check=True).stdout)
    ]


def test_who_sees_what(filled: Node) -> None:
    everything = ["custom:private:1", "docker:public:1", "docker:public:2"]
    assert names(filled, "root") == everything
    filled.run(f"chmod 644 {IMAGES}/*.meta {IMAGES}/*.squashfs", check=True)  # then only the ACL decides
    assert names(filled, "alice") == names(filled, "dave") == everything  # dave is in lab
    assert names(filled, "carol") == everything[1:]
    assert filled.shifterimg("lookup", "custom:private:1", user="dave").returncode == 0
    for command in ("lookup", "inspect"):
        done = filled.shifterimg(command, "custom:private:1", user="carol")
        assert done.returncode == 1
        assert done.stdout == ""
        assert "its ACL names neither you (uid 5003) nor one of your groups" in done.stderr
    said = filled.shifterimg("lookup", "custom:private:2", user="carol").stderr
    assert said == "shifterimg: no image custom:private:2\n"


def test_lists_and_details(filled: Node) -> None:
    lines = filled.shifterimg("images", check=True).stdout.splitlines()
    assert lines[0].split() == ["IMAGE", "ID", "FORMAT", "SIZE", "IMPORTED"]
    assert lines[1].split()[0] == "custom:private:1"
    assert lines[1].split()[-1] == "restricted"
    said = json.loads(filled.shifterimg("inspect", "--json", "custom:private:1", check=True).stdout)
    assert (said["users"], said["groups"], said["format"]) == ([5001], [6002], "squashfs")
    text = filled.shifterimg("inspect", "custom:private:1", check=True).stdout
    assert "users:      [5001]\n" in text


def test_removing(filled: Node) -> None:
    identifier = filled.shifterimg("lookup", "public:1", check=True).stdout.strip()
    done = filled.shifterimg("rm", f"id:{identifier}")
    assert "is in use as docker:public:1, docker:public:2" in done.stderr
    filled.shifterimg("rm", "public:1", check=True)
    assert filled.shifterimg("lookup", "public:2", check=True).stdout.strip() == identifier
    filled.shifterimg("rm", "docker:public:2", check=True)
    assert not [name for name in os.listdir(filled.path(IMAGES)) if name.startswith(identifier)]
    done = filled.shifterimg("rm", "docker:public:2")
    assert (done.returncode, done.stderr) == (1, "shifterimg: no image docker:public:2\n")
    assert names(filled, "root") == ["custom:private:1"]


@pytest.mark.parametrize("argv", [["import", "/srv", "docker:x:1"], ["rm", "docker:x:1"]])
def test_others_may_not_write(node: Node, argv: list[str]) -> None:
    done = node.shifterimg(*argv, user="alice")
    assert done.returncode == 1
    assert done.stderr == "shifterimg: only uid 0, which owns the image store /images, and root may do that\n"
    assert os.listdir(node.path(IMAGES)) == []


def test_a_service_account(node: Node, image: Tree) -> None:
    """It imports and removes by itself; root does it in its name, also from files that only root can read."""
    node.mkdir("/store", owner="carol")
    node.conf(imagePath="/store")
    node.write("/srv/r/secret", "x", 0o600)
    assert "Permission denied" in node.shifterimg("import", "/srv/r", "mine:1", user="carol").stderr
    for fmt in ("squashfs", "erofs"):
        node.shifterimg("import", "--format", fmt, "/srv/r", f"root:{fmt}", check=True)
    node.run("chmod 644 /srv/r/secret", check=True)
    for fmt in ("squashfs", "erofs"):
        node.shifterimg("import", "--format", fmt, "/srv/r", f"mine:{fmt}", user="carol", check=True)
    for path in node.path("/store").rglob("*"):
        assert path.lstat().st_uid == 5003, path
    assert len(names(node, "carol")) == 4
    assert not [name for name in os.listdir(node.path("/var/tmp")) if name.startswith("shifterimg")]
    node.shifterimg("rm", "root:erofs", user="carol", check=True)
    node.shifterimg("rm", "mine:squashfs", check=True)
    assert names(node, "root") == ["docker:mine:erofs", "docker:root:squashfs"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["import", "/srv", "local:/x"], "is a directory, not an image of the store"),
        (["import", "/srv", "id:x"], "only docker: and custom: images have a tag"),
        (["import", "/srv", "a;b"], "the character ';' is not allowed"),
        (["import", "/nowhere", "a"], "does not exist"),
        (["import", "-u", "nobody-of-that-name", "/srv", "a"], "there is no user nobody-of-that-name"),
        (["import", "-g", ",", "/srv", "a"], "no group in the list"),
        (["import", "--format", "ext4", "/srv", "a"], "ext4"),
        (["lookup", "local:/x"], "is a directory"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_usage_errors(node: Node, argv: list[str], message: str) -> None:
    done = node.shifterimg(*argv)
    assert done.returncode == 2
    assert done.stderr.startswith("shifterimg: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_options_before_the_command(node: Node) -> None:
    """As C Shifter's shifterimg had them."""
    node.write("/srv/r/f", "x")
    node.shifterimg("--user", "alice,5002", "--group", "6001", "import", "/srv/r", "a", check=True)
    said = json.loads(node.shifterimg("inspect", "--json", "a", check=True).stdout)
    assert (said["users"], said["groups"]) == ([5001, 5002], [6001])


def test_control_characters_never_reach_the_terminal(node: Node) -> None:
    put(node, meta="FORMAT: squashfs\nENV: A=\x1b[2J\nWORKDIR: /\x9b\n")
    node.tag_image("docker:x:1", ID)
    assert "env:        A=\\x1b[2J\n" in node.shifterimg("inspect", "x:1", check=True).stdout
    node.write("/srv/\x1b[2J", "no archive")
    done = node.shifterimg("import", "/srv/\x1b[2J", "y")
    assert "\x1b" not in done.stderr
    assert "\\x1b[2J" in done.stderr


def test_a_broken_image_is_shown_to_the_administrator(node: Node) -> None:
    put(node)
    node.run(f"chmod 666 {IMAGES}/{ID}.squashfs", check=True)
    assert "is writable by group or others" in node.shifterimg("images", check=True).stdout
    assert names(node, "alice") == []
    mode = node.path(f"{IMAGES}/{ID}.squashfs").stat().st_mode
    assert stat.S_IMODE(mode) == 0o666
