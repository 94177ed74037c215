"""Acting as somebody else for file access: fsuid, fsgid and supplementary groups, set and read back.

The kernel drops the file-related capabilities (CAP_DAC_OVERRIDE, CAP_FOWNER ...) from the effective set while fsuid is
not 0 (capabilities(7)). All others but CAP_SYS_ADMIN, for mount calls, are taken too: CAP_SYS_PTRACE shows what hidepid
hides, CAP_SYS_RESOURCE writes beyond quotas. So a path is looked up with the rights of that account only.
Part of the build path.
"""

import posix

from shifter.errors import BuildError
from shifter.linux import syscalls

MYPY = False
if MYPY:
    from types import TracebackType


class Identity:
    """An account to act as: ``with Identity(uid, gid, groups): open(...)``. Not reentrant; root gets itself back after."""

    def __init__(self, uid: int, gid: int, groups: "tuple[int, ...]" = ()) -> None:
        self.uid = uid
        self.gid = gid
        self.groups = groups

    def __enter__(self) -> "Identity":
        if self.uid == 0:
            return self
        self._own_groups = posix.getgroups()
        if self._own_groups != list(self.groups):
            posix.setgroups(list(self.groups))
        syscalls.setfsgid(self.gid)
        syscalls.setfsuid(self.uid)
        try:
            self._own_capabilities = syscalls.limit_capabilities(1 << syscalls.CAP_SYS_ADMIN)
        except OSError:
            self._own_capabilities = b""
        changed = current() == (self.uid, self.gid) and sorted(posix.getgroups()) == sorted(self.groups)
        if not changed or not self._own_capabilities:
            # The kernel refused a drop of privileges: nothing may go on from here, not even what handles errors.
            posix.write(2, b"the kernel did not let the builder act as another account\n")
            posix._exit(70)
        return self

    def __exit__(
        self, kind: "type[BaseException] | None", error: "BaseException | None", trace: "TracebackType | None"
    ) -> None:
        if self.uid == 0:
            return
        try:
            syscalls.restore_capabilities(self._own_capabilities)
            syscalls.setfsuid(posix.geteuid())
            syscalls.setfsgid(posix.getegid())
            if self._own_groups != list(self.groups):
                posix.setgroups(self._own_groups)
            back = current() == (posix.geteuid(), posix.getegid())
        except OSError:  # which a caller could take for one of its own
            back = False
        if not back:
            raise BuildError("the builder could not take its own identity back")


ROOT = Identity(0, 0)
"""Ourselves: nothing changes."""


def current() -> "tuple[int, int]":
    """Return the (fsuid, fsgid) in force; an invalid argument changes nothing (setfsuid(2))."""
    return syscalls.setfsuid(-1), syscalls.setfsgid(-1)
