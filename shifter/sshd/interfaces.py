"""The addresses of a network interface, for an sshd that listens there only. pyroute2 takes a tenth of a second to load."""

import socket

from shifter.sshd import SshError


def addresses(name: str) -> list[str]:
    """Return the addresses of the interface *name*, without those that mean another node on each link. Raises SshError."""
    from pyroute2 import IPRoute

    with IPRoute() as route:
        found = route.link_lookup(ifname=name)
        if not found:
            raise SshError(f"sshdInterface={name}: this node has no such interface")
        entries = [
            entry
            for family in (socket.AF_INET, socket.AF_INET6)
            for entry in route.get_addr(index=found[0], family=family)
            if entry["scope"] != _LINK
        ]
    if not entries:
        raise SshError(f"sshdInterface={name}: it has no address")
    return [str(entry.get_attr("IFA_LOCAL") or entry.get_attr("IFA_ADDRESS")) for entry in entries]


_LINK = 253
"""RT_SCOPE_LINK of <linux/rtnetlink.h>."""
