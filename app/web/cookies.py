"""Cookies of the pages: whose session it is, and to which browser forms were given."""

from __future__ import annotations

import secrets
from datetime import timedelta
from typing import Final
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import Response

from app.runtime import Runtime
from app.web.sessions import Session, Sessions

SESSION: Final = "mgs_session"
VISITOR: Final = "mgs_visitor"
# A page may be left open for long, and its forms should still be taken.
_VISITOR_LIFETIME: Final = timedelta(days=365)


def session_of(request: Request) -> Session | None:
    """Read the session's cookie; None when there is none of ours."""
    if "session" not in request.scope:
        sessions: Sessions = request.app.state.sessions
        cookie = request.cookies.get(cookie_name(request, SESSION))
        request.scope["session"] = None if cookie is None else sessions.read(cookie)
    found: Session | None = request.scope["session"]
    return found


def is_secure(request: Request) -> bool:
    """Tell whether the browser speaks https with us, or with the proxy before us."""
    if request.url.scheme == "https":
        return True
    runtime: Runtime = request.app.state.runtime
    ours = urlsplit(runtime.settings.public_base_url or "")
    return ours.scheme == "https" and ours.netloc == request.url.netloc


def cookie_name(request: Request, name: str) -> str:
    """Name a cookie: with https, so that no neighbouring host can set it (`__Host-`)."""
    return f"__Host-{name}" if is_secure(request) else name


def set_cookie(
    request: Request, response: Response, name: str, value: str, *, seconds: int
) -> None:
    """Give the browser a cookie that no script reads and no other site's forms bring.

    `Lax`: a link from a mail or a chat must find its reader signed in, and following a link
    changes nothing here; `Strict` would ask for the key again.  Every POST has its token.
    """
    response.set_cookie(
        cookie_name(request, name),
        value,
        max_age=seconds,
        path="/",
        secure=is_secure(request),
        httponly=True,
        samesite="lax",
    )


def holder_of(request: Request) -> str | None:
    """Name the browser a token is given to: by its session, or by a cookie that says nothing."""
    session = session_of(request)
    if session is not None:
        return f"session {session.id}"
    given = request.cookies.get(cookie_name(request, VISITOR))
    return f"visitor {given}" if given and len(given) <= 64 else None


def token_for(request: Request) -> str:
    """Give the token for the forms of a page; a browser nobody knows yet gets a name."""
    sessions: Sessions = request.app.state.sessions
    holder = holder_of(request)
    if holder is None:
        made = request.scope.setdefault("new_visitor", secrets.token_urlsafe(24))
        holder = f"visitor {made}"
    return sessions.token(holder)


def remember_visitor(request: Request, response: Response) -> None:
    """Give a browser the name its tokens were made for, if it had none."""
    made = request.scope.get("new_visitor")
    if made is not None:
        seconds = int(_VISITOR_LIFETIME.total_seconds())
        set_cookie(request, response, VISITOR, made, seconds=seconds)
