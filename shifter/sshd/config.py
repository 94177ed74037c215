"""sshd_config and the client's configuration of one UDI, from the templates that a site edits.

What must hold stands first: sshd and ssh take the first value that they read of a keyword. But some keywords add up
(Port, AllowUsers, HostKey, IdentityFile), DenyUsers and the like take away, ``Match`` overrides, ``Include`` brings in
lines that nobody has looked at, and ``Subsystem sftp`` twice is fatal. So a line of the template that has to do with what
must hold is left out: a comment stands in its place, which keeps the line numbers of sshd's own messages in step, and a
warning names it unless it says what holds anyway. Everything else is the site's and stays as it is.

A line must be ``Keyword value`` or ``Keyword=value`` with a plain keyword. OpenSSH understands more (``"Po"rt 22``), and
what two programs may understand in two ways is left out too.

**The client.** For nodes of the job ssh is started with ``-F`` and one file of ours, so that nothing of the user's is even
parsed: an included file can be fatal where none of its Host blocks matches. Which hosts these are is said by NODES, which
`udiImage/client.c` reads. The file is not ``/opt/udiImage/etc/ssh_config``: that may be the system-wide file of the ssh
which we ship, and would then hold for every other host too.
"""

from collections.abc import Iterable, Sequence

from shifter.sshd import SshError
from shifter.sshd.trust import ETC, canonical_address, node_names

SFTP_SERVER = "internal-sftp"
"""In sshd itself: scp and sftp need no shell of the image, and nothing that a user's shell prints at its start breaks them."""
SERVER_FILE = "sshd_config"
CLIENT_FILE = "ssh_config.nodes"
NODES = "nodes"
"""Names of the files below ETC."""
MAX_TEMPLATE = 1 << 16

_LETTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_DIGITS = b"0123456789"

_ALIASES = {
    "challengeresponseauthentication": "kbdinteractiveauthentication",
    "skeyauthentication": "kbdinteractiveauthentication",
    "tisauthentication": "kbdinteractiveauthentication",
    "dsaauthentication": "pubkeyauthentication",
    "hostdsakey": "hostkey",
    "identityfile2": "identityfile",
    "smartcarddevice": "pkcs11provider",
}
"""Second names of keywords that must hold (servconf.c, readconf.c)."""

# Left out of every sshd_config: no value of theirs may hold.
_SERVER_WITHOUT = """
    AllowGroups DenyGroups DenyUsers AuthorizedKeysCommandUser AuthorizedPrincipalsCommandUser GSSAPIKeyExchange
    HostKeyAgent Include RDomain UseLogin UsePAM
"""
# 64 logins at once are an ordinary mpiexec; by OpenSSH's own defaults a third of them is dropped.
_SERVER_DEFAULTS = (
    ("X11Forwarding", "no"),
    ("MaxStartups", "512:30:1024"),
    ("MaxSessions", "512"),
    ("PermitUserRC", "no"),
)
_CLIENT_WITHOUT = "CertificateFile GSSAPIKeyExchange HostKeyAlias Hostname Include PKCS11Provider RemoteCommand User"


class Server:
    """What the sshd of a UDI depends on. addresses: where it listens (none: everywhere)."""

    def __init__(self, user: str, port: int, addresses: Sequence[str] = ()) -> None:
        self.user = user
        self.port = port
        self.addresses = addresses


