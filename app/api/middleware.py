"""What happens around every request: an id, a size limit, a count, a goodbye when stopping.

Plain ASGI: the wrappers that come with the framework cost more than our whole handler.
"""

from __future__ import annotations

import re
import time

import structlog
from fastapi import Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uuid_utils.compat import uuid7

from app.api.rates import rate_fields
from app.runtime import Runtime

BODY_LIMIT = 256 * 1024
# Labels of metrics: what a caller can invent must not become one.
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
UNMATCHED = "unmatched"
REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class Envelope:
    """Wraps the app: request id in and out, bodies bounded, requests counted by route."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        request_id = _request_id(scope)
        scope["request_id"] = request_id
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        status = 500

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                ours = [(b"x-request-id", request_id.encode()), *rate_fields(scope)]
                if _is_stopping(scope):
                    # Nobody else may come by this connection: it is about to be closed,
                    # and an open one would hold the end up.
                    ours.append((b"connection", b"close"))
                message["headers"] = [*message["headers"], *ours]
            await send(message)

        try:
            await self._app(scope, receive, tell)
        finally:
            self._count(scope, status, time.perf_counter() - began)

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


def _runtime_of(scope: Scope) -> Runtime | None:
    """Give the parts of this process, once they are there."""
    found: Runtime | None = None
    if "app" in scope:
        found = getattr(scope["app"].state, "runtime", None)
    return found


def _is_stopping(scope: Scope) -> bool:
    """Tell whether to part with this client; HTTP/2 has no such header."""
    runtime = _runtime_of(scope)
    if runtime is None or not scope["http_version"].startswith("1"):
        return False
    return runtime.stopping.is_set()


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


def _declared_length(headers: Headers) -> int:
    text = headers.get("content-length", "")
    return int(text) if text.isdigit() and len(text) < 20 else 0


async def read_body(request: Request, *, limit: int = BODY_LIMIT) -> bytes:
    """Read the body, whatever its header said about the length, up to the limit in bytes.

    Past it the answer is 413; 400 for a body that breaks off.
    """
    too_large = HTTPException(413, f"The body must be at most {limit} bytes.")
    chunks: list[bytes] = []
    size = 0
    if _declared_length(request.headers) > limit:
        raise too_large
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise too_large
            chunks.append(chunk)
    except ClientDisconnect as error:
        raise HTTPException(400, "The body did not arrive whole.") from error
    return b"".join(chunks)
