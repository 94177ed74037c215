"""What a process in a UDI tries, as a program: it prints what it should not have been able to do, one line each.

Runs with the Python of the node inside of a UDI, so it imports nothing of the tests. Its argument is a JSON object:
what of others there is to reach. With "nested" it tries the same as root of a user and mount namespace of its own.
"""

import ctypes
import fcntl
import json
import os
import stat
import struct
import sys
from collections.abc import Callable

LIBC = ctypes.CDLL(None, use_errno=True)
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000
FD_NSFS_ROOT = -10003  # linux/fcntl.h, Linux >= 6.18
NS_MNT_GET_NEXT, NS_MNT_GET_PREV = 0x8010B70B, 0x8010B70C  # linux/nsfs.h, Linux >= 6.12
NS_GET_USERNS, NS_GET_PARENT = 0xB701, 0xB702
PIDFD_GET_MNT_NAMESPACE = 0xFF03
RDONLY, NOSUID, NODEV = 1, 2, 4  # MOUNT_ATTR_*
found: list[str] = []


def call(result: int) -> int:
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def syscall(number: int, *words: "int | bytes | None") -> int:
    return call(LIBC.syscall(*[ctypes.c_long(w) if isinstance(w, int) else w for w in (number, *words)]))


def attempt(what: str, act: "Callable[..., object]", *args: object) -> None:
    """Note *what* if it works."""
    try:
        act(*args)
    except OSError:
        return
    found.append(what)


def mounts() -> "list[tuple[str, str]]":
    """(mount point, options) of every mount that a path leads to, the last first."""
    with open("/proc/self/mountinfo", errors="surrogateescape") as table:
        rows = [line.split(" ") for line in table]
    place = {row[0]: row[4] for row in rows}
    covered = {row[1] for row in rows if place.get(row[1]) == row[4]}
    return [(row[4].replace("\\040", " "), row[5]) for row in reversed(rows) if row[0] not in covered]


def look_at_processes(pids: "dict[str, int]") -> None:
    """Ways from a process of somebody else to its files, its memory and its namespaces."""
    for whose, pid in pids.items():
        for name in ("root", "cwd", "fd", "map_files"):
            attempt(f"{name} of {whose}", lambda name, pid: os.listdir(f"/proc/{pid}/{name}"), name, pid)
        attempt(f"run of {whose}", lambda pid: os.listdir(f"/proc/{pid}/root/run"), pid)
        for name in ("mem", "environ", "ns/mnt", "ns/user", "exe"):
            attempt(f"{name} of {whose}", lambda name, pid: os.open(f"/proc/{pid}/{name}", os.O_RDONLY), name, pid)
        pidfd = os.pidfd_open(pid)
        attempt(f"descriptor of {whose}", lambda fd: syscall(438, fd, 0, 0), pidfd)
        attempt(f"namespace of {whose}", lambda fd: fcntl.ioctl(fd, PIDFD_GET_MNT_NAMESPACE, 0), pidfd)
        attempt(f"join {whose}", lambda fd: call(LIBC.setns(fd, 0x20000)), pidfd)


def look_at_own_outside(pid: int) -> None:
    """A process of one's own, outside of the UDI, is a way to the node's files, and to nothing that is closed there."""
    for name in ("", "/site", "/store", "/udi", "/udi/5001", "/images"):
        path = f"/proc/{pid}/root/run/shifter{name}"
        attempt(f"list {path}", lambda path: os.listdir(path), path)
        attempt(f"open {path}", lambda path: os.open(path, os.O_RDONLY), path)
    attempt("join one's own outside", lambda: call(LIBC.setns(os.open(f"/proc/{pid}/ns/mnt", 0), 0x20000)))


def look_at_namespaces(known: "dict[str, list[int]]") -> None:
    """From the UDI's namespace to others: parent, owner, neighbours, file handles, and listing by id."""
    own = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    attempt("NS_GET_PARENT", lambda: fcntl.ioctl(own, NS_GET_PARENT))
    for step in (NS_MNT_GET_NEXT, NS_MNT_GET_PREV):
        fd = own
        for _ in range(1000):
            info = bytearray(struct.pack("IIQ", 16, 0, 0))
            try:
                fd = fcntl.ioctl(fd, step, info)
            except OSError:
                break
            other = os.fstat(fd).st_ino
            found.extend(f"{who} as a neighbour" for who, (_, inode) in known.items() if inode == other)
    for who, (ident, inode) in known.items():
        for inum in (inode, 0):
            handle = struct.pack("IiQII", 16, 0xF1, ident, 0x20000 if inum else 0, inum)
            attempt(f"{who} by handle", lambda h: call(LIBC.open_by_handle_at(FD_NSFS_ROOT, h, os.O_RDONLY)), handle)
        request = struct.pack("IIQQQ", 32, 0, 2**64 - 1, 0, ident)
        attempt(f"{who} listed", lambda r: syscall(458, r, bytes(8 * 512), 512, 0), request)
    request = struct.pack("IIQQQ", 32, 0, 2**64 - 1, 0, 0)
    buffer = ctypes.create_string_buffer(8 * 4096)
    count = call(LIBC.syscall(ctypes.c_long(458), request, buffer, ctypes.c_long(4096), ctypes.c_long(0)))
    with open("/proc/self/mountinfo", "rb") as table:
        lines = len(table.readlines())
    if count not in (lines, lines - 1):  # without the root itself
        found.append(f"listmount shows {count} mounts, mountinfo {lines}")


