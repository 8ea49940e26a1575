"""Forms of the pages: believed when a page of ours sent them, and read within bounds."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Final, TypeVar

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.formparsers import FormParser, MultiPartException, MultiPartParser

from app.api.bodies import BODY_LIMIT, timed_chunks
from app.api.guard import demand_origin
from app.api.origins import is_ours
from app.domain.errors import Forbidden
from app.runtime import Runtime
from app.web.cookies import holder_of
from app.web.sessions import Sessions

TOKEN_FIELD: Final = "csrf_token"
TOKEN_HEADER: Final = "x-csrf-token"

_MOST_FIELDS: Final = 200
_LONGEST_FIELD: Final = 64 * 1024  # bytes
_FULL_FILES: Final = (
    5  # of the largest size, in one form: they lie on the disk meanwhile
)
_FORMS: Final = ("application/x-www-form-urlencoded", "multipart/form-data")

F = TypeVar("F", bound=Callable[..., Any])


def takes_files(*, most: int) -> Callable[[F], F]:
    """Say that a form may bring so many files; together, five times MAX_UPLOAD_BYTES."""

    def mark(endpoint: F) -> F:
        endpoint.__dict__["most_files"] = most
        return endpoint

    return mark


def form_of(request: Request) -> FormData:
    """Give the form of a POST; the route has read it."""
    form: FormData = request.scope["form"]
    return form


def text_of(form: FormData, name: str) -> str:
    """Give a field as text: its last value, and nothing for one that is missing."""
    values = [one for one in form.getlist(name) if isinstance(one, str)]
    return values[-1] if values else ""


async def take_form(request: Request, most_files: int) -> None:
    """Read the form of a POST for `form_of`; raise `Forbidden` unless a page of ours sent it."""
    _demand_origin(request)
    token = request.headers.get(TOKEN_HEADER)
    if token is not None:
        _demand_token(request, token)
    form = request.scope["form"] = await _read_form(request, most_files)
    if token is None:
        _demand_token(request, text_of(form, TOKEN_FIELD))


def _demand_origin(request: Request) -> None:
    """Refuse what a browser says comes from elsewhere."""
    runtime: Runtime = request.app.state.runtime
    if not is_ours(request, runtime.settings):
        raise _forged("It was sent from another site.")
    if not runtime.gatekeeper.demands_keys:
        demand_origin(request, runtime)


def _demand_token(request: Request, token: str) -> None:
    sessions: Sessions = request.app.state.sessions
    holder = holder_of(request)
    if holder is None or not sessions.is_token(token, holder):
        raise _forged("The page it was sent from is too old, or not one of ours.")


def _forged(reason: str) -> Forbidden:
    return Forbidden(
        f"{reason} Nothing was done: reload the page and try again.",
        code="form_refused",
    )


async def _read_form(request: Request, most_files: int) -> FormData:
    given, options = parse_options_header(request.headers.get("content-type"))
    kind = given.decode("latin-1").strip().lower()
    if options.get(b"charset", b"utf-8").lower() != b"utf-8":
        raise HTTPException(415, "Send the form in UTF-8.")
    if kind not in _FORMS:
        if not request.headers.get("content-length", "0").strip("0"):
            return FormData()  # a button of htmx with nothing to say
        raise HTTPException(415, "Send a form.")
    most = BODY_LIMIT
    if kind == "multipart/form-data" and most_files:
        runtime: Runtime = request.app.state.runtime
        most += min(most_files, _FULL_FILES) * runtime.uploads.max_bytes
    async with aclosing(_bounded(request, most)) as chunks:
        try:
            return await _parser(request, kind, chunks, most_files).parse()
        except MultiPartException as error:
            raise HTTPException(400, "The form is malformed.") from error


def _parser(
    request: Request, kind: str, chunks: AsyncGenerator[bytes, None], most_files: int
) -> FormParser | MultiPartParser:
    if kind == "multipart/form-data":
        return MultiPartParser(
            request.headers,
            chunks,
            max_files=most_files,
            max_fields=_MOST_FIELDS,
            max_part_size=_LONGEST_FIELD,
        )
    return FormParser(
        request.headers,
        chunks,
        max_fields=_MOST_FIELDS,
        max_part_size=_LONGEST_FIELD,
    )


async def _bounded(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    size = 0
    async with aclosing(timed_chunks(request)) as chunks:
        async for chunk in chunks:
            size += len(chunk)
            if size > most:
                raise HTTPException(413, f"The form must be at most {most} bytes.")
            yield chunk
