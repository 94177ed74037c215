r"""Volumes: the grammar of ``siteFs`` and of ``--volume``, and the targets that are refused.

    map    = entry *( ";" entry )            empty entries are skipped, blanks around an entry do not count
    entry  = path [ ":" path ] *( ":" flag ) or the same in double quotes
    flag   = "ro" / "rec" / "slave" / "private"     users: "ro" only; in any case

Both paths are absolute; a site may leave out the second, which then equals the first. ``\`` takes the meaning from a
following ``:`` ``;`` ``"`` or ``\``. In a quoted entry ``;`` and blanks at the ends are part of a path. A path is taken
as it was written or refused, never edited. Targets are compared by components: ``/etcetera`` is not below ``/etc``.

The builder checks a target again when its symbolic links are resolved. Part of the build path.
"""

from shifter.errors import ConfigError, UsageError

SITE_FLAGS = ("ro", "rec", "slave", "private")
USER_FLAGS = ("ro",)
"""The known flags, in the order in which they are printed."""

_BLANKS = " \t"
_SPECIAL = frozenset('\\:;"')

_USER_REFUSED = tuple(tuple(path.split("/")) for path in ("etc", "var", "proc", "sys", "dev", "run", "opt/udiImage"))
_USER_REFUSED_FIRST = frozenset(parts[0] for parts in _USER_REFUSED)
_USER_ALLOWED = ("var", "tmp")
_SITE_REFUSED = ((), ("etc",), ("var",), ("opt",), ("proc",), ("sys",), ("dev",))
_SITE_REFUSED_BELOW = ("etc", "proc", "sys", "dev")


class Volume:
    """One entry: the directory *source* is mounted on *target*. *flags* is in the order of SITE_FLAGS."""

    def __init__(self, source: str, target: str, flags: "tuple[str, ...]") -> None:
        self.source = source
        self.target = target
        self.flags = flags

    def __str__(self) -> str:
        """Return the canonical text of the entry: parsing it gives an equal volume."""
        text = ":".join((_escape(self.source), _escape(self.target), *self.flags))
        return f'"{text}"' if text[-1] in _BLANKS else text

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Volume):
            return NotImplemented
        return (self.source, self.target, self.flags) == (other.source, other.target, other.flags)

    def __hash__(self) -> int:
        return hash((self.source, self.target, self.flags))


class SiteMount(Volume):
    """An entry of ``siteFs``; *where* is the FILE:LINE it comes from."""

    def __init__(self, source: str, target: str, flags: "tuple[str, ...]", where: str) -> None:
        super().__init__(source, target, flags)
        self.where = where


class UserVolume(Volume):
    """An entry of ``--volume`` or ``SHIFTER_VOLUME``; the source is the user's path on the node."""


def parse_site(text: str, where: str) -> "list[SiteMount]":
    """Return the site volumes in *text*, which stands at *where* (FILE:LINE). Raises ConfigError, which names it."""
    mounts = []
    try:
        for fields in _entries(text):
            target_given = len(fields) > 1 and fields[1].startswith("/")
            source, target = fields[0], fields[1] if target_given else fields[0]
            _check_path(source)
            _check_path(target)
            flags = _flags(source, fields[2 if target_given else 1 :], SITE_FLAGS)
            reason = site_target_refusal(target)
            if reason:
                raise ValueError(f"{show(target)} can't be a target: {reason}")
            mounts.append(SiteMount(source, target, flags, where))
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    return mounts


def parse_user(text: str) -> "list[UserVolume]":
    """Return the volumes that a user asked for by *text*. Raises UsageError, which names the entry's fault."""
    volumes = []
    try:
        for fields in _entries(text):
            _check_path(fields[0])
            if len(fields) == 1:
                raise ValueError(f"{show(fields[0])}: where to? A volume is FROM:TO[:ro]")
            _check_path(fields[1])
            flags = _flags(fields[0], fields[2:], USER_FLAGS)
            reason = user_target_refusal(fields[1])
            if reason:
                raise ValueError(f"{show(fields[1])} can't be a target: {reason}")
            volumes.append(UserVolume(fields[0], fields[1], flags))
    except ValueError as error:
        raise UsageError(f"volume: {error}") from None
    return volumes


def site_target_refusal(path: str) -> "str | None":
    """Return why a site may not mount on the absolute *path* in the container, or None if it may."""
    parts = components(path)
    if parts in _SITE_REFUSED:
        return "Shifter makes this directory itself"
    if parts[0] in _SITE_REFUSED_BELOW:
        return f"Shifter makes everything below /{parts[0]} itself"
    return None


