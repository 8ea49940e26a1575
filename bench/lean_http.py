"""An HTTP server for `bench.provider`: a request comes whole, the answer leaves in one piece.

A comfortable framework costs more CPU per request than the client that is measured.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast
from urllib.parse import parse_qs

import httptools


class Asked(NamedTuple):
    """One request."""

    method: str
    path: str
    query: Mapping[str, str]
    prefer: str
    body: bytes


class Answer(NamedTuple):
    """One answer; with `after` it is made that many seconds later."""

    status: int
    body: bytes
    content_type: str = "application/json"
    after: float = 0.0
    late: Callable[[], bytes] | None = None


class Connection(asyncio.Protocol):
    """One connection, one request at a time (no client of ours sends the next one early)."""

    def __init__(self, answer: Callable[[Asked], Answer]) -> None:
        self._answer = answer
        self._parser = httptools.HttpRequestParser(self)
        self._begin()

    def _begin(self) -> None:
        self._url, self._body, self._prefer = b"", b"", ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop has its own class

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    # What the parser calls.

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"prefer":
            self._prefer = value.decode()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        path, _, query = self._url.decode().partition("?")
        answer = self._answer(
            Asked(
                self._parser.get_method().decode(),
                path,
                {name: values[0] for name, values in parse_qs(query).items()},
                self._prefer,
                self._body,
            )
        )
        self._begin()
        if answer.late is None:
            self._send(answer.status, answer.content_type, answer.body)
        else:
            loop = asyncio.get_running_loop()
            loop.call_later(answer.after, self._send_late, answer.status, answer.late)

    def _send_late(self, status: int, make: Callable[[], bytes]) -> None:
        if not self._transport.is_closing():
            self._send(status, "application/json", make())

    def _send(self, status: int, content_type: str, body: bytes) -> None:
        head = (
            f"HTTP/1.1 {status} Answer\r\nContent-Type: {content_type}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._transport.writelines((head.encode(), body))
