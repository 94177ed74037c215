"""The sshd that runs in every UDI of a job: who may log in, which keys there are, what its files say.

Run as root by setupRoot, never on the build path. `secret` reads what only root or only the user has, `trust` makes
keys and certificates of it, `config` the configuration files.
"""

from shifter.errors import ShifterError


class SshError(ShifterError):
    """There can be no sshd, or a key can't be admitted; the text says what, which path, why and what to do."""
