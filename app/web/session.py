"""Signing in with an API key, and out."""

from __future__ import annotations

import re
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from app.api import problems
from app.api.guard import address_of
from app.domain.access import Scope
from app.domain.errors import Forbidden, OverLimit, ServiceError, Unauthorized
from app.runtime import Runtime
from app.web.cookies import SESSION, set_cookie
from app.web.door import PageRoute, caller_of, form_of, open_to_all, text_of
from app.web.render import page, see_other
from app.web.sessions import Sessions

router = APIRouter(route_class=PageRoute)

# A path of ours: no other host (`//host`, `/\\host`), nothing a header cannot hold.
_LOCAL: Final = re.compile(r"/(?![/\\])[!-\[\]-~]{0,2000}", re.ASCII)


@router.api_route("/signin", methods=["GET", "HEAD"])
@open_to_all
async def signin(
    request: Request, next: Annotated[str, Query(max_length=4000)] = "/"
) -> Response:
    """Ask for an API key; lead on whoever is known already."""
    if "caller" in request.scope and caller_of(request).may(Scope.READ):
        return see_other(local_path(next))
    return page(request, "signin.html", next=local_path(next), problem=None)


@router.post("/signin")
@open_to_all
async def sign_in(request: Request) -> Response:
    """Open a session for the bearer of a key.  Wrong keys count as they do at the API."""
    runtime: Runtime = request.app.state.runtime
    form = form_of(request)
    secret, there = text_of(form, "key").strip(), local_path(text_of(form, "next"))
    if not runtime.gatekeeper.demands_keys:
        return see_other(there)
    try:
        caller = await runtime.gatekeeper.identify(secret, address_of(request))
        if not caller.may(Scope.READ):
            raise Forbidden("The pages need a key with the scope read.")
    except (Unauthorized, Forbidden, OverLimit) as error:
        return _ask_again(request, error, there)
    sessions: Sessions = request.app.state.sessions
    response = see_other(there)
    seconds = int(sessions.lifetime.total_seconds())
    cookie = sessions.open(secret, caller)
    set_cookie(request, response, SESSION, cookie, seconds=seconds)
    return response


def _ask_again(request: Request, error: ServiceError, there: str) -> Response:
    problems.note(request, error)
    status, _ = problems.look_up(error)
    text = str(error) if not _is_missing(error) else "Enter an API key."
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after.total_seconds())))
    return page(request, "signin.html", status, headers, next=there, problem=text)


def _is_missing(error: ServiceError) -> bool:
    return type(error) is Unauthorized


@router.post("/signout")
@open_to_all
async def sign_out(request: Request) -> Response:
    """Make the browser forget who was signed in."""
    response = see_other("/signin")
    set_cookie(request, response, SESSION, "", seconds=0)
    return response


def local_path(text: str) -> str:
    """Give the path if it leads to a page of ours; else the first one's."""
    return text if _LOCAL.fullmatch(text) else "/"
