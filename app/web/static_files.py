"""Styles, scripts and pictures of the pages: packaged files that browsers keep for ever.

`static_url("app.css")` names a file together with its content, `/static/app.css?v=3f…`: another
content is another address, so that what was fetched once need never be asked for again.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs

from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles
from starlette.types import Scope

STATIC: Final = Path(__file__).resolve().parent.parent / "static"
PREFIX: Final = "/static"

_FOR_EVER: Final = "public, max-age=31536000, immutable"
_ASK_AGAIN: Final = "no-cache"


def static_url(name: str) -> str:
    """Give the address of a file below `app/static`; raise `FileNotFoundError`."""
    return f"{PREFIX}/{name}?v={_mark(name)}"


class VersionedFiles(StaticFiles):
    """Serves the files; an address that names the very content may be kept for ever."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Answer with the file."""
        response = await super().get_response(path, scope)
        if response.status_code in (200, 304):
            given = parse_qs(scope["query_string"].decode("latin-1")).get("v")
            is_exact = given == [_mark(path)]
            response.headers["Cache-Control"] = _FOR_EVER if is_exact else _ASK_AGAIN
        return response


@lru_cache(maxsize=256)
def _mark(name: str) -> str:
    return hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:16]
