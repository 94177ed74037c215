"""The secrets that the keys of a job are derived from, and the users' files that say who may log in.

**The site's** (`sshSecretFile`): lines of at least 64 hexadecimal digits, one or two; blank lines and lines that begin
with ``#`` do not count. ``openssl rand -hex 32`` makes one. It belongs to root, mode 0600, and nobody else can write a
directory on the way to it. Every node of the cluster has the same file.

*Two lines are for rotation.* Keys and certificates are made from the first; those of both are accepted. A site gets from A
to B in three steps, each one node after the other, while jobs start all the time: ``A``, ``A B``, ``B A``, ``B``. Whatever
two nodes have, as long as one step is finished everywhere before the next begins, each accepts what the other makes:
``A`` and ``A B`` both make A's; ``A B`` accepts the B of ``B A`` and is accepted as A; ``B A`` and ``B`` make B's.
(With two steps, ``A`` to ``B A``, a node that still has ``A`` would refuse the keys of B.)
A file that is there but can't be used is an error, never a reason to take the user's secret: the other nodes would not.

**The user's** (``~/.udiRoot/secret``), where a site has none: 32 random bytes, mode 0600, in a directory 0700. Whoever
finds none makes one as a temporary file and gives it its name with link(2), which fails when the name exists, also
between the clients of one NFS server: nodes that start together agree. What others can read is refused and not
repaired: it may have been read, and changing its mode would go on trusting it.

Everything of a user is read in a child process that has become the user for good (`shifter.linux.drop`), within a time
limit: a home on a dead server holds that child, which is killed and left, and not setupRoot.
"""

import _signal  # type: ignore[import-not-found]
import errno
import os
import select
import stat
import time
from collections.abc import Callable

from shifter.errors import ConfigError, ShifterError, describe
from shifter.linux import child, drop, paths, syscalls
from shifter.sshd import SshError

SECRET_BYTES = 32
MAX_SITE_BYTES = 4096
MAX_KEY_BYTES = 65536
"""Bounds of the files: the site's secret, and one file of public keys."""
TIME_LIMIT = 20.0
"""Seconds that a user's home may take to answer."""

_DIRECTORY = ".udiRoot"
_OPEN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY  # O_NONBLOCK: a FIFO must not stop us


class Account:
    """The user of a job, as the node knows them."""

    def __init__(self, uid: int, gid: int, groups: tuple[int, ...], home: str) -> None:
        self.uid = uid
        self.gid = gid
        self.groups = groups
        self.home = home


def site_secrets(path: str) -> list[bytes]:
    """Return the one or two secrets in the file *path* of root: the first makes keys, all are accepted.

    Raises SshError: the file or a directory above it is not root's alone, is no regular file, or has another format.
    """
    try:
        fd = paths.open_trusted(path, (0,), os.O_RDONLY | os.O_NONBLOCK)
    except ConfigError as error:
        raise SshError(f"sshSecretFile: {error}") from None
    except OSError as error:
        raise SshError(f"sshSecretFile: {describe(error)}") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise SshError(f"sshSecretFile: {path} is not a regular file")
        if status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise SshError(
                f"sshSecretFile: {path} can be read by others (mode {mode:04o}): it is no secret any more. Make a new one:"
                f" (umask 077; openssl rand -hex 32 > {path})"
            )
        data = _read(fd, MAX_SITE_BYTES)
    except OSError as error:
        raise SshError(f"sshSecretFile: {path}: {error.strerror}") from None
    finally:
        os.close(fd)
    return _generations(data, path)


def _generations(data: bytes | None, path: str) -> list[bytes]:
    """Return the secrets of the content *data* (None: too long). Raises SshError, which never shows what it read."""
    how = "it must have one or two lines of at least 64 hexadecimal digits, as openssl rand -hex 32 prints them"
    if data is None:
        raise SshError(f"sshSecretFile: {path} is longer than {MAX_SITE_BYTES} bytes; {how}")
    secrets: list[bytes] = []
    for number, line in enumerate(data.split(b"\n"), 1):
        word = line.strip(b" \t\r")
        if not word or word.startswith(b"#"):
            continue
        plain = len(word) % 2 == 0 and all(byte in b"0123456789abcdefABCDEF" for byte in word)
        if not plain or len(word) < 2 * SECRET_BYTES:
            raise SshError(f"sshSecretFile: {path}:{number}: {how}")
        secrets.append(bytes.fromhex(word.decode("ascii")))
    if not 1 <= len(secrets) <= 2 or len(set(secrets)) != len(secrets):
        raise SshError(f"sshSecretFile: {path} has {len(secrets)} secrets, of which {len(set(secrets))} differ; {how}")
    return secrets


