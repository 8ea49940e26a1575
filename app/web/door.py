"""Who may see a page, and whose forms are taken.

How to write a route of the pages:

    router = APIRouter(route_class=PageRoute)

    @router.get("/webhooks")
    @needs(Scope.READ)                      # who may; nothing said: administrators
    async def webhooks(request: Request) -> Response:
        caller = caller_of(request)         # caller.realm goes into every statement
        return page(request, "webhooks.html", …)

    @router.post("/ui/webhooks/{endpoint_id}/test")
    @needs(Scope.GENERATE)
    async def test(request: Request, endpoint_id: Id) -> Response:
        name = text_of(form_of(request), "name")
        …
        if not is_htmx(request):
            return see_other("/webhooks")
        return fragment(request, "endpoint.html", …)

Then a line in PAGES of tests/api/test_doors.py.  The route does the rest:

* It finds out who is signed in (`sessions`), or sends the browser to /signin and back.  No other
  door believes the cookie.  While no keys are demanded everybody is the one caller.
* It counts against the key's requests a minute.
* A POST must come from a page of ours, with the token that page was given; else 403.  Its form is
  read before the endpoint runs: 256 KiB, no files, unless the endpoint says `@takes_files`.
* An error of ours (`domain.errors`), raised anywhere in the endpoint, becomes a page; for htmx, a
  note in the corner.  Status and title are those of the JSON API.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlsplit

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from app.api.guard import admit_again, caller_of, demand, needs
from app.api.rates import charge
from app.domain.access import ANYBODY, Caller, Scope
from app.domain.errors import ServiceError, StorageUnavailable, Unauthorized
from app.runtime import Runtime
from app.web.cookies import remember_visitor, session_of, token_for
from app.web.forms import form_of, take_form, takes_files, text_of
from app.web.refusals import refuse, refuse_http, refuse_parameter
from app.web.render import Visitor, is_htmx
from app.web.sessions import caller_of_session

__all__ = [
    "PageRoute",
    "caller_of",
    "form_of",
    "needs",
    "open_to_all",
    "takes_files",
    "text_of",
]

# Any name: only the origin of its address is looked at.
_PROBE: Final = f"00/{'0' * 64}.png"
_A_WHILE: Final = timedelta(minutes=1)

F = TypeVar("F", bound=Callable[..., Any])


def open_to_all(endpoint: F) -> F:
    """Say that a page is for people who are not signed in, too."""
    endpoint.__dict__["is_open"] = True
    return endpoint


class PageRoute(APIRoute):
    """A route of the pages: admits, takes forms, answers errors for people."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        options["include_in_schema"] = False
        options["response_class"] = HTMLResponse
        super().__init__(path, endpoint, **options)

    @property
    def needed_scope(self) -> Scope | None:
        """Give the scope a caller must have; None: the page is open."""
        if self.endpoint.__dict__.get("is_open", False):
            return None
        scope: Scope = self.endpoint.__dict__.get("needed_scope", Scope.ADMIN)
        return scope

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Put the door before the endpoint, and the error pages around both."""
        handle = super().get_route_handler()
        most_files: int = self.endpoint.__dict__.get("most_files", 0)

        async def guarded(request: Request) -> Response:
            try:
                await prepare(request)
                await _admit(request, self.needed_scope)
                if request.method == "POST":
                    await take_form(request, most_files)
                    await _look_again(request)
                response = await handle(request)
            except ServiceError as error:
                response = _turn_away(request, error)
            except RequestValidationError as error:
                response = refuse_parameter(request, error)
            except HTTPException as error:
                response = refuse_http(request, error)
            finally:
                form = request.scope.get("form")
                if form is not None:
                    await form.close()
            remember_visitor(request, response)
            return response

        return guarded


# ---------------------------------------------------------------------------- who it is


async def prepare(request: Request) -> None:
    """Find out for whom a page is made, as far as that can be known; raises nothing."""
    runtime: Runtime = request.app.state.runtime
    request.scope["visitor"] = Visitor(
        caller=None,
        keys_on=runtime.gatekeeper.demands_keys,
        token=lambda: token_for(request),
        picture_sources=await _picture_sources(request, runtime),
    )


async def _picture_sources(request: Request, runtime: Runtime) -> tuple[str, ...]:
    """Name where pictures come from besides here: a bucket, where we redirect to one."""
    state = request.app.state
    found: tuple[str, ...] | None = getattr(state, "picture_sources", None)
    if found is None:
        try:
            url = await runtime.store.signed_url(_PROBE, _A_WHILE)
        except StorageUnavailable:
            return ()
        found = ()
        if url is not None:
            parts = urlsplit(url)
            found = (f"{parts.scheme}://{parts.netloc}",)
        state.picture_sources = found
    return found


async def _admit(request: Request, scope: Scope | None) -> None:
    runtime: Runtime = request.app.state.runtime
    request.scope["identify"] = _identify
    request.scope["admitted_at"] = time.monotonic()
    request.scope["needed_scope"] = scope
    try:
        caller = await _identify(request, runtime)
    except Unauthorized:
        if scope is None:
            return
        raise
    request.scope["caller"] = caller
    _show(request, caller)
    await charge(request, runtime, caller)
    if scope is not None:
        demand(caller, scope)


async def _identify(request: Request, runtime: Runtime) -> Caller:
    """Say who is signed in; the only place that believes the cookie."""
    if not runtime.gatekeeper.demands_keys:
        return ANYBODY
    session = session_of(request)
    if session is None:
        raise Unauthorized("Sign in with an API key.")
    return await caller_of_session(runtime.gatekeeper, session)


async def _look_again(request: Request) -> None:
    """Ask again who it is after a form was read: it may have taken its time."""
    if request.scope["needed_scope"] is not None:
        await admit_again(request)


def _show(request: Request, caller: Caller) -> None:
    """Let the page know whom it is made for."""
    visitor: Visitor = request.scope["visitor"]
    request.scope["visitor"] = Visitor(
        caller, visitor.keys_on, visitor.token, visitor.picture_sources
    )


def _turn_away(request: Request, error: ServiceError) -> Response:
    """Answer an error; whoever is not signed in is asked to."""
    if not isinstance(error, Unauthorized):
        return refuse(request, error)
    if is_htmx(request):
        address = signin_address(*_place_of(request))
        return Response(
            status_code=401,
            headers={"HX-Redirect": address, "Cache-Control": "no-store"},
        )
    is_reading = request.method in ("GET", "HEAD")
    path = request.url.path if is_reading else "/"
    address = signin_address(path, request.url.query if is_reading else "")
    return Response(
        status_code=303, headers={"Location": address, "Cache-Control": "no-store"}
    )


def _place_of(request: Request) -> tuple[str, str]:
    """Give the path and query of the page that htmx asks from."""
    try:
        there = urlsplit(request.headers.get("hx-current-url", "/"))
    except ValueError:  # no address of a page
        return "/", ""
    return there.path or "/", there.query


def signin_address(path: str, query: str) -> str:
    """Give where one signs in to come back to a place."""
    there = f"{path}?{query}" if query else path
    return "/signin" if there == "/" else f"/signin?next={quote(there, safe='/')}"