def user_target_refusal(path: str) -> "str | None":
    """Return why a user may not mount on the absolute *path* in the container, or None if they may."""
    parts = components(path)
    if parts == _USER_ALLOWED or (parts and parts[0] not in _USER_REFUSED_FIRST):
        return None
    for refused in _USER_REFUSED:
        shorter = min(len(parts), len(refused))
        if parts[:shorter] == refused[:shorter]:
            relation = "is" if parts == refused else "is below" if len(parts) > len(refused) else "holds"
            return f"it {relation} /{'/'.join(refused)}, which belongs to the system"
    return None


def components(path: str) -> "tuple[str, ...]":
    """Return the names on the absolute *path*; repeated slashes and ``.`` do not count."""
    return tuple(part for part in path.split("/") if part and part != ".")


def _entries(text: str) -> "list[list[str]]":
    """Split *text* at ``;`` and every entry at ``:``; quotes and escapes are resolved. Raises ValueError."""
    if '"' not in text and "\\" not in text:  # nearly always: thirty volumes, character by character, take milliseconds
        plain = [entry.strip(_BLANKS) for entry in text.split(";")]
        return [entry.split(":") for entry in plain if entry]
    entries = []
    position = 0
    while position < len(text):
        fields, position = _entry(text, position)
        if fields != [""]:
            entries.append(fields)
    return entries


def _entry(text: str, position: int) -> "tuple[list[str], int]":
    """Return the fields of the entry that starts at *position*, and where the next one starts."""
    length = len(text)
    while position < length and text[position] in _BLANKS:
        position += 1
    quoted = position < length and text[position] == '"'
    position += quoted
    fields = [""]
    trailing = 0  # unescaped blanks at the end of the last field, which do not belong to it
    while position < length:
        char = text[position]
        position += 1
        if char == "\\":
            char = text[position : position + 1]
            if not char or char not in _SPECIAL:
                raise ValueError(f'a backslash must be followed by one of : ; " \\ (near {show(fields[-1])})')
            position += 1
            fields[-1] += char
            trailing = 0
        elif char == ":":
            fields.append("")
            trailing = 0
        elif char == '"':
            if quoted:
                return fields, _after_quote(text, position)
            raise ValueError(f'{show(fields[-1])}: a double quote must surround a whole entry, or be written as \\"')
        elif char == ";" and not quoted:
            break
        else:
            fields[-1] += char
            trailing = trailing + 1 if char in _BLANKS else 0
    if quoted:
        raise ValueError(f"{show(fields[0])}: a double quote is not closed")
    if trailing:
        fields[-1] = fields[-1][:-trailing]
    return fields, position


def _after_quote(text: str, position: int) -> int:
    """Return the start of the next entry. Raises ValueError if more than blanks stand before the ``;``."""
    rest, semicolon, _ = text[position:].partition(";")
    if rest.strip(_BLANKS):
        raise ValueError(f"{show(rest)} follows a closing quote")
    return position + len(rest) + len(semicolon)


def _check_path(path: str) -> None:
    """Raise ValueError if *path* is not absolute, or holds ``..`` or a control character."""
    if not path.startswith("/"):
        raise ValueError(f"{show(path)} is not an absolute path")
    if ".." in path.split("/"):
        raise ValueError(f"{show(path)}: '..' is not allowed")
    if not path.isprintable() and any(char < " " or "\x7f" <= char < "\xa0" for char in path):
        raise ValueError(f"{show(path)}: control characters are not allowed")


def _flags(source: str, words: "list[str]", known: "tuple[str, ...]") -> "tuple[str, ...]":
    """Return *words* as flags in canonical order. Raises ValueError for an unknown, repeated or contradictory one."""
    if not words:
        return ()
    flags = [word.lower() for word in words]
    for word, flag in zip(words, flags, strict=True):
        if flag not in known:
            raise ValueError(f"{show(source)}: {show(word)} is no flag; known: {', '.join(known)}")
        if flags.count(flag) > 1:
            raise ValueError(f"{show(source)}: flag {flag} is given twice")
    if "slave" in flags and "private" in flags:
        raise ValueError(f"{show(source)}: flags slave and private exclude each other")
    return tuple(flag for flag in known if flag in flags)


def _escape(path: str) -> str:
    if _SPECIAL.isdisjoint(path):
        return path
    return "".join("\\" + char if char in _SPECIAL else char for char in path)


def show(text: str) -> str:
    """Return *text* for an error message: quoted, control characters escaped, cut."""
    return repr(text if len(text) <= 200 else text[:200] + "...")
