"""The pages at /docs and /redoc, from files of our own, under a policy that names their scripts.

The pages are the framework's; each inline script and style is allowed by its hash, so a page
that somebody managed to write into would still run nothing.
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

from app.api.safe_headers import CSP

FILES: Final = "/docs-files"  # where the packaged scripts are mounted

router = APIRouter(include_in_schema=False)

_INLINE: Final = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


@router.get("/")
async def welcome() -> RedirectResponse:
    """Lead a visitor to the documentation."""
    return RedirectResponse("/docs")


@router.get("/docs")
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
    return _with_policy(page)


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
    return _with_policy(page)


def _place(request: Request) -> tuple[FastAPI, str]:
    app: FastAPI = request.app
    root: str = request.scope.get("root_path", "")
    return app, root


def _with_policy(page: HTMLResponse) -> HTMLResponse:
    page.headers[CSP] = _policy(bytes(page.body).decode())
    return page


@lru_cache(maxsize=8)
def _policy(html: str) -> str:
    """Allow a page what it needs, and what is written into it word by word."""
    allowed: dict[str, list[str]] = {"script": ["'self'"], "style": ["'self'"]}
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
