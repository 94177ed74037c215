"""The names and addresses of a job's nodes, from the node's own name service, bounded in time."""

import _signal  # type: ignore[import-not-found]
import _socket
import contextlib
import os
import select
import time
from collections.abc import Sequence

from shifter.linux import child, drop, syscalls

TIME_LIMIT = 10.0
"""Seconds that the name service may take; then only names are known, which is what ssh is called with."""


def names(nodes: list[str], addresses: dict[str, list[str]], listen: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Return (names and addresses of this node, those of all nodes). The first goes into its host certificate.

    *addresses*: what `Resolver` found; *listen*: further ones of this node.
    """
    here = os.uname().nodename
    short = here.partition(".")[0]
    own = {here, short, "localhost", "127.0.0.1", "::1", *listen}
    own |= {node for node in nodes if node.partition(".")[0].lower() == short.lower()}
    everybody = {*own, *nodes, *(node.partition(".")[0] for node in nodes)}
    for name, found in addresses.items():
        everybody.update(found)
        if name in own:
            own.update(found)
    return sorted(own), sorted(everybody)


def etc_hosts(nodes: list[str], addresses: dict[str, list[str]]) -> bytes:
    """Return the lines that a UDI's /etc/hosts has for the nodes of its job, after those of the node's own file.

    So names are known inside that come from a name service which an image has no library for (NIS, LDAP, systemd).
    """
    lines = []
    for node in nodes:
        short = node.partition(".")[0]
        for address in addresses.get(node, []):
            if address != node:
                lines.append(f"{address} {node}" + (f" {short}" if short != node else ""))
    return "".join(line + "\n" for line in lines).encode("ascii")


class Resolver:
    """A child that asks the name service for the addresses of *nodes* and of this node, while we do something else."""

    def __init__(self, nodes: list[str]) -> None:
        wanted = sorted({*nodes, os.uname().nodename})
        self._deadline = time.monotonic() + TIME_LIMIT
        self._found: dict[str, list[str]] | None = None
        self._read, write = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            try:
                _ask(wanted, write)
            finally:
                os._exit(0)
        os.close(write)

    def __enter__(self) -> "Resolver":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._read)
        child.end(self._child)

    def addresses(self) -> dict[str, list[str]]:
        """Return the addresses by name, as far as the name service answered in time."""
        if self._found is None:
            data = b""
            while select.select([self._read], [], [], max(0.0, self._deadline - time.monotonic()))[0]:
                block = os.read(self._read, 65536)
                if not block:
                    break
                data += block
            lines = [line.split() for line in data.decode("ascii", "replace").split("\n")[:-1]]
            self._found = {words[0]: [word for word in words[1:] if "%" not in word] for words in lines if words}
        return self._found


def _ask(names: list[str], write: int) -> None:
    """Write a line for each name that is known: the name and its addresses."""
    # A name service that is dead must hold no lock of ours, nor the prolog's output.
    (write,) = drop.keep_only(write)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, _signal.SIGKILL)
    with open(write, "wb") as out:
        for name in names:
            with contextlib.suppress(OSError):  # names as bytes: for text, Python loads what it knows of IDNA
                found = sorted(
                    {entry[4][0] for entry in _socket.getaddrinfo(name.encode(), None, type=_socket.SOCK_STREAM)}
                )
                out.write(f"{name} {' '.join(map(str, found))}\n".encode())
                out.flush()
