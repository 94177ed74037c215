"""The operations that a UDI is made of. Each can say what it does and why, and do it: what is printed is what runs.

``reason`` is the configuration line, option or image that put the operation there. What comes from the node is in
binds.py. Part of the build path.
"""

import posix

from shifter.errors import BuildError, ShifterError, describe
from shifter.linux import syscalls
from shifter.udi.assembly import ABSENT, Assembly, write_new

MYPY = False
if MYPY:
    from collections.abc import Callable

    from shifter.udi.etc import EtcFiles


class Operation:
    """One step of a plan: ``KIND`` is its name for programs, *path* the place in the container."""

    KIND = ""

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason

    def text(self) -> str:
        """Return in a few words what is done, and where."""
        raise NotImplementedError

    def details(self) -> "list[tuple[str, str]]":
        """Return what belongs to it besides its path and its reason, by name."""
        return []

    def describe(self) -> str:
        """Return one line for people: what is done, where, and why."""
        return f"{self.text()} ({self.reason})"

    def serialise(self) -> str:
        """Return one line for programs: a JSON object of strings (RFC 8259)."""
        values = [("do", self.KIND), ("path", self.path), *self.details()]
        values += [("reason", self.reason), ("text", self.text())]
        return json_object(values)

    def execute(self, assembly: Assembly) -> None:
        """Do it. Raises OSError or BuildError."""
        raise NotImplementedError


class Directory(Operation):
    """An empty directory on the UDI's own root."""

    KIND = "directory"

    def __init__(self, path: str, reason: str, mode: int = 0o755) -> None:
        super().__init__(path, reason)
        self.mode = mode

    def text(self) -> str:
        return f"directory {self.path}"

    def execute(self, assembly: Assembly) -> None:
        assembly.make_directory(self.path, self.mode)


class Scratch(Operation):
    """A directory on the UDI's own root that stays writable, for whoever is inside: they are all of one user."""

    KIND = "scratch"

    def text(self) -> str:
        return f"writable directory {self.path}"

    def execute(self, assembly: Assembly) -> None:
        assembly.make_directory(self.path)
        directory = assembly.open(self.path, posix.O_RDONLY | posix.O_DIRECTORY)
        posix.fchmod(directory, 0o1777)
        # Bound on itself, it is no part of the mount that becomes read-only at the end.
        mount = syscalls.open_tree(directory, "", syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH)
        posix.close(directory)
        assembly.attach(mount, self.path)


class Symlink(Operation):
    """A symbolic link on the UDI's own root."""

    KIND = "symlink"

    def __init__(self, path: str, target: str, reason: str) -> None:
        super().__init__(path, reason)
        self.target = target

    def text(self) -> str:
        return f"symlink {self.path} -> {self.target}"

    def details(self) -> "list[tuple[str, str]]":
        return [("target", self.target)]

    def execute(self, assembly: Assembly) -> None:
        assembly.symlink(self.path, self.target)


class File(Operation):
    """A small generated file on the UDI's own root."""

    KIND = "file"

    def __init__(self, path: str, data: bytes, reason: str, mode: int = 0o644) -> None:
        super().__init__(path, reason)
        self.data = data
        self.mode = mode

    def text(self) -> str:
        return f"file {self.path}, {len(self.data)} bytes"

    def details(self) -> "list[tuple[str, str]]":
        return [("content", self.data.decode("utf-8", "replace"))]

    def execute(self, assembly: Assembly) -> None:
        assembly.make_file(self.path, self.data, self.mode)


class ImageDirectory(Operation):
    """The entries of one image directory, each bound at the same path: directories and files, symlinks made anew.

    Names in *skip* and names that exist already are left out: the site's and our own come first.
    """

    KIND = "image-directory"

    def __init__(self, path: str, skip: "tuple[str, ...]", reason: str) -> None:
        super().__init__(path, reason)
        self.skip = skip

    def text(self) -> str:
        return f"each entry of the image's {self.path} but {' '.join(filter(None, self.skip))}, read-only"

    def details(self) -> "list[tuple[str, str]]":
        return [("without", " ".join(filter(None, self.skip)))]

    def execute(self, assembly: Assembly) -> None:
        names = [name for name in assembly.image_entries(self.path) if name not in self.skip]
        if names:
            source = assembly.open_image(self.path, syscalls.O_PATH | posix.O_DIRECTORY)
            target = assembly.open(self.path, syscalls.O_PATH | posix.O_DIRECTORY)
            assembly.bind_entries(source, names, target, self.path)
            posix.close(target)
            posix.close(source)


class Etc(Operation):
    """/etc: generated files above the image's own directory, read-only. Covers files that the image lacks."""

    KIND = "etc"

    def __init__(
        self,
        files: "EtcFiles",
        links: "list[tuple[str, str]]",
        places: "list[str]",
        shell: "Callable[[Assembly], str]",
        reason: str,
    ) -> None:
        super().__init__("/etc", reason)
        self.files = files
        self.links = links
        self.places = places
        """Directories on which other operations mount something."""
        self.shell = shell
        """Which login shell the user gets depends on what the image has."""

    def text(self) -> str:
        return f"/etc of the image below generated {self._names()}"

    def details(self) -> "list[tuple[str, str]]":
        return [("generated", self._names())]

    def _names(self) -> str:
        return " ".join([*self.files.names(), *(name for name, _ in self.links)])

    def execute(self, assembly: Assembly) -> None:
        assembly.make_directory("/etc")
        layer = assembly.new_layer([(name, True) for name in self.places])
        for name, data, mode in self.files.files(self.shell(assembly)):
            write_new(assembly.generated, f"{layer}/{name}", data, mode)
        for name, target in self.links:
            posix.symlink(target, f"{layer}/{name}", dir_fd=assembly.generated)
        try:
            lower = assembly.open_image("/etc", posix.O_RDONLY | posix.O_DIRECTORY)
        except OSError as error:
            if error.errno not in ABSENT:
                raise
            assembly.attach_layer(layer, "/etc")
        else:
            assembly.merge(layer, lower, "/etc")
            posix.close(lower)


