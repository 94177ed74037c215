"""Images in the store namespace: each mounted once per node, read-only, and used by every UDI that names it.

The key is made of device, inode, size and ctime of the opened file, so an image that is replaced is another image.
The lock is held only around the mount itself and no path of a user is opened under it. Part of the build path.
"""

import _thread
import posix

from shifter.errors import BuildError
from shifter.images.store import Image
from shifter.linux import loop, paths, syscalls
from shifter.udi import pins

MYPY = False
if MYPY:
    from shifter.linux.identity import Identity

READ_AHEAD_BYTES = 2 << 20
"""At most this much of a file is unpacked ahead: all of a C library (1.9 MB in Debian 12)."""

ATTRIBUTES = syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV


def image_key(status: posix.stat_result) -> str:
    """Return the name under which the image file with *status* is mounted in the store namespace."""
    return f"{status.st_dev:x}-{status.st_ino:x}-{status.st_size:x}-{status.st_ctime_ns:x}"


def enter_store_copy(image: "Image | None", owner: "Identity", home: int, store: int) -> str:
    """Leave the process in a private copy of the store namespace in which *image* is mounted; return its directory there.

    The copy is taken under the image's lock, so the reaper can't unmount the image in between. Must be called in the
    home namespace, where devices are. Without *image* (formats that are no file) only the copy is made and "" returned.
    Raises BuildError, OSError.
    """
    if image is None:
        syscalls.setns(store)
        syscalls.unshare_mounts()
        return ""
    key = image_key(posix.fstat(image.fd))
    lock = _lock(key)
    try:
        syscalls.setns(store)
        try:
            posix.mkdir("/" + key, 0o700)
            mounted = False
        except FileExistsError:
            mounted = posix.stat("/" + key).st_dev != posix.stat("/").st_dev
        if not mounted:
            syscalls.setns(home)
            posix.ftruncate(lock, 0)
            posix.pwrite(lock, image.path.encode("utf-8", "surrogateescape") + b"\n", 0)
            mount = _mount(image, owner)
            _unpack_ahead(mount)
            syscalls.setns(store)
            directory = posix.open("/" + key, syscalls.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
            syscalls.move_mount(mount, directory, image.path)
            posix.close(directory)
            posix.close(mount)
        syscalls.unshare_mounts()
        return "/" + key
    finally:
        syscalls.flock(lock, syscalls.LOCK_UN, key)
        posix.close(lock)


def _unpack_ahead(mount: int) -> None:
    """Start to read what every dynamic program of a newly mounted image needs, on another processor, and don't wait.

    Unpacking the loader and the C library takes the kernel about as long as all the rest of the build (squashfs zstd:
    6 of 35 ms saved, benchmarks/launch.py). Only the page cache is filled; not a byte comes into this process.
    """
    ready = _thread.allocate_lock()
    ready.acquire()
    try:
        _thread.start_new_thread(_read_ahead, (posix.dup(mount), ready))
    except RuntimeError:  # no thread to be had: the program reads for itself
        return
    # A thread that gets no memory ends without a word. One that has not begun is a task, but not counted by Python yet.
    while not ready.acquire(True, 0.05) and len(posix.listdir("/proc/self/task")) > 1:
        pass


def _read_ahead(mount: int, ready: "_thread.LockType") -> None:
    """The thread. It ends with the process at the latest, whatever it reads."""
    try:
        syscalls.unshare_fs_attributes()  # setns(2) refuses a process whose root and cwd are shared
    finally:
        ready.release()
    machine = posix.uname().machine
    loaders = (f"/lib64/ld-linux-{machine.replace('_', '-')}.so.2", f"/lib/ld-linux-{machine}.so.1")
    libraries = (f"/lib/{machine}-linux-gnu/libc.so.6", "/lib64/libc.so.6", f"/lib/ld-musl-{machine}.so.1")
    for path in loaders + libraries:
        try:
            # O_NONBLOCK: it may be a FIFO; whatever is no regular file is refused by readahead(2).
            fd = paths.open_in_root(mount, path, posix.O_RDONLY | posix.O_NONBLOCK)
        except OSError:
            continue
        try:
            syscalls.readahead(fd, READ_AHEAD_BYTES)
        except OSError:
            pass
        posix.close(fd)
    posix.close(mount)


def known() -> "list[str]":
    """Return the keys of all images: those with a lock file, and what is mounted without one (a wiped /run/shifter)."""
    found = set(posix.listdir(pins.IMAGES))
    back = _enter_store()
    try:
        found.update(name for name in posix.listdir("/") if name not in pins.STORE_DIRECTORIES)
    finally:
        _leave_store(back)
    return sorted(found)


def unmount(key: str) -> None:
    """Unmount one image from the store, with its lock held. UDIs that use it keep it alive."""
    back = _enter_store()
    try:
        pins.remove("/" + key)
    finally:
        _leave_store(back)


def _enter_store() -> int:
    """Join the store namespace; return the way back."""
    back = pins.open_namespace("/proc/self/ns/mnt")
    store = pins.open_namespace(pins.STORE)
    syscalls.setns(store)
    posix.close(store)
    return back


def _leave_store(back: int) -> None:
    syscalls.setns(back)
    posix.close(back)


def _lock(key: str) -> int:
    """Take the lock of an image, mark it as used now, and return its descriptor."""
    path = f"{pins.IMAGES}/{key}"
    while True:
        lock = posix.open(path, posix.O_CREAT | posix.O_RDWR | posix.O_NOFOLLOW | posix.O_CLOEXEC, 0o600)
        syscalls.flock(lock, syscalls.LOCK_EX, key)
        if posix.fstat(lock).st_nlink:
            posix.utime(lock)
            return lock
        posix.close(lock)  # the reaper removed it while we waited


def _mount(image: Image, owner: "Identity") -> int:
    """Return a detached, read-only mount of the image file: EROFS from the file itself where the kernel can, else by loop."""
    kind = image.meta.format
    try:
        if kind == "erofs":
            try:
                # Linux >= 6.12 opens the file by this name, with the fsuid of the caller: that of the store's owner.
                with owner:
                    return syscalls.new_mount("erofs", {"source": f"/proc/self/fd/{image.fd}", "ro": None}, ATTRIBUTES)
            except OSError:
                pass  # ENOTBLK before 6.12, or built without CONFIG_EROFS_FS_BACKED_BY_FILE
        device, path = loop.attach(image.fd, image.path)
        try:
            return syscalls.new_mount(kind, {"source": path, "ro": None}, ATTRIBUTES)
        finally:
            posix.close(device)
    except OSError as error:
        raise BuildError(
            f"image file {image.path} can't be mounted ({kind}: {error.strerror}): it is damaged, or this kernel lacks {kind}"
        ) from None
