"""Errors as RFC 9457 problem documents: ONE table from our errors to status and title.

The extra `error` member is what SDKs of the OpenAI family read.  No stack trace, SQL, path
or token gets out: messages are ours, and what is not ours is "internal error".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from http import HTTPStatus
from typing import Any

import orjson
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import Match, Mount

from app.api.rates import count_refusal
from app.domain import errors

log = structlog.get_logger("app.api")

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:mediagen:problem:"
CONTENT = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
_CHALLENGE = 'Bearer realm="mediagen"'

# The first class that fits wins, so subclasses come before their parents.
TABLE: Sequence[tuple[type[errors.ServiceError], int, str]] = (
    (errors.ModelNotFound, 404, "Unknown model"),
    (errors.InvalidRequest, 422, "Invalid request"),
    (errors.InvalidKey, 401, "Not a valid key"),
    (errors.Unauthorized, 401, "Who are you?"),
    (errors.Forbidden, 403, "Not allowed"),
    (errors.BudgetExceeded, 402, "Over budget"),
    (errors.NotFound, 404, "Not found"),
    (errors.InProgress, 409, "Still being accepted"),
    (errors.Conflict, 409, "Not possible in this state"),
    (errors.OverLimit, 429, "Too much at once"),
    (errors.Unavailable, 503, "Temporarily unavailable"),
    (errors.ServiceError, 500, "Internal error"),
)

_CODES = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    408: "body_too_slow",
    413: "body_too_large",
    414: "address_too_long",
    415: "unsupported_media_type",
    431: "headers_too_large",
}


# How SDKs of the OpenAI family sort errors; the rest are the caller's or ours.
_TYPES = {
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    429: "rate_limit_error",
}

_MOST_FIELDS = 20  # told about in one answer
_SOON = timedelta(seconds=2)  # to try again, when nobody knows better


class BadParameter(errors.InvalidRequest):
    """A path or query parameter is wrong: 400, where a wrong body is 422."""

    code = "invalid_parameter"


class InvalidBody(errors.InvalidRequest):
    """The body does not fit its schema; `fields` are (pointer, what is wrong) pairs."""

    def __init__(self, fields: Sequence[tuple[str, str]], field: str | None) -> None:
        pointer, text = fields[0]
        super().__init__(f"{pointer.strip('/') or 'body'}: {text}", field=field)
        self.fields = fields


def problem(
    request: Request,
    status: int,
    *,
    code: str,
    title: str,
    detail: str,
    retryable: bool = False,
    param: str | None = None,
    fields: Sequence[tuple[str, str]] = (),
    retry_after: timedelta | None = None,
    budget: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Make the problem response.  `fields` are (pointer, what is wrong) pairs."""
    body = document(
        status,
        code=code,
        title=title,
        detail=detail,
        retryable=retryable,
        param=param,
        instance=request.url.path,
        request_id=request.scope.get("request_id", ""),
    )
    if budget is not None:
        body["budget"] = budget
    if fields:
        body["errors"] = [{"pointer": at, "detail": text} for at, text in fields]
    sent = {"Cache-Control": "no-store"} | dict(headers or {})
    if retry_after is not None:
        seconds = retry_after.total_seconds()
        sent["Retry-After"] = str(max(1, math.ceil(seconds)))
        # The same without rounding, as SDKs of the OpenAI family read it.
        sent["Retry-After-Ms"] = str(max(1, math.ceil(seconds * 1000)))
    return Response(orjson.dumps(body), status, sent, MEDIA_TYPE)


