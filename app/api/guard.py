"""Who may come in: every route of a guarded router asks for a key before anything else.

A route says which scope it needs with `@needs(Scope.READ)`; one that says nothing is for
administrators, so that a forgotten word closes a door instead of opening it.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Coroutine
from datetime import timedelta
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers

from app.api import problems
from app.api.origins import may_write
from app.api.rates import charge
from app.domain.access import Caller, Scope
from app.domain.errors import Forbidden, Unauthorized
from app.runtime import Runtime

# What a request may take without being asked for its key again: with the time a key is
# believed, still less than the second in which a revocation has to work.
SOON_ENOUGH = timedelta(milliseconds=50)

F = TypeVar("F", bound=Callable[..., Any])

Identify = Callable[[Request, Runtime], Awaitable[Caller]]

SECURITY_SCHEMES = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key: `Authorization: Bearer mgs_…`.",
    },
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}

_REFUSALS: dict[int | str, dict[str, Any]] = {
    401: {"description": "A key is demanded, and this is none that is valid."},
    403: {"description": "The key's scopes do not allow it."},
    429: {
        "description": "Too many requests; `Retry-After` says when to try again.",
        "headers": {
            "Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}
        },
    },
    503: {"description": "The database does not answer, or the queue is full."},
}


def needs(scope: Scope) -> Callable[[F], F]:
    """Say which scope a route takes."""

    def mark(endpoint: F) -> F:
        endpoint.__dict__["needed_scope"] = scope
        return endpoint

    return mark


def caller_of(request: Request) -> Caller:
    """Give who makes the request; a guarded route knows."""
    caller: Caller = request.scope["caller"]
    return caller


class GuardedRoute(APIRoute):
    """A route that lets in callers with the scope its endpoint needs, and nobody else."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        refusals = {
            code: one | {"content": problems.CONTENT} for code, one in _REFUSALS.items()
        }
        options["responses"] = refusals | (options.get("responses") or {})
        extra = dict(options.get("openapi_extra") or {})
        extra["security"] = [{name: []} for name in SECURITY_SCHEMES]
        options["openapi_extra"] = extra
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Put the guard before the endpoint."""
        handle = super().get_route_handler()
        scope: Scope = self.endpoint.__dict__.get("needed_scope", Scope.ADMIN)

        async def guarded(request: Request) -> Response:
            runtime: Runtime = request.app.state.runtime
            request.scope["caller"] = await admit(request, runtime, scope)
            request.scope["needed_scope"] = scope
            request.scope["admitted_at"] = time.monotonic()
            return await handle(request)

        return guarded


async def admit(request: Request, runtime: Runtime, scope: Scope) -> Caller:
    """Find out who calls, and let them in; raise `Unauthorized`, `Forbidden`, `OverLimit`."""
    if not runtime.gatekeeper.demands_keys:
        demand_origin(request, runtime)
    caller = await identify_by_headers(request, runtime)
    await charge(request, runtime, caller)
    demand(caller, scope)
    return caller


async def admit_again(request: Request) -> None:
    """Find out whether a guarded request that took its time may still go on.

    To be called after every wait a caller can make long, before anything is done or told: a
    key that was revoked meanwhile must open nothing.  Counts as no other request.
    """
    if time.monotonic() - request.scope["admitted_at"] < SOON_ENOUGH.total_seconds():
        return
    identify: Identify = request.scope.get("identify", identify_by_headers)
    caller = await identify(request, request.app.state.runtime)
    demand(caller, request.scope["needed_scope"])
    request.scope["caller"] = caller


async def identify_by_headers(request: Request, runtime: Runtime) -> Caller:
    """Say who calls by the key in the headers: the only way the JSON API believes."""
    gatekeeper = runtime.gatekeeper
    secret = read_secret(request.headers) if gatekeeper.demands_keys else None
    return await gatekeeper.identify(secret, address_of(request))


def demand_origin(request: Request, runtime: Runtime) -> None:
    """Raise `Forbidden` for a write that a page of another site has sent, or may have."""
    if not may_write(request, runtime.settings):
        raise Forbidden(
            "A browser sent this from a page that is not known to be ours. If it is, name its"
            " address in PUBLIC_BASE_URL or CORS_ORIGINS.",
            code="foreign_origin",
        )


def demand(caller: Caller, scope: Scope) -> None:
    """Raise `Forbidden` for a caller without the scope."""
    if not caller.may(scope):
        raise _too_little(scope)


async def admit_or_nobody(
    request: Request, runtime: Runtime, scope: Scope
) -> Caller | None:
    """Let in whoever brings no key, as nobody; a key that is brought must be a valid one."""
    if read_secret(request.headers) is None:
        return None
    return await admit(request, runtime, scope)


def address_of(request: Request) -> str:
    """Give the caller's address, as the server in front of us tells it."""
    return request.client.host if request.client else "unknown"


def read_secret(headers: Headers) -> str | None:
    """Read the key from either header, None when there is none.

    Raises `Unauthorized` for a header nobody can read, and for two keys that differ.
    """
    found = None
    for name, value in headers.raw:  # one walk: this is on every request's way
        if name == b"authorization":
            secret = _bearer(value.decode("latin-1"))
        elif name == b"x-api-key":
            secret = value.decode("latin-1").strip()
        else:
            continue
        if found is not None and secret != found:
            raise Unauthorized("Two different keys were sent: send one of them.")
        found = secret
    return found


def _bearer(given: str) -> str:
    scheme, _, secret = given.strip().partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthorized(
            "Authorization must be: Bearer mgs_…  The key may also be sent as X-API-Key."
        )
    return secret.strip()


def _too_little(scope: Scope) -> Forbidden:
    if scope is Scope.MONITOR:
        text = "This needs METRICS_TOKEN, or a key with the scope admin."
        return Forbidden(text, scope=Scope.ADMIN.value)
    text = f"This needs a key with the scope {scope.value}."
    return Forbidden(text, scope=scope.value)
