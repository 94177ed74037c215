"""udiRoot.conf: reading, checking, and remembering where every setting comes from.

    key = value                 blanks around both do not count
    key = value \\              a value goes on in the next line; the parts are joined with one blank
    # comment                   a whole line, also between the lines of a continued value
    include = FILE              absolute, or relative to the directory of this file; read at this place

A repeated list key adds to the list, any other repeated key replaces the value. Lists are separated by blanks; an item
with blanks stands in double quotes. Every fault is a ConfigError that begins with ``FILE:LINE``. Part of the build
path.
"""

import posix

from shifter import limits
from shifter.errors import ConfigError, describe
from shifter.linux import paths
from shifter.suggest import distance
from shifter.volumes import SiteMount, parse_site, show

MYPY = False
if MYPY:
    from typing import Callable

MAX_BYTES = 1 << 20
MAX_FILES = 64
MAX_DEPTH = 4
"""Bounds of one configuration: bytes of a file, files, and how deep includes nest."""

_BLANKS = " \t\r"

_IGNORED = frozenset(
    """
    allowLibcPwdCalls autoLoadKernelModule batchType chmodPath cpPath ddPath etcPath gatewayTimeout imageGateway
    insmodPath kmodBasePath kmodCacheFile loopMount mkfsXfsPath modprobePath mvPath nodeContextPrefix
    optionalSshdAsRoot perNodeCacheAllowedFsType perNodeCachePath perNodeCacheSizeLimit populateEtcDynamically
    rootfsType udiMount udiRootPath
    """.split()
)
"""Keys of C Shifter that mean nothing here: accepted, so that an existing udiRoot.conf loads."""

_MISSING = {
    "sitePreMountHook": "this version runs no site hooks",
    "sitePostMountHook": "this version runs no site hooks",
    "defaultModules": "this version has no modules",
}
"""Keys of C Shifter that would change what users see: refused, because to ignore them would be silently wrong."""


_OLD_NAMES = {"optUdiImage": "udiImagePath"}
"""Names that C Shifter's configuration files have for keys of this version."""


class Setting:
    """One ``key = value`` as it was read: the text, and the file and line where it starts."""

    def __init__(self, value: str, file: str, line: int) -> None:
        self.value = value
        self.file = file
        self.line = line

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Config:
    """The effective configuration. Every key is an attribute of the same name; udiRoot.conf(5) says what it means.

    settings: key -> all its Settings, in the order they were read; ignored: (key, FILE:LINE) of keys that mean nothing
    any more; files: (path, status on the open descriptor) of every file that was read.
    """

    def __init__(self) -> None:
        self.imagePath = ""
        self.defaultImageType = "docker"
        self.allowLocalChroot = False
        self.siteFs: "list[SiteMount]" = []
        self.siteEnv: "list[str]" = []
        self.siteEnvAppend: "list[str]" = []
        self.siteEnvPrepend: "list[str]" = []
        self.siteEnvUnset: "list[str]" = []
        self.mountPropagationStyle = "slave"
        self.devpts = "auto"
        self.usersToImport: "list[str]" = []
        self.maxGroupCount = 0
        self.udiIdleTime = 300
        self.udiMaxAge = 12 * 3600
        self.udiMaxPerUser = 16
        self.udiBuildTimeout = 120
        self.udiImagePath = ""
        self.system = ""
        self.sshdPort = (1204, 1204)
        self.sshdInterface = ""
        self.sshdLimits: "list[str]" = []
        self.sshSecretFile = ""
        self.sharedNodeSshd = False
        self.prologFailure = "job"
        self.slurmBinPath = "/usr/bin"
        self.settings: "dict[str, list[Setting]]" = {}
        self.ignored: "list[tuple[str, str]]" = []
        self.files: "list[tuple[str, posix.stat_result]]" = []

    def where(self, key: str) -> str:
        """Return where the value of *key* comes from: ``FILE:LINE`` (of a list all of them) or ``default``."""
        settings = self.settings.get(key)
        if not settings:
            return "default"
        return ", ".join(map(str, settings if isinstance(getattr(self, key), list) else settings[-1:]))

    def entries(self) -> "list[tuple[str, str | int | bool | list[str], str]]":
        """Return (key, effective value, where) of every key in the order of KEYS; volumes as canonical text."""
        values: "list[tuple[str, str | int | bool | list[str], str]]" = []
        for key in KEYS:
            value = getattr(self, key)
            if key == "sshdPort":
                value = port_range(value)
            values.append((key, list(map(str, value)) if isinstance(value, list) else value, self.where(key)))
        return values


