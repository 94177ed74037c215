"""Loop devices (loop(4)): attach an open image file read-only, freed by the kernel with its last user.

Part of the build path.
"""

import errno
import posix

from shifter.errors import BuildError
from shifter.linux import syscalls

LOOP_CONFIGURE = 0x4C0A
LOOP_CTL_GET_FREE = 0x4C82
LO_FLAGS_READ_ONLY = 1
LO_FLAGS_AUTOCLEAR = 4

_CONFIG_BYTES = 304  # struct loop_config, linux/loop.h: u32 fd, u32 block_size, loop_info64 (232 bytes), u64[8]
_FLAGS_OFFSET = 8 + 52
_NAME_OFFSET = 8 + 56


def attach(fd: int, name: str) -> "tuple[int, str]":
    """Attach the open image *fd* to a free loop device; *name* is what ``losetup`` shows. Returns (descriptor, path).

    The device lives while the descriptor is open or it is mounted (LO_FLAGS_AUTOCLEAR). Another process may take the
    number between LOOP_CTL_GET_FREE and LOOP_CONFIGURE, which then answers EBUSY: so the next free one is asked for.
    Raises BuildError when there is no loop device to be had.
    """
    try:
        control = posix.open("/dev/loop-control", posix.O_RDWR | posix.O_CLOEXEC)
    except OSError as error:
        raise BuildError("no loop device: /dev/loop-control can't be opened; run: modprobe loop") from error
    try:
        for _ in range(64):
            path = f"/dev/loop{syscalls.ioctl(control, LOOP_CTL_GET_FREE, 0, 'LOOP_CTL_GET_FREE')}"
            device = -1
            try:
                device = posix.open(path, posix.O_RDWR | posix.O_CLOEXEC)
                config = bytearray(_CONFIG_BYTES)
                config[0:4] = fd.to_bytes(4, "little")
                config[_FLAGS_OFFSET : _FLAGS_OFFSET + 4] = (LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR).to_bytes(
                    4, "little"
                )
                label = name.encode("utf-8", "surrogateescape")[-63:]
                config[_NAME_OFFSET : _NAME_OFFSET + len(label)] = label
                syscalls.ioctl(device, LOOP_CONFIGURE, config, path)
                return device, path
            except OSError as error:
                if device >= 0:
                    posix.close(device)
                if error.errno not in (errno.EBUSY, errno.ENXIO, errno.ENOENT):
                    raise
    finally:
        posix.close(control)
    raise BuildError("no free loop device after 64 tries")
