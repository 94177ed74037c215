"""Having the UDI of a job built: the same builder, with the same request, as the door has it started for a user."""

import os
import select
import time

from shifter import _build, fields
from shifter.errors import BuildError
from shifter.jobs.job import Job
from shifter.linux import child, syscalls
from shifter.udi.home import Home

LOCK, ANSWER = 4, 3
"""Descriptors of the builder (shifter/builder.py)."""
PATIENCE = 10.0
"""Seconds after which one that waits for a question is not asked any more: it ends by itself (udi/run.py: START_TIMEOUT)."""


def request(job: Job, namespace: int) -> bytes:
    """Return the request for the job's own UDI; *namespace*: the id of the one that it is made from."""
    content = [
        ("shifter", _build.BUILD),
        ("uid", str(job.uid)),
        ("gid", str(job.gid)),
        ("groups", ",".join(map(str, job.groups))),
        ("ns", str(namespace or 1)),
        ("job", job.ident),
        ("ref", job.image),
        *(("volume", text) for text in job.volumes),
        *(("module", text) for text in job.modules),
        ("setup", "1"),
        ("end", "request"),
    ]
    return fields.encode(content)


class Builder:
    """A builder for one UDI, as a context. It can be started before it is known what to ask it for.

    Its interpreter needs as long to start as the names and keys of a job. It begins in the namespace that *home* came from.
    *lock*: the descriptor of the user's lock, which is taken when it is asked; both have it by the same open file.
    """

    def __init__(self, lock: int, home: Home) -> None:
        self._lock = lock
        self._home = home
        self._start()

    def _start(self) -> None:
        self._began = time.monotonic()
        request_read, self._request = os.pipe()
        self._answer, answer_write = os.pipe()
        self._log, log_write = os.pipe()
        program = [_build.PYTHON, "-I", "-S", "-B", f"{_build.LIBEXEC}/builder.pyc", str(LOCK)]
        descriptors = {0: request_read, 1: log_write, 2: log_write, ANSWER: answer_write, LOCK: self._lock}
        with self._home.away():
            self._pid = child.spawn(program, {"LC_ALL": "C"}, descriptors)
        for fd in (request_read, answer_write, log_write):
            os.close(fd)

    def __enter__(self) -> "Builder":
        return self

    def __exit__(self, *_: object) -> None:
        """Without a question, or when it failed, it ends at once; else it may go on with what nobody waits for."""
        for fd in (self._request, self._answer, self._log):
            if fd >= 0:
                os.close(fd)
        if self._pid:
            child.end(self._pid)

    def build(self, job: Job, timeout: float) -> None:
        """Have the UDI built. Raises BuildError with the builder's own line."""
        self._take_lock(timeout)
        if time.monotonic() > self._began + PATIENCE:
            self.__exit__()
            self._start()
        os.write(self._request, request(job, syscalls.mount_namespace_id(self._home.back)))
        os.close(self._request)
        self._request = -1
        _wait(self._answer, self._log, timeout)
        self._pid = 0

    def _take_lock(self, timeout: float) -> None:
        """Take the user's lock, which their own launches hold at times, and whoever stops one as long as they like."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                return syscalls.flock(self._lock, syscalls.LOCK_EX | syscalls.LOCK_NB, "lock")
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildError(f"another launch of this user has been under way for {timeout:g} s") from None
                time.sleep(0.01)


def _wait(answer: int, log: int, timeout: float) -> None:
    """Read the builder's fields until the last one. Raises BuildError unless that is ``ok``."""
    data, step = b"", "starting"
    deadline = time.monotonic() + timeout + 5  # its own alarm comes first
    while select.select([answer], [], [], max(0.0, deadline - time.monotonic()))[0]:
        block = os.read(answer, 65536)
        if not block:
            break
        data += block
        *complete, data = data.split(b"\0")
        for item in complete:
            key, _, value = item.decode("utf-8", "surrogateescape").partition("=")
            if key == "error":
                raise BuildError(value)
            if key == "again":
                raise BuildError("somebody unmounted /run/shifter meanwhile: try again")
            if key == "ok":
                return
            step = value.partition(":")[2]
    said = os.read(log, 65536).decode("utf-8", "replace").strip() if select.select([log], [], [], 0)[0] else ""
    last = said.splitlines()[-1] if said else "it took longer than udiBuildTimeout, or somebody killed it"
    raise BuildError(f"the builder was ended while {step}: {last}")
