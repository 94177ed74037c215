"""Starting the sshd of a UDI as its user, and waiting until it answers with the host certificate of this job."""

import _socket
import binascii
import contextlib
import errno
import os
import resource
import time
from collections.abc import Callable, Sequence

from shifter import _build, limits
from shifter.config import Config
from shifter.errors import describe
from shifter.jobs import cgroup, state
from shifter.jobs.job import Job
from shifter.linux import child, drop, syscalls
from shifter.sshd import SshError, authorized, config, handshake, hosts, secret, trust
from shifter.sshd.secret import Account
from shifter.sshd.trust import ETC
from shifter.udi import pins

SSHD = "/opt/udiImage/sbin/sshd"
TIME_LIMIT = 20.0
"""Seconds until an sshd that does not answer is given up; on a busy node it takes some tens of milliseconds."""
SILENCE = 0.2
"""Seconds until an sshd that does not say that it listens is asked."""


class Sshd:
    """The sshd of a job on this node: its files are prepared before the UDI is built, then it is started in that.

    *address*: at which it is asked whether it answers; *certificate*: what it has to answer then.
    """

    def __init__(self, account: Account, address: str, port: int, limited: list[str], certificate: bytes) -> None:
        self.account = account
        self.address = address
        self.port = port
        self.limits = limited
        self.certificate = certificate

    @classmethod
    def prepare(
        cls,
        job: Job,
        settings: Config,
        directory: str,
        addresses: Callable[[], dict[str, list[str]]],
        say: Callable[[str], None],
    ) -> "Sshd":
        """Write the keys and configuration files of *job* into *directory*, as ``etc.NAME``. Raises SshError.

        *addresses*: gives those of the job's nodes, by name; asked as late as possible.
        """
        templates = f"{settings.udiImagePath or f'{_build.PREFIX}/libexec/shifter/opt/udiImage'}/etc"
        port = job_port(job.ident, settings.sshdPort)
        listen = []
        if settings.sshdInterface:
            from shifter.sshd import interfaces

            listen = interfaces.addresses(settings.sshdInterface)
        refuse_taken_port(port, listen)
        account = Account(job.uid, job.gid, job.groups, job.home)
        masters = secret.site_secrets(settings.sshSecretFile) if settings.sshSecretFile else []
        own_secret, legacy = secret.of_user(account, not masters)
        own, everybody = hosts.names([name for name, _ in job.nodes], addresses(), listen)
        masters = masters or [own_secret]
        further = [*(authorized.parse_keys(legacy, "~/.udiRoot/id_rsa.key.pub") if legacy else []), *job.authorized]
        files = trust.files(trust.Job(settings.system, job.uid, job.ident, job.restart), masters, own, further)
        server, warnings = config.server_config(
            _template(f"{templates}/sshd_config"), config.Server(job.user, port, listen), f"{templates}/sshd_config"
        )
        template = _template(f"{templates}/ssh_config")
        client, more = config.client_config(template, port, f"{templates}/ssh_config")
        for warning in warnings + more:
            say(warning)
        public = ((config.SERVER_FILE, server), (config.CLIENT_FILE, client), ("ssh_config", template))
        files += [
            trust.File(name, data, 0o444, 0) for name, data in (*public, (config.NODES, config.nodes_file(everybody)))
        ]
        for file in files:
            _write(f"{directory}/etc.{file.name}", file)
        certificate = next(file.data for file in files if file.name.endswith("-cert.pub")).split()[1]
        address = listen[0] if listen else "127.0.0.1"
        return cls(account, address, port, settings.sshdLimits, binascii.a2b_base64(certificate))

    def start(self, ident: str, directory: str, group: str) -> None:
        """Start it in the UDI of the job *ident* and the cgroup *group*, with its log in *directory*; wait for its answer.

        Raises SshError.
        """
        log = _open_log(f"{directory}/log", self.account.uid)
        null = os.open("/dev/null", os.O_RDWR)
        try:
            # By `shifter`, as the user would: so namespace, groups and environment are those of every command in this UDI, and
            # there is no second way in. It becomes the sshd, whose PID is known.
            words = [f"{_build.PREFIX}/bin/shifter", "--clearenv", SSHD, "-D", "-e", "-f", f"{ETC}/sshd_config"]
            sshd = child.spawn(
                words,
                {"SHIFTER_JOB_ID": ident},  # all that it needs to find the job's UDI; --clearenv keeps it out of that
                {0: null, 1: null, 2: log},
                lambda: _enter(self.account, group, self.limits),
            )
            try:
                self._wait_until_ready(sshd, f"{directory}/log/sshd")
            except SshError as error:
                # Its user may have stopped it where it is in no UDI yet.
                child.end(sshd)
                lines = _read(f"{directory}/log/sshd").decode("utf-8", "replace").splitlines()
                raise SshError(f"{error}{': ' + lines[-1] if lines else ''}") from None
            started = _read(f"/proc/{sshd}/stat").decode("utf-8", "replace").rpartition(")")[2].split()[19]
            pins.write_file(f"{directory}/sshd", f"{sshd} {started}\n".encode())
        finally:
            os.close(null)
            os.close(log)

    def _wait_until_ready(self, sshd: int, log: str) -> None:
        """Wait until the process *sshd* answers with our host certificate. Raises SshError that says why it does not."""
        begin = time.monotonic()
        while (spent := time.monotonic() - begin) < TIME_LIMIT:
            # It stays a zombie, so that its number is nobody else's.
            if os.waitid(os.P_PID, sshd, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                raise SshError("sshd ended at once")
            # It says so, unless a site has it say less: to try costs a process of its, at a moment when it has to start.
            if b"Server listening" in _read(log) or spent > SILENCE:
                with contextlib.suppress(OSError):
                    found = handshake.host_key(self.address, self.port, TIME_LIMIT - spent)
                    if found == self.certificate:
                        return
                    if found:
                        raise SshError(f"on port {self.port} somebody else answers, with another host certificate")
            time.sleep(0.001 if spent < SILENCE else 0.02)
        raise SshError(f"sshd did not answer within {TIME_LIMIT:.0f} s")


def job_port(ident: str, ports: tuple[int, int]) -> int:
    """Return the port of a job: the first one plus its id, so that jobs after each other never clash."""
    digits = ident.partition("_")[0].partition(".")[0]
    number = int(digits) if digits.isascii() and digits.isdigit() else 0
    return ports[0] + number % (ports[1] - ports[0] + 1)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:  # of the log, which is the user's, its user says how long it is
        return file.read(state.LOG_BYTES)


def _template(path: str) -> bytes:
    try:
        return _read(path)
    except OSError as error:
        raise SshError(f"{describe(error)}; make install puts it there, udiImagePath says where") from None


def _write(path: str, file: trust.File) -> None:
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as out:
        out.write(file.data)
        os.fchown(fd, file.owner, -1)
        os.fchmod(fd, file.mode)


def _rlim(value: int) -> int:
    return resource.RLIM_INFINITY if value == limits.RLIM_INFINITY else value


def _open_log(directory: str, owner: int) -> int:
    """Return the log, in a small file system of its own. It is *owner*'s to read, by `shifterctl logs`."""
    os.makedirs(directory, 0o700, exist_ok=True)
    mount = syscalls.new_mount(
        "tmpfs", {"source": "shifter", "size": str(state.LOG_BYTES), "mode": "700"}, syscalls.MOUNT_ATTR_NOSUID
    )
    target = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    syscalls.move_mount(mount, target, directory)
    os.close(target)
    os.close(mount)
    log = os.open(f"{directory}/sshd", os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o400)
    os.fchown(log, owner, -1)
    return log


class PortInUse(SshError):
    """Somebody else listens on the port of this job."""


def refuse_taken_port(port: int, addresses: Sequence[str]) -> None:
    """Raise PortInUse if the port can't be had: two jobs whose ids fall on the same one, or a program of a user's.

    *addresses*: where it is wanted; none: at every address.
    """
    for address in addresses or ("0.0.0.0", "::"):  # noqa: S104 - as sshd does
        family = _socket.AF_INET6 if ":" in address else _socket.AF_INET
        with contextlib.suppress(OSError), contextlib.closing(_socket.socket(family, _socket.SOCK_STREAM)) as probe:
            probe.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise PortInUse(
                        f"port {port} is in use: no sshd for this job (sshdPort=FIRST-LAST avoids that)"
                    ) from None


def _enter(account: Account, group: str, limited: Sequence[str]) -> None:
    """In a child that executes `shifter` next: become the user, with the prolog's limits, or *limited*.

    Not more: `shifter` is setuid root. It joins the UDI and drops the rest, as in every launch.
    """
    cgroup.enter(group)
    for item in limited:
        try:
            kind, soft, hard = limits.parse(item)
            resource.setrlimit(kind, (_rlim(soft), _rlim(hard)))
        except (OSError, ValueError) as error:
            raise SshError(f"sshdLimits: {item}: {error}") from None
    # A workload manager's daemon may be spared by the OOM killer; what the user runs must not be.
    spared = "/proc/self/oom_score_adj"
    if int(_read(spared)) < 0:
        with open(spared, "w") as file:
            file.write("0")
    drop.log_in(account.uid, account.gid, account.groups)
