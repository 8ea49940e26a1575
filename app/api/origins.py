"""Where a browser says a request comes from, and whether that is a page of ours.

Keys protect by themselves: no other site has them.  While none are demanded, whatever a visited
page can send to this address would be done; so writes are looked at.  Programs say nothing of an
origin, and are not meant.
"""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import SplitResult, urlsplit

from fastapi import Request

from app.core.config import Settings

_SAFE = frozenset(("GET", "HEAD", "OPTIONS"))


def is_ours(request: Request, settings: Settings) -> bool:
    """Tell whether nothing speaks against that a page of ours, or no page at all, sent it."""
    said = request.headers.get("sec-fetch-site")
    if said is not None and said not in ("same-origin", "none"):
        return False
    origin = request.headers.get("origin")
    if origin is None:
        return True
    parts, public = _split(origin), _split(settings.public_base_url or "")
    if public.netloc and parts.netloc == public.netloc:
        return True
    return bool(parts.netloc) and parts.netloc == request.url.netloc


def may_write(request: Request, settings: Settings) -> bool:
    """Tell whether to do what a browser asks for on behalf of nobody in particular.

    A name that anybody may have pointed at our address makes a foreign page look like one of ours
    (DNS rebinding): it is believed when it is none that others can point, or was named to us.
    """
    if request.method in _SAFE:
        return True
    origin = request.headers.get("origin")
    if origin is not None and origin in settings.cors_origins:
        return True
    if not is_ours(request, settings):
        return False
    if origin is None:
        return True
    parts, public = _split(origin), _split(settings.public_base_url or "")
    is_named = bool(public.netloc) and parts.netloc == public.netloc
    return is_named or _is_nobodys(parts.hostname or "")


def _is_nobodys(host: str) -> bool:
    """Tell whether no stranger can have the host's name resolve to where they like."""
    if "." not in host or host.endswith(".localhost"):
        return True  # a name of this machine, or of its own network
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.hostname
    except ValueError:  # as `http://[`
        return urlsplit("")
    return parts
