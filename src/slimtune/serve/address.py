"""Where a server listens: the socket, its address, and whether other machines reach it."""

from __future__ import annotations

import socket
from ipaddress import ip_address

from slimtune.errors import ConfigError


def is_loopback(host: str) -> bool:
    """Whether a host is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes any that is free. Raises: ConfigError, for an address that is taken."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        # A port whose old connections are still in TIME_WAIT can be bound again at once.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        raise ConfigError(f"can't listen on {host}:{port}: {error.strerror or error}; pass another --port") from error
    return listening


def url_of(host: str, listening: socket.socket) -> str:
    """The address of a socket, with the port that it got."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listening.getsockname()[1]}"