def load(path: str, owners: "tuple[int, ...]" = (0,)) -> Config:
    """Read the configuration file *path* (absolute) and what it includes.

    Every file, and every directory up to ``/``, must belong to one of *owners* and not be writable by others.
    Raises ConfigError, which names the file, and the line where there is one.
    """
    config = Config()
    _read_file(config, path, owners, "", ())
    if not config.imagePath:
        raise ConfigError(f"{path}: imagePath is not set; it names the directory of the image store")
    return config


def _read_file(
    config: Config, path: str, owners: "tuple[int, ...]", origin: str, above: "tuple[tuple[int, int], ...]"
) -> None:
    """Read one file into *config*.

    *origin* is ``FILE:LINE: `` of its include, *above* holds (dev, ino) of the files above it. Raises ConfigError.
    """
    if len(config.files) >= MAX_FILES:
        raise ConfigError(f"{origin}more than {MAX_FILES} files")
    try:
        data, status = _read_trusted(path, owners)
    except ConfigError as error:
        raise ConfigError(f"{origin}{error}") from None
    except OSError as error:
        raise ConfigError(f"{origin}can't read {describe(error)}") from None
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise ConfigError(f"{origin}{path} includes itself")
    config.files.append((path, status))
    for key, setting in _settings(data, path):
        if key == "include":
            if len(above) + 1 >= MAX_DEPTH:
                raise ConfigError(f"{setting}: includes nest deeper than {MAX_DEPTH} files")
            included = setting.value if setting.value.startswith("/") else path.rpartition("/")[0] + "/" + setting.value
            _read_file(config, included, owners, f"{setting}: ", (*above, identity))
        else:
            _assign(config, key, setting)


def _read_trusted(path: str, owners: "tuple[int, ...]") -> "tuple[bytes, posix.stat_result]":
    """Return content and status of *path*, both from one descriptor. Raises ConfigError or OSError."""
    fd = paths.open_trusted(path, owners, posix.O_RDONLY | posix.O_NONBLOCK)  # O_NONBLOCK: a FIFO must not stop us
    try:
        status = posix.fstat(fd)
        if status.st_mode & paths.S_IFMT != paths.S_IFREG:
            raise ConfigError(f"{path} is not a regular file")
        data = b""
        while len(data) <= MAX_BYTES:
            chunk = posix.read(fd, 65536)
            if not chunk:
                return data, status
            data += chunk
        raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes")
    finally:
        posix.close(fd)


def _settings(data: bytes, file: str) -> "list[tuple[str, Setting]]":
    """Return the settings in *data* in their order. Raises ConfigError for a line that can't be part of one."""
    found: "list[tuple[str, Setting]]" = []
    continued: "Setting | None" = None
    lines = data.removesuffix(b"\n").decode("utf-8", "surrogateescape").split("\n")
    for number, line in enumerate(lines, start=1):
        text = line.strip(_BLANKS)
        if text.startswith("#"):
            continue
        if not text.replace("\t", " ").isprintable():
            _check_characters(text, f"{file}:{number}")
        if continued is None:
            if not text:
                continue
            key, equals, text = text.partition("=")
            if not equals:
                raise ConfigError(f"{file}:{number}: expected 'key = value', not {show(key)}")
            setting = Setting("", file, number)
            found.append((key.rstrip(_BLANKS), setting))
        else:
            setting = continued
        more = text.endswith("\\")
        part = (text[:-1] if more else text).strip(_BLANKS)
        setting.value += " " + part if setting.value and part else part
        continued = setting if more else None
    if continued is not None:
        raise ConfigError(f"{continued}: the value goes on in a next line, but the file ends")
    return found