def of_user(account: Account, with_secret: bool, time_limit: float = TIME_LIMIT) -> tuple[bytes, bytes | None]:
    """Return what a job needs of its user's ``~/.udiRoot``: the secret, and C Shifter's ``id_rsa.key.pub`` (None: there is none).

    *with_secret*: 32 bytes, which are made if there are none; else b"". Who may log in is said by the other file, so only its
    owner may be able to write it. Raises SshError, when the home can't be had or does not answer, or something there is not
    as it must be.
    """
    directory = f"{account.home}/{_DIRECTORY}"
    advice = "; or let the site set sshSecretFile" if with_secret else ""

    def work(account: Account) -> bytes:
        found = b""
        if with_secret:
            try:
                found = _find_or_make(account)
            except ShifterError as error:
                raise SshError(f"{error}{advice}") from None
            except OSError as error:
                raise SshError(f"{directory}/secret: {error.strerror}{advice}") from None
        path = f"{directory}/id_rsa.key.pub"
        try:
            fd = _open_at(_open_directory(_home(account), make=False), "id_rsa.key.pub", path)
        except FileNotFoundError:
            return found + b"-"
        except PermissionError:
            if with_secret:
                raise
            return b"-"  # a home that only its user's tickets open: the site's secret is there for that
        return found + b"+" + _checked(fd, account.uid, path, 0o022, MAX_KEY_BYTES)

    what = f"{directory}/{'secret' if with_secret else 'id_rsa.key.pub'}"
    data = _as_user(account, work, what, time_limit, advice)
    size = SECRET_BYTES if with_secret else 0
    return data[:size], data[size + 1 :] if data[size : size + 1] == b"+" else None


def key_file(account: Account, path: str, time_limit: float = TIME_LIMIT) -> bytes:
    """Return the content of the file *path* of public keys that the user named, read as the user.

    Raises SshError as of_user does.
    """
    if not path.startswith("/"):
        raise SshError(f"{path}: the path of a key file must be absolute")

    def work(account: Account) -> bytes:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        return _checked(fd, account.uid, path, 0o022, MAX_KEY_BYTES, (0,))

    return _as_user(account, work, path, time_limit)


# --- in the child, as the user ---------------------------------------------------------------------------------------


def _find_or_make(account: Account) -> bytes:
    """Return the user's secret. Of nodes that do this at once, one makes it."""
    path = f"{account.home}/{_DIRECTORY}/secret"
    directory = _open_directory(_home(account), make=True)
    for attempt in range(20):
        try:
            fd = _open_at(directory, "secret", path)
        except FileNotFoundError:
            if attempt:  # an NFS client may go on for a moment believing that there is no such name
                time.sleep(0.1)
            _make(directory)
            continue
        secret = _checked(fd, account.uid, path, 0o077, SECRET_BYTES)
        if len(secret) != SECRET_BYTES:
            raise SshError(
                f"{path} has {len(secret)} bytes, not {SECRET_BYTES}; remove it, and the next job makes a new one"
            )
        return secret
    raise SshError(f"{path} exists and can't be found, by turns; remove it")