def server_config(template: bytes, server: Server, where: str = "sshd_config") -> tuple[bytes, list[str]]:
    """Return the sshd_config of a UDI and warnings, which begin with *where*, the template's path, and a line number.

    Raises SshError for a template, port, address or user name that can't be used.
    """
    fixed: list[tuple[str, str]] = [("Port", _port(server.port))]
    fixed += [("ListenAddress", canonical_address(address)) for address in server.addresses]
    fixed += [
        ("AllowUsers", _user_pattern(server.user)),
        ("PermitRootLogin", "no"),
        ("AuthenticationMethods", "publickey"),
        ("PubkeyAuthentication", "yes"),
        ("PasswordAuthentication", "no"),
        ("PermitEmptyPasswords", "no"),
        ("KbdInteractiveAuthentication", "no"),
        ("HostbasedAuthentication", "no"),
        ("HostKey", f"{ETC}/ssh_host_ed25519_key"),
        ("HostCertificate", f"{ETC}/ssh_host_ed25519_key-cert.pub"),
        ("HostKeyAlgorithms", "ssh-ed25519-cert-v01@openssh.com,ssh-ed25519"),
        ("AuthorizedKeysFile", f"{ETC}/user_auth_keys"),
        ("AuthorizedKeysCommand", "none"),
        ("AuthorizedPrincipalsFile", "none"),
        ("AuthorizedPrincipalsCommand", "none"),
        ("TrustedUserCAKeys", "none"),
        ("StrictModes", "yes"),
        ("PermitUserEnvironment", "no"),
        ("ChrootDirectory", "none"),
        ("PidFile", "none"),
    ]
    without = _SERVER_WITHOUT if server.addresses else _SERVER_WITHOUT + " ListenAddress"
    kept, warnings = _template(template, where, fixed, without.split(), server=True)
    # Only where the site says nothing: of MaxStartups sshd takes the last value.
    said = {pair[0].lower().encode() for pair in map(_pair, kept) if pair}
    fixed += [("Subsystem", f"sftp {SFTP_SERVER}")]
    fixed += [(keyword, value) for keyword, value in _SERVER_DEFAULTS if keyword.lower().encode() not in said]
    return _whole(fixed, kept), warnings


def client_config(template: bytes, port: int, where: str = "ssh_config") -> tuple[bytes, list[str]]:
    """Return what ssh reads for nodes of the job, and warnings; parameters as of server_config. Raises SshError.

    User is not set: ssh takes the name that the UDI's own passwd has for it.
    """
    fixed = [
        ("Port", _port(port)),
        ("IdentityFile", f"{ETC}/id_ed25519"),
        ("IdentitiesOnly", "yes"),
        ("PubkeyAuthentication", "yes"),
        ("PreferredAuthentications", "publickey"),
        ("PasswordAuthentication", "no"),
        ("KbdInteractiveAuthentication", "no"),
        ("HostbasedAuthentication", "no"),
        ("StrictHostKeyChecking", "yes"),
        ("GlobalKnownHostsFile", f"{ETC}/ssh_known_hosts"),
        ("UserKnownHostsFile", "none"),
        ("KnownHostsCommand", "none"),
        ("HostKeyAlgorithms", "ssh-ed25519-cert-v01@openssh.com"),
        ("CASignatureAlgorithms", "ssh-ed25519"),
        ("NoHostAuthenticationForLocalhost", "no"),
        ("VerifyHostKeyDNS", "no"),
        ("CheckHostIP", "no"),
        ("UpdateHostKeys", "no"),
        ("CanonicalizeHostname", "no"),
        ("ProxyCommand", "none"),
        ("ProxyJump", "none"),
    ]
    kept, warnings = _template(template, where, fixed, _CLIENT_WITHOUT.split(), server=False)
    # A Host block of the template would end what comes after it; what is ours for all nodes comes before.
    return _whole(fixed, kept), warnings


def nodes_file(names: Iterable[str]) -> bytes:
    """Return the file in which client.c looks up hosts: names, aliases, addresses of all nodes, one a line, sorted."""
    return b"".join(name.encode("ascii") + b"\n" for name in node_names(names))


def _whole(first: list[tuple[str, str]], kept: list[bytes]) -> bytes:
    head = [
        "# Made by setupRoot. What must hold; then the site's template.",
        *(f"{key} {value}" for key, value in first),
        "",
    ]
    return "\n".join(head).encode("ascii") + b"".join(line + b"\n" for line in kept)


