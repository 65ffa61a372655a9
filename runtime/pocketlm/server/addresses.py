"""Where other devices find a server that listens at every address of this machine."""

from __future__ import annotations

import ipaddress
import socket

import psutil

from pocketlm.server.config import ServerConfig


def elsewhere_url(config: ServerConfig, url: str) -> str | None:
    """The URL for other devices, if the server's own `url` names the loopback in its stead: with a host that
    the operator has named, or else the first address of this machine. None if there is neither.

    Only this machine is asked.
    """
    if config.host not in ("0.0.0.0", "::"):
        return None
    named = [name for name in config.allowed_hosts if not name.startswith("*.")]
    host = named[0] if named else _first_address()
    return None if host is None else f"http://{host}:{url.rpartition(':')[2]}"


def _first_address() -> str | None:
    """The IPv4 address of the first interface that is up and leads out of this machine."""
    try:
        states, found = psutil.net_if_stats(), psutil.net_if_addrs()
    except OSError:
        return None
    for interface, addresses in found.items():
        if interface not in states or not states[interface].isup:
            continue
        for each in addresses:
            if each.family == socket.AF_INET and _is_reachable(each.address):
                return str(each.address)
    return None


def _is_reachable(text: str) -> bool:
    address = ipaddress.ip_address(text)
    return not (address.is_loopback or address.is_link_local)
