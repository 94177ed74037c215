"""The system call layer: every failure becomes an OSError, whatever the C function returns it in."""

import errno
from collections.abc import Callable

import pytest

from shifter.linux import syscalls


@pytest.mark.parametrize(
    "call",
    [
        lambda: syscalls.unmount("/nonexistent"),
        lambda: syscalls.setns(-1),
        lambda: syscalls.ioctl(-1, 0, 0, "ioctl"),
        lambda: syscalls.flock(-1, syscalls.LOCK_UN, "flock"),
        lambda: syscalls.filesystem_magic(-1),
        lambda: syscalls.prctl(99999, 0),
        lambda: syscalls.bind_by_path("/nonexistent", "/nonexistent"),
        lambda: syscalls.openat2(-1, "nonexistent", 0, 0),
        lambda: syscalls.open_tree(-1, "nonexistent", 0),
        lambda: syscalls.move_mount(-1, -1, "x"),
        lambda: syscalls.mount_setattr(-1, "x", syscalls.MOUNT_ATTR_RDONLY),
        lambda: syscalls.mount_namespace_id(-1),
    ],
)
def test_failures_are_errors(call: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:
        call()
    assert caught.value.errno in (errno.EBADF, errno.ENOENT, errno.EINVAL, errno.EPERM)
