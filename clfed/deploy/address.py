"""Where a server can be reached: ``host:port``, as people type it."""

from __future__ import annotations

import ipaddress
import re

from clfed.errors import ConfigError

_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_PORT = re.compile(r"[1-9][0-9]{0,4}")


def parse_address(text: str) -> tuple[str, int]:
    """Take ``host:port`` apart; IPv6 stands in brackets, ``[fd00::5]:8000``.

    Returns:
        The host as :func:`parse_host` returns it, without brackets, and the port.

    Raises:
        ConfigError: Not of that form, the host is none, or the port is outside 1 to 65535.

    Example:
        >>> parse_address("[FD00:0::5]:8000")
        ('fd00::5', 8000)
    """
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    if not colon or bracketed != (":" in host) or not _PORT.fullmatch(port) or int(port) > 65535:
        raise ConfigError(
            f"Expected an address of the form HOST:PORT, got {text[:80]!r}.",
            remedy="Give a host and a port from 1 to 65535 and nothing else, such as "
            "hub.local:8000, 192.168.1.5:8000 or [fd00::5]:8000.",
        )
    return parse_host(host), int(port)


def parse_host(text: str) -> str:
    """Return a host name, or an IP address in its shortest form.

    Args:
        text: ASCII; IPv6 without brackets.

    Raises:
        ConfigError: Neither, or an address that stands for "any" and cannot be connected to.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        labels = text.split(".")
        if len(text) > 253 or labels[-1].isdigit() or not all(map(_LABEL.fullmatch, labels)):
            raise ConfigError(
                f"Expected a host name or an IP address, got {text[:80]!r}.",
                remedy="Give what other machines call the server, such as 192.168.1.5 or "
                "hub.local; write letters beyond ASCII in their xn-- form.",
            ) from None
        return text.lower()
    if address.is_unspecified or "%" in text:
        raise ConfigError(
            f"Expected an address at which other machines reach the server, got {text}.",
            remedy="Give the server's own address in its network, such as 192.168.1.5.",
        )
    return str(address)
