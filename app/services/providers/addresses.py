"""Which hosts outputs may come from: checked on the URL, and again on the socket."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from yarl import URL

from app.domain.errors import OutputForbidden

_HTTPS_PORT = 443


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