_DOCUMENTED = {
    400: "A path or query parameter, or a header, is wrong.",
    402: "It may cost more than a budget has left, or its price is unknown.",
    404: "There is no such thing.",
    409: "Its present state does not allow it, or an equal request is being accepted.",
    413: "The body is too large.",
    422: "The body does not fit its schema, or the model's.",
    503: "A part we need does not answer; nothing was done.",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe problem answers of a route, for the OpenAPI document."""
    return {
        status: {"description": _DOCUMENTED[status], "content": CONTENT}
        for status in statuses
    }


def _error_type(status: int) -> str:
    return (
        "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    )


def document(
    status: int,
    *,
    code: str,
    title: str,
    detail: str,
    instance: str,
    request_id: str,
    retryable: bool = False,
    param: str | None = None,
) -> dict[str, Any]:
    """Give the body of a problem, in plain values for orjson."""
    return {
        "type": TYPE_PREFIX + code,
        "title": title,
        "status": status,
        "detail": detail,
        "instance": instance,
        "code": code,
        "retryable": retryable,
        "request_id": request_id,
        "error": {
            "message": detail,
            "type": _error_type(status),
            "param": param,
            "code": code,
        },
    }


def install(app: FastAPI) -> None:
    """Answer every error of the app with a problem document."""
    app.add_exception_handler(errors.ServiceError, _on_service_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_parameter)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, _on_crash)


def look_up(error: errors.ServiceError) -> tuple[int, str]:
    """Give the status and the title an error is answered with."""
    if isinstance(error, BadParameter):
        return 400, "Invalid parameter"
    return next(
        (status, title) for kind, status, title in TABLE if isinstance(error, kind)
    )


def note(request: Request, error: errors.ServiceError) -> None:
    """Have it known, in counters and log, that a request was answered with the error."""
    if isinstance(error, errors.OverLimit):
        count_refusal(request, error)
    if isinstance(error, errors.Unavailable):
        log.warning("request.unavailable", code=error.code, reason=str(error))


async def _on_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.ServiceError)
    status, title = look_up(error)
    note(request, error)
    field = error.field if isinstance(error, errors.InvalidRequest) else None
    retry_after = error.retry_after
    if isinstance(error, errors.Unavailable):
        retry_after = retry_after or _SOON
    return problem(
        request,
        status,
        code=error.code,
        title=title,
        detail=str(error),
        retryable=error.retryable,
        param=field,
        fields=fields_of(error),
        retry_after=retry_after,
        budget=error.facts if isinstance(error, errors.BudgetExceeded) else None,
        headers=_headers_of(error),
    )


def _headers_of(error: errors.ServiceError) -> dict[str, str]:
    """Give what an error says in headers: how to come in (RFC 6750, section 3)."""
    match error:
        case errors.InvalidKey():
            challenge = f'{_CHALLENGE}, error="invalid_token"'
        case errors.Unauthorized():
            challenge = _CHALLENGE
        case errors.Forbidden(scope=str(scope)):
            challenge = f'{_CHALLENGE}, error="insufficient_scope", scope="{scope}"'
        case _:
            return {}
    return {"WWW-Authenticate": challenge}


def fields_of(error: errors.ServiceError) -> Sequence[tuple[str, str]]:
    """Say what is wrong with which field, as (pointer, text) pairs; empty when it is none."""
    if isinstance(error, InvalidBody):
        return error.fields[:_MOST_FIELDS]
    if not isinstance(error, errors.InvalidRequest) or error.field is None:
        return ()
    if isinstance(error, BadParameter):
        return [(error.field, str(error))]
    return [("/" + error.field.replace(".", "/"), str(error))]


async def _on_invalid_parameter(request: Request, error: Exception) -> Response:
    """Path and query parameters that FastAPI refused."""
    assert isinstance(error, RequestValidationError)
    found = [(str(e["loc"][-1]), str(e["msg"])) for e in error.errors()]
    name, text = found[0]
    return problem(
        request,
        400,
        code="invalid_parameter",
        title="Invalid parameter",
        detail=f"{name}: {text}",
        param=name,
        fields=found,
    )


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answer what the framework, or a limit, refuses."""
    assert isinstance(error, HTTPException)
    response = problem(
        request,
        error.status_code,
        code=_CODES.get(error.status_code, "http_error"),
        title=HTTPStatus(error.status_code).phrase,
        detail=str(error.detail),
        retryable=error.status_code == 408,
    )
    response.headers.update(error.headers or {})
    if "allow" in response.headers:
        response.headers["Allow"] = ", ".join(_allowed(request))
    return response


def _allowed(request: Request) -> list[str]:
    """Give all methods of a path: the framework names those of the first route that fits."""
    routes = [one for one in request.app.routes if not isinstance(one, Mount)]
    return [
        method
        for method in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL
            for route in routes
        )
    ]


async def _on_crash(request: Request, error: Exception) -> Response:
    log.error("request.crashed", exc_info=error, path=request.url.path)
    return problem(
        request,
        500,
        code="internal_error",
        title="Internal error",
        detail="Something went wrong on our side; the request id finds it in the logs.",
        retryable=True,
    )
