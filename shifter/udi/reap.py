"""Reaping: UDIs that nobody used for a while, debris of builds that died, images that no UDI needs any more.

Unpinning is always safe: the kernel keeps a namespace while a process lives in it, and frees mounts and loop devices with
the last. Locks are tried, never waited for: what is busy now is found by the next run. Must run in the home namespace.
"""

import posix
import time

from shifter import _build
from shifter.linux import paths, syscalls
from shifter.udi import image_mounts, pins, records

MYPY = False
if MYPY:
    from shifter.config import Config

SWEEP_INTERVAL = 30
"""Seconds between two sweeps by builders; a node without a gc timer still gets rid of what nobody uses."""

MAX_IMAGES = 64
"""With more images mounted than this, those that no UDI needs go at once: a user can name all images of a store."""

DEBRIS_AGE = 60
"""Seconds after which a temporary file in /run/shifter was left behind by a builder that died (a write takes microseconds)."""


PATIENCE = 10
"""Seconds that a pass over everything waits for a build under way; one more than most builds take."""


class Reaper:
    """One pass. ``report`` collects a line for everything that was taken down.

    *everything*: UDIs in use and images too, whatever their age; *keep_images*: leave the images mounted.
    """

    def __init__(self, config: "Config", everything: bool = False, keep_images: bool = False) -> None:
        self.config = config
        self.all = everything
        self.keep_images = keep_images
        self.now = time.time()
        self.report: list[str] = []
        self._busy = roots_in_use() if not everything else set()
        self._deadline = time.monotonic() + PATIENCE

    def run(self) -> None:
        """Go through all users, then through the images."""
        needed: set[str] = set()
        for uid in sorted(_entries(pins.UDIS)):
            needed |= self.user(uid)
        if pins.base_ready():
            if not self.keep_images:
                self.images(needed)
        elif self.all and pins.discard_base():
            self.report.append(f"{pins.RUN}: it was incomplete")
        for name in _entries(pins.RUN):
            path = f"{pins.RUN}/{name}"
            if name.startswith("site.") and self.now - _modified(path, self.now) > DEBRIS_AGE:
                pins.remove(path)

    def user(self, uid: str) -> "set[str]":
        """Reap the UDIs of one user; return the image keys that the remaining ones use."""
        directory = f"{pins.UDIS}/{uid}"
        try:
            if not uid.isdigit() or not paths.is_directory(posix.stat(directory, follow_symlinks=False).st_mode):
                raise NotADirectoryError
            lock = posix.open(
                f"{directory}/lock", posix.O_CREAT | posix.O_RDWR | posix.O_NOFOLLOW | posix.O_CLOEXEC, 0o600
            )
        except OSError:
            # Not a directory, or a lock that is none: no door and no builder can work with that.
            pins.remove(directory)
            self.report.append(f"{directory}: debris")
            return set()
        try:
            if not self._locked(lock):
                if self.all:
                    self.report.append(f"uid {uid}: left alone, a build has been under way for {PATIENCE} s; try again")
                return (
                    set() if self.all else self._mounted(directory)
                )  # a build is under way, or a stopped door holds it
            alive: list[records.Record] = []
            for key in _entries(directory):
                if key == "lock":
                    continue
                record = records.read(f"{directory}/{key}")
                if record is None and not self.all and records.read(f"{directory}/{key}", pins.ENDED):
                    continue  # unsetupRoot's, which may have to look again for what is left in it
                why = self._expired(record)
                if record is None or why:
                    self._remove(f"{directory}/{key}", why, record)
                else:
                    alive.append(record)
            alive.sort(key=lambda record: record.used)
            spare = [record for record in alive if not record.get("setup")]
            while len(spare) > self.config.udiMaxPerUser:
                oldest = spare.pop(0)
                alive.remove(oldest)
                self._remove(oldest.directory, f"more than udiMaxPerUser={self.config.udiMaxPerUser}", oldest)
            return {record.get("mounted") for record in alive}
        finally:
            posix.close(lock)

    @staticmethod
    def _mounted(directory: str) -> "set[str]":
        """Return the image keys that a user's UDIs have; a build under way has its image in a copy of the store."""
        found = [records.read(f"{directory}/{key}") for key in _entries(directory)]
        return {record.get("mounted") for record in found if record}

    def _locked(self, lock: int) -> bool:
        """Try to take a lock: once, or for some seconds when everything has to go."""
        while True:
            try:
                syscalls.flock(lock, syscalls.LOCK_EX | syscalls.LOCK_NB, "lock")
                return True
            except BlockingIOError:
                if not self.all or time.monotonic() > self._deadline:
                    return False
                time.sleep(0.01)

    def _expired(self, record: "records.Record | None") -> str:
        """Return why this UDI has to go, or ""."""
        if self.all:
            return "all were asked for"
        if record is None:
            return "no valid record"
        if record.get("setup"):
            return ""  # unsetupRoot's, with all that runs in it
        if record.get("shifter") != _build.BUILD:
            return f"built by {record.get('shifter')}"
        if self.now - record.built > self.config.udiMaxAge:
            return "older than udiMaxAge"  # whoever is inside stays there; whoever comes gets a new one
        if record.get("root") in self._busy:
            return ""
        idle = 0 if record.get("once") else self.config.udiIdleTime
        if self.now - record.used > max(idle, 1):
            return f"idle for {int(self.now - record.used)} s"
        return ""

    def _remove(self, directory: str, why: str, record: "records.Record | None") -> None:
        pins.remove_udi(directory)
        name = record.get("image") if record else "?"
        self.report.append(f"UDI {directory.rpartition('/udi/')[2]} of {name}: {why}")

    def images(self, needed: "set[str]") -> None:
        """Unmount the images that no UDI needs and no build has used for udiIdleTime."""
        keys = image_mounts.known()
        patience = self.config.udiIdleTime if len(keys) <= MAX_IMAGES else 0
        for key in keys:
            if key not in needed:
                self.unmount(key, -1 if self.all else patience, "not used by any UDI")

    def unmount(self, key: str, idle: int, why: str) -> None:
        """Unmount one image if nobody mounts it right now, and no build has used it for *idle* seconds."""
        path = f"{pins.IMAGES}/{key}"
        if self.now - _modified(path, 0) <= idle:
            return
        try:
            lock = posix.open(path, posix.O_CREAT | posix.O_RDWR | posix.O_NOFOLLOW | posix.O_CLOEXEC, 0o600)
        except OSError:
            pins.remove(path)  # no file: debris
            return
        try:
            if not self._locked(lock) or not pins.is_same_file(lock, path):
                return  # being mounted right now; or another reaper was faster
            name = posix.read(lock, 4096).decode("utf-8", "surrogateescape").strip() or key
            image_mounts.unmount(key)
            pins.remove(path)
            self.report.append(f"image {name}: {why}")
        finally:
            posix.close(lock)


