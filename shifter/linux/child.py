"""Starting a program that keeps nothing of ours: for root's own children, which may become a user before they execute."""

import _signal  # type: ignore[import-not-found]
import os
import select
from collections.abc import Callable, Mapping

from shifter.linux import drop


def spawn(
    words: list[str],
    environment: Mapping[str, str],
    descriptors: Mapping[int, int],
    prepare: Callable[[], None] = lambda: None,
) -> int:
    """Execute *words* (the first is a path) in a new session; return its PID, which the caller waits for.

    descriptors: what it is to have under each number, and it has no other ones. prepare: is called in the child last; what
    it raises, or execve(2), is written to descriptor 2, and the status is 127. Not by subprocess, which waits until the
    program is executed: a user whose process it is by then can stop it.
    """
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        os.chdir("/")
        os.umask(0o022)
        for number, fd in zip(descriptors, drop.keep_only(*descriptors.values()), strict=True):
            os.dup2(fd, number)
        for kind in _signal.valid_signals() - {_signal.SIGKILL, _signal.SIGSTOP}:
            _signal.signal(kind, _signal.SIG_DFL)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, [])
        prepare()
        os.execve(words[0], words, environment)
    except BaseException as error:
        os.write(2, f"{error}\n".encode("utf-8", "replace"))
    finally:
        os._exit(127)


def end(pid: int) -> None:
    """End the child *pid* and wait for it a moment: one that hangs in a dead file system ends when its server is back."""
    fd = os.pidfd_open(pid)  # a zombie at least: nobody else waits for it
    try:
        _signal.pidfd_send_signal(fd, _signal.SIGKILL)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.poll(100)
        os.waitpid(pid, os.WNOHANG)
    finally:
        os.close(fd)
