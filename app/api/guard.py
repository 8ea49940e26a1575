"""Who may come in: every route of a guarded router asks for a key before anything else.

A route says which scope it needs with `@needs(Scope.READ)`; one that says nothing is for
administrators, so that a forgotten word closes a door instead of opening it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from app.domain.access import Caller, Scope
from app.domain.errors import Forbidden
from app.runtime import Runtime

F = TypeVar("F", bound=Callable[..., Any])

SECURITY_SCHEMES = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key: `Authorization: Bearer mgs_…`.",
    },
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}

_PROBLEM = {
    "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
}
_REFUSALS: dict[int | str, dict[str, Any]] = {
    401: {"description": "A key is demanded, and this is none that is valid."},
    403: {"description": "The key's scopes do not allow it."},
    429: {"description": "Too many requests; `Retry-After` says when to try again."},
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
            code: one | {"content": _PROBLEM} for code, one in _REFUSALS.items()
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
            return await handle(request)

        return guarded


async def admit(request: Request, runtime: Runtime, scope: Scope) -> Caller:
    """Find out who calls, and let them in; raise `Unauthorized`, `Forbidden`, `OverLimit`."""
    address = request.client.host if request.client else "unknown"
    caller = await runtime.gatekeeper.identify(_secret(request), address)
    if not caller.may(scope):
        raise Forbidden(f"This needs a key with the scope {scope.value}.")
    return caller


async def admit_or_nobody(
    request: Request, runtime: Runtime, scope: Scope
) -> Caller | None:
    """Let in whoever brings no key, as nobody; a key that is brought must be a valid one."""
    if _secret(request) is None:
        return None
    return await admit(request, runtime, scope)


def _secret(request: Request) -> str | None:
    """Read the key from either header; the empty string when it makes no sense."""
    given = request.headers.get("authorization")
    if given is None:
        return request.headers.get("x-api-key")
    scheme, _, secret = given.partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else ""
