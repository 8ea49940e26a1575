"""Where this service goes because a caller said so: the public internet, over https.

Everything that is called on a stranger's word passes here: inputs given by URL, `webhook_url`.
`check` reads the URL and asks nobody.  `examine` looks the name up as well, to tell the caller at
once.  Neither is believed later: the sockets of `session_for` check the address themselves, each
time they connect.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Iterable
from datetime import timedelta
from typing import Final, NoReturn

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from app.core.guarded_http import AddressRefused, GuardedSessions, is_public
from app.core.trusted_hosts import parse_trusted
from app.domain.errors import OutboundRefused

LONGEST_URL: Final = 2048
LOOKUP_PATIENCE: Final = timedelta(seconds=2)

_PORTS: Final = {"https": 443, "http": 80}
# RFC 3986 without user info, escapes and anything beyond ASCII in the host: what can be read in
# two ways is read by nobody.  Hosts of other scripts are written as xn--….
_URL: Final = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://"
    r"(?P<host>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:(?P<port>[0-9]{1,5}))?"
    r"(?P<rest>[/?][!-\"$-~]*)?(#[!-~]*)?",
    re.ASCII | re.IGNORECASE,
)
_LABEL: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)", re.ASCII)
# inet_aton(3) reads these as numbers: 127.1, 0x7f000001, 017700000001.
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)
# Names of the own machine or network, by RFC 6761, 6762, 8375, 9476, ICANN 2024 and by custom.
_INWARD: Final = frozenset(
    "localhost localdomain local internal intranet lan home corp private invalid test onion"
    " alt".split()
)


class Outbound:
    """Tells where one may go, and goes there.  One per process; close it with `aclose`."""

    def __init__(
        self,
        trusted: Iterable[str] = (),
        *,
        max_connections: int = 64,
        resolver: AbstractResolver | None = None,
    ) -> None:
        """Take the entries of OUTBOUND_HOSTS; raise `ValueError` for one that is no host:port.

        `resolver` replaces the system's for names that are not trusted (tests).
        """
        self._trusted = frozenset(parse_trusted(entry) for entry in trusted)
        self.sessions = GuardedSessions(
            max_connections=max_connections, resolver=resolver
        )

    def check(self, url: str, *, field: str = "url") -> URL:
        """Return the URL as it will be requested.  Raise `OutboundRefused` naming the field.

        Says nothing about where the name leads: connect by `session_for` only.
        """
        if len(url) > LONGEST_URL:
            _refuse(field, f"must have at most {LONGEST_URL} characters")
        matched = _URL.fullmatch(url)
        if matched is None or "\\" in url:
            _refuse(
                field,
                "must be an https:// URL without user name, in ASCII (other characters as "
                "%XX, in the host as xn--)",
            )
        scheme, host = matched["scheme"].lower(), matched["host"].lower()
        port = int(matched["port"] or _PORTS.get(scheme, 0))
        try:
            # Signed URLs must arrive as they are: nothing is decoded or quoted anew.
            target = URL(url.partition("#")[0], encoded=True)
            is_same = (target.raw_host or "").lower() == host.strip("[]")
        except ValueError:
            is_same = False
        if not is_same:
            _refuse(field, "is not a URL")
        if scheme in _PORTS and (host.strip("[]"), port) in self._trusted:
            return target
        if scheme != "https":
            _refuse(field, "must be an https:// URL")
        if port != _PORTS["https"]:
            _refuse(field, "must use port 443")
        if not _may_be_public(host):
            _refuse(field, "must name a host of the public internet")
        return target

    def is_trusted(self, target: URL) -> bool:
        """Tell whether host and port are on the list exactly as written."""
        return ((target.raw_host or "").lower(), target.port) in self._trusted

    async def examine(self, url: str, *, field: str = "url") -> URL:
        """Check the URL and where its name leads now.  Raise `OutboundRefused`.

        A name that cannot be looked up within `LOOKUP_PATIENCE` is let through: it may have an
        address when it is called, and that one is checked then.
        """
        target = self.check(url, field=field)
        if self.is_trusted(target) or _is_literal(target.raw_host or ""):
            return target
        try:
            async with asyncio.timeout(LOOKUP_PATIENCE.total_seconds()):
                await self.sessions.resolver.resolve(target.raw_host or "", 443)
        except AddressRefused:
            _refuse(field, "must name a host of the public internet")
        except (OSError, UnicodeError):
            pass  # TimeoutError is an OSError
        return target

    def session_for(self, target: URL) -> aiohttp.ClientSession:
        """Give the client to call a checked URL with; follow no redirect, send no token of ours.

        It decompresses nothing and has no limit of time but to connect and for silence.
        """
        if self.is_trusted(target):
            return self.sessions.to_trusted
        return self.sessions.to_public

    async def aclose(self) -> None:
        """Close all connections."""
        await self.sessions.aclose()


def _refuse(field: str, text: str) -> NoReturn:
    # Neither the URL nor what its name leads to is repeated: the one may hold a secret, the
    # other is a look into our network.
    raise OutboundRefused(f"{field} {text}.", field=field)


def _may_be_public(host: str) -> bool:
    """Tell whether a host, as written in lower case, can be one of the public internet."""
    if host.startswith("["):
        return is_public(host.strip("[]"))
    labels = host.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        # Four plain decimals or nothing (WHATWG URL, "ends in a number").
        return _is_literal(host) and is_public(host)
    return (
        len(labels) > 1
        and len(host) <= 253
        and all(_LABEL.fullmatch(label) for label in labels)
        and labels[-1] not in _INWARD
        and labels[-2:] != ["home", "arpa"]
    )


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
