"""Downloads output files from where we trust, and from nowhere else.

A model's output is text chosen by somebody else's program.  So: only listed hosts, https on
port 443, addresses checked when the socket is made, redirects followed only on the list, a
cap on bytes, a total deadline and a minimum speed.  No token, no cookie is ever sent.

Answers and what becomes of them:

| answer | raises |
|---|---|
| host, scheme, port, address or redirect off the list | `OutputForbidden` |
| 404, 410 | `OutputGone` |
| 401, 403, 429, 5xx, any other status | `OutputInterrupted`: a fresh look at the prediction may
  bring a freshly signed URL, and buckets answer 403 for objects not there yet |
| connection lost, too slow, shorter than announced | `OutputInterrupted` |
| larger than the cap, unreadable data URI | `OutputInvalid` |
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol
from urllib.parse import unquote_to_bytes

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from app.core.guarded_http import GuardedSessions, was_refused
from app.domain.errors import (
    OutputForbidden,
    OutputGone,
    OutputInterrupted,
    OutputInvalid,
)

OnRequest = Callable[[str, str, float], None]

_MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 64 * 1024
_HEADERS = {
    # What is counted and capped must be what was sent: no compression.  An answer that is
    # compressed all the same is passed on as it is, and then is no picture.
    "Accept-Encoding": "identity",
    "Accept": "*/*",
}


@dataclass(frozen=True, slots=True)
class DownloadLimits:
    """What one download may cost.

    `slowest` bytes a second are asked for in every `window` spent waiting for the network;
    a consumer that is slow itself is not held against the sender.
    """

    max_bytes: int
    total: timedelta = timedelta(seconds=120)
    idle: timedelta = timedelta(seconds=15)
    slowest: int = 16 * 1024
    window: timedelta = timedelta(seconds=10)


class Hosts(Protocol):
    """Where one may download from."""

    def check(self, url: str) -> URL:
        """Return the URL as it will be requested, or raise a `ServiceError`."""
        ...

    def is_trusted(self, target: URL) -> bool:
        """Tell whether any address will do, instead of public ones only."""
        ...


def ignore_request(operation: str, code: str, seconds: float) -> None:
    """Count nothing: the default where no metrics are wanted."""


class Downloader:
    """Stream output files from the listed hosts, each within its limits."""

    def __init__(
        self,
        hosts: Hosts,
        limits: DownloadLimits,
        *,
        max_redirects: int = _MAX_REDIRECTS,
        max_connections: int = 64,
        user_agent: str = "media-generation-service",
        on_request: OnRequest = ignore_request,
        resolver: AbstractResolver | None = None,
        sessions: GuardedSessions | None = None,
    ) -> None:
        """Open nothing yet; `resolver` replaces the system's for listed domains (tests).

        `sessions` are used instead of own ones, and closed with the rest.
        """
        self._hosts = hosts
        self._limits = limits
        self._max_redirects = max_redirects
        self._on_request = on_request
        self._sessions = sessions or GuardedSessions(
            max_connections=max_connections,
            user_agent=user_agent,
            idle=limits.idle,
            resolver=resolver,
        )
        self._closed = False

    async def download(self, url: str) -> AsyncGenerator[bytes, None]:
        """Yield the file's bytes.  Raise an `OutputError`; see the table of this module."""
        if url[:5].lower() == "data:":
            for chunk in _decode_data_uri(url, self._limits.max_bytes):
                yield chunk
            return
        started = time.perf_counter()
        code = "cancelled"
        try:
            async with aclosing(self._fetch(url)) as chunks:
                async for chunk in chunks:
                    yield chunk
            code = "200"
        except (
            OutputForbidden,
            OutputGone,
            OutputInterrupted,
            OutputInvalid,
        ) as exc:
            code = type(exc).__name__
            raise
        finally:
            self._on_request("download", code, time.perf_counter() - started)

    async def aclose(self) -> None:
        """Close all connections; later downloads are refused as interrupted."""
        self._closed = True
        await self._sessions.aclose()

    async def _fetch(self, url: str) -> AsyncGenerator[bytes, None]:
        deadline = time.monotonic() + self._limits.total.total_seconds()
        response = await self._open(url, deadline)
        try:
            self._believe_headers(response)
            async with aclosing(self._read(response, deadline)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            response.close()  # harmless when the answer was read to its end

    async def _open(self, url: str, deadline: float) -> aiohttp.ClientResponse:
        """Send the GET, and again for each redirect that stays on the list."""
        target = self._hosts.check(url)
        for _ in range(self._max_redirects + 1):
            response = await self._get(target, deadline)
            if response.status not in _REDIRECTS:
                return response
            location = response.headers.get("Location", "")
            response.close()
            if self._max_redirects == 0:
                # Where it leads is not even looked at.
                raise OutputForbidden("the address redirects elsewhere")
            try:
                onward = target.join(URL(location, encoded=True))
            except ValueError as exc:
                raise OutputForbidden("the redirect is not a URL") from exc
            if not location:
                raise OutputInterrupted("a redirect without a target")
            target = self._hosts.check(str(onward))
        raise OutputForbidden("the address redirects too often")

    async def _get(self, target: URL, deadline: float) -> aiohttp.ClientResponse:
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await self._session_for(target).get(
                    target, headers=_HEADERS, allow_redirects=False
                )
        except (aiohttp.ClientError, OSError) as exc:
            if was_refused(exc):
                raise OutputForbidden(
                    f"{target.host} points to an address we do not download from"
                ) from exc
            raise OutputInterrupted(
                f"no answer from {target.host}: {type(exc).__name__}"
            ) from exc

    def _believe_headers(self, response: aiohttp.ClientResponse) -> None:
        host, status = response.url.host, response.status
        if status in (404, 410):
            raise OutputGone(f"{host} does not have the file (any more)")
        if status != 200:
            raise OutputInterrupted(f"{host} answered {status}")
        length = response.content_length
        if length is not None and length > self._limits.max_bytes:
            raise OutputInvalid(f"the file has {length} bytes, more than we accept")

    async def _read(
        self, response: aiohttp.ClientResponse, deadline: float
    ) -> AsyncGenerator[bytes, None]:
        received = 0
        pace = Pace(self._limits)
        while True:
            before = time.monotonic()
            try:
                async with asyncio.timeout(deadline - before):
                    chunk = await response.content.readany()
            except (aiohttp.ClientError, OSError) as exc:
                # TimeoutError is an OSError: the deadline, or no byte for `idle`.
                raise OutputInterrupted(
                    f"the transfer broke off after {received} bytes: {type(exc).__name__}"
                ) from exc
            if not chunk:
                break
            received += len(chunk)
            if received > self._limits.max_bytes:
                raise OutputInvalid("the file is larger than we accept")
            if pace.is_too_slow(len(chunk), time.monotonic() - before):
                raise OutputInterrupted("the transfer is too slow")
            yield chunk
        announced = response.content_length
        if announced is not None and received != announced:
            raise OutputInterrupted(f"{received} of {announced} bytes arrived")

    def _session_for(self, target: URL) -> aiohttp.ClientSession:
        """Use one pool for listed domains, another for entries trusted as written."""
        if self._closed:
            raise OutputInterrupted("the downloads are closed")
        if self._hosts.is_trusted(target):
            return self._sessions.to_trusted
        return self._sessions.to_public


class Pace:
    """Tell when a transfer brings too little, over a window that slides with the reading."""

    def __init__(self, limits: DownloadLimits) -> None:
        self._window = limits.window.total_seconds()
        self._least = limits.slowest * self._window
        self._reads: deque[tuple[float, int]] = deque()
        self._seconds = 0.0
        self._bytes = 0

    def is_too_slow(self, size: int, seconds: float) -> bool:
        """Note `size` bytes that took `seconds`; judge once a whole window has passed."""
        self._reads.append((seconds, size))
        self._seconds += seconds
        self._bytes += size
        while self._seconds - self._reads[0][0] >= self._window:
            first_seconds, first_size = self._reads.popleft()
            self._seconds -= first_seconds
            self._bytes -= first_size
        return self._seconds >= self._window and self._bytes < self._least


def _decode_data_uri(uri: str, max_bytes: int) -> Iterator[bytes]:
    """Yield the bytes of an RFC 2397 URI; its media type is not looked at."""
    head, comma, payload = uri.partition(",")
    if not comma:
        raise OutputInvalid("the data URI has no data")
    is_base64 = head.lower().endswith(";base64")
    # Base64 makes four characters of three bytes, percent-encoding at most three of one.
    if len(payload) > (max_bytes * 4 // 3 + 4 if is_base64 else max_bytes * 3):
        raise OutputInvalid("the file is larger than we accept")
    content = unquote_to_bytes(payload)
    if is_base64:
        try:
            content = base64.b64decode(content, validate=True)
        except binascii.Error as exc:
            raise OutputInvalid("the data URI is not valid base64") from exc
    if len(content) > max_bytes:
        raise OutputInvalid("the file is larger than we accept")
    for start in range(0, len(content), _CHUNK):
        end = start + _CHUNK
        yield content[start:end]
