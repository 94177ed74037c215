"""Having the UDI of a job built: the same builder, with the same request, as the door has it started for a user."""

import os
import select
import signal
import time

from shifter import _build, fields
from shifter.errors import BuildError
from shifter.jobs.job import Job
from shifter.linux import drop

LOCK, ANSWER = 4, 3
"""Descriptors of the builder (shifter/builder.py)."""


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


def build(job: Job, namespace: int, lock: int, timeout: float) -> None:
    """Run the builder until the UDI is there. *lock*: the descriptor of the user's lock, held.

    Raises BuildError with the builder's own line.
    """
    request_read, request_write = os.pipe()
    answer_read, answer_write = os.pipe()
    log_read, log_write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            os.chdir("/")
            os.umask(0o022)
            source, log, answer, lock = drop.keep_only(request_read, log_write, answer_write, lock)
            for fd, target in ((source, 0), (log, 1), (log, 2), (answer, ANSWER), (lock, LOCK)):
                os.dup2(fd, target)
            for number in range(1, signal.NSIG):
                if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):
                    signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            program = [_build.PYTHON, "-I", "-S", "-B", f"{_build.LIBEXEC}/builder.pyc", str(LOCK)]
            os.execve(program[0], program, {"LC_ALL": "C"})
        finally:
            os._exit(127)
    for fd in (request_read, answer_write, log_write):
        os.close(fd)
    try:
        os.write(request_write, request(job, namespace))
        os.close(request_write)
        _wait(answer_read, log_read, timeout)
    finally:
        os.close(answer_read)
        os.close(log_read)
        os.waitpid(child, 0)


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