def _check_characters(text: str, where: str) -> None:
    """Raise ConfigError if *text* holds a control character. (Other unprintable ones may be part of a file name.)"""
    for char in text:
        if (char < " " and char != "\t") or "\x7f" <= char < "\xa0":
            raise ConfigError(f"{where}: control character {show(char)}")


def _assign(config: Config, key: str, setting: Setting) -> None:
    """Check one setting and put its value into *config*. Raises ConfigError."""
    key = _OLD_NAMES.get(key, key)
    parser = KEYS.get(key)
    if parser is None:
        _other_key(config, key, setting)
        return
    try:
        value = parser(setting.value, setting)
    except ValueError as error:
        raise ConfigError(f"{setting}: {key}: {error}") from None
    if isinstance(value, list):
        getattr(config, key).extend(value)
    else:
        setattr(config, key, value)
    config.settings.setdefault(key, []).append(setting)


def _other_key(config: Config, key: str, setting: Setting) -> None:
    """Accept a key of C Shifter that means nothing any more; raise ConfigError for every other."""
    missing = "this version has no modules" if key.startswith("module_") else _MISSING.get(key)
    if key == "mountUdiRootWritable":
        try:
            missing = "the root of a UDI is always read-only" if _boolean(setting.value or "0", setting) else None
        except ValueError as error:
            raise ConfigError(f"{setting}: {key}: {error}") from None
    elif missing is None and key not in _IGNORED:
        close = _closest(key)
        raise ConfigError(f"{setting}: unknown key {show(key)}" + (f"; did you mean '{close}'?" if close else ""))
    if missing and setting.value:
        raise ConfigError(f"{setting}: {key} is not supported: {missing}. Remove the line, or leave the value empty")
    config.ignored.append((key, str(setting)))


def _closest(key: str) -> str:
    """Return the known key that is most like *key*, or ``""`` if none is close."""
    limit = max(2, len(key) // 3)
    if len(key) > 60:
        return ""
    candidates = [*KEYS, "include", *sorted(_IGNORED)]
    how_far, best = min((distance(key.lower(), known.lower()), known) for known in candidates)
    return best if how_far <= limit else ""


def _boolean(text: str, setting: Setting) -> bool:
    word = text.lower()
    if word in ("1", "yes", "true"):
        return True
    if word in ("0", "no", "false"):
        return False
    raise ValueError(f"{show(text)} is neither 1/yes/true nor 0/no/false")


def _number(text: str, low: int, high: int, what: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 12 or not low <= int(text) <= high:
        raise ValueError(f"{show(text)} is not {what} from {low} to {high}")
    return int(text)


def _count(low: int, high: int) -> "Callable[[str, Setting], int]":
    return lambda text, setting: _number(text, low, high, "a number")


def _duration(low: int) -> "Callable[[str, Setting], int]":
    """Return a parser of durations of at least *low* seconds and at most 100 days."""

    def parse(text: str, setting: Setting) -> int:
        unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:])
        digits = text[:-1] if unit else text
        if not (digits.isascii() and digits.isdigit()) or len(digits) > 12:
            raise ValueError(f"{show(text)} is not a duration, like 300, 5m, 12h or 2d")
        seconds = int(digits) * (unit or 1)
        if not low <= seconds <= 100 * 86400:
            raise ValueError(f"{show(text)} is not between {low} seconds and 100 days")
        return seconds

    return parse


def _ports(text: str, setting: Setting) -> "tuple[int, int]":
    """Parse ``FIRST`` or ``FIRST-LAST``, TCP ports that need no privilege."""
    first, dash, last = text.partition("-")
    low = _number(first.strip(_BLANKS), 1024, 65535, "a port")
    return low, _number(last.strip(_BLANKS), low, 65535, "a port") if dash else low


def port_range(ports: "tuple[int, int]") -> str:
    """Return *ports* as they are written in a configuration."""
    return str(ports[0]) if ports[0] == ports[1] else f"{ports[0]}-{ports[1]}"


def _word(text: str, setting: Setting) -> str:
    if not text or any(char in text for char in _BLANKS):
        raise ValueError(f"{show(text)} is not one word")
    return text


