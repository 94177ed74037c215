"""Attacks on what root wrote and reads again: requests, records, the site file, pins and locks below /run/shifter.

Users can't write there. These tests play root's mistake, a disk that lies, or a hole elsewhere: whatever is there, root
acts on nothing but what is whole and meant for this launch, and one clean-up later all is as it was.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import node as nodes
from tests.images import Tree
from tests.node import PREFIX, Node
from tests.security.traces import RUN, collect, damages, nothing_left, refused, traces

WHO = "id -u; id -g; cat /etc/issue; grep -E '^(CapEff|NoNewPrivs)' /proc/self/status"
EXPECTED = "5001\n5001\nTiny\nCapEff:\t0000000000000000\nNoNewPrivs:\t1\n"


@pytest.fixture
def ready(node: Node, image: Tree) -> Node:
    """A node on which alice has launched an image that says all that an image can."""
    settings = {"entry": ["/bin/sh", "-c"], "cmd": ["true"], "workdir": "/srv", "env": {"COLOUR": "blue"}}
    node.add_image("docker:tiny:1", image, **settings)  # type: ignore[arg-type]
    launch(node)
    assert nodes.until(lambda: [p for p in node.processes() if "builder.pyc" in p.cmdline], 20) == []  # it sweeps
    return node


def without_a_sweep(node: Node) -> None:
    """Builders sweep after their answer, if the last sweep is 30 s ago: on a slow machine what is damaged went meanwhile."""
    os.utime(node.path(f"{RUN}/swept"))


def launch(node: Node, *options: str) -> str:
    """Launch as alice, assert that it is right, and say what -v said."""
    done = node.shifter("-v", "--image=tiny:1", *options, "/bin/busybox", "sh", "-c", WHO, timeout=20)
    assert (done.returncode, done.stdout) == (0, EXPECTED), (done.stdout, done.stderr)
    return done.stderr


def keys(node: Node, uid: int = 5001) -> list[str]:
    """Names of the user's UDIs."""
    return sorted(name for name in os.listdir(node.path(f"{RUN}/udi/{uid}")) if name != "lock")


def record_of(node: Node, uid: int = 5001) -> Path:
    """The record of the user's only UDI."""
    [key] = keys(node, uid)
    return node.path(f"{RUN}/udi/{uid}/{key}/record")


# --- request ----------------------------------------------------------------------------------------------------------


def build(node: Node, request: bytes, lock: str = f"{RUN}/udi/5001/lock") -> tuple[str, str]:
    """Run the builder as the door does, with *request*; return the last field of its answer."""
    builder = f"{PREFIX}/libexec/shifter/python/builder.pyc"
    script = f"exec 4<>{lock}; flock 4; exec /usr/bin/python3 -I -S -B {builder} 4 3>&1 >/dev/null"
    text = request.decode("utf-8", "surrogateescape")
    done = node.run(["sh", "-c", script], env={"LC_ALL": "C"}, clean=True, input=text, cwd="/")
    assert done.returncode in (0, 1) and done.stderr == "", done.stderr
    fields = [item.partition("=") for item in done.stdout.split("\0")[:-1]]
    assert {key for key, _, _ in fields[:-1]} <= {"step"}, fields
    key, _, value = fields[-1]
    assert key in ("ok", "again", "error") and done.returncode == (key == "error"), (fields, request)
    assert "internal error" not in value and "\n" not in value, (value, request)
    return key, value


def request_of(node: Node, ref: str = "tiny:1") -> bytes:
    """What a door of alice's asks for *ref*: the beginning of her record."""
    lines = record_of(node).read_bytes().split(b"\0")
    return b"\0".join([*lines[:5], b"ref=" + ref.encode(), b"end=request", b""])


def test_damaged_requests(ready: Node) -> None:
    """The door is no part of the policy: the builder takes every request for a stranger's."""
    good = request_of(ready)
    start = traces(ready)
    assert build(ready, good) == ("ok", keys(ready)[0])
    for _, bad in damages(good, 1, 14, 6):
        key, value = build(ready, bad)
        if key == "ok":  # another request: of other groups, or another name of the same image
            assert value in keys(ready), "nothing is made for anybody but alice, whose lock it was"
    assert os.listdir(ready.path(f"{RUN}/udi")) == ["5001"]
    collect(ready, "--all")
    launch(ready)
    nothing_left(ready, start)


def fields(data: bytes) -> list[bytes]:
    return data.split(b"\0")[:-1]


