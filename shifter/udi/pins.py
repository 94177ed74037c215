"""The run-time state of the node below /run/shifter: its tmpfs, the store namespace, pins, locks.

Pins are nsfs bind mounts, so they exist in one mount namespace only: the node's first one (that of PID 1), on a mount of
our own that is private and unbindable. On a shared /run, as systemd makes it, a pin would fail with EINVAL as soon as
another namespace holds a slave copy. A caller may sit in another namespace; the builder goes home for this part.
Part of the build path.
"""

import errno
import posix

from shifter.errors import BuildError
from shifter.linux import paths, syscalls

RUN = "/run/shifter"
STORE = RUN + "/store"
IMAGES = RUN + "/images"
UDIS = RUN + "/udi"
SITE = RUN + "/site"
JOBS = RUN + "/jobs"
"""What setupRoot knows of the jobs that it has set up: a directory for each id."""

JOB_UDI = "job."
"""How the directory of a job's own UDI begins, before the id; other UDIs have 16 hex digits."""

ENDED = "ended"
"""What unsetupRoot renames a record to: no door comes in any more, and what is being taken down stays known until it is."""

_SOURCE = "shifter"
"""What mount tables show as the source of our tmpfs."""

_ID_BATCH = 4096
"""COOKIE_LOCAL_BATCH, linux/cookie.h: ids that a processor takes at once. After so many it has newer ones than any other."""

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


def unshare_until_younger(home: int, procfs: int) -> None:
    """Go on in a copy of the current mount namespace that can be pinned in the namespace *home*.

    The kernel binds a mount namespace only in an older one (mnt_ns_loop, fs/namespace.c), told by their ids; and since
    processors take ids in batches (seen on Linux 6.18), a namespace made later may have the smaller id. Then another
    processor is tried. On a real node home has the smallest id of all; inside a container it has not.
    """
    age = syscalls.mount_namespace_id(home)
    attempt = 0
    while age and _own_id(procfs) <= age:
        processors = posix.cpu_count() or 1
        if attempt == processors + 2 * _ID_BATCH:
            raise BuildError("no mount namespace younger than the node's first one could be made")
        if attempt < processors:
            try:
                posix.sched_setaffinity(0, [attempt])
            except OSError:
                pass  # not in our cpuset
        syscalls.unshare_mounts()
        attempt += 1


def _own_id(procfs: int) -> int:
    """Return the 64-bit id of the mount namespace that this process is in."""
    own = posix.open("self/ns/mnt", posix.O_RDONLY | posix.O_CLOEXEC, dir_fd=procfs)
    try:
        return syscalls.mount_namespace_id(own)
    finally:
        posix.close(own)


def base_ready() -> bool:
    """True if /run/shifter is our tmpfs with a live store namespace and its directories, seen from the current namespace."""
    try:
        posix.close(open_namespace(STORE))
        return all(paths.is_directory(posix.stat(name, follow_symlinks=False).st_mode) for name in (IMAGES, UDIS))
    except OSError:
        return False


def prepare_base() -> None:
    """Mount the tmpfs on /run/shifter and make the store namespace. Must be called in the home namespace.

    What is left of a base that somebody wiped is taken down first. Processes in its UDIs go on; the next launch builds.

    Concurrent builders wait for each other on the directory below the mount, which no user can open (mode 0711). The
    tmpfs itself is 0700: a pin is a file that everybody may open, and who holds it keeps the store and all its images.
    """
    lock = _lock_base()
    try:
        # What is unmounted is what is locked: whoever waits for the directory below it may mount a new base at once.
        while not base_ready() and _is_our_mount():
            syscalls.unmount(RUN)
            posix.close(lock)
            lock = _lock_base()
        if base_ready():
            return
        posix.fchmod(lock, 0o711)
        tmpfs = syscalls.new_mount(
            "tmpfs",
            {"source": _SOURCE, "mode": "700", "size": "64m"},
            syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC,
        )
        # Whoever opens /run/shifter from now on gets this directory, and has to wait until all is there.
        root = posix.open(".", posix.O_RDONLY | posix.O_DIRECTORY | posix.O_CLOEXEC, dir_fd=tmpfs)
        syscalls.flock(root, syscalls.LOCK_EX, RUN)
        syscalls.move_mount(tmpfs, lock, RUN)
        # Attached below a shared parent a mount becomes shared itself, so this comes after.
        syscalls.mount_setattr(tmpfs, "", propagation=syscalls.MS_PRIVATE)
        syscalls.mount_setattr(tmpfs, "", propagation=syscalls.MS_UNBINDABLE)
        posix.mkdir("images", 0o700, dir_fd=tmpfs)
        posix.mkdir("udi", 0o700, dir_fd=tmpfs)
        _make_store_namespace(tmpfs)
        posix.close(tmpfs)
        posix.close(root)
    finally:
        posix.close(lock)


