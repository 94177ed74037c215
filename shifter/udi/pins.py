"""The run-time state of the node below /run/shifter: its tmpfs, the store namespace, pins, locks.

Pins are nsfs bind mounts, so they exist in one mount namespace only: the node's first one (that of PID 1), on a mount of
our own that is private and unbindable. On a shared /run, as systemd makes it, a pin would fail with EINVAL as soon as
another namespace holds a slave copy. A caller may sit in another namespace; the builder goes home for this part.
Part of the build path.
"""

import posix

from shifter.errors import BuildError
from shifter.linux import paths, syscalls

RUN = "/run/shifter"
STORE = RUN + "/store"
IMAGES = RUN + "/images"
UDIS = RUN + "/udi"
SITE = RUN + "/site"

STORE_DIRECTORIES = ("udi", "generated", "lower", "directory")
"""Mount points in the store namespace's root that each build uses in its own copy of the namespace."""


def open_namespace(path: str) -> int:
    """Open a mount namespace file and check that it is one (other namespaces see a plain file where a pin is)."""
    fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    if syscalls.filesystem_magic(fd) != syscalls.NSFS_MAGIC:
        posix.close(fd)
        raise FileNotFoundError(2, "not a namespace", path)
    return fd


def open_home_namespace() -> int:
    """Return the namespace in which pins live: that of PID 1, else (where even root may not look at PID 1) our own.

    The second case is right only for a caller that is at home itself; whether it is shows when no pin is found.
    Raises BuildError when PID 1 is in a mount namespace of another user namespace: in a PID namespace it can be a program
    of the user, who then has mounted there what they like.
    """
    try:
        home = open_namespace("/proc/1/ns/mnt")
        owner = syscalls.ioctl(home, syscalls.NS_GET_USERNS, 0, "NS_GET_USERNS")
    except PermissionError:
        return open_namespace("/proc/self/ns/mnt")
    # Both are held open meanwhile, so that the number of neither is given to another namespace.
    ours = posix.open("/proc/self/ns/user", posix.O_RDONLY | posix.O_CLOEXEC)
    same = posix.fstat(owner).st_ino == posix.fstat(ours).st_ino
    posix.close(owner)
    posix.close(ours)
    if not same:
        raise BuildError("PID 1 of this PID namespace is in a user namespace of its own: run shifter outside of it")
    return home


def base_ready() -> bool:
    """True if /run/shifter is our tmpfs with a live store namespace, seen from the current namespace."""
    try:
        posix.close(open_namespace(STORE))
    except OSError:
        return False
    return True


def prepare_base() -> None:
    """Mount the tmpfs on /run/shifter and make the store namespace. Must be called in the home namespace.

    Concurrent builders wait for each other on the directory below the mount, which no user can open (mode 0711). The
    tmpfs itself is 0700: a pin is a file that everybody may open, and who holds it keeps the store and all its images.
    """
    try:
        posix.mkdir(RUN, 0o711)
    except FileExistsError:
        pass
    lock = paths.open_trusted(RUN, flags=posix.O_RDONLY | posix.O_DIRECTORY)
    posix.fchmod(lock, 0o711)
    syscalls.flock(lock, syscalls.LOCK_EX, RUN)
    try:
        if base_ready():
            return
        tmpfs = syscalls.new_mount(
            "tmpfs",
            {"source": "shifter", "mode": "700", "size": "64m"},
            syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC,
        )
        syscalls.move_mount(tmpfs, lock, RUN)
        # Attached below a shared parent a mount becomes shared itself, so this comes after.
        syscalls.mount_setattr(tmpfs, "", propagation=syscalls.MS_PRIVATE)
        syscalls.mount_setattr(tmpfs, "", propagation=syscalls.MS_UNBINDABLE)
        posix.mkdir("images", 0o700, dir_fd=tmpfs)
        posix.mkdir("udi", 0o700, dir_fd=tmpfs)
        _make_store_namespace(tmpfs)
        posix.close(tmpfs)
    finally:
        syscalls.flock(lock, syscalls.LOCK_UN, RUN)
        posix.close(lock)


