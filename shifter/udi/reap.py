"""Reaping: UDIs that nobody used for a while, debris of builds that died, images that no UDI needs any more.

Unpinning is always safe: the kernel keeps a namespace while a process lives in it, and frees mounts and loop devices with
the last. Locks are tried, never waited for: what is busy now is found by the next run. Must run in the home namespace.
"""

import posix
import time

from shifter import _build, fields
from shifter.linux import syscalls
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

    def run(self) -> None:
        """Go through all users, then through the images."""
        if not pins.base_ready():
            return
        needed: set[str] = set()
        for uid in sorted(posix.listdir(pins.UDIS)):
            needed |= self.user(uid)
        if not self.keep_images:
            self.images(needed)
        for name in posix.listdir(pins.RUN):
            if name.startswith("site.") and self.now - posix.stat(f"{pins.RUN}/{name}").st_mtime > DEBRIS_AGE:
                posix.unlink(f"{pins.RUN}/{name}")

    def user(self, uid: str) -> "set[str]":
        """Reap the UDIs of one user; return the image keys that the remaining ones use."""
        directory = f"{pins.UDIS}/{uid}"
        lock = posix.open(f"{directory}/lock", posix.O_CREAT | posix.O_RDWR | posix.O_NOFOLLOW | posix.O_CLOEXEC, 0o600)
        try:
            try:
                syscalls.flock(lock, syscalls.LOCK_EX | syscalls.LOCK_NB, directory)
            except BlockingIOError:
                return set() if self.all else self._mounted(directory)  # a build is under way, or a stopped door holds it
            alive: list[records.Record] = []
            for key in posix.listdir(directory):
                if key == "lock":
                    continue
                record = records.read(f"{directory}/{key}")
                why = self._expired(f"{directory}/{key}", record)
                if record is None or why:
                    self._remove(f"{directory}/{key}", why or "no record", record)
                else:
                    alive.append(record)
            alive.sort(key=lambda record: record.used)
            while len(alive) > self.config.udiMaxPerUser:
                oldest = alive.pop(0)
                self._remove(oldest.directory, f"more than udiMaxPerUser={self.config.udiMaxPerUser}", oldest)
            return {record.get("mounted") for record in alive}
        finally:
            syscalls.flock(lock, syscalls.LOCK_UN, directory)
            posix.close(lock)

    @staticmethod
    def _mounted(directory: str) -> "set[str]":
        """Return the image keys that a user's UDIs have; a build under way has its image in a copy of the store."""
        found = [records.read(f"{directory}/{key}") for key in posix.listdir(directory)]
        return {record.get("mounted") for record in found if record}

    def _expired(self, directory: str, record: "records.Record | None") -> str:
        """Return why this UDI has to go, or ""."""
        if self.all:
            return "all were asked for"
        if record is None:
            return "no valid record"
        if record.get("shifter") != _build.BUILD:
            return f"built by {record.get('shifter')}"
        if record.get("root") in self._busy:
            return ""
        idle = 0 if record.get("once") else self.config.udiIdleTime
        if self.now - record.used > max(idle, 1):
            return f"idle for {int(self.now - record.used)} s"
        built = record.get("built", "0")
        if self.now - fields.number(built, "built") > self.config.udiMaxAge:
            return "older than udiMaxAge"
        return ""

    def _remove(self, directory: str, why: str, record: "records.Record | None") -> None:
        pins.remove_udi(directory)
        name = record.get("image") if record else "?"
        self.report.append(f"UDI {directory.rpartition('/udi/')[2]} of {name}: {why}")

    def images(self, needed: "set[str]") -> None:
        """Unmount the images that no UDI needs and no build has used for udiIdleTime."""
        if "*" in needed:
            return
        home = pins.open_namespace("/proc/self/ns/mnt")
        stored = pins.open_namespace(pins.STORE)
        try:
            keys = posix.listdir(pins.IMAGES)
            patience = self.config.udiIdleTime if len(keys) <= MAX_IMAGES else 0
            for key in keys:
                idle = self.now - posix.stat(f"{pins.IMAGES}/{key}").st_mtime
                if key not in needed and (self.all or idle > patience):
                    self._unmount(key, home, stored)
        finally:
            posix.close(home)
            posix.close(stored)

    def _unmount(self, key: str, home: int, stored: int) -> None:
        lock = posix.open(f"{pins.IMAGES}/{key}", posix.O_RDWR | posix.O_NOFOLLOW | posix.O_CLOEXEC)
        try:
            syscalls.flock(lock, syscalls.LOCK_EX | syscalls.LOCK_NB, key)
            path = posix.read(lock, 4096).decode("utf-8", "surrogateescape").strip()
            syscalls.setns(stored)
            try:
                image_mounts.unmount(key)
            finally:
                syscalls.setns(home)
            posix.unlink(f"{pins.IMAGES}/{key}")
            self.report.append(f"image {path}: not used by any UDI")
        except BlockingIOError:
            pass  # being mounted right now
        finally:
            posix.close(lock)


def sweep(config: "Config", uid: int) -> None:
    """Reap after a build: everybody's if the last sweep is a while ago, this user's if they have too many UDIs."""
    stamp = f"{pins.RUN}/swept"
    try:
        due = time.time() - posix.stat(stamp).st_mtime > SWEEP_INTERVAL
    except FileNotFoundError:
        due = True
    if due or len(posix.listdir(pins.IMAGES)) > MAX_IMAGES:
        posix.close(posix.open(stamp, posix.O_CREAT | posix.O_WRONLY | posix.O_CLOEXEC, 0o600))
        posix.utime(stamp)
        Reaper(config).run()
    elif len(posix.listdir(f"{pins.UDIS}/{uid}")) - 1 > config.udiMaxPerUser:
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
