"""Targets of binds, for all of them together: mount points that are missing are made, those of volumes are opened.

A mount point that is missing is made where it harms nobody: on the UDI's own root, or in a read-only overlay of a directory
of the image. What many targets share is done once: the change of identity, their directory, what it is really called.
Part of the build path.
"""

import posix

from shifter.errors import BuildError
from shifter.linux import paths, syscalls
from shifter.linux.identity import ROOT, Identity
from shifter.udi.assembly import Assembly
from shifter.udi.binds import Bind, ancestor_in, nearest, place_of, refuse_reserved, refuse_site, unreachable
from shifter.udi.plan import Operation

MYPY = False
if MYPY:
    Covers = dict[str, tuple[int, list[tuple[str, bool]]]]
    """Directories of the image by path: a descriptor, and the (relative path, is a directory) that they shall have."""


class MountPoints(Operation):
    """Mount points that siteFs and volumes need and the image lacks.

    On the UDI's own root they are simply made. Inside the image, the nearest existing directory is covered by itself
    and all the new ones. Inside anything else of the node nothing is invented: it must be there, or is the user's to make.
    """

    KIND = "mount-points"

    def __init__(self, binds: "list[Bind]", reserved: "set[str]") -> None:
        super().__init__(" ".join(bind.path for bind in binds), "siteFs and volumes")
        self.binds = binds
        self.reserved = reserved
        """Where directories of the node are mounted already."""
        self._paths = {bind.path for bind in binds}

    def text(self) -> str:
        return f"mount points, where they are missing: {self.path}"

    def execute(self, assembly: Assembly) -> None:
        covers: Covers = {}
        targets: set[str] = set()
        missing: list[Missing] = []
        for user in dict.fromkeys(bind.user for bind in self.binds):
            wanted = []
            for bind in self.binds:
                if bind.user is user and not ancestor_in(bind.path, targets):
                    targets.add(bind.path)
                    wanted.append(bind)
            if wanted:
                with user or ROOT:  # one change of identity for all: it costs as much as a mount
                    for above, binds in by_directory(wanted).items():
                        missing += look(assembly, above, binds)
        for place in missing:
            self._make(assembly, place, covers)
            posix.close(place.directory)
        for where in sorted(covers):  # a parent before what is below it, which it would hide
            lower, parts = covers[where]
            assembly.merge(assembly.new_layer(parts, posix.fstat(lower)), lower, where, resolved=True)
            posix.close(lower)

    def _make(self, assembly: Assembly, place: "Missing", covers: "Covers") -> None:
        where = assembly.resolved(place.directory)
        above = f"{where.rstrip('/')}/{place.rest}".rstrip("/")
        of_the_node = ancestor_in(where, self.reserved) is not None
        hidden = ancestor_in(above or "/", self._paths) is not None
        our_own = posix.fstat(place.directory).st_dev == assembly.root_device
        made = -1
        for bind, name in place.names:
            self.reason = bind.reason  # what a failure is blamed on
            path = f"{above}/{name}"
            if bind.user is not None:
                refuse_reserved(path, bind.path)
            else:
                refuse_site(path, bind.path)
            if of_the_node:
                if bind.user is None:
                    raise BuildError(f"{path} does not exist on the node, and is not made inside {where}")
            elif hidden or (path != bind.path and path in self._paths):
                pass  # what will be mounted there hides what could be made here
            elif our_own:
                if made < 0:
                    made = assembly.made_directory(place.directory, place.rest)
                assembly.make_entry(made, name, bind.directory)
            else:
                if where not in covers:
                    covers[where] = (posix.dup(place.directory), [])
                covers[where][1].append((f"{place.rest}/{name}".lstrip("/"), bind.directory))
        if made >= 0:
            posix.close(made)


class Targets(Operation):
    """The targets of a user's volumes, opened with one change of identity: each costs as much as several mounts.

    What is not there, or lies in another volume, is left to its Bind.
    """

    KIND = "targets"

    def __init__(self, binds: "list[Bind]", user: Identity) -> None:
        super().__init__(" ".join(bind.path for bind in binds), "volumes")
        self.binds = binds
        self.user = user

    def text(self) -> str:
        return f"targets, opened as the user: {self.path}"

    def execute(self, assembly: Assembly) -> None:
        every = {bind.path for bind in self.binds}
        directories: list[tuple[int, list[tuple[Bind, int, posix.stat_result]]]] = []
        behind_links: list[tuple[Bind, int]] = []
        with self.user:
            for above, binds in by_directory(self.binds).items():
                if ancestor_in(above, every):
                    continue
                entries: list[tuple[Bind, int, posix.stat_result]] = []
                try:
                    directory = assembly.open(above, syscalls.O_PATH | posix.O_DIRECTORY)
                except OSError:
                    continue  # the Binds make it, or say why not
                directories.append((directory, entries))
                for bind in binds:
                    try:
                        fd, status = entry(directory, bind.name)
                        if paths.is_link(status.st_mode):
                            posix.close(fd)
                            behind_links.append((bind, assembly.open(bind.path)))
                        else:
                            entries.append((bind, fd, status))
                    except OSError:
                        pass
        for directory, entries in directories:
            where = assembly.resolved(directory).rstrip("/")
            posix.close(directory)
            for bind, fd, status in entries:
                bind.place = fd, f"{where}/{bind.name}", status
        for bind, fd in behind_links:
            bind.place = place_of(assembly, fd)


class Missing:
    """Targets that are not there: *names* of Binds, to be made in the directory *rest* below the descriptor *directory*.

    *rest* is not there either; it is empty if the targets are missing in *directory* itself.
    """

    def __init__(self, directory: int, rest: str, names: "list[tuple[Bind, str]]") -> None:
        self.directory = directory
        self.rest = rest
        self.names = names


def by_directory(binds: "list[Bind]") -> "dict[str, list[Bind]]":
    """Return *binds* by the directory that their targets are in: to be looked at once for all of them."""
    found: dict[str, list[Bind]] = {}
    for bind in binds:
        found.setdefault(bind.path.rpartition("/")[0] or "/", []).append(bind)
    return found


def entry(directory: int, name: str) -> "tuple[int, posix.stat_result]":
    """Open the entry *name* of an opened directory, a symbolic link itself; return it with its status. Raises OSError."""
    fd = paths.open_in_root(directory, name, syscalls.O_PATH | posix.O_NOFOLLOW)
    return fd, posix.fstat(fd)


def look(assembly: Assembly, above: str, binds: "list[Bind]") -> "list[Missing]":
    """Return which targets in the directory *above* are missing, as far as the one who asks may see. Raises BuildError."""
    bind = binds[0]
    try:
        try:
            directory = assembly.open(above, syscalls.O_PATH | posix.O_DIRECTORY)
        except FileNotFoundError:
            return [Missing(*nearest(assembly, above), [(bind, bind.name) for bind in binds])]
        missing = [Missing(directory, "", [])]
        for bind in binds:
            try:
                fd, status = entry(directory, bind.name)
            except FileNotFoundError:
                missing[0].names.append((bind, bind.name))
                continue
            posix.close(fd)
            if paths.is_link(status.st_mode) and not _exists(assembly, bind.path):
                end, rest = nearest(assembly, bind.path)
                rest, _, name = rest.rpartition("/")
                missing.append(Missing(end, rest, [(bind, name)]))
        return missing
    except OSError as error:
        raise BuildError(f"{bind.path} {unreachable(error)} ({bind.reason})") from None


def _exists(assembly: Assembly, path: str) -> bool:
    try:
        posix.close(assembly.open(path))
    except FileNotFoundError:
        return False
    return True
