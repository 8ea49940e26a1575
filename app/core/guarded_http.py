"""HTTP clients for addresses somebody else chose: they connect to the public internet only.

Names can be made to point anywhere, and at any moment anew.  The check that counts is
therefore the one on the address a socket is about to connect to (as svix-webhooks does in
`server/svix-server/src/core/webhook_http_client.rs`, at resolution).
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

_IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

CONNECT = timedelta(seconds=5)
_LOOKUPS = 8  # at once: strangers' name servers may take half a minute

# Not public, and not (in every Python we support) known as such to `ipaddress`.
_ALSO_REFUSED = tuple(
    ipaddress.ip_network(text)
    for text in (
        "100.64.0.0/10",  # carrier-grade NAT, RFC 6598; some clouds' metadata
        "168.63.129.16/32",  # Azure's host services, a public address by number
        "192.0.0.0/24",  # IETF protocol assignments, RFC 6890; Oracle's metadata
        "192.88.99.0/24",  # 6to4 relays, RFC 7526
        "198.18.0.0/15",  # benchmarks, RFC 2544
        "::/96",  # IPv4-compatible, RFC 4291
        "64:ff9b:1::/48",  # local NAT64, RFC 8215
        "2001::/23",  # IETF protocol assignments, Teredo among them, RFC 2928
        "3fff::/20",  # documentation, RFC 9637
        "5f00::/16",  # segment routing, RFC 9602
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


class GuardedSessions:
    """Two pools of connections: one to public addresses only, one to whatever is trusted.

    Both keep no cookie, use no proxy and decompress nothing; what they send, they send to the
    host that was asked for.  Opened on first use, in that loop.
    """

    def __init__(
        self,
        *,
        max_connections: int,
        user_agent: str = "media-generation-service",
        idle: timedelta = timedelta(seconds=15),
        resolver: AbstractResolver | None = None,
    ) -> None:
        """`idle` ends a request that brings no byte; `resolver` replaces the system's (tests)."""
        self._max_connections = max_connections
        self._user_agent = user_agent
        self._idle = idle
        self._resolver = resolver
        self._guarded: GuardedResolver | None = None
        self._to_public: aiohttp.ClientSession | None = None
        self._to_trusted: aiohttp.ClientSession | None = None

    @property
    def resolver(self) -> GuardedResolver:
        """Look names up as connections to the public do."""
        if self._guarded is None:
            self._guarded = GuardedResolver(self._resolver or _SeparateResolver())
        return self._guarded

    @property
    def to_public(self) -> aiohttp.ClientSession:
        """Connect to public addresses; raises `AddressRefused`, wrapped by aiohttp, for others."""
        if self._to_public is None:
            connector = aiohttp.TCPConnector(
                limit=self._max_connections,
                resolver=self.resolver,
                socket_factory=_open_public_socket,
            )
            self._to_public = self._new(connector)
        return self._to_public

    @property
    def to_trusted(self) -> aiohttp.ClientSession:
        """Connect to any address."""
        if self._to_trusted is None:
            connector = aiohttp.TCPConnector(limit=self._max_connections)
            self._to_trusted = self._new(connector)
        return self._to_trusted

    async def aclose(self) -> None:
        """Close all connections."""
        for session in (self._to_public, self._to_trusted):
            if session is not None:
                await session.close()
        if self._guarded is not None:
            await self._guarded.close()

    def _new(self, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,  # a proxy would look up the names, behind our checks
            headers={"User-Agent": self._user_agent},
            timeout=aiohttp.ClientTimeout(
                total=None,
                sock_connect=CONNECT.total_seconds(),
                sock_read=self._idle.total_seconds(),
            ),
        )


def was_refused(error: BaseException) -> bool:
    """Find our refusal of an address below what aiohttp made of it."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, AddressRefused):
            return True
        link = link.__cause__
    return False


class GuardedResolver(AbstractResolver):
    """Refuse a name altogether when any of its addresses is not public."""

    def __init__(self, inner: AbstractResolver) -> None:
        self._inner = inner

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_UNSPEC,
    ) -> list[ResolveResult]:
        """Look the name up and check every address; raise `AddressRefused`, or `OSError`."""
        found = await self._inner.resolve(host, port, family)
        if not all(is_public(result["host"]) for result in found):
            raise AddressRefused("the name points to an address that is not public")
        return found

    async def close(self) -> None:
        """Close the resolver below."""
        await self._inner.close()


class _SeparateResolver(AbstractResolver):
    """The system's resolver in threads of its own.

    In the loop's own threads a stranger's slow name server would hold up everybody's look-ups.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_LOOKUPS, "outbound-names")

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_UNSPEC,
    ) -> list[ResolveResult]:
        """Look the name up; raise `OSError`."""
        loop = asyncio.get_running_loop()
        rows = await loop.run_in_executor(
            self._threads, _look_up, host, port, int(family)
        )
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=kind,
                proto=protocol,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for kind, protocol, address in rows
        ]

    async def close(self) -> None:
        """Start no further look-up."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _look_up(host: str, port: int, family: int) -> list[tuple[int, int, str]]:
    found = socket.getaddrinfo(
        host, port, family, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
    )
    return [(kind, protocol, str(to[0])) for kind, _, protocol, _, to in found]


def _open_public_socket(info: aiohttp.AddrInfoType) -> socket.socket:
    """Make the socket for one address, the last moment it can be refused.

    The only check that a literal address in a URL meets: no name is looked up for it.
    """
    family, kind, protocol, _, address = info
    if not is_public(str(address[0])):
        raise AddressRefused("the address is not public")
    return socket.socket(family=family, type=kind, proto=protocol)
