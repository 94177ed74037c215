r"""The ``ID.meta`` file of an image: C Shifter's format, read tolerantly and written robustly.

Lines ``KEY: VALUE``, split at the first colon, blanks around both dropped. A line whose first character is ``#``, and a
line without a colon, is skipped. Keys:

* ``FORMAT``: how the image is stored, one of FORMATS; ``VFS`` when missing. Anything else is an error.
* ``ENV``: ``NAME=VALUE``, repeatable. A line without a name or ``=`` is skipped.
* ``ENTRY``, ``CMD``: a list as Python writes it: both kinds of quotes, escapes, ``u''``. Empty or ``[]``: none.
  Text that does not begin like a list is one word; a list that can't be read is an error.
* ``WORKDIR``: a path. Empty: none.
* ``USERACL``, ``GROUPACL``: decimal ids, comma separated. Empty: no restriction. Anything that is not a number, or the
  key given twice, is an error: an image with an ACL that can't be read must not become everybody's.
* ``ENV_QUOTED``, ``WORKDIR_QUOTED``: the same as a Python string literal. We write it only for values which the plain
  form can't carry (line breaks, blanks or a backslash at the end); C Shifter warns and goes on without that value.
* Other keys (``USER``, ``VOLUME``) are kept in ``extra``. What looks like a misspelt ACL is an error, for the same reason.

Deliberate difference: a backslash at the end of a value is part of the value. C Shifter joins the next line to it, and
its gateway, which writes values as they are, so loses the next variable. In an ACL a backslash is an error, as above.
Part of the build path.
"""

from shifter import fields
from shifter.errors import FormatError, ImageError

FORMATS = ("VFS", "squashfs", "erofs", "ext4", "xfs", "cramfs")

_BLANKS = " \t\r\v\f"
_MAX_ID = 0xFFFFFFFE
_MAX_CODE = 0x10FFFF
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", '"': '"'}
_HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}


class Meta:
    """What the metadata file of an image says. An ACL of None restricts nothing."""

    __slots__ = ("cmd", "entry", "env", "extra", "format", "group_acl", "user_acl", "workdir")

    def __init__(
        self,
        format: str = "VFS",
        env: "list[str] | None" = None,
        entry: "list[str] | None" = None,
        cmd: "list[str] | None" = None,
        workdir: "str | None" = None,
        user_acl: "tuple[int, ...] | None" = None,
        group_acl: "tuple[int, ...] | None" = None,
    ) -> None:
        self.format = format
        self.env: "list[str]" = env if env is not None else []
        self.entry = entry
        self.cmd = cmd
        self.workdir = workdir
        self.user_acl = user_acl
        self.group_acl = group_acl
        self.extra: "list[tuple[str, str]]" = []

    def allows(self, uid: int, gid: int, groups: "list[int] | tuple[int, ...]") -> bool:
        """True if the ACL lets the user *uid* with primary group *gid* and supplementary *groups* use the image."""
        if self.user_acl is None and self.group_acl is None:
            return True
        if self.user_acl is not None and uid in self.user_acl:
            return True
        return self.group_acl is not None and any(group in self.group_acl for group in (gid, *groups))


def parse(text: str, where: str = "image metadata") -> Meta:
    """Return what *text* says; *where* names the file in messages.

    Raises ImageError naming file and line where going on would lose the meaning: an unknown FORMAT, an ACL that is not
    a list of numbers, an entry point or command that begins like a list and is none.
    """
    meta = Meta()
    for index, line in enumerate(text.split("\n"), 1):
        if line.startswith("#"):
            continue
        key, colon, value = line.partition(":")
        try:
            if "ACL" in key.upper() and (not colon or key.strip(_BLANKS) not in ("USERACL", "GROUPACL")):
                raise FormatError(f"an ACL is USERACL: or GROUPACL:, not {line[:40]!a}")
            if not colon:
                continue
            _assign(meta, key.strip(_BLANKS), value.strip(_BLANKS))
        except FormatError as error:
            raise ImageError(f"{where} line {index}") from error
    return meta


def _assign(meta: Meta, key: str, value: str) -> None:
    if key in ("ENV_QUOTED", "WORKDIR_QUOTED"):
        value = _quoted(value)
        key = key[: -len("_QUOTED")]
    if key == "FORMAT":
        if value not in FORMATS:
            raise FormatError(f"unknown FORMAT {value[:40]!a}")
        meta.format = value
    elif key == "ENV":
        # NUL can't be in an environment; a name can't be empty.
        if "=" in value[1:] and "\0" not in value:
            meta.env.append(value)
    elif key == "ENTRY":
        meta.entry = _words(value)
    elif key == "CMD":
        meta.cmd = _words(value)
    elif key == "WORKDIR":
        meta.workdir = value or None
    elif key == "USERACL":
        meta.user_acl = _acl(value, key, meta.user_acl)
    elif key == "GROUPACL":
        meta.group_acl = _acl(value, key, meta.group_acl)
    else:
        meta.extra.append((key, value))


