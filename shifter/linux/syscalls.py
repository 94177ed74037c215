"""System calls that Python has no function for, three lines each, over ``_ctypes``.

Importing ``_ctypes`` alone costs 0.6 ms; ``ctypes`` with ``os`` 2 ms more. Every wrapper raises OSError with the path or
object it was called for. Constants carry their kernel names. Numbers from 424 up are the same on every architecture;
the older calls are reached through their libc symbols. Part of the build path.
"""

import _ctypes
import errno
import posix

MYPY = False
if MYPY:
    from typing import Any

AT_FDCWD = -100
AT_RECURSIVE = 0x8000
AT_EMPTY_PATH = 0x1000
AT_STATX_DONT_SYNC = 0x4000

CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000

O_PATH = 0o10000000
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = posix.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x04
MOVE_MOUNT_T_EMPTY_PATH = 0x40

FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6

MOUNT_ATTR_RDONLY = 0x01
MOUNT_ATTR_NOSUID = 0x02
MOUNT_ATTR_NODEV = 0x04
MOUNT_ATTR_NOEXEC = 0x08

MS_BIND = 0x1000
RENAME_EXCHANGE = 2
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_UNBINDABLE = 1 << 17
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

LOCK_EX = 2
LOCK_NB = 4
LOCK_UN = 8

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

NS_GET_USERNS = 0xB701
"""_IO(0xb7, 1), linux/nsfs.h: a descriptor of the user namespace that owns a namespace."""
NS_GET_MNTNS_ID = 0x8008B705
"""_IOR(0xb7, 5, __u64), linux/nsfs.h: the 64-bit id of a mount namespace, never reused (unlike the nsfs inode)."""

CAP_SYS_ADMIN = 21
_CAPABILITIES = (0x20080522).to_bytes(4, "little") + bytes(4)
"""struct __user_cap_header_struct: _LINUX_CAPABILITY_VERSION_3, this thread."""

NSFS_MAGIC = 0x6E736673
PROC_SUPER_MAGIC = 0x9FA0

_SYS_open_tree = 428
_SYS_move_mount = 429
_SYS_fsopen = 430
_SYS_fsconfig = 431
_SYS_fsmount = 432
_SYS_openat2 = 437
_SYS_mount_setattr = 442


