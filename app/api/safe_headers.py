"""Headers that keep browsers from doing anything odd with an answer: made once, as bytes.

An answer that says something of its own about one of them (pictures, the documentation) is
left with what it says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

RawHeaders = Sequence[tuple[bytes, bytes]]

CSP: Final = "content-security-policy"

_ALWAYS: Final[Mapping[str, str]] = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    CSP: "default-src 'none'; frame-ancestors 'none'",
}
# Of this host alone: what runs under the domain beside us is not ours to decide.
_TLS_ONLY: Final = ("strict-transport-security", "max-age=31536000")


def safe_headers(public_base_url: str | None) -> RawHeaders:
    """Give the headers of every answer; https is insisted on where it is known to be there."""
    headers = dict(_ALWAYS)
    if public_base_url is not None and public_base_url.startswith("https://"):
        headers |= [_TLS_ONLY]
    return tuple((name.encode(), value.encode()) for name, value in headers.items())


def missing(ours: RawHeaders, there: RawHeaders) -> RawHeaders:
    """Give those of ours that the answer does not bring itself."""
    names = {name.lower() for name, _ in there}
    return [pair for pair in ours if pair[0] not in names]
