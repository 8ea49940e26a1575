"""Which hosts and addresses outputs may come from: checked on the URL and on the socket.

Names can be made to point anywhere, and at any moment anew.  The check that counts is
therefore the one on the address a socket is about to connect to (as svix-webhooks does in
`server/svix-server/src/core/webhook_http_client.rs`, at resolution).
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from yarl import URL

from app.domain.errors import OutputForbidden

_HTTPS_PORT = 443
_IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# Not public, and not (in every Python we support) known as such to `ipaddress`.
_ALSO_REFUSED = tuple(
    ipaddress.ip_network(text)
    for text in (
        "100.64.0.0/10",  # carrier-grade NAT, RFC 6598; some clouds' metadata
        "168.63.129.16/32",  # Azure's host services, a public address by number
        "192.0.0.0/24",  # IETF protocol assignments, RFC 6890; Oracle's metadata
        "192.88.99.0/24",  # 6to4 relays, RFC 7526
        "198.18.0.0/15",  # benchmarks, RFC 2544
        "64:ff9b:1::/48",  # local NAT64, RFC 8215
        "fec0::/10",  # site-local, RFC 3879
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: an IPv4 address at the end


class AddressRefused(OSError):
    """A name or URL led to an address that is not public."""


def is_public(address: str) -> bool:
    """Tell whether an IP address is an ordinary host on the internet.

    Addresses that carry an IPv4 address inside (mapped, 6to4, NAT64) count as that one.
    """
    try:
        ip: _IPAddress = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        ip = _embedded_ipv4(ip) or ip
    if any(ip in network for network in _ALSO_REFUSED if network.version == ip.version):
        return False
    return ip.is_global and not (
        ip.is_multicast
        or ip.is_reserved
        or ip.is_unspecified
        or ip.is_loopback
        or ip.is_link_local
    )


def _embedded_ipv4(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour


@dataclass(frozen=True, slots=True)
class OutputHosts:
    """Where outputs may be downloaded from.

    `domains`: the host itself and its subdomains, https on port 443, public addresses only.
    `trusted`: (host, port) as written, plain http and any address included.
    """

    domains: frozenset[str]
    trusted: frozenset[tuple[str, int]]

    @classmethod
    def parse(cls, entries: Iterable[str]) -> OutputHosts:
        """Read the entries of OUTPUT_HOSTS: `replicate.delivery`, `localhost:9009`.

        Raise `ValueError` naming an entry that is neither.
        """
        domains: set[str] = set()
        trusted: set[tuple[str, int]] = set()
        for entry in entries:
            try:
                url = URL(f"//{entry}", encoded=True)
                host, port = url.raw_host, url.explicit_port
            except ValueError:
                host = port = None
            is_whole = host is not None and url.raw_authority == entry
            if not host or not is_whole or re.search(r"[@\\\s]", entry):
                raise ValueError(f"{entry!r} is not a host or host:port")
            if port is None:
                domains.add(_canonical(host))
            else:
                trusted.add((_canonical(host), port))
        return cls(frozenset(domains), frozenset(trusted))

    def check(self, url: str) -> URL:
        """Return the URL as it will be requested.  Raise `OutputForbidden`."""
        if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
            raise OutputForbidden("the output's URL has characters a URL cannot have")
        try:
            # Signed URLs must arrive as they are: nothing is decoded or quoted anew.
            target = URL(url, encoded=True)
            host = _canonical(target.raw_host or "")
        except ValueError as exc:
            raise OutputForbidden("the output's URL is not a URL") from exc
        if target.scheme not in ("https", "http") or not host:
            raise OutputForbidden("the output's URL is neither https nor http")
        if target.user is not None or target.password is not None:
            raise OutputForbidden("the output's URL carries a user name")
        if self.is_trusted(target):
            return target
        if target.scheme != "https" or target.port != _HTTPS_PORT:
            raise OutputForbidden(f"{host} must be https on port 443")
        if not any(host == d or host.endswith("." + d) for d in self.domains):
            raise OutputForbidden(f"{host} is not a host we download from")
        return target

    def is_trusted(self, target: URL) -> bool:
        """Tell whether host and port are on the list exactly as written."""
        return (_canonical(target.raw_host or ""), target.port) in self.trusted


def _canonical(host: str) -> str:
    return host.casefold().rstrip(".")


def guarded_connector(
    limit: int, resolver: AbstractResolver | None
) -> aiohttp.TCPConnector:
    """Make a connector that opens sockets to public addresses only."""
    return aiohttp.TCPConnector(
        limit=limit,
        resolver=_GuardedResolver(resolver or ThreadedResolver()),
        socket_factory=_open_public_socket,
    )


class _GuardedResolver(AbstractResolver):
    """Refuse a name altogether when any of its addresses is not public."""

    def __init__(self, inner: AbstractResolver) -> None:
        self._inner = inner

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_INET,
    ) -> list[ResolveResult]:
        """Look the name up and check every address."""
        found = await self._inner.resolve(host, port, family)
        if not all(is_public(result["host"]) for result in found):
            raise AddressRefused("the name points to an address that is not public")
        return found

    async def close(self) -> None:
        """Close the resolver below."""
        await self._inner.close()


def _open_public_socket(info: aiohttp.AddrInfoType) -> socket.socket:
    """Make the socket for one address, the last moment it can be refused.

    The only check that a literal address in a URL meets: no name is looked up for it.
    """
    family, kind, protocol, _, address = info
    if not is_public(str(address[0])):
        raise AddressRefused("the address is not public")
    return socket.socket(family=family, type=kind, proto=protocol)