def discard_base() -> bool:
    """Detach our tmpfs, with all pins on it, from /run/shifter, as often as an incomplete one is there; True if it was."""
    found = False
    while not base_ready() and _is_our_mount():
        lock = _lock_base()
        try:
            if base_ready() or not _is_our_mount():
                break
            syscalls.unmount(RUN)
            found = True
        finally:
            posix.close(lock)
    return found


def _lock_base() -> int:
    """Lock /run/shifter, whatever lies there, and return its descriptor. No user can open it (mode 0711)."""
    while True:
        try:
            posix.mkdir(RUN, 0o711)
        except FileExistsError:
            pass
        lock = paths.open_trusted(RUN, flags=posix.O_RDONLY | posix.O_DIRECTORY)
        syscalls.flock(lock, syscalls.LOCK_EX, RUN)
        if is_same_file(lock, RUN):
            return lock
        posix.close(lock)  # another builder mounted the base on it while we waited


def _is_our_mount() -> bool:
    """True if what is to be seen at /run/shifter, in the current namespace, is the root of a tmpfs of ours."""
    try:
        run = posix.open(RUN, syscalls.O_PATH | posix.O_DIRECTORY | posix.O_NOFOLLOW | posix.O_CLOEXEC)
    except OSError:
        return False
    words = paths.mount_entry(run)
    posix.close(run)
    return words[4:5] == [RUN.encode("ascii")] and words[-3:-1] == [b"tmpfs", _SOURCE.encode("ascii")]


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
            procfs = posix.open("/proc", syscalls.O_PATH | posix.O_DIRECTORY)
            home = open_namespace("/proc/self/ns/mnt")
            syscalls.unshare_mounts()
            unshare_until_younger(home, procfs)
            syscalls.mount_setattr(syscalls.AT_FDCWD, "/", propagation=syscalls.MS_PRIVATE, recursive=True)
            root = syscalls.new_mount(
                "tmpfs", {"source": "shifter-store", "mode": "711", "size": "1m"}, syscalls.MOUNT_ATTR_NOSUID
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


def is_same_file(fd: int, path: str) -> bool:
    """True if *path* is, now, the file that *fd* was opened on."""
    try:
        one, other = posix.fstat(fd), posix.stat(path, follow_symlinks=False)
        return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
    except FileNotFoundError:
        return False


def exists(path: str) -> bool:
    """True if there is something of that name. For root's own files below /run/shifter."""
    try:
        posix.stat(path, follow_symlinks=False)
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False


def remove_udi(directory: str) -> None:
    """Take down one UDI directory: record first (nobody new comes in), then pin, then what is left. Idempotent.

    Processes inside keep the namespace; the kernel frees it with the last of them.
    """
    try:
        posix.unlink(f"{directory}/record")
    except OSError:
        pass  # none, or no file: it goes with the rest
    while True:
        try:
            return remove(directory)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise  # else a builder has put something into it: it sees that this is gone, and gives up


def remove(path: str) -> None:
    """Remove *path*, whatever it is and whatever is mounted on it. For root's own files below /run/shifter."""
    try:
        while True:
            syscalls.unmount(path)
    except OSError:
        pass  # EINVAL: nothing is mounted there (any more)
    try:
        try:
            posix.unlink(path)
        except IsADirectoryError:
            for name in posix.listdir(path):
                remove(f"{path}/{name}")
            posix.rmdir(path)
    except FileNotFoundError:
        pass  # somebody else was faster


def keep_newest(directory: str, count: int) -> None:
    """Take down the UDIs of one user that were not used for longest, but for *count*. With the user's lock held.

    Here, and not left to the reaper: it never gets the lock of a user who starts one build after the other.
    """
    keys = [name for name in posix.listdir(directory) if name != "lock" and not name.startswith(JOB_UDI)]
    keys = [key for key in keys if not exists(f"{directory}/{key}/{ENDED}")]  # those are unsetupRoot's
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


def read_files(directory: str) -> "dict[str, tuple[bytes, int, int]]":
    """Return content, mode and owner of each file in a directory of root's own, by name."""
    found = {}
    for name in posix.listdir(directory):
        status = posix.stat(f"{directory}/{name}", follow_symlinks=False)
        found[name] = (paths.read(f"{directory}/{name}"), status.st_mode & 0o777, status.st_uid)
    return found


def write_file(path: str, data: bytes) -> None:
    """Write a root-only file so that it is either the old one or the whole new one (rename)."""
    temporary = f"{path}.{posix.urandom(8).hex()}"  # not the PID: there are PID namespaces
    fd = posix.open(
        temporary, posix.O_CREAT | posix.O_TRUNC | posix.O_WRONLY | posix.O_NOFOLLOW | posix.O_CLOEXEC, 0o600
    )
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[posix.write(fd, view) :]
        finally:
            posix.close(fd)
        try:
            posix.rename(temporary, path)
        except IsADirectoryError:
            remove(path)
            posix.rename(temporary, path)
    except OSError as error:
        posix.unlink(temporary)
        raise OSError(error.errno, error.strerror, path) from None
