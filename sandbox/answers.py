"""How the sandbox answers: JSON, problems in Replicate's forms, and spoilt answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import orjson
from aiohttp import web

from sandbox.catalogue import Complaint
from sandbox.config import SandboxConfig
from sandbox.faults import Strike

CONFIG: web.AppKey[SandboxConfig] = web.AppKey("config", SandboxConfig)
HTML = (
    "<html>\n<head><title>{status}</title></head>\n<body>\n"
    "<center><h1>{status} Bad Gateway</h1></center>\n<hr><center>cloudflare</center>\n"
    "</body>\n</html>\n"
)


def base_url(request: web.Request) -> str:
    """Return the start of every URL in an answer: as configured, else as it was asked."""
    given = request.app[CONFIG].public_url
    return given or f"{request.scheme}://{request.host}"


def reply(
    body: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """Answer JSON."""
    return web.Response(
        body=orjson.dumps(body),
        status=status,
        headers=headers,
        content_type="application/json",
    )


def problem(
    status: int,
    detail: str,
    *,
    title: str | None = None,
    headers: Mapping[str, str] | None = None,
    **more: Any,
) -> web.Response:
    """Answer an error: ``detail`` and ``status`` always, ``title`` often."""
    body = {"detail": detail, "status": status, **more}
    if title is not None:
        body["title"] = title
    return reply(body, status, headers)


def unauthenticated() -> web.Response:
    """Answer 401, the one that comes as problem+json (recorded 2023)."""
    body = {
        "title": "Unauthenticated",
        "detail": "You did not pass a valid authentication token",
        "status": 401,
    }
    return web.Response(
        body=orjson.dumps(body), status=401, content_type="application/problem+json"
    )


def not_found() -> web.Response:
    """Answer 404."""
    return problem(404, "The requested resource could not be found.", title="Not found")


def no_credit() -> web.Response:
    """Answer 402; the newline at the end is Replicate's (pasted by users)."""
    return problem(
        402,
        "You have insufficient credit to run this model. Go to "
        "https://replicate.com/account/billing#billing to purchase credit.\n",
        title="Insufficient credit",
    )


def throttled(
    retry_after: int, headers: Mapping[str, str] | None = None
) -> web.Response:
    """Answer 429; nothing was created."""
    return problem(
        429,
        f"Request was throttled. Your rate limit resets in ~{retry_after}s.",
        headers={"retry-after": str(retry_after), **(headers or {})},
        retry_after=retry_after,
    )


def invalid(complaints: list[Complaint]) -> web.Response:
    """Answer 422 with one line and one entry for each complaint."""
    return problem(
        422,
        "".join(f"{complaint.line()}\n" for complaint in complaints),
        title="Input validation failed",
        invalid_fields=[
            {"type": c.kind, "field": c.field, "description": c.description}
            for c in complaints
        ],
    )


def spoilt(strike: Strike) -> web.Response:
    """Answer the error that a fault asks for."""
    status = int(strike.params["status"])
    kind = strike.params["body"]
    if kind == "json":
        return problem(status, "Internal server error")
    bodies = {
        "html": HTML.format(status=status),
        "text": "upstream error\n",
        "empty": "",
    }
    return web.Response(
        text=bodies.get(str(kind), ""),
        status=status,
        content_type="text/html" if kind == "html" else "text/plain",
    )


async def pause(strike: Strike) -> None:
    """Wait as long as a fault asks for."""
    await asyncio.sleep(float(strike.params["seconds"]))


def drop_connection(request: web.Request) -> web.Response:
    """Close the connection without an answer; what is returned is never sent."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=500)


async def cut_short(
    request: web.Request, body: bytes, *, sent: int, **kw: Any
) -> web.StreamResponse:
    """Promise the whole body, send the first bytes and close the connection."""
    response = web.StreamResponse(**kw)
    response.content_length = len(body)
    await response.prepare(request)
    await response.write(body[:sent])
    if request.transport is not None:
        request.transport.close()
    return response