def _template(
    template: bytes, where: str, fixed: list[tuple[str, str]], without: Sequence[str], server: bool
) -> tuple[list[bytes], list[str]]:
    """Return the lines of *template*, those that are left out as comments, and the warnings about them."""
    if len(template) > MAX_TEMPLATE:
        raise SshError(f"{where} is longer than {MAX_TEMPLATE} bytes")
    holds = {keyword.lower(): f"{keyword} {value}" for keyword, value in fixed}
    never = {keyword.lower() for keyword in without}
    kept: list[bytes] = []
    warnings: list[str] = []
    for number, raw in enumerate(template.removesuffix(b"\n").split(b"\n"), 1):
        line = raw.rstrip(b" \t\r\f")
        reason = _overruled(line, holds, never, server)
        if reason is None:
            kept.append(line)
            continue
        kept.append(b"# (left out)")
        if reason:
            warnings.append(f"{where}:{number}: {reason}")
        if server and reason.startswith("Match"):
            break  # all that follows would belong to that block, or to another one
    return kept, warnings


def _pair(line: bytes) -> tuple[str, bytes] | None:
    """Return keyword and value of ``Keyword value`` or ``Keyword=value``; None if *line* is neither in plain characters."""
    text = line.strip(b" \t")
    rest = text.lstrip(_LETTERS + _DIGITS)
    keyword, value = text[: len(text) - len(rest)], rest.lstrip(b" \t")
    separated = value != rest
    if value.startswith(b"="):
        separated, value = True, value[1:].lstrip(b" \t")
    if not keyword or keyword[0] in _DIGITS or not separated or not value or _has_control(line):
        return None
    return keyword.decode("ascii"), value


def _has_control(line: bytes) -> bool:
    return any((byte < 32 and byte != 9) or byte == 127 for byte in line)


def _overruled(line: bytes, holds: dict[str, str], never: set[str], server: bool) -> str | None:
    """Return None if *line* stays, else why it is left out: ``""`` where it says what holds anyway."""
    text = line.lstrip(b" \t")
    if not text or (text.startswith(b"#") and not _has_control(text)):
        return None
    pair = _pair(line)
    if pair is None:
        return f"{line[:60].decode('ascii', 'replace')!a} is left out: it is not 'Keyword value' in plain characters"
    keyword, value = pair
    name = _ALIASES.get(keyword.lower(), keyword.lower())
    if server and name == "match":
        return "Match and what follows it is left out: it would override what must hold"
    if server and name == "subsystem":
        if value == f"sftp {SFTP_SERVER}".encode("ascii"):
            return ""
        subsystem = value.replace(b"\t", b" ").partition(b" ")
        program = subsystem[2].lstrip(b" ")
        if (
            subsystem[0].strip(_LETTERS + _DIGITS + b"._@-")
            or subsystem[0] == b"sftp"
            or program[:1] in (b"", b'"', b"'", b"\\")
        ):
            return f"{keyword} is overruled: the sftp subsystem is that of udiImage"
        return None
    if name in never:
        return f"{keyword} is left out: in a UDI it must have no value but its default"
    if name not in holds:
        return None
    want = holds[name].split(None, 1)[1]
    have = value.decode("utf-8", "replace").strip('" \t').lower()
    return "" if have == want.lower() else f"{keyword} is overruled: '{holds[name]}' holds"


def _port(port: int) -> str:
    if not 1 <= port <= 65535:
        raise SshError(f"{port} is not a port")
    return str(port)


def _user_pattern(user: str) -> str:
    """Return the pattern of AllowUsers for *user*.

    Names of directory services may hold ``@`` or a backslash, which mean something there, and so does every character of a
    pattern: ``?`` stands for each of them. That it would match other names too lets nobody in: an sshd that runs as the user
    can give nobody else's session.
    """
    data = user.encode("utf-8", "surrogateescape")
    if not data or len(data) > 256 or any(byte < 32 or byte in b":/\x7f" for byte in data):
        raise SshError(f"{user[:260]!a} is not a user name")
    plain = _LETTERS + _DIGITS + b"._-"
    return "".join(chr(byte) if byte in plain else "?" for byte in data)