class NewMount(Operation):
    """A new instance of a kernel file system (proc, devpts)."""

    KIND = "mount"

    def __init__(self, path: str, fstype: str, options: "dict[str, str | None]", attributes: int, reason: str) -> None:
        super().__init__(path, reason)
        self.fstype = fstype
        self.options = options
        self.attributes = attributes

    def text(self) -> str:
        options = self._options()
        return f"new {self.fstype} on {self.path}" + (f" with {options}" if options else "")

    def details(self) -> "list[tuple[str, str]]":
        return [("type", self.fstype), ("options", self._options())]

    def _options(self) -> str:
        return ",".join(name if value is None else f"{name}={value}" for name, value in self.options.items())

    def execute(self, assembly: Assembly) -> None:
        assembly.attach(syscalls.new_mount(self.fstype, self.options, self.attributes), self.path)


class BindInside(Operation):
    """A file that the UDI has already, bound a second time (the ptmx of a private devpts)."""

    KIND = "bind-inside"

    def __init__(self, path: str, source: str, reason: str) -> None:
        super().__init__(path, reason)
        self.source = source

    def text(self) -> str:
        return f"bind {self.source} of the UDI on {self.path}"

    def details(self) -> "list[tuple[str, str]]":
        return [("source", self.source)]

    def execute(self, assembly: Assembly) -> None:
        source = assembly.open(self.source, syscalls.O_PATH | posix.O_NOFOLLOW)
        mount = syscalls.open_tree(source, "", syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH)
        posix.close(source)
        assembly.attach(mount, self.path)


class Files(Operation):
    """A directory whose whole content is generated: (name, content, mode, owner) of each file; read-only."""

    KIND = "files"

    def __init__(self, path: str, files: "list[tuple[str, bytes, int, int]]", reason: str) -> None:
        super().__init__(path, reason)
        self.files = files

    def text(self) -> str:
        return f"files in {self.path}: {self._names()}"

    def details(self) -> "list[tuple[str, str]]":
        return [("generated", self._names())]

    def _names(self) -> str:
        return " ".join(sorted(name for name, _, _, _ in self.files))

    def execute(self, assembly: Assembly) -> None:
        layer = assembly.new_layer([])
        for name, data, mode, owner in self.files:
            write_new(assembly.generated, f"{layer}/{name}", data, mode)
            posix.chown(f"{layer}/{name}", owner, -1, dir_fd=assembly.generated, follow_symlinks=False)
        assembly.attach_layer(layer, self.path)


class Image(Operation):
    """The image file of the UDI, mounted once per node; it is in place before the other operations (image_mounts.py)."""

    KIND = "image"

    def __init__(self, identifier: str, source: str, form: str, reason: str) -> None:
        super().__init__("/", reason)
        self.identifier = identifier
        self.source = source
        self.form = form

    def text(self) -> str:
        return f"image {self.identifier}: {self.source}, {self.form}, read-only"

    def details(self) -> "list[tuple[str, str]]":
        return [("identifier", self.identifier), ("source", self.source), ("format", self.form)]

    def execute(self, assembly: Assembly) -> None:
        """Nothing: the assembly was made of it."""


class Setting(Operation):
    """What the door does when a command is started: a field of the record, which carries it there."""

    KIND = "set"

    def __init__(self, key: str, value: str, reason: str) -> None:
        super().__init__("", reason)
        self.key = key
        self.value = value

    def text(self) -> str:
        return f"{_SETTINGS.get(self.key, self.key)} {self.value}"

    def details(self) -> "list[tuple[str, str]]":
        return [("field", self.key), ("value", self.value)]

    def execute(self, assembly: Assembly) -> None:
        """Nothing: the door does it, for each command."""


_SETTINGS = {
    "env.image": "environment of the image:",
    "env.default": "environment, unless user or image has it:",
    "env.set": "environment:",
    "env.append": "environment, appended:",
    "env.prepend": "environment, prepended:",
    "env.unset": "environment without",
    "entry": "word of the entry point:",
    "cmd": "word of the default command:",
    "workdir": "working directory, if it is asked for:",
}
"""What the fields of a record that the door acts upon mean (door/user.c)."""


def json_object(values: "list[tuple[str, str]]") -> str:
    """Return *values* as a JSON object of strings, in one line."""
    return "{" + ",".join(f"{json_string(name)}:{json_string(value)}" for name, value in values) + "}"


def json_string(text: str) -> str:
    """Return *text* as a JSON string (RFC 8259): quote, backslash and control characters escaped."""
    if '"' not in text and "\\" not in text and text.isprintable():  # nearly always; in a launch, all volumes in one
        return f'"{text}"'
    out = []
    for char in text:
        if char in '"\\':
            out.append("\\" + char)
        elif char < " ":
            out.append(f"\\u{ord(char):04x}")
        else:
            out.append(char)
    return '"' + "".join(out) + '"'


def execute(operations: "list[Operation]", assembly: Assembly, show: "Callable[[str], None] | None") -> None:
    """Execute a plan in order, each operation told to *show* first. Raises BuildError that says which failed, and why."""
    for operation in operations:
        try:
            if show:
                show(operation.describe())
            operation.execute(assembly)
        except ShifterError as error:
            raise BuildError(f"{error} ({operation.reason})") from error.__cause__
        except OSError as error:
            raise BuildError(f"{operation.describe()} failed: {describe(error)}") from None
