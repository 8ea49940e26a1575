"""What happens around every request: an id, limits, safe headers, a count, a goodbye.

Plain ASGI: the wrappers that come with the framework cost more than our whole handler.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Final

import structlog
from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uuid_utils.compat import uuid7

from app.api.bodies import Arrival
from app.api.problems import on_http_error
from app.api.rates import rate_fields
from app.api.safe_headers import RawHeaders, missing
from app.api.streams import MEDIA_TYPE
from app.runtime import Runtime

# What one request may carry besides its body.
ADDRESS_LIMIT: Final = 8 * 1024  # bytes of path and query
HEADERS_LIMIT: Final = 32 * 1024  # bytes of names and values together
MOST_HEADERS: Final = 100

# A body that no route asked for: waited for before the answer, and swallowed after it, so
# that a client in the middle of sending can still read what it is told.
_SMALL_BODY: Final = 64 * 1024
_SMALL_WAIT: Final = timedelta(milliseconds=100)
_LINGER_BYTES: Final = 1024 * 1024
_LINGER: Final = timedelta(seconds=2)

# Labels of metrics: what a caller can invent must not become one.
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
UNMATCHED = "unmatched"
REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)

_STREAM: Final = (b"content-type", MEDIA_TYPE.encode())
_CLOSE: Final = (b"connection", b"close")
_GOODBYE: Final[Mapping[str, str]] = {"Connection": "close"}


class Envelope:
    """Wraps the app: id in and out, requests bounded, answers made safe, counted by route."""

    def __init__(self, app: ASGIApp, headers: RawHeaders) -> None:
        self._app = app
        self._headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        request_id = _request_id(scope)
        scope["request_id"] = request_id
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        ours = [(b"x-request-id", request_id.encode()), *self._headers]
        answer = _Answer(scope, send, ours, _arrival(scope, receive))
        refusal = _refusal(scope)
        try:
            if refusal is None:
                await self._app(scope, answer.receive, answer.send)
            else:
                response = await on_http_error(Request(scope), refusal)
                await response(scope, answer.receive, answer.send)
        finally:
            ended = answer.streams_since or time.perf_counter()
            self._count(scope, answer.status, ended - began)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        runtime = _runtime_of(scope)
        if runtime is None:
            return
        counters = runtime.counters
        route = _template(scope)
        method = scope["method"] if scope["method"] in METHODS else "other"
        if route == UNMATCHED:
            method = "any"
        counters.add("http_requests", method=method, route=route, code=str(status))
        counters.observe("http_request_seconds", seconds, method=method, route=route)


class _Answer:
    """An answer on its way out, and the body it may leave unread."""

    def __init__(
        self, scope: Scope, send: Send, ours: RawHeaders, arrival: Arrival
    ) -> None:
        self._scope = scope
        self._send = send
        self._ours = ours
        self._arrival = arrival
        self.receive = arrival.receive_next if arrival.is_whole else arrival.receive
        self.status = 500
        # How long somebody listens is no time it took to answer.
        self.streams_since: float | None = None

    async def send(self, message: Message) -> None:
        """Pass a message on; the first one with our headers, the last one with care."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if _STREAM in message.get("headers", ()):
                self.streams_since = time.perf_counter()
            await self._begin(message)
            return
        arrival = self._arrival
        is_last = not message.get("more_body", False)
        if is_last and not arrival.is_whole:
            # The server closes with this answer.  Closing on somebody who still sends takes
            # the answer away from them (RFC 9112, section 9.6): they get a moment.
            await self._send({**message, "more_body": True})
            await arrival.take_in(_LINGER_BYTES, _LINGER)
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def _begin(self, message: Message) -> None:
        arrival = self._arrival
        if not arrival.is_whole and _is_small(self._scope):
            await arrival.take_in(_SMALL_BODY, _SMALL_WAIT)
        ours = [*self._ours, *rate_fields(self._scope)]
        if not arrival.is_whole or _is_stopping(self._scope):
            # Nobody else may come by this connection: it is about to be closed, and an open
            # one would hold the end up.  HTTP/2 has no such header.
            if self._scope["http_version"].startswith("1"):
                ours = [*ours, _CLOSE]
        there = message.get("headers", ())
        await self._send({**message, "headers": [*there, *missing(ours, there)]})


def _arrival(scope: Scope, receive: Receive) -> Arrival:
    """Watch the body, where there is one."""
    has_none = not any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
        for name, value in scope["headers"]
    )
    return Arrival(receive, is_whole=has_none)


def _is_small(scope: Scope) -> bool:
    """Tell whether the body is short by its own word, and on its way without being asked."""
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"")
    is_short = length.isdigit() and len(length) < 20 and int(length) <= _SMALL_BODY
    return is_short and b"expect" not in headers


def _refusal(scope: Scope) -> HTTPException | None:
    """Say what is too large about a request, its body apart."""
    if len(scope.get("raw_path", b"")) + len(scope["query_string"]) > ADDRESS_LIMIT:
        return HTTPException(
            414, f"Path and query must be at most {ADDRESS_LIMIT} bytes.", _GOODBYE
        )
    headers = scope["headers"]
    if len(headers) > MOST_HEADERS:
        return HTTPException(
            431, f"There must be at most {MOST_HEADERS} headers.", _GOODBYE
        )
    if sum(len(name) + len(value) for name, value in headers) > HEADERS_LIMIT:
        return HTTPException(
            431, f"The headers must be at most {HEADERS_LIMIT} bytes.", _GOODBYE
        )
    return None


def _runtime_of(scope: Scope) -> Runtime | None:
    """Give the parts of this process, once they are there."""
    found: Runtime | None = None
    if "app" in scope:
        found = getattr(scope["app"].state, "runtime", None)
    return found


def _is_stopping(scope: Scope) -> bool:
    """Tell whether to part with every client."""
    runtime = _runtime_of(scope)
    return runtime is not None and runtime.stopping.is_set()


def _request_id(scope: Scope) -> str:
    """Take the caller's id if it is harmless, else make one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given: str = value.decode("latin-1")
            if REQUEST_ID.fullmatch(given):
                return given
    return uuid7().hex


def _template(scope: Scope) -> str:
    """Give the route as it is documented, `/api/v1/status/{job_id}`, never the raw path.

    A route knows its path below the prefix it was included with; the prefix is what the
    request's path has in front of it.
    """
    path_format = getattr(scope.get("route"), "path_format", None)
    if path_format is None:
        return UNMATCHED
    path: str = scope["path"]
    own = path_format.format(**scope["path_params"])
    prefix = path.removesuffix(own) if path.endswith(own) else ""
    return f"{prefix}{path_format}"
