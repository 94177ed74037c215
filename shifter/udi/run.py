"""One run of the builder: read the request, build, answer the door, then sweep what has expired.

Answer: fields ``step=NS:TEXT`` (what is being done, and since when) or ``plan=`` (a piece of the plan: a line each operation),
and last ``error=``, ``again=`` (the base was made: ask once more) or ``ok=KEY``. Build path.
"""

import _signal  # type: ignore[import-not-found]
import posix
import select
import syslog
import time

from shifter import _build, config, fields, request
from shifter.errors import AccessError, BuildError, ShifterError, describe
from shifter.images import store
from shifter.linux import syscalls
from shifter.udi import pins, records
from shifter.udi.build import Builder

START_TIMEOUT = 30
"""Seconds until the configuration says udiBuildTimeout. After either, SIGALRM ends the builder, whatever it hangs in."""

ANSWER = 3

FIONREAD = 0x541B
"""The same number on x86-64 and arm64."""

UNREAD_STEPS = 16384
"""With so many bytes in it a pipe has room for the answer (of 16 buffers half are free, however the bytes lie in them)."""


MAX_ANSWER = 4000
"""Characters of one field; a longer one is cut."""


def main(lock: str) -> int:
    """Run once and return the exit status. *lock*: the descriptor of the user's lock in decimal, or ``-``."""
    _signal.alarm(START_TIMEOUT)
    asked: request.Request | None = None
    try:
        asked = request.decode(_read_request())
        if asked.build != _build.BUILD:
            raise BuildError("door and builder are of different installations; run: make install")
        settings = config.load(_build.CONF)
        _signal.alarm(settings.udiBuildTimeout)
        _run(asked, settings, -1 if lock == "-" else int(lock))
        return 0
    except ShifterError as error:
        message = error.chain()
        _log(asked, "refused" if isinstance(error, AccessError) else "failed", message)
    except (OSError, MemoryError) as error:
        message = f"the UDI could not be built: {describe(error)}"
        _log(asked, "failed", message)
    except Exception as error:  # not to the interpreter: it looks for source files, in whatever root it is now
        trace = error.__traceback__
        while trace and trace.tb_next:
            trace = trace.tb_next
        where = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "?"
        message = f"internal error: {type(error).__name__}: {error} at {where}"
        _log(asked, "failed", message)
    _answer("error", message)
    return 1


def _run(asked: request.Request, settings: config.Config, lock: int) -> None:
    home = pins.open_home_namespace()
    here = pins.open_namespace("/proc/self/ns/mnt")
    syscalls.setns(home)
    # The second and third question are for a base that somebody wiped, or made anew, since the door looked.
    if lock < 0 or not pins.base_ready() or not pins.is_same_file(lock, f"{pins.UDIS}/{asked.uid}/lock"):
        _step("preparing /run/shifter")
        pins.prepare_base()
        _answer("again", "")
        return
    given = pins.read_files(f"{pins.JOBS}/{asked.job}/setup") if asked.setup else {}
    syscalls.setns(here)
    builder = Builder(settings, asked, _step, _build.PREFIX, given)
    try:
        builder.resolve_image()
    finally:
        _refresh_site(settings, builder.store, home, here)
    if asked.check:
        syscalls.setns(home)
        builder.renew_job_record()
        _answer("ok", asked.job)
        return
    if settings.udiIdleTime == 0 and not asked.once and not asked.setup and asked.show != "plan":
        _answer("again", "")  # the door knows it from the new site file, and asks for a UDI that is not shared
        return
    operations = builder.prepare()
    if asked.show == "plan":
        builder.sources.refuse_absent(None)
        lines = "".join(operation.serialise() + "\n" for operation in operations)
        for start in range(0, len(lines), MAX_ANSWER):
            _answer("plan", lines[start : start + MAX_ANSWER])
        _answer("ok", "plan")
        return
    key = builder.make(operations, home)
    pins.keep_newest(f"{pins.UDIS}/{asked.uid}", settings.udiMaxPerUser)
    if not asked.once:
        syscalls.flock(lock, syscalls.LOCK_UN, "lock")
    _answer("ok", key)
    _log(asked, "built", f"{key} {builder.image_name}")
    if asked.once:
        _wait_for_door()
        pins.remove_udi(f"{pins.UDIS}/{asked.uid}/{key}")
        # Not before: whoever stops a door while its builder waits for it gets no second builder.
        syscalls.flock(lock, syscalls.LOCK_UN, "lock")
    from shifter.udi import reap  # after the answer: nobody waits for it

    try:
        reap.sweep(settings, asked.uid)
    except (ShifterError, OSError) as error:
        _log(asked, "sweep failed", describe(error))


def _refresh_site(settings: config.Config, opened: "store.Store | None", home: int, here: int) -> None:
    """Write the site file; in the home namespace, where it is. A ``local:`` image needs no store."""
    if opened is None:
        try:
            opened = store.Store.open(settings.imagePath)
        except ShifterError:
            pass
    syscalls.setns(home)
    records.write_site(_build.BUILD, settings, opened)
    syscalls.setns(here)


def _read_request() -> bytes:
    data = b""
    while len(data) <= fields.MAX_BYTES:
        block = posix.read(0, 65536)
        if not block:
            break
        data += block
    null = posix.open("/dev/null", posix.O_RDWR)
    posix.dup2(null, 0)
    posix.close(null)
    return data


def _answer(key: str, value: str) -> None:
    """Send one field to the door. A door that is gone does not stop the build: the next launch finds the result.

    Nor does one that does not read, because it was stopped or its terminal is: then what is being done is left out.
    """
    unread = bytearray(4)
    syscalls.ioctl(ANSWER, FIONREAD, unread, "FIONREAD")
    if key == "step" and int.from_bytes(unread, "little") > UNREAD_STEPS:
        return
    try:
        posix.write(ANSWER, fields.encode([(key, value.replace("\0", "?")[:MAX_ANSWER])]))
    except BrokenPipeError:
        pass


def _step(text: str) -> None:
    """Tell the door what is being done, and when that began (CLOCK_MONOTONIC, nanoseconds)."""
    _answer("step", f"{time.monotonic_ns()}:{text}")


def _wait_for_door() -> None:
    """Wait until the door, which holds the other end of the answer, has opened the pin (or is gone)."""
    poll = select.poll()
    poll.register(ANSWER, 0)
    poll.poll()


def _log(asked: "request.Request | None", what: str, text: str) -> None:
    """Write one line to syslog: who, what, which image; control characters escaped."""
    who = f"uid {asked.uid} image {asked.ref!r}" if asked else "unreadable request"
    syslog.openlog("shifter", syslog.LOG_PID, syslog.LOG_AUTHPRIV)
    syslog.syslog(syslog.LOG_INFO, f"{what}: {who}: {text!r}"[:900])