def join(items: list[bytes]) -> bytes:
    return b"".join(item + b"\0" for item in items)


BAD_REQUESTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "root": lambda good: good.replace(b"uid=5001", b"uid=0"),
    "root's group": lambda good: good.replace(b"gid=5001", b"gid=0"),
    "root among the groups": lambda good: good.replace(b"groups=", b"groups=0,"),
    "groups in another order": lambda good: good.replace(b"6001,6002", b"6002,6001"),
    "group twice": lambda good: good.replace(b"6001,6002", b"6001,6001,6002"),
    "uid of 33 bits": lambda good: good.replace(b"uid=5001", b"uid=%d" % (2**32 + 5001)),
    "uid -1": lambda good: good.replace(b"uid=5001", b"uid=4294967295"),
    "uid with a zero": lambda good: good.replace(b"uid=5001", b"uid=05001"),
    "field twice": lambda good: good.replace(b"uid=5001\0", b"uid=5001\0uid=5001\0"),
    "image twice": lambda good: good.replace(b"end=", b"ref=tiny:1\0end="),
    "fields in another order": lambda good: join([*fields(good)[:5][::-1], *fields(good)[5:]]),
    "unknown field": lambda good: good.replace(b"end=", b"image=x\0end="),
    "twice": lambda good: good + good,
    "more after its end": lambda good: good + b"volume=/root:/mnt\0",
    "another kind": lambda good: good.replace(b"end=request", b"end=record"),
    "another build": lambda good: good.replace(b"shifter=", b"shifter=1"),
    "too long": lambda good: good.replace(b"end=", b"volume=/" + b"x" * 66000 + b":/mnt\0end="),
    "endless": lambda good: good.replace(b"end=", b"volume=/tmp:/mnt\0" * 50000 + b"end="),
    "volume of root": lambda good: good.replace(b"end=", b"volume=/root/x:/mnt\0end="),
    "volume of another user": lambda good: good.replace(b"end=", b"volume=/home/bob/x:/mnt\0end="),
    "volume over what is ours": lambda good: good.replace(b"end=", b"volume=/tmp:/etc\0end="),
    "control characters": lambda good: good.replace(b"tiny:1", b"tiny\x1b[2J:1"),
    "bytes that are no text": lambda good: good.replace(b"tiny:1", b"ti\xff\xfe:1"),
    "image that climbs": lambda good: good.replace(b"tiny:1", b"id:../../etc/passwd"),
    "image of procfs": lambda good: good.replace(b"tiny:1", b"local:/proc/1/root"),
    "namespace without an id": lambda good: join([b"ns=0" if f.startswith(b"ns=") else f for f in fields(good)]),
    "once that is none": lambda good: good.replace(b"ref=", b"once=../../../../etc\0ref="),
}


def test_requests_of_a_stranger(ready: Node) -> None:
    good = request_of(ready)
    start = traces(ready)
    for what, change in BAD_REQUESTS.items():
        assert change(good) != good, what
        assert build(ready, change(good))[0] == "error", what
    nothing_left(ready, start)


def test_request_for_another_user_gets_no_udi(ready: Node) -> None:
    """Under alice's lock nothing is made for bob: the lock says whose builder it is."""
    start = traces(ready)
    for other in (b"uid=5002", b"uid=777777"):
        assert build(ready, request_of(ready).replace(b"uid=5001", other)) == ("again", "")
    nothing_left(ready, start)


# --- record and site file ---------------------------------------------------------------------------------------------


def looked_at(node: Node) -> None:
    """Who lists or collects UDIs meets damaged records, too. Alice sees her own records, and no others."""
    for user in ("root", "alice"):
        done = node.shifterctl("ps", user=user)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert b"\0uid=5002\0" not in node.shifter("--udi-list").stdout.encode()
    collect(node)


@pytest.mark.parametrize("what", ["record", "site"])
def test_damaged_documents(ready: Node, what: str) -> None:
    """Each byte changed, each length: what is entered is right, or a new one is built. What can't be told, does no harm."""
    place = ready.path(f"{RUN}/site") if what == "site" else record_of(ready)
    start = traces(ready)
    first = good = place.read_bytes()
    canonical = good.index(b"\0watch=") if what == "record" else 0
    for number, (position, bad) in enumerate(damages(first, 2, 16, 6)):
        without_a_sweep(ready)
        place.write_bytes(bad)
        if what == "record" and number % 12 == 0:
            looked_at(ready)
        if place.parent.exists():  # else it was collected
            said = launch(ready)
            cut = len(bad) < len(first)  # one that was built since may be longer: numbers of devices grow
            assert "built now" in said or what == "site" or not (cut or position < canonical), (position, bad)
        else:
            launch(ready)
        if place.read_bytes() == bad:
            place.write_bytes(good)
        good = place.read_bytes()
    nothing_left(ready, start)