def look_at_handles(handles: "dict[str, list[int]]") -> None:
    """A file handle, guessed or learnt elsewhere, opened through what the UDI shows of the same file system."""
    for who, (kind, *data) in handles.items():
        handle = struct.pack("Ii", len(data), kind) + bytes(data)
        for path in filter(os.path.isdir, ("/", "/mnt", "/tmp", "/etc", "/srv", "/home")):
            directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            attempt(f"{who} by handle in {path}", lambda d, h: call(LIBC.open_by_handle_at(d, h, 0)), directory, handle)


def look_at_devices_and_keys(keys: "list[int]") -> None:
    """Block devices (the images' among them), kernel memory, switches of the kernel, keys of others."""
    for top, _, names in os.walk("/dev"):
        for name in names:
            path = f"{top}/{name}"
            mode = os.lstat(path).st_mode
            if stat.S_ISBLK(mode) or name in ("mem", "kmem", "port", "loop-control"):
                attempt(f"open {path}", lambda path: os.open(path, os.O_RDONLY | os.O_NONBLOCK), path)
                attempt(f"write {path}", lambda path: os.open(path, os.O_WRONLY | os.O_NONBLOCK), path)
    for top, _, names in os.walk("/proc/sys"):
        # ns_last_pid asks for a capability when it is written; user/ is what the own user namespace allows itself.
        names = [name for name in names if name != "ns_last_pid" and top != "/proc/sys/user"]
        found.extend(f"write {top}/{name}" for name in names if os.access(f"{top}/{name}", os.W_OK))
    for path, options in mounts():
        if (path == "/sys" or path.startswith("/sys/")) and "ro" not in options.split(","):
            found.append(f"{path} can be written")
    for key in keys:
        for operation in (11, 6, 5, 21):  # READ, DESCRIBE, SETPERM, GET_SECURITY of <linux/keyctl.h>
            attempt(f"key {operation}", lambda op, key: syscall(250, op, key, 0x3F3F3F3F, 0), operation, key)


def act_on_mounts(nested: bool) -> None:
    """Uncover, make writable, move, clone or add mounts. In a namespace of one's own some of it is legal, and harmless."""
    there = mounts()
    for path, options in there:
        for name, flag in (("ro", RDONLY), ("nosuid", NOSUID), ("nodev", NODEV)):
            if name in options.split(","):
                attr = struct.pack("QQQQ", 0, flag, 0, 0)
                attempt(
                    f"clear {name} of {path}", lambda p, a: syscall(442, AT_FDCWD, p.encode(), 0, a, 32), path, attr
                )
        attempt(f"umount {path}", lambda p: call(LIBC.umount2(p.encode(), 8)), path)
        if path != "/":
            attempt(f"umount -l {path}", lambda p: call(LIBC.umount2(p.encode(), 8 | 2)), path)
        if covers(path, there):
            attempt(f"clone {path} alone", lambda p: syscall(428, AT_FDCWD, p.encode(), 1), path)
    attempt("pivot_root", lambda: syscall(155 if os.uname().machine == "x86_64" else 41, b"/tmp", b"/tmp"))
    attempt("new proc", lambda: call(LIBC.mount(b"proc", b"/proc", b"proc", 0, None)))
    attempt("new sysfs", lambda: call(LIBC.mount(b"sysfs", b"/sys", b"sysfs", 0, None)))
    attempt("device", lambda: os.mknod("/tmp/device", 0o666 | stat.S_IFBLK, os.makedev(7, 0)))
    for kind in (b"squashfs", b"erofs", b"ext4"):
        attempt(f"mount {kind!r}", lambda kind: call(LIBC.mount(b"/dev/loop0", b"/tmp", kind, 1, None)), kind)
    if not nested:
        attempt("fsopen", lambda: syscall(430, b"tmpfs", 0))
        attempt("fspick", lambda: syscall(433, AT_FDCWD, b"/", 0))
        attempt("open_tree", lambda: syscall(428, AT_FDCWD, b"/", 1 | AT_RECURSIVE))
        attempt("mount", lambda: call(LIBC.mount(b"x", b"/tmp", b"tmpfs", 0, None)))
        attempt("bind", lambda: call(LIBC.mount(b"/", b"/tmp", None, 4096, None)))
        attempt("unshare", lambda: call(LIBC.unshare(0x20000)))
        attempt("chroot", lambda: os.chroot("/tmp"))


def covers(path: str, there: "list[tuple[str, str]]") -> bool:
    """True if other mounts lie below *path*: without them it would show what they hide."""
    return any(other != path and other.startswith(path.rstrip("/") + "/") for other, _ in there)


def main() -> None:
    args = json.loads(sys.argv[1])
    if args["nested"]:
        uid, gid = os.getuid(), os.getgid()
        call(LIBC.unshare(0x10020000))  # CLONE_NEWUSER | CLONE_NEWNS
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    LIBC.prctl(4, 1)  # PR_SET_DUMPABLE: what is one's own stays one's own
    look_at_processes(args["pids"])
    look_at_namespaces(args["namespaces"])
    look_at_handles(args["handles"])
    if not args["control"]:
        look_at_own_outside(args["outside"])
        look_at_devices_and_keys(args["keys"])
        act_on_mounts(args["nested"])
    print(json.dumps(found))


main()
