"""What ``shifterctl`` and administrators see and do: list UDIs, collect, release what holds a file system.

Not part of the build path.
"""

import os

from shifter import config as configuration
from shifter import fields
from shifter.errors import FormatError, ShifterError
from shifter.linux import paths, syscalls
from shifter.udi import image_mounts, pins, reap, records
from shifter.udi.home import Home, entries, mounted_devices


class Udi:
    """A UDI of this node, as ``ps`` shows it. *mounted*: device numbers (MAJOR:MINOR) of its mounts, None if unknown.

    *ended*: unsetupRoot began to take it down, and could not.
    """

    def __init__(
        self, record: records.Record, pids: "list[int]", mounted: "set[str] | None", ended: bool = False
    ) -> None:
        self.record = record
        self.pids = pids
        self.mounted = mounted
        self.ended = ended

    def as_dict(self) -> "dict[str, object]":
        """Return what is public to the UDI's own user."""
        get = self.record.get
        return {
            "key": self.record.directory.rpartition("/")[2],
            "uid": self.record.uid,
            "job": get("job"),
            "ended": self.ended,
            "image": get("image"),
            "ref": get("ref"),
            "volumes": self.record.all("volume"),
            "built": self.record.built,
            "used": int(self.record.used),
            "pids": self.pids,
        }


class _FileSystem:
    """The file system of a path, and how it shows: ``device`` in mount tables, ``prefix`` in keys of its image files.

    The two differ on btrfs, whose files have device numbers that no mount has.
    """

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            mount = paths.mount_entry(fd)
            if not mount:
                raise ShifterError(f"{path}: it is on no mount of this namespace")
            self.device = mount[2].decode("ascii")
            self.prefix = f"{os.fstat(fd).st_dev:x}-"
        finally:
            os.close(fd)

    def held_by(self, udi: Udi) -> bool:
        """True if the UDI has it mounted, or its image file lies there."""
        return self.device in (udi.mounted or ()) or udi.record.get("mounted").startswith(self.prefix)


def udis(path: "str | None" = None) -> "list[Udi]":
    """Return all UDIs of the node, or those that hold the file system of *path*. Root only.

    Raises AccessError for others, OSError when *path* does not exist.
    """
    wanted = _FileSystem(path) if path else None
    found = []
    with Home():
        by_root = processes_by_root()
        for uid in sorted(entries(pins.UDIS)):
            for key in sorted(entries(f"{pins.UDIS}/{uid}")):
                directory = f"{pins.UDIS}/{uid}/{key}"
                if key == "lock":
                    continue
                current = records.read(directory)
                record = current or records.read(directory, pins.ENDED)
                if record is None:
                    continue
                try:
                    udi = Udi(record, by_root.get(record.get("root"), []), _devices(directory), ended=not current)
                except OSError:
                    continue  # taken down meanwhile
                if wanted is None or wanted.held_by(udi):
                    found.append(udi)
    return found


def own_udis(data: bytes) -> "list[Udi]":
    """Return the UDIs in *data*, which the door printed for its caller: key, last use and record of each.

    A record that can't be read is left out, as root's list does it: no launch uses it, and the reaper takes it down.
    """
    found = []
    by_root = processes_by_root()
    for block in data.split(b"\0end=record\0"):
        if not block:
            continue
        head, _, rest = block.partition(b"\0")
        key, _, used = head.decode("utf-8", "surrogateescape").rpartition(" ")
        try:
            record = records.Record(key, fields.decode(rest + b"\0end=record\0", "record"), fields.number(used, "used"))
        except FormatError:
            continue
        found.append(Udi(record, by_root.get(record.get("root"), []), None))
    return found


def release(path: str) -> "list[str]":
    """Unpin every UDI that holds the file system of *path*, and unmount image files that lie on it.

    Returns a line for each, with the processes that still live there. Root only.
    """
    report = []
    wanted = _FileSystem(path)
    found = udis(path)
    with Home():
        for udi in found:
            pins.remove_udi(udi.record.directory)
            holders = f"; still used by PID {' '.join(map(str, udi.pids))}" if udi.pids else ""
            report.append(f"UDI {udi.record.directory.rpartition('/udi/')[2]} of {udi.record.get('image')}{holders}")
        if pins.base_ready():
            reaper = reap.Reaper(configuration.Config(), everything=True)
            for key in image_mounts.known():
                if key.startswith(wanted.prefix):
                    reaper.unmount(key, -1, f"its file is on the file system of {path}")
            report += reaper.report
    return report


def collect(conf: str, everything: bool = False, keep_images: bool = False) -> "list[str]":
    """Run one pass of the reaper and return its report. With *everything* and no readable configuration: defaults."""
    try:
        settings = configuration.load(conf)
    except ShifterError:
        if not everything:
            raise
        settings = configuration.Config()
    with Home():
        reaper = reap.Reaper(settings, everything, keep_images)
        reaper.run()
    return reaper.report


def processes_by_root() -> "dict[str, list[int]]":
    """Return the PIDs that this process may look at, by the device of their root directory (see reap.roots_in_use)."""
    found: dict[str, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                found.setdefault(str(syscalls.device_number(f"/proc/{name}/root")), []).append(int(name))
            except OSError:
                continue
    return found


def _devices(directory: str) -> "set[str]":
    namespace = pins.open_namespace(f"{directory}/ns")
    try:
        return mounted_devices(namespace)
    finally:
        os.close(namespace)