def _make_store_namespace(run: int) -> None:
    """Make the namespace that holds nothing but mounted images, and pin it as ``store``.

    A child makes it and waits, since a namespace can't be pinned from inside (the kernel refuses such loops).
    """
    ready_read, ready_write = posix.pipe()
    go_read, go_write = posix.pipe()
    child = posix.fork()
    if child == 0:
        status = 1
        try:
            posix.close(go_write)  # or the read below would wait for ourselves
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, 9)
            syscalls.unshare_mounts()
            syscalls.mount_setattr(syscalls.AT_FDCWD, "/", propagation=syscalls.MS_PRIVATE, recursive=True)
            root = syscalls.new_mount(
                "tmpfs", {"source": "shifter-store", "mode": "700", "size": "1m"}, syscalls.MOUNT_ATTR_NOSUID
            )
            for name in STORE_DIRECTORIES:
                posix.mkdir(name, 0o700, dir_fd=root)
            target = posix.open("/run/shifter", syscalls.O_PATH | posix.O_DIRECTORY)
            syscalls.move_mount(root, target, "store root")
            posix.fchdir(root)
            syscalls.pivot_root_here()
            posix.write(ready_write, b"1")
            posix.read(go_read, 1)
            status = 0
        finally:
            posix._exit(status)
    posix.close(ready_write)
    posix.close(go_read)
    try:
        if posix.read(ready_read, 1) != b"1":
            raise BuildError("the store namespace could not be made")
        posix.close(posix.open("store", posix.O_CREAT | posix.O_EXCL | posix.O_WRONLY, 0o600, dir_fd=run))
        syscalls.bind_by_path(f"/proc/{child}/ns/mnt", STORE)
    finally:
        posix.close(ready_read)
        posix.close(go_write)
        posix.waitpid(child, 0)


def pin(namespace: int, path: str) -> None:
    """Bind the namespace descriptor on the new file *path*. Called in the home namespace."""
    posix.close(posix.open(path, posix.O_CREAT | posix.O_EXCL | posix.O_WRONLY, 0o600))
    syscalls.bind_by_path(f"/proc/self/fd/{namespace}", path)


def remove_udi(directory: str) -> None:
    """Take down one UDI directory: record first (nobody new comes in), then pin, then what is left. Idempotent.

    Processes inside keep the namespace; the kernel frees it with the last of them.
    """
    try:
        names = sorted(posix.listdir(directory), reverse=True)  # "record" sorts after "ns"
    except FileNotFoundError:
        return
    for name in names:
        if name == "ns":
            try:
                syscalls.unmount(f"{directory}/ns")
            except OSError:
                pass  # a build that died before it pinned
        posix.unlink(f"{directory}/{name}")
    posix.rmdir(directory)


def keep_newest(directory: str, count: int) -> None:
    """Take down the UDIs of one user that were not used for longest, but for *count*. With the user's lock held.

    Here, and not left to the reaper: it never gets the lock of a user who starts one build after the other.
    """
    keys = [name for name in posix.listdir(directory) if name != "lock"]
    if len(keys) <= count:
        return
    ages = []
    for key in keys:
        try:
            ages.append((posix.stat(f"{directory}/{key}/record").st_mtime, key))
        except OSError:
            ages.append((0.0, key))  # of a build that died
    for _, key in sorted(ages)[: len(keys) - count]:
        remove_udi(f"{directory}/{key}")


def write_file(path: str, data: bytes) -> None:
    """Write a root-only file so that it is either the old one or the whole new one (rename)."""
    temporary = f"{path}.{posix.getpid()}"
    fd = posix.open(
        temporary, posix.O_CREAT | posix.O_TRUNC | posix.O_WRONLY | posix.O_NOFOLLOW | posix.O_CLOEXEC, 0o600
    )
    try:
        view = memoryview(data)
        while view:
            view = view[posix.write(fd, view) :]
    finally:
        posix.close(fd)
    posix.rename(temporary, path)