def _make(directory: int) -> None:
    """Make a secret unless there is one by now. Complete and on its server before it has its name."""
    temporary = f".secret.{os.urandom(8).hex()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN, 0o600, dir_fd=directory)
    try:
        try:
            os.fchmod(fd, 0o600)
            if os.write(fd, os.urandom(SECRET_BYTES)) != SECRET_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(fd)
        finally:
            os.close(fd)
        try:
            os.link(temporary, "secret", src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
        except FileExistsError:
            pass
    finally:
        os.unlink(temporary, dir_fd=directory)


def _home(account: Account) -> int:
    """Open the user's home; symlinks in its path are followed with their rights."""
    if not account.home.startswith("/"):
        raise SshError(f"the home {account.home!r} of uid {account.uid} is no absolute path")
    return os.open(account.home, os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | os.O_CLOEXEC)


def _open_directory(home: int, make: bool) -> int:
    """Open ``.udiRoot`` in *home*, which must be the user's and closed to others' writing; *make* it if it is missing."""
    try:
        fd = os.open(_DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | _OPEN, dir_fd=home)
    except FileNotFoundError:
        if not make:
            raise
        try:
            os.mkdir(_DIRECTORY, 0o700, dir_fd=home)
        except FileExistsError:  # another node was faster
            pass
        fd = os.open(_DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | _OPEN, dir_fd=home)
    status = os.fstat(fd)
    if status.st_uid != os.getuid():
        raise SshError(f"~/{_DIRECTORY} belongs to uid {status.st_uid}, not to uid {os.getuid()}; remove it")
    if status.st_mode & 0o022:
        raise SshError(
            f"~/{_DIRECTORY} can be written by others (mode {stat.S_IMODE(status.st_mode):04o}); run: chmod go-w ~/{_DIRECTORY}"
        )
    return fd


def _open_at(directory: int, name: str, path: str) -> int:
    try:
        return os.open(name, os.O_RDONLY | _OPEN, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise SshError(f"{path} is a symbolic link; remove it") from None
        raise


def _checked(fd: int, uid: int, path: str, closed: int, limit: int, others: tuple[int, ...] = ()) -> bytes:
    """Return what is in the regular file *fd* of *uid* (or of *others*) that has no mode bit of *closed*. Closes *fd*."""
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise SshError(f"{path} is not a regular file; remove it")
        if status.st_uid not in (uid, *others):
            raise SshError(f"{path} belongs to uid {status.st_uid}, not to uid {uid}; remove it")
        if status.st_mode & closed:
            mode = stat.S_IMODE(status.st_mode)
            if closed & 0o044:
                raise SshError(
                    f"{path} can be read by others (mode {mode:04o}), so it is no secret any more;"
                    " remove it, and the next job makes a new one"
                )
            raise SshError(f"{path} can be written by others (mode {mode:04o}); run: chmod go-w {path}")
        data = _read(fd, limit)
    finally:
        os.close(fd)
    if data is None:
        raise SshError(f"{path} is longer than {limit} bytes")
    return data


def _read(fd: int, limit: int) -> bytes | None:
    """Return all of *fd*, or None if that is more than *limit* bytes."""
    data = b""
    while len(data) <= limit:
        chunk = os.read(fd, limit + 1 - len(data))
        if not chunk:
            return data
        data += chunk
    return None


# --- the child -------------------------------------------------------------------------------------------------------


def _as_user(
    account: Account, work: Callable[[Account], bytes], what: str, time_limit: float, advice: str = ""
) -> bytes:
    """Return what *work* returns in a child process that has become the user. Raises SshError for all that it raises."""
    read, write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _child(account, work, what, write)
    os.close(write)
    try:
        answer = _answer(read, time_limit)
    finally:
        os.close(read)
        child.end(pid)
    if answer is None:
        raise SshError(f"{what}: no answer within {time_limit:g} s, is its server down?{advice}")
    size, kind, data = answer[:4], answer[4:5], answer[5:]
    if len(answer) < 5 or int.from_bytes(size, "big") != len(data):  # the user may end the child, at any point
        raise SshError(f"{what}: the process that read it was killed{advice}")
    if kind == b"=":
        return data
    told = data.decode("utf-8", "replace")
    raise SshError("".join(char if char.isprintable() else "?" for char in told))


def _child(account: Account, work: Callable[[Account], bytes], what: str, write: int) -> None:
    """Become the user, do *work*, tell the result. Never returns: what is above us on the stack is root's."""
    status = 70
    try:
        (write,) = drop.keep_only(write)
        null = os.open("/dev/null", os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        os.setsid()  # no signal of a terminal ends it half-way
        os.umask(0o077)
        os.chdir("/")
        for number in (
            _signal.SIGTERM,
            _signal.SIGINT,
            _signal.SIGPIPE,
            _signal.SIGHUP,
            _signal.SIGALRM,
            _signal.SIGCHLD,
        ):
            _signal.signal(number, _signal.SIG_DFL)  # handlers of setupRoot undo what setupRoot did
        try:
            drop.become(account.uid, account.gid, account.groups)
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, _signal.SIGKILL)  # after the drop, which clears it
            kind, data = b"=", work(account)
        except ShifterError as error:
            kind, data = b"!", str(error).encode("utf-8", "replace")
        except OSError as error:
            kind, data = b"!", f"{what}: {error.strerror}".encode("utf-8", "replace")
        answer = len(data).to_bytes(4, "big") + kind + data
        sent = 0
        while sent < len(answer):
            sent += os.write(write, answer[sent:])
        status = 0
    finally:
        os._exit(status)


def _answer(fd: int, time_limit: float) -> bytes | None:
    """Return what comes from *fd* until its end, b"" if the other side died, None after *time_limit*."""
    end = time.monotonic() + time_limit
    data = b""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while True:
        left = end - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return None
        chunk = os.read(fd, 65536)
        if not chunk:
            return data
        data += chunk
