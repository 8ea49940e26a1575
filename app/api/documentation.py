"""The pages at /docs and /redoc, from packaged files, under a policy that names their scripts.

The pages are the framework's; each inline script and style is allowed by its hash, so a page
that somebody managed to write into would still run nothing.  Nothing is fetched from other
hosts: of ReDoc that costs a logo, which its script names by an address of its maker.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import lru_cache
from typing import Final

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import Scope

from app.api.safe_headers import CSP

FILES: Final = "/docs-files"  # where the packaged scripts are mounted

router = APIRouter(include_in_schema=False)


class _ForMachines(APIRoute):
    """A route that leaves browsers to the page at the same address."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Fit requests of those who do not ask for a page."""
        accepted = Headers(scope=scope).get("accept", "")
        if "text/html" in accepted:
            return Match.NONE, {}
        return super().matches(scope)


machines = APIRouter(include_in_schema=False, route_class=_ForMachines)

# Styles the packaged ReDoc writes into the page as it starts: sheets it fills by script,
# empty at first, and one with text.  After an upgrade look at what a browser's console says.
_REDOC_STYLES: Final = (
    "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='",
    "'sha256-QMIg+bpjm3JdElJ388KYke01izlUW0UoNOeKjpMxdgc='",
)
_INLINE: Final = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


@machines.api_route("/", methods=["GET", "HEAD"])
async def welcome() -> RedirectResponse:
    """Lead a program to the documentation."""
    return RedirectResponse("/docs")


@router.api_route("/docs", methods=["GET", "HEAD"])
async def swagger(request: Request) -> HTMLResponse:
    """Show every route, ready to be tried."""
    app, root = _place(request)
    page = get_swagger_ui_html(
        openapi_url=f"{root}{app.openapi_url}",
        title=app.title,
        swagger_js_url=f"{root}{FILES}/swagger-ui-bundle.js",
        swagger_css_url=f"{root}{FILES}/swagger-ui.css",
        swagger_favicon_url=f"{root}{FILES}/favicon.png",
    )
    return _with_policy(page, _policy(_html(page)))


@router.get("/redoc")
async def redoc(request: Request) -> HTMLResponse:
    """Show every route, for reading."""
    app, root = _place(request)
    page = get_redoc_html(
        openapi_url=f"{root}{app.openapi_url}",
        title=app.title,
        redoc_js_url=f"{root}{FILES}/redoc.standalone.js",
        redoc_favicon_url=f"{root}{FILES}/favicon.png",
        with_google_fonts=False,
    )
    # Its index for searching is built by a worker it writes itself.
    policy = _policy(_html(page), styles=_REDOC_STYLES) + "; worker-src blob:"
    return _with_policy(page, policy)


def _place(request: Request) -> tuple[FastAPI, str]:
    app: FastAPI = request.app
    root: str = request.scope.get("root_path", "")
    return app, root


def _html(page: HTMLResponse) -> str:
    return bytes(page.body).decode()


def _with_policy(page: HTMLResponse, policy: str) -> HTMLResponse:
    page.headers[CSP] = policy
    return page


@lru_cache(maxsize=8)
def _policy(html: str, styles: tuple[str, ...] = ()) -> str:
    """Allow a page what it needs, and what is written into it word by word."""
    allowed: dict[str, list[str]] = {"script": ["'self'"], "style": ["'self'", *styles]}
    for kind, text in _INLINE.findall(html):
        digest = hashlib.sha256(text.encode()).digest()
        allowed[kind].append(f"'sha256-{base64.b64encode(digest).decode()}'")
    return "; ".join(
        (
            "default-src 'none'",
            "script-src " + " ".join(allowed["script"]),
            "style-src " + " ".join(allowed["style"]),
            "img-src 'self' data:",
            "font-src 'self' data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