def swap(data: bytes, one: bytes, other: bytes) -> bytes:
    """Exchange the first fields that begin with *one* and with *other*."""
    items = fields(data)
    a, b = ([item.partition(b"=")[0] for item in items].index(name) for name in (one, other))
    items[a], items[b] = items[b], items[a]
    return join(items)


def before(data: bytes, name: bytes, field: bytes) -> bytes:
    """Put *field* before the first one of *name*."""
    return data.replace(b"\0" + name + b"=", b"\0" + field + b"\0" + name + b"=", 1)


def filled(data: bytes, size: int) -> bytes:
    """Make *data* so long with a field that nobody knows."""
    return before(data, b"end", b"x=" + b"y" * (size - len(data) - 3))


Change = Callable[[bytes], bytes]
EVIL: dict[str, Change] = {
    "watch as uid -1": lambda good: before(good, b"watch", b"watch=4294967295:0:0:0:0:0:/nowhere"),
    "watch as uid of 33 bits": lambda good: before(good, b"watch", b"watch=4294967296:0:0:0:0:0:/nowhere"),
    "watch of no number": lambda good: before(good, b"watch", b"watch=" + b"9" * 400 + b":0:0:0:0:0:/no"),
    "watch of a relative path": lambda good: before(good, b"watch", b"watch=0:0:0:0:0:0:nowhere"),
    "source": lambda good: before(good, b"end", b"source=1:1:/"),
    "ends in the middle": lambda good: before(good, b"end", b"end=record\0end=site\0env.set=PATH=/evil"),
    "end first": lambda good: b"end=record\0end=site\0" + good,
    "nothing but its ends": lambda good: join([fields(good)[0], fields(good)[-1]]),
    "twice": lambda good: good + good,
    "fields in another order": lambda good: join([*fields(good)[-2::-1], fields(good)[-1]]),
    "field without a value": lambda good: before(good, b"end", b"env"),
    "key that is none": lambda good: before(good, b"end", b"../x=y"),
    "full to the brim": lambda good: filled(good, 65536),
    "one byte too long": lambda good: filled(good, 65537),
}
EVIL_RECORDS: dict[str, Change] = {
    "another user's": lambda good: good.replace(b"uid=5001", b"uid=5002"),
    "uid twice": lambda good: before(good, b"uid", b"uid=5002"),
    "uid and gid exchanged": lambda good: swap(good, b"uid", b"gid"),
    "image and namespace exchanged": lambda good: swap(good, b"image", b"ns"),
    "built at no time": lambda good: good.replace(b"\0built=", b"\0built=x"),
    "built at the end of time": lambda good: good.replace(b"\0built=", b"\0built=1844674407"),
}
LOOKED_AT = ("ends in the middle", "another user's", "built at no time", "built at the end of time", "full to the brim")
EVIL_SITES: dict[str, Change] = {
    "another store": lambda good: good.replace(b"imagePath=/images", b"imagePath=/etc"),
    "two stores": lambda good: before(good, b"imagePath", b"imagePath=/etc"),
    "store that is a name": lambda good: good.replace(b"storeUid=0", b"storeUid=root"),
    "store of uid -1": lambda good: good.replace(b"storeUid=0", b"storeUid=4294967295"),
    "store of gid -1": lambda good: good.replace(b"storeGid=0", b"storeGid=-1"),
    "times that are none": lambda good: good.replace(b"udiIdleTime=", b"udiIdleTime=x"),
}


@pytest.mark.parametrize("what", ["record", "site"])
def test_documents_of_a_stranger(ready: Node, what: str) -> None:
    """Fields twice, in another order, too many, out of range: the launch is right, and goes on being so.

    A watch or a store of uid -1 ended each launch with "can't act as uid 4294967295", and nothing made the file anew.
    """
    place = ready.path(f"{RUN}/site") if what == "site" else record_of(ready)
    start = traces(ready)
    for name, change in (EVIL | (EVIL_SITES if what == "site" else EVIL_RECORDS)).items():
        good = place.read_bytes()
        bad = change(good)
        assert bad != good, name
        without_a_sweep(ready)
        place.write_bytes(bad)
        launch(ready)
        launch(ready)
        if what == "record" and name in LOOKED_AT:
            place.write_bytes(bad)
            looked_at(ready)
            launch(ready)
        if place.read_bytes() == bad:
            place.write_bytes(good)
    nothing_left(ready, start)


