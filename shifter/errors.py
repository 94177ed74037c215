"""The exception hierarchy. An error is raised where it is understood, chained, and printed once, at the edge.

Part of the build path: imports nothing.
"""


class ShifterError(Exception):
    """Base of all errors that a user or an administrator can cause. The text says what, where, why and what to do."""

    def chain(self) -> str:
        """Return the messages of this error and its causes, outermost first, joined by ``: ``."""
        parts = []
        error: BaseException | None = self
        while error is not None:
            parts.append(describe(error))
            error = error.__cause__
        return ": ".join(parts)


class UsageError(ShifterError):
    """The command line or an environment variable is wrong."""


class FormatError(ShifterError):
    """A request, record, site file, tag or metadata file does not follow its format."""


class ConfigError(ShifterError):
    """udiRoot.conf can't be used; the text names file and line."""


class ImageError(ShifterError):
    """The image does not exist, or its files can't be used."""


class AccessError(ShifterError):
    """Something exists, but this user may not have it."""


class BuildError(ShifterError):
    """A UDI could not be built."""


def describe(error: BaseException) -> str:
    """Return one line for *error*: an OSError as ``PATH: strerror``, everything else as its text."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__