class _Long(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "l"


class _Word(_ctypes._SimpleCData):  # type: ignore[type-arg]
    """What a system call takes: an int of any sign as a whole register, or the address of bytes."""

    _type_ = "P"


class _Char(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "c"


class _Int(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "i"


class _Function(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = _Int  # not long: the upper half of the register is undefined, and -1 would not be seen


class _LongFunction(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = _Long


_LIBC = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]


def _libc(name: str) -> "Any":
    return _Function(_ctypes.dlsym(_LIBC, name))


_syscall = _LongFunction(_ctypes.dlsym(_LIBC, "syscall"))
_setns, _unshare, _pivot_root, _umount2, _mount = map(_libc, ("setns", "unshare", "pivot_root", "umount2", "mount"))
_setfsuid, _setfsgid, _ioctl, _flock, _fstatfs, _prctl, _readahead, _capget, _capset = map(
    _libc, ("setfsuid", "setfsgid", "ioctl", "flock", "fstatfs", "prctl", "readahead", "capget", "capset")
)


_word = _Word.from_param


def _call(function: "Any", what: "str | None", *args: "int | bytes | None") -> int:
    """Call *function*; an int result of -1 becomes an OSError about *what*. EINTR is retried."""
    while True:
        result: int = function(*map(_word, args))
        if result != -1:
            return result
        code = _ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, posix.strerror(code), what)


def _address(buffer: bytearray) -> int:
    """Return where *buffer* lies in memory: for a call that writes into it."""
    # Not an array of its size: each of those is a new type, which takes longer than most calls.
    return _ctypes.addressof(_Char.from_buffer(buffer))


def _path(path: "str | bytes") -> bytes:
    return path if isinstance(path, bytes) else path.encode("utf-8", "surrogateescape")


def openat2(dirfd: int, path: str, flags: int, resolve: int, mode: int = 0) -> int:
    """openat2(2): open *path* below *dirfd* with the RESOLVE_* restrictions; always O_CLOEXEC. Returns the descriptor."""
    how = (flags | posix.O_CLOEXEC | mode << 64 | resolve << 128).to_bytes(24, "little")  # struct open_how, three u64
    while True:
        try:
            return _call(_syscall, path, _SYS_openat2, dirfd, _path(path), how, len(how))
        except BlockingIOError:  # EAGAIN: a rename raced with a RESOLVE_IN_ROOT walk; openat2(2) says try again
            continue


def open_tree(dirfd: int, path: str, flags: int) -> int:
    """open_tree(2) with OPEN_TREE_CLOEXEC: with OPEN_TREE_CLONE a detached copy of the mount at *path*."""
    return _call(_syscall, path, _SYS_open_tree, dirfd, _path(path), flags | OPEN_TREE_CLOEXEC)


def move_mount(mountfd: int, targetfd: int, what: str) -> None:
    """move_mount(2), descriptor to descriptor: attach the mount *mountfd* on the file or directory *targetfd*."""
    _call(
        _syscall, what, _SYS_move_mount, mountfd, b"", targetfd, b"", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
    )


def mount_setattr(
    fd: int, path: str, set_attr: int = 0, clear_attr: int = 0, propagation: int = 0, recursive: bool = False
) -> None:
    """mount_setattr(2): set MOUNT_ATTR_* and MS_PRIVATE/SLAVE/SHARED/UNBINDABLE on a mount, or on its whole tree."""
    # struct mount_attr: four u64, the last of which is a descriptor that is not used
    attr = (set_attr | clear_attr << 64 | propagation << 128).to_bytes(32, "little")
    flags = (AT_EMPTY_PATH if not path else 0) | (AT_RECURSIVE if recursive else 0)
    _call(_syscall, path or "mount_setattr", _SYS_mount_setattr, fd, _path(path), flags, attr, len(attr))


def new_mount(fstype: str, options: "dict[str, str | None]", attributes: int) -> int:
    """fsopen(2), fsconfig(2), fsmount(2): a new, detached mount of *fstype*. An option with value None is a flag.

    The option ``source`` names the device. Raises OSError naming the type and the option that failed.
    """
    context = _call(_syscall, fstype, _SYS_fsopen, _path(fstype), FSOPEN_CLOEXEC)
    try:
        for key, value in options.items():
            what = f"{fstype}: {key}"
            if value is None:
                _call(_syscall, what, _SYS_fsconfig, context, FSCONFIG_SET_FLAG, _path(key), None, 0)
            else:
                _call(_syscall, what, _SYS_fsconfig, context, FSCONFIG_SET_STRING, _path(key), _path(value), 0)
        _call(_syscall, fstype, _SYS_fsconfig, context, FSCONFIG_CMD_CREATE, None, None, 0)
        return _call(_syscall, fstype, _SYS_fsmount, context, FSMOUNT_CLOEXEC, attributes)
    finally:
        posix.close(context)


def bind_by_path(source: str, target: str) -> None:
    """mount(2) with MS_BIND. Needed for nsfs files only, which open_tree(2) refuses to clone on older kernels."""
    _call(_mount, target, _path(source), _path(target), None, MS_BIND, None)


def exchange(one: str, other: str) -> None:
    """renameat2(2) with RENAME_EXCHANGE: both must exist, and each gets the other's name."""
    _call(_libc("renameat2"), other, AT_FDCWD, _path(one), AT_FDCWD, _path(other), RENAME_EXCHANGE)


def setns(fd: int) -> None:
    """setns(2) into the mount namespace *fd*; root and cwd of the process become those of that namespace."""
    _call(_setns, "mount namespace", fd, CLONE_NEWNS)


def unshare_mounts() -> None:
    """unshare(2) CLONE_NEWNS: go on in a private copy of the current mount namespace."""
    _call(_unshare, "mount namespace", CLONE_NEWNS)


def unshare_fs_attributes() -> None:
    """unshare(2) CLONE_FS: this thread gets a root and a cwd of its own, and the others are free to setns(2)."""
    _call(_unshare, "root and cwd", CLONE_FS)


def readahead(fd: int, count: int) -> None:
    """readahead(2) of the first *count* bytes of the regular file *fd* into the page cache."""
    _call(_readahead, "readahead", fd, 0, count)


def pivot_root_here() -> None:
    """pivot_root(".", "."), then detach the old root: the cwd becomes the root (pivot_root(2), NOTES)."""
    _call(_pivot_root, "pivot_root", b".", b".")
    _call(_umount2, "old root", b".", MNT_DETACH)


def unmount(path: str) -> None:
    """umount2(2) with MNT_DETACH and UMOUNT_NOFOLLOW."""
    _call(_umount2, path, _path(path), MNT_DETACH | UMOUNT_NOFOLLOW)


def setfsuid(uid: int) -> int:
    """setfsuid(2); returns the previous value. It can't report failure, so callers read back with ``setfsuid(-1)``."""
    return int(_setfsuid(_Long(uid))) & 0xFFFFFFFF


def setfsgid(gid: int) -> int:
    """setfsgid(2); see setfsuid."""
    return int(_setfsgid(_Long(gid))) & 0xFFFFFFFF


def limit_capabilities(keep: int) -> bytes:
    """capset(2): take all effective capabilities but those in the mask *keep*; return what ``restore_capabilities`` needs.

    Effective only, and of this thread only.
    """
    sets = bytearray(24)  # two of struct __user_cap_data_struct: 32 bits each of effective, permitted, inheritable
    _call(_capget, "capget", _CAPABILITIES, _address(sets))
    before = bytes(sets)
    for offset, bits in ((0, keep & 0xFFFFFFFF), (12, keep >> 32)):
        bits &= int.from_bytes(sets[offset : offset + 4], "little")
        sets[offset : offset + 4] = bits.to_bytes(4, "little")
    restore_capabilities(bytes(sets))
    return before


def restore_capabilities(sets: bytes) -> None:
    """capset(2) of what ``limit_capabilities`` returned."""
    _call(_capset, "capset", _CAPABILITIES, sets)


def ioctl(fd: int, request: int, argument: "int | bytearray | bytes", what: str) -> int:
    """ioctl(2); a bytearray argument is read and written by the kernel in place."""
    if isinstance(argument, bytearray):
        return _call(_ioctl, what, fd, request, _address(argument))
    return _call(_ioctl, what, fd, request, argument)


def flock(fd: int, operation: int, what: str) -> None:
    """flock(2). Raises BlockingIOError when LOCK_NB is set and somebody holds the lock."""
    _call(_flock, what, fd, operation)


def filesystem_magic(fd: int) -> int:
    """fstatfs(2): the f_type of the file system that *fd* is on."""
    buffer = bytearray(256)
    _call(_fstatfs, "fstatfs", fd, _address(buffer))
    return int.from_bytes(buffer[:8], "little") & 0xFFFFFFFF


def device_number(path: str) -> int:
    """statx(2) with AT_STATX_DONT_SYNC: st_dev of *path*, without asking the server of its file system.

    That can be a user's FUSE daemon, or a dead NFS server, and never answer.
    """
    buffer = bytearray(256)
    _call(_libc("statx"), path, AT_FDCWD, _path(path), AT_STATX_DONT_SYNC, 0, _address(buffer))
    return posix.makedev(int.from_bytes(buffer[136:140], "little"), int.from_bytes(buffer[140:144], "little"))


def mount_namespace_id(fd: int) -> int:
    """NS_GET_MNTNS_ID of the mount namespace *fd*; 0 where the kernel does not have it (ENOTTY)."""
    buffer = bytearray(8)
    try:
        ioctl(fd, NS_GET_MNTNS_ID, buffer, "NS_GET_MNTNS_ID")
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EINVAL):
            return 0
        raise
    return int.from_bytes(buffer, "little")


def prctl(option: int, value: int) -> int:
    """prctl(2) with one argument."""
    return _call(_prctl, "prctl", option, value, 0, 0, 0)


def capget() -> "tuple[int, int, int]":
    """capget(2) of the calling thread: effective, permitted and inheritable capabilities as bit masks."""
    sets = bytearray(24)
    _call(_capget, "capget", _CAPABILITIES, _address(sets))
    words = [int.from_bytes(sets[at : at + 4], "little") for at in range(0, 24, 4)]
    return words[0] | words[3] << 32, words[1] | words[4] << 32, words[2] | words[5] << 32


def capset_none() -> None:
    """capset(2): the calling thread has no effective, permitted or inheritable capability any more."""
    restore_capabilities(bytes(24))
