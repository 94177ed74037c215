"""A user's FUSE file system that stops to answer when it is told to."""

import os
import select
import struct
import threading

INIT, LOOKUP, GETATTR, STATFS, FORGET, INTERRUPT = 26, 1, 3, 17, 2, 36
ENOSYS = 38


class UserFuse:
    """Any user's FUSE daemon: one directory in which every name is a directory. The test mounts it, as fusermount does.

    patience  opcode: how many such requests are answered; those after them are taken, and never answered
    reading   False: requests are not even taken
    asked     the opcodes of all requests that were taken
    """

    def __init__(self, patience: dict[int, int]) -> None:
        self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        self.patience = patience
        self.reading = True
        self.asked: list[int] = []
        self._ended = threading.Event()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def options(self, uid: int, allow_other: bool = True) -> str:
        """Mount options, as the user's fusermount would give them."""
        return f"fd={self.fd},rootmode=40000,user_id={uid},group_id={uid}" + ",allow_other" * allow_other

    def end(self) -> None:
        """The daemon is gone: the kernel ends all its requests."""
        self._ended.set()
        self.thread.join()

    def _serve(self) -> None:
        while not self._ended.wait(0 if self.reading else 0.01):
            if not self.reading or not select.select([self.fd], [], [], 0.02)[0]:
                continue
            try:
                data = os.read(self.fd, 1 << 18)
            except (PermissionError, BlockingIOError):  # not mounted yet; interrupted meanwhile
                self._ended.wait(0.01)
                continue
            except OSError:
                break
            _, opcode, unique = struct.unpack_from("=IIQ", data)
            self.asked.append(opcode)
            patience = self.patience.get(opcode, len(self.asked))
            if self.asked.count(opcode) <= patience and opcode not in (FORGET, INTERRUPT):
                error, reply = self._answer(opcode)
                os.write(self.fd, struct.pack("=IiQ", 16 + len(reply), -error, unique) + reply)
        os.close(self.fd)

    @staticmethod
    def _answer(opcode: int) -> tuple[int, bytes]:
        directory = struct.pack("=6QI9I", *(1, 0, 0, 0, 0, 0), *(0, 0, 0, 0o40755, 2, 0, 0, 0, 4096, 0))
        if opcode == INIT:  # major, minor, readahead, flags, background, threshold, max_write, granularity ...
            return 0, struct.pack("=IIIIHHII", 7, 31, 0, 0, 12, 9, 4096, 1) + bytes(36)
        if opcode == GETATTR:  # valid for no time
            return 0, struct.pack("=QII", 0, 0, 0) + directory
        if opcode == LOOKUP:  # node 2, valid for no time: each look asks again
            return 0, struct.pack("=QQQQII", 2, 0, 0, 0, 0, 0) + directory
        if opcode == STATFS:
            return 0, struct.pack("=5QIIII24x", 1000, 1000, 1000, 1000, 1000, 4096, 255, 4096, 0)
        return ENOSYS, b""
