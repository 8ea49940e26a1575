"""Errors for people: a page that says what happened and what helps; for htmx, a note.

Status, title and words are those of the JSON API (`app/api/problems.py`).
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from datetime import timedelta
from http import HTTPStatus
from typing import Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from app.api import problems
from app.domain.errors import ServiceError
from app.web.render import is_htmx, page, toast

Prepare = Callable[[Request], Awaitable[None]]
Handler = Callable[[Request, Exception], Awaitable[Response]]

_NOT_PAGES: Final = ("/media/", "/metrics", "/static/", "/openapi.json", "/docs-files/")


def refuse(request: Request, error: ServiceError) -> Response:
    """Answer one of our own errors."""
    problems.note(request, error)
    status, title = problems.look_up(error)
    return _tell(request, status, title, str(error), retry_after=error.retry_after)


def refuse_parameter(request: Request, error: RequestValidationError) -> Response:
    """Answer an address with something wrong in it."""
    first = error.errors()[0]
    text = f"{first['loc'][-1]}: {first['msg']}"
    return _tell(request, 400, "Invalid parameter", text)


def refuse_http(request: Request, error: HTTPException) -> Response:
    """Answer what the framework, or a limit, refuses."""
    status = error.status_code
    title = HTTPStatus(status).phrase
    text = str(error.detail)
    if status == 404:
        title, text = "Not found", "There is nothing at this address."
    response = _tell(request, status, title, text)
    response.headers.update(error.headers or {})
    return response


def _tell(
    request: Request,
    status: int,
    title: str,
    text: str,
    *,
    retry_after: timedelta | None = None,
) -> Response:
    headers = {}
    if retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after.total_seconds())))
    if is_htmx(request):
        return toast(
            request, text, kind="bad", title=title, status=status, headers=headers
        )
    return page(
        request,
        "error.html",
        status,
        headers,
        code=status,
        title=title,
        text=text,
        request_id=request.scope.get("request_id", ""),
    )


# -------------------------------------------------------------- errors outside of our routes


def install(app: FastAPI, prepare: Prepare) -> None:
    """Answer browsers with a page where no route of the pages is to do it.

    An address that leads nowhere, a method no page takes, a crash.  Everybody else, and every
    path of the JSON API, keeps the problem document.
    """
    for kind in (HTTPException, Exception):
        other: Handler = app.exception_handlers[kind]  # type: ignore[assignment]
        app.add_exception_handler(kind, _for_people(prepare, other))


def _for_people(prepare: Prepare, other: Handler) -> Handler:
    async def answer(request: Request, error: Exception) -> Response:
        made = await other(request, error)
        if not _wants_page(request):
            return made
        await prepare(request)
        if isinstance(error, HTTPException):
            return refuse_http(request, error)
        text = (
            "Something went wrong on our side. The number below finds it in the logs."
        )
        return _tell(request, made.status_code, "That should not have happened", text)

    return answer


def _wants_page(request: Request) -> bool:
    """Tell whether a browser asks for something to look at."""
    path = request.url.path
    runtime = getattr(request.app.state, "runtime", None)
    if runtime is None or "text/html" not in request.headers.get("accept", ""):
        return False
    prefix = runtime.settings.api_v1_prefix
    return not path.startswith((f"{prefix}/", *_NOT_PAGES))