def _acl(value: str, key: str, before: "tuple[int, ...] | None") -> "tuple[int, ...] | None":
    if before is not None:
        raise FormatError(f"{key} is given twice")
    if not value:
        return None
    items = [item.strip(_BLANKS) for item in value.split(",")]
    ids = tuple(fields.number(item, key, _MAX_ID) for item in items if item)
    if not ids:
        raise FormatError(f"{key} has no id in it")
    return ids


def _words(value: str) -> "list[str] | None":
    """Return the words of an ENTRY or CMD value, None for none. Raises FormatError for a list that can't be read."""
    inner = value[1:].strip(_BLANKS)
    if not value or (value[0] == "[" and inner == "]"):
        return None
    if value[0] != "[" or not inner.removeprefix("u").startswith(("'", '"')):
        return [value]
    words = []
    position, last = 1, len(value) - 1
    while True:
        word, position = _literal(value, _skip(value, position))
        words.append(word)
        position = _skip(value, position)
        if value[position : position + 1] == ",":
            position = _skip(value, position + 1)
        elif position != last or value[last] != "]":
            raise FormatError(f"malformed list {value[:60]!a}")
        if position == last and value[last] == "]":  # a slice would copy the rest of the list, for each word
            return words


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in _BLANKS:
        position += 1
    return position


def _literal(text: str, position: int) -> "tuple[str, int]":
    """Return the string literal at *position* of *text* and where it ends. Raises FormatError."""
    start = position
    if text[position : position + 1] == "u":
        position += 1
    quote = text[position : position + 1]
    if quote not in ("'", '"'):
        raise FormatError(f"no quoted text at {text[start : start + 40]!a}")
    position += 1
    out: "list[str]" = []
    while position < len(text):
        character = text[position]
        position += 1
        if character == quote:
            return "".join(out), position
        if character == "\\" and position < len(text):
            character, position = _escape(text, position)
        if character == "\0":
            raise FormatError("NUL character in quoted text")
        out.append(character)
    raise FormatError(f"no closing quote after {text[start : start + 40]!a}")


def _escape(text: str, position: int) -> "tuple[str, int]":
    """Return the character of the escape sequence after the backslash, and where it ends; an unknown one is kept."""
    name = text[position]
    digits = _HEX_ESCAPES.get(name)
    if digits is None:
        return _ESCAPES.get(name, "\\" + name), position + 1
    code = text[position + 1 : position + 1 + digits]
    valid = len(code) == digits and all(digit in "0123456789abcdefABCDEF" for digit in code)
    number = int(code, 16) if valid else _MAX_CODE + 1
    if number > _MAX_CODE or _is_lone_surrogate(number):
        raise FormatError(f"bad escape sequence \\{name}{code!a}")
    return chr(number), position + 1 + digits


def _is_lone_surrogate(code: int) -> bool:
    """True for half a surrogate pair; those in 0xDC80-0xDCFF stand for bytes which are not UTF-8 (PEP 383)."""
    return 0xD800 <= code <= 0xDFFF and not 0xDC80 <= code <= 0xDCFF


def _quoted(value: str) -> str:
    text, end = _literal(value, 0)
    if end != len(value):
        raise FormatError(f"text after the closing quote of {value[:40]!a}")
    return text


def format(meta: Meta) -> str:
    """Return the text of the metadata file for *meta*; C Shifter reads it too (see ENV_QUOTED above for the exception).

    Raises ImageError for a value which no process could be given (NUL, half a surrogate pair), and for an empty ACL,
    which would be read as no ACL.
    """
    for text in (*meta.env, *(meta.entry or ()), *(meta.cmd or ()), meta.workdir or ""):
        if "\0" in text or any(_is_lone_surrogate(ord(character)) for character in text):
            raise ImageError(f"a character that no program can be given in {text[:40]!a}")
    lines = [f"FORMAT: {meta.format}"]
    for key, words in (("ENTRY", meta.entry), ("CMD", meta.cmd)):
        if words:
            lines.append(f"{key}: {words!r}")
    if meta.workdir:
        lines.append(_line("WORKDIR", meta.workdir))
    for key, acl in (("USERACL", meta.user_acl), ("GROUPACL", meta.group_acl)):
        if acl is not None:
            if not acl:
                raise ImageError(f"empty {key}")
            lines.append(f"{key}: {','.join(map(str, acl))}")
    lines += [_line("ENV", variable) for variable in meta.env]
    return "\n".join(lines) + "\n"


def _line(key: str, value: str) -> str:
    if value != value.strip(_BLANKS) or value.endswith("\\") or any(character in value for character in "\n\r"):
        return f"{key}_QUOTED: {value!r}"
    return f"{key}: {value}"