def _entries(directory: str) -> "list[str]":
    """Return what is in *directory*; nothing if it is none, or was taken down meanwhile."""
    try:
        return posix.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _modified(path: str, otherwise: float) -> float:
    """Return the time of the last change of *path*, *otherwise* if there is no such file (any more)."""
    try:
        return posix.stat(path, follow_symlinks=False).st_mtime
    except FileNotFoundError:
        return otherwise


def sweep(config: "Config", uid: int) -> None:
    """Reap after a build: everybody's if the last sweep is a while ago, this user's if they have too many UDIs."""
    stamp = f"{pins.RUN}/swept"
    try:
        due = abs(time.time() - posix.stat(stamp).st_mtime) > SWEEP_INTERVAL  # clocks are set back, too
    except FileNotFoundError:
        due = True
    if due or len(posix.listdir(pins.IMAGES)) > MAX_IMAGES:
        posix.close(posix.open(stamp, posix.O_CREAT | posix.O_WRONLY | posix.O_CLOEXEC, 0o600))
        posix.utime(stamp)
        Reaper(config).run()
    elif len(_entries(f"{pins.UDIS}/{uid}")) - 1 > config.udiMaxPerUser:
        Reaper(config).user(str(uid))


def roots_in_use() -> "set[str]":
    """Return the devices of the root directories of all processes of this PID namespace.

    A UDI's root is a tmpfs of its own. The mount namespace would not do: an interactive launch has a private copy of it
    (its terminal is on /dev/console), and a user can unshare again.
    """
    found = set()
    for name in posix.listdir("/proc"):
        if name.isdigit():
            try:
                found.add(str(syscalls.device_number(f"/proc/{name}/root")))
            except OSError:
                continue  # it ended meanwhile
    return found
