"""Records and the site file: what the builder promises a door. Written here, checked by the door (door/fields.c).

Part of the build path.
"""

import posix

from shifter import fields
from shifter.errors import FormatError
from shifter.linux import paths
from shifter.udi import pins

MYPY = False
if MYPY:
    from shifter.config import Config
    from shifter.images.store import Store
    from shifter.udi.host import Watch

_UINT64 = 0xFFFFFFFFFFFFFFFF


def watch_field(watch: "Watch") -> "tuple[str, str]":
    """Return the field for one watch: as whom to stat, the identity of the file (all zero: it must not exist), its path.

    Times are modulo 2**64, as the door computes them: a file may be dated before 1970.
    """
    uid, path, status = watch
    if status is None:
        return "watch", f"{uid}:0:0:0:0:0:{path}"
    times = (status.st_mtime_ns & _UINT64, status.st_ctime_ns & _UINT64)
    parts = (uid, status.st_dev, status.st_ino, status.st_size, *times)
    return "watch", ":".join(map(str, parts)) + f":{path}"


def write_site(build: str, config: "Config", store: "Store | None") -> None:
    """Write the site file, which lets a door resolve a tag without Python as long as the configuration stays as it is."""
    content = [("shifter", build)]
    content += [watch_field((0, path, status)) for path, status in config.files]
    content += [
        ("imagePath", config.imagePath),
        # Without a store there are only directories as images (local:), and no tag is ever read.
        ("storeUid", str(store.owner if store else 0)),
        ("storeGid", str(store.group if store else 0)),
        ("defaultImageType", config.defaultImageType),
        ("udiIdleTime", str(config.udiIdleTime)),
        ("end", "site"),
    ]
    pins.write_file(pins.SITE, fields.encode(content))


class Record:
    """A record as the reaper and ``shifterctl ps`` read it. Raises FormatError when what they need is not in it."""

    def __init__(self, directory: str, values: "list[tuple[str, str]]", used: float) -> None:
        self.directory = directory
        self.values = values
        self.used = used
        """Seconds since the epoch of the last launch: doors touch the record."""
        self.uid = fields.number(self.get("uid"), "uid", 0xFFFFFFFE)
        self.built = fields.number(self.get("built"), "built")
        """Seconds since the epoch."""

    def get(self, key: str, default: str = "") -> str:
        """Return the first value of *key*."""
        return next((value for name, value in self.values if name == key), default)

    def all(self, key: str) -> "list[str]":
        """Return all values of *key*."""
        return [value for name, value in self.values if name == key]


def read(directory: str, name: str = "record") -> "Record | None":
    """Return the record of a UDI directory; None when there is none, or nothing that this build can read."""
    try:
        fd = posix.open(f"{directory}/{name}", posix.O_RDONLY | posix.O_NOFOLLOW | posix.O_NONBLOCK | posix.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = posix.fstat(fd)
        if status.st_uid != 0 or status.st_mode & paths.S_IFMT != paths.S_IFREG:
            return None
        data = posix.read(fd, fields.MAX_BYTES + 1)
        if not data.startswith(b"shifter="):
            return None
        return Record(directory, fields.decode(data, "record"), status.st_mtime)
    except FormatError:
        return None
    finally:
        posix.close(fd)
