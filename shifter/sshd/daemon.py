"""Starting the sshd of a UDI as its user, and waiting until it answers with the host certificate of this job."""

import contextlib
import os
import signal
import socket
import subprocess
import time

from shifter.linux import drop, syscalls
from shifter.sshd import SshError
from shifter.sshd.secret import Account
from shifter.sshd.trust import ETC

SSHD = "/opt/udiImage/sbin/sshd"
KEYSCAN = "/opt/udiImage/bin/ssh-keyscan"
TIME_LIMIT = 20.0
"""Seconds until an sshd that does not answer is given up; on a busy node it takes some tens of milliseconds."""
LOG_SIZE = "256k"
"""Size of the file system that only holds the log: who connects in a loop fills that, and nothing that others need."""


class PortInUse(SshError):
    """Somebody else listens on the port of this job."""


def refuse_taken_port(port: int) -> None:
    """Raise PortInUse if the port can't be had: two jobs whose ids fall on the same one, or a program of a user's."""
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):  # noqa: S104 - as sshd does
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except PermissionError:
                raise
            except OSError as error:
                if error.errno == 98:  # EADDRINUSE
                    raise PortInUse(
                        f"port {port} is in use: no sshd for this job (sshdPort=FIRST-LAST avoids that)"
                    ) from None


def start(namespace: int, account: Account, log: int) -> int:
    """Start sshd in the UDI *namespace* as the user, its messages going to *log*; return its PID."""
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            null = os.open("/dev/null", os.O_RDWR)
            for fd, target in ((null, 0), (null, 1), (log, 2)):
                os.dup2(fd, target)
            _enter(namespace, account)
            os.execve(SSHD, [SSHD, "-D", "-e", "-f", f"{ETC}/sshd_config"], {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin"})
        except BaseException as error:
            os.write(2, f"{SSHD}: {error}\n".encode())
        finally:
            os._exit(127)
    return child


def _enter(namespace: int, account: Account) -> None:
    """In a child: join the UDI, become the user for good, keep nothing of ours."""
    syscalls.setns(namespace)
    os.chdir("/")
    os.closerange(3, 4096)
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    os.umask(0o022)
    drop.become(account.uid, account.gid, account.groups)


def wait_until_ready(pid: int, namespace: int, account: Account, port: int, certificate: bytes) -> None:
    """Wait until the sshd *pid* answers on *port* with *certificate*. Raises SshError that says why it does not."""
    deadline = time.monotonic() + TIME_LIMIT
    pause = 0.002
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            raise SshError("sshd ended at once")
        if _listens(port):
            found = _scan(namespace, account, port)
            if certificate.split()[1] in found.split():
                return
            if found:
                raise SshError(f"on port {port} somebody else answers, with another host certificate")
        time.sleep(pause)
        pause = min(pause * 2, 0.1)
    raise SshError(f"sshd did not answer within {TIME_LIMIT:.0f} s")


def _listens(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _scan(namespace: int, account: Account, port: int) -> bytes:
    """Return what ssh-keyscan says of the host certificates on *port*; it runs in the UDI, as the user."""
    done = subprocess.run(
        [KEYSCAN, "-c", "-T", "5", "-p", str(port), "127.0.0.1"],
        preexec_fn=lambda: _enter(namespace, account),
        capture_output=True,
        env={"PATH": "/usr/bin:/bin"},
        check=False,
    )
    return done.stdout
