"""A pseudo-terminal of a node, and commands on it."""

import fcntl
import os
import select
import signal
import struct
import subprocess
import termios
import time
from types import TracebackType
from typing import Any, Self

from tests.node.machine import Machine
from tests.node.root import User

TIOCGPTN, TIOCSPTLCK = 0x80045430, 0x40045431
TTY_GROUP = 5


class Terminal:
    """A terminal of the node's own /dev/pts that belongs to *user*, 80 x 24, without echo and changes of line ends.

    with Terminal(node, "alice") as terminal:
        assert terminal.run(["tty"]) == (0, terminal.name + "\\n")
    """

    def __init__(self, node: Machine, user: str | User = "alice") -> None:
        self.node, self.user = node, node.user(user)
        self.master = os.open(f"/proc/{node.pid}/root/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(self.master, TIOCSPTLCK, struct.pack("i", 0))
            self.name = f"/dev/pts/{pts_number(self.master)}"
            slave = self.open()
            try:
                os.fchown(slave, self.user.uid, TTY_GROUP)
                termios.tcsetwinsize(slave, (24, 80))
                attributes = termios.tcgetattr(slave)
                attributes[1] &= ~termios.OPOST
                attributes[3] &= ~termios.ECHO
                termios.tcsetattr(slave, termios.TCSANOW, attributes)
            finally:
                os.close(slave)
        except BaseException:
            self.close()
            raise

    def open(self) -> int:
        """A descriptor of the side that commands see, for the caller to close."""
        return os.open(f"/proc/{self.node.pid}/root{self.name}", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)

    def popen(
        self, argv: list[str] | str, which: tuple[int, ...] = (0, 1, 2), **options: Any
    ) -> "subprocess.Popen[str]":
        """Start *argv* with this as its controlling terminal, and as those of its standard descriptors."""
        slave = self.open()

        def prepare() -> None:
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        ends = {n: slave if fd in which else subprocess.DEVNULL for fd, n in enumerate(("stdin", "stdout", "stderr"))}
        try:
            return self.node.popen(argv, self.user, prepare=prepare, **ends, **options)
        finally:
            os.close(slave)

    def run(
        self,
        argv: list[str] | str,
        which: tuple[int, ...] = (0, 1, 2),
        *,
        input: str = "",
        timeout: float = 60,
        **options: Any,
    ) -> tuple[int, str]:
        """Run *argv* on the terminal; return its exit status and all that was written to the terminal.

        "All" ends when nobody has the terminal open any more.
        """
        process = self.popen(argv, which, **options)
        try:
            self.write(input)
            text = self.read(timeout=timeout)
            return process.wait(timeout), text
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def write(self, text: str) -> None:
        """Type *text*."""
        data = text.encode()
        while data:
            data = data[os.write(self.master, data) :]

    def read(self, until: str | None = None, timeout: float = 60) -> str:
        """What is written to the terminal up to and with *until*, or until nobody has it open any more."""
        end = time.monotonic() + timeout
        text = b""
        while until is None or until.encode() not in text:
            if not select.select([self.master], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError(f"{timeout} s for {until or 'the end'!r} on a terminal; so far: {text!r}")
            try:
                # By the byte: what comes after *until* is for the next read.
                text += os.read(self.master, 65536 if until is None else 1)
            except OSError:  # EIO: the other side is closed
                if until is not None:
                    raise EOFError(f"no {until!r} on a terminal before the end: {text!r}") from None
                break
        return text.decode(errors="surrogateescape")

    def close(self) -> None:
        """Hang up. May be called again."""
        if self.master >= 0:
            os.close(self.master)
            self.master = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def pts_number(master: int) -> int:
    """The number of the terminal of a multiplexer's descriptor."""
    number: int = struct.unpack("i", fcntl.ioctl(master, TIOCGPTN, bytes(4)))[0]
    return number