# --- what is in the place of something else ---------------------------------------------------------------------------

THINGS = {
    "file": "echo garbage > {0}",
    "fifo": "mkfifo {0}",
    "device": "mknod {0} b 7 0",
    "directory": "mkdir -p {0}/a/b; echo garbage > {0}/a/b/c",
    "socket": "python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"{0}\")'",
    "symlink": "ln -s /srv/victim {0}",
    "link to nothing": "ln -s /srv/victim/new {0}",
    "hard link": "ln {1}/site {0}",
}


@pytest.mark.parametrize("what", ["record", "UDI", "lock", "directory", "image", "site"])
def test_things_in_place_of_others(ready: Node, what: str) -> None:
    """A launch works, or one line says why not; after one collection it works, and what a link led to is as it was."""
    ready.write("/srv/victim/file", "untouched")
    victim = ready.path("/srv/victim").stat()
    user = f"{RUN}/udi/5001"
    udi = f"{user}/{keys(ready)[0]}"
    [image] = os.listdir(ready.path(f"{RUN}/images"))
    where = {"record": f"{udi}/record", "lock": f"{user}/lock", "image": f"{RUN}/images/{image}"}
    where |= {"UDI": udi, "directory": user, "site": f"{RUN}/site"}
    start = traces(ready)
    for name, make in THINGS.items():
        if (what, name) == ("site", "hard link"):
            continue  # to itself
        clear = f"umount {user}/*/ns; rm -rf {where[what]}" if what in ("UDI", "directory") else f"rm -rf {where[what]}"
        ready.run(f"{clear}; {make.format(where[what], RUN)}")
        without_a_sweep(ready)
        if what in ("record", "UDI", "site"):
            launch(ready)
        else:
            done = ready.shifter("--image=tiny:1", "/bin/busybox", "id", "-u", timeout=20)
            assert done.stdout == "5001\n" or refused(done, f"{RUN}"), (name, done.stderr)
            collect(ready)
            launch(ready)
        assert ready.path("/srv/victim").stat() == victim and ready.read("/srv/victim/file") == "untouched", name
    nothing_left(ready, start)


def test_udis_with_the_same_key(ready: Node) -> None:
    """The key is a hash that users can make collide: what decides is the record's text, not the name of its directory."""
    for name in ("one", "two"):
        ready.write(f"/home/alice/{name}/name", f"{name}\n", owner="alice")
        ready.shifter("--image=tiny:1", f"--volume=/home/alice/{name}:/mnt", "/bin/true")
    start = traces(ready)
    places = {name: key for key in keys(ready) for name in ("one", "two") if f"/alice/{name}:" in record(ready, key)}
    assert len(places) == 2
    user = f"{RUN}/udi/5001"
    ready.run(f"cd {user}; mv {places['one']} x; mv {places['two']} {places['one']}; mv x {places['two']}", check=True)
    for name in ("one", "two"):
        done = ready.shifter("-v", "--image=tiny:1", f"--volume=/home/alice/{name}:/mnt", "/bin/cat", "/mnt/name")
        assert done.stdout == f"{name}\n" and "built now" in done.stderr, done.stderr
    nothing_left(ready, start)


def record(node: Node, key: str, uid: int = 5001) -> str:
    return node.read(f"{RUN}/udi/{uid}/{key}/record")


def test_udi_of_another_user_in_ones_own_place(ready: Node) -> None:
    """Root copied it there. It is not entered, and not listed: it is no launch of alice's."""
    launch_of_bob = ready.shifter("--image=tiny:1", "/bin/true", user="bob")
    assert launch_of_bob.returncode == 0
    start = traces(ready)
    [mine], [theirs] = keys(ready), keys(ready, 5002)
    ready.run(f"cd {RUN}/udi; umount 5001/{mine}/ns; rm -r 5001/{mine}; mv 5002/{theirs} 5001/{mine}", check=True)
    assert ready.shifter("--udi-list").stdout == ""
    assert "built now" in launch(ready)
    assert "\0uid=5001\0" in ready.shifter("--udi-list").stdout
    assert ready.shifter("--udi-list", user="bob").stdout == ""
    nothing_left(ready, start)