def _or_none(parser: "Callable[[str, Setting], str]") -> "Callable[[str, Setting], str]":
    """Return *parser*, for a key whose value may be left empty: as if the line were not there."""
    return lambda text, setting: parser(text, setting) if text else ""


def _one_of(*words: str) -> "Callable[[str, Setting], str]":
    def parse(text: str, setting: Setting) -> str:
        if text not in words:
            raise ValueError(f"{show(text)} is not one of {', '.join(words)}")
        return text

    return parse


def _directory(text: str, setting: Setting) -> str:
    if not text.startswith("/") or ".." in text.split("/"):
        raise ValueError(f"{show(text)} is not an absolute path without '..'")
    return text


def _items(text: str) -> "list[str]":
    """Split *text* at blanks; an item that begins with a double quote goes on to the next one. Raises ValueError."""
    items = []
    rest = text.lstrip(_BLANKS)
    while rest:
        if rest[0] == '"':
            item, quote, rest = rest[1:].partition('"')
            if not quote:
                raise ValueError("a double quote is not closed")
            if rest and rest[0] not in _BLANKS:
                raise ValueError(f"{show(rest)} follows a closing quote")
        else:
            item = rest.replace("\t", " ").partition(" ")[0]
            rest = rest[len(item) :]
        items.append(item)
        rest = rest.lstrip(_BLANKS)
    return items


def _assignments(text: str, setting: Setting) -> "list[str]":
    """Parse a list of NAME=VALUE."""
    items = _items(text)
    for item in items:
        name, equals, _ = item.partition("=")
        if not equals or not is_variable_name(name):
            raise ValueError(f"{show(item)} is not NAME=VALUE")
    return items


def _names(text: str, setting: Setting) -> "list[str]":
    """Parse a list of NAME; C Shifter takes NAME=VALUE too, and looks at the name."""
    names = [item.partition("=")[0] for item in _items(text)]
    for name in names:
        if not is_variable_name(name):
            raise ValueError(f"{show(name)} is not the name of an environment variable")
    return names


def is_variable_name(name: str) -> bool:
    """Return whether *name* can be the name of an environment variable: ``[A-Za-z_][A-Za-z0-9_]*``."""
    return name.isascii() and name.isidentifier()


def _users(text: str, setting: Setting) -> "list[str]":
    users = _items(text)
    for user in users:
        if not user or len(user) > 256 or any(char in user for char in ":/ \t,"):
            raise ValueError(f"{show(user)} is not a user name")
    return users


def _interface(text: str, setting: Setting) -> str:
    if len(text) > 15 or "/" in text or any(char.isspace() or not char.isprintable() for char in text):
        raise ValueError(f"{show(text)} is not the name of a network interface")
    return text


def _limits(text: str, setting: Setting) -> "list[str]":
    items = _items(text)
    for item in items:
        limits.parse(item)
    return items


def _site_volumes(text: str, setting: Setting) -> "list[SiteMount]":
    return parse_site(text, str(setting))


KEYS: "dict[str, Callable[[str, Setting], object]]" = {
    "imagePath": _directory,
    "defaultImageType": _one_of("docker", "custom", "id", "local"),
    "allowLocalChroot": _boolean,
    "siteFs": _site_volumes,
    "siteEnv": _assignments,
    "siteEnvAppend": _assignments,
    "siteEnvPrepend": _assignments,
    "siteEnvUnset": _names,
    "mountPropagationStyle": _one_of("private", "slave"),
    "devpts": _one_of("auto", "host", "private"),
    "usersToImport": _users,
    "maxGroupCount": _count(0, 65536),
    "udiIdleTime": _duration(0),
    "udiMaxAge": _duration(1),
    "udiMaxPerUser": _count(1, 10000),
    "udiBuildTimeout": _duration(1),
    "udiImagePath": _or_none(_directory),
    "system": _or_none(_word),
    "sshdPort": _ports,
    "sshdInterface": _or_none(_interface),
    "sshdLimits": _limits,
    "sshSecretFile": _or_none(_directory),
    "sharedNodeSshd": _boolean,
    "prologFailure": _one_of("job", "drain", "ignore"),
    "slurmBinPath": _directory,
}
"""Every key of this version and the parser of its value; an attribute of Config has the default."""
