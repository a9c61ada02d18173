"""Who may ask a server without a token: what calls it by a name of this machine, and no page of another site.

A browser sends what any page tells it to, also to 127.0.0.1. A page of another site is known by its ``Origin``; one whose
name was pointed at this machine (DNS rebinding) by the ``Host`` that it was opened under.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from multidict import CIMultiDictProxy


def foreign(headers: CIMultiDictProxy[str], allowed: Collection[str]) -> str | None:
    """Why a request is refused, if it is.

    Args:
        allowed: names beside those of this machine, in lower case.
    """
    hosts = headers.getall("Host", [])
    if len(hosts) != 1:
        return f"{len(hosts)} Host headers; expected one"
    for name, value, host in (
        ("Host", hosts[0], _host("//" + hosts[0])),
        *(("Origin", origin, _host(origin)) for origin in headers.getall("Origin", [])),
    ):
        if host is None or not (is_loopback(host) or host in allowed):
            return (
                f"{name} {value[:100]!r} is no name of this machine, and the server has no token; ask by 127.0.0.1, or start "
                "it with --allow-host NAME, or with --token-file"
            )
    return None


def _host(url: str) -> str | None:
    """Its host in lower case, without brackets and the final dot; nothing for ``null`` and nonsense."""
    try:
        parts = urlsplit(url)
        if parts.username is not None or parts.path.strip("/"):
            return None
        _ = parts.port
        return (parts.hostname or "").rstrip(".") or None
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own for everybody.

    Example:
        >>> [is_loopback(host) for host in ("localhost", "127.0.0.2", "::1", "127.0.0.1.evil.example", "0.0.0.0")]
        [True, True, True, False, False]
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
