"""Where stored files are found: the addresses callers and the provider are given.

While no keys are demanded, a file's address is its hash.  Else only public files have such a
plain address; a private one's is signed when it is read, and stops to work by itself.  Links
are never stored and never logged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

from app.core.links import LinkSigner

MEDIA_PREFIX = "/media/"
WIDTH = "w"  # asks for a thumbnail


@dataclass(frozen=True, slots=True)
class Addresses:
    """How files are named in one answer: all links in it end together."""

    base: str
    _signer: LinkSigner | None
    _end: int

    def path(self, key: str, *, is_public: bool, width: int | None = None) -> str:
        """Give the path of a file or its thumbnail, with what opens it when it is private.

        What opens a file opens its thumbnails: the width is not signed.
        """
        path = MEDIA_PREFIX + key
        if not is_public and self._signer is not None:
            path = self._signer.sign(path, self._end)
        if width is None:
            return path
        return f"{path}{'&' if '?' in path else '?'}{WIDTH}={width}"

    def url(self, key: str, *, is_public: bool, width: int | None = None) -> str:
        """Give the address of a file: absolute where our own is known."""
        return self.base + self.path(key, is_public=is_public, width=width)

    def mark(self, *, is_public: bool) -> str | None:
        """Name the links an answer gets now; None: they never change."""
        if is_public or self._signer is None:
            return None
        return self._signer.mark(self._end)


class MediaLinks:
    """Gives the addresses of files, and checks signed ones."""

    def __init__(
        self, signer: LinkSigner, *, public_base_url: str | None, is_guarded: bool
    ) -> None:
        """`is_guarded` tells whether private files are private: keys are demanded."""
        self._signer = signer
        self._base = public_base_url or ""
        self.is_guarded = is_guarded

    def now(self) -> Addresses:
        """Fix the end of the links of one answer."""
        signer = self._signer if self.is_guarded else None
        return Addresses(self._base, signer, self._signer.end())

    def link_of(self, key: str, lifetime: timedelta) -> str | None:
        """Give an absolute address of a file that works for a while without a key.

        For the provider, who fetches inputs.  None without PUBLIC_BASE_URL.
        """
        if not self._base:
            return None
        return self._base + self._signer.sign_for(MEDIA_PREFIX + key, lifetime)

    def seconds_left(self, key: str, query: Iterable[tuple[str, str]]) -> int | None:
        """Say how long the query still opens the file; None: it does not."""
        return self._signer.seconds_left(MEDIA_PREFIX + key, query)
