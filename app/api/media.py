"""Serve stored files to who may have them: resumable, and harmless in a browser."""

from __future__ import annotations

import re
from collections.abc import Mapping
from email.utils import format_datetime
from typing import Any, Final, Literal

from fastapi import APIRouter, Request
from fastapi.responses import (
    RedirectResponse,
    Response,
    StreamingResponse,
)

from app.api.deps import runtime_of
from app.api.guard import SECURITY_SCHEMES
from app.api.media_access import Admission, admit_to_file
from app.api.problems import BadParameter, problem
from app.core.links import EXPIRES, SIGNATURE
from app.domain.errors import NotFound
from app.runtime import Runtime
from app.services.media_links import WIDTH
from app.services.media_store import WIDTHS, BlobMeta, ByteRange, is_key, thumbnail_etag
from app.services.pictures import WEBP

router = APIRouter(tags=["media"])

_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII | re.IGNORECASE)

# Bytes drawn by a stranger's model must never run as a page of ours.
_HARMLESS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Content-Disposition": "inline",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "cross-origin",
}

_PICTURE: Final[dict[str, Any]] = {
    f"image/{kind}": {"schema": {"type": "string", "format": "binary"}}
    for kind in ("png", "jpeg", "webp", "gif", "avif")
}
_PROBLEM: Final[dict[str, Any]] = {"application/problem+json": {}}
_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"description": "The file.", "content": _PICTURE},
    206: {"description": "The part asked for with `Range`.", "content": _PICTURE},
    304: {"description": "`If-None-Match` names the file as it is."},
    400: {"description": "There are no thumbnails of that width.", "content": _PROBLEM},
    307: {
        "description": "The file is in a bucket: a link that works for 15 minutes, or as"
        " long as the one that led here."
    },
    401: {"description": "A key was sent that is not valid.", "content": _PROBLEM},
    403: {"description": "The key's scopes do not allow it.", "content": _PROBLEM},
    404: {
        "description": "There is no such file for you: unknown, private, or its link is"
        " dead.",
        "content": _PROBLEM,
    },
    416: {
        "description": "The range starts behind the end of the file.",
        "content": _PROBLEM,
    },
    422: {
        "description": "No thumbnail can be made of this file.",
        "content": _PROBLEM,
    },
    429: {
        "description": "Too many requests; `Retry-After` says when to try again.",
        "content": _PROBLEM,
    },
    503: {"description": "The store or the database is silent.", "content": _PROBLEM},
}
_OPTIONAL_KEY: Final[dict[str, Any]] = {
    "security": [{}, *({name: []} for name in SECURITY_SCHEMES)],
    "parameters": [
        {
            "name": name,
            "in": "query",
            "required": False,
            "schema": {"type": "string"},
            "description": "Part of a signed link; opens a private file without a key.",
        }
        for name in (EXPIRES, SIGNATURE)
    ]
    + [
        {
            "name": WIDTH,
            "in": "query",
            "required": False,
            "schema": {"type": "integer", "enum": list(WIDTHS)},
            "description": "Ask for a thumbnail instead: WebP, no wider and no taller than"
            " that. What opens the file opens its thumbnails.",
        }
    ],
}


@router.get(
    "/media/{key:path}",
    summary="Get a stored file",
    response_class=Response,
    responses=_RESPONSES,
    openapi_extra=_OPTIONAL_KEY,
    operation_id="get_media",
)
async def get_media(key: str, request: Request) -> Response:
    """Send a stored picture, whole or one range of it, with memory use independent of size.

    A public file's address contains the hash of the bytes, so the answer may be cached for ever.
    A private one is sent to a key of its owner, or to whoever has a signed link.  Several ranges
    in one request are answered with the whole file (RFC 9110, section 14.2).
    """
    runtime, width = runtime_of(request), _width(request)
    store = runtime.store
    admission = await admit_to_file(request, runtime, key)
    if width is not None:
        return await _thumbnail(request, runtime, admission, key, width)
    meta = await store.head(key)
    redirect = await _redirect(runtime, key, admission, "GET")
    if redirect is not None:
        return redirect
    headers = _describe(meta, admission)
    if _is_current(meta.etag, request.headers):
        return Response(status_code=304, headers=headers)
    wanted = _choose_range(meta, request.headers)
    if wanted == "unsatisfiable":
        return _refuse_range(request, meta)
    blob = await store.open(key, wanted)
    size = meta.size_bytes if wanted is None else wanted.stop - wanted.start
    headers["Content-Length"] = str(size)
    if wanted is not None:
        headers["Content-Range"] = (
            f"bytes {wanted.start}-{wanted.stop - 1}/{meta.size_bytes}"
        )
    return StreamingResponse(
        blob.stream,
        status_code=200 if wanted is None else 206,
        media_type=meta.content_type,
        headers=headers,
    )


@router.head(
    "/media/{key:path}",
    summary="Describe a stored file",
    response_class=Response,
    responses={code: one for code, one in _RESPONSES.items() if code not in (206, 416)},
    openapi_extra=_OPTIONAL_KEY,
    operation_id="head_media",
)
async def head_media(key: str, request: Request) -> Response:
    """Send what `GET` would send of a stored picture, without its bytes."""
    runtime, width = runtime_of(request), _width(request)
    admission = await admit_to_file(request, runtime, key)
    if width is not None:
        return await _thumbnail(request, runtime, admission, key, width)
    meta = await runtime.store.head(key)
    redirect = await _redirect(runtime, key, admission, "HEAD")
    if redirect is not None:
        return redirect
    headers = _describe(meta, admission)
    if _is_current(meta.etag, request.headers):
        return Response(status_code=304, headers=headers)
    headers["Content-Length"] = str(meta.size_bytes)
    return Response(headers=headers, media_type=meta.content_type)


def _width(request: Request) -> int | None:
    """Read which thumbnail is asked for; None: the file itself.  Raise `BadParameter`."""
    given = request.query_params.getlist(WIDTH)
    if not given:
        return None
    allowed = {str(width): width for width in WIDTHS}
    if len(given) > 1 or given[0] not in allowed:
        raise BadParameter(f"{WIDTH} must be {' or '.join(allowed)}.", field=WIDTH)
    return allowed[given[0]]


async def _thumbnail(
    request: Request, runtime: Runtime, admission: Admission, key: str, width: int
) -> Response:
    """Send a thumbnail, always whole; make it when nobody has yet."""
    if not is_key(key):
        raise NotFound("There is no such file.")
    store = runtime.store
    try:
        meta = await store.head(key, width=width)
    except NotFound:
        # Those who ask for files that do not exist must not take the places of others.
        await store.head(key)
        made = await runtime.thumbnails.make(key)
        if not made.are_kept:
            return _as_made(request, admission, key, width, made.thumbnails[width])
        meta = await store.head(key, width=width)
    is_head = request.method == "HEAD"
    method: Literal["GET", "HEAD"] = "HEAD" if is_head else "GET"
    redirect = await _redirect(runtime, key, admission, method, width=width)
    if redirect is not None:
        return redirect
    headers = _describe(meta, admission) | {"Accept-Ranges": "none"}
    if _is_current(meta.etag, request.headers):
        return Response(status_code=304, headers=headers)
    headers["Content-Length"] = str(meta.size_bytes)
    if is_head:
        return Response(headers=headers, media_type=meta.content_type)
    blob = await store.open(key, width=width)
    return StreamingResponse(blob.stream, headers=headers, media_type=meta.content_type)


def _as_made(
    request: Request, admission: Admission, key: str, width: int, content: bytes
) -> Response:
    """Send a thumbnail that could not be kept."""
    etag = thumbnail_etag(key, width)
    headers = {"ETag": etag, "Accept-Ranges": "none"}
    headers |= {**admission.file_headers, **_HARMLESS}
    if _is_current(etag, request.headers):
        return Response(status_code=304, headers=headers)
    headers["Content-Length"] = str(len(content))
    body = b"" if request.method == "HEAD" else content
    return Response(body, headers=headers, media_type=WEBP.content_type)


async def _redirect(
    runtime: Runtime,
    key: str,
    admission: Admission,
    method: Literal["GET", "HEAD"],
    *,
    width: int | None = None,
) -> Response | None:
    """Send the client to the bucket, where there is one."""
    url = await runtime.store.signed_url(
        key, admission.bucket_link, method=method, width=width
    )
    if url is None:
        return None
    headers = dict(admission.redirect_headers)
    return RedirectResponse(url, status_code=307, headers=headers)


def _describe(meta: BlobMeta, admission: Admission) -> dict[str, str]:
    return {
        "ETag": meta.etag,
        "Last-Modified": _last_modified(meta),
        "Accept-Ranges": "bytes",
        **admission.file_headers,
        **_HARMLESS,
    }


def _last_modified(meta: BlobMeta) -> str:
    return format_datetime(meta.last_modified, usegmt=True)


def _is_current(etag: str, headers: Mapping[str, str]) -> bool:
    """Compare weakly, as `If-None-Match` demands (RFC 9110, section 13.1.2)."""
    given = headers.get("if-none-match")
    if given is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in given.split(",")]
    return "*" in tags or etag in tags


def _choose_range(
    meta: BlobMeta, headers: Mapping[str, str]
) -> ByteRange | None | Literal["unsatisfiable"]:
    """Read `Range`; None stands for the whole file, also when the header makes no sense.

    `If-Range` must name this very file, else the whole is sent (RFC 9110, section 13.1.5).
    """
    condition = headers.get("if-range")
    if condition is not None and condition not in (meta.etag, _last_modified(meta)):
        return None
    matched = _RANGE.fullmatch(headers.get("range", "").replace(" ", ""))
    if matched is None or not (matched[1] or matched[2]):
        return None
    size = meta.size_bytes
    if not matched[1]:
        length = min(int(matched[2]), size)
        return ByteRange(size - length, size) if length else "unsatisfiable"
    start = int(matched[1])
    stop = min(int(matched[2]) + 1, size) if matched[2] else size
    if matched[2] and int(matched[2]) < start:
        return None
    return ByteRange(start, stop) if start < size else "unsatisfiable"


def _refuse_range(request: Request, meta: BlobMeta) -> Response:
    answer = problem(
        request,
        416,
        code="range_not_satisfiable",
        title="Range not satisfiable",
        detail=f"The file has {meta.size_bytes} bytes; the range starts behind its end.",
    )
    answer.headers["Content-Range"] = f"bytes */{meta.size_bytes}"
    answer.headers.update(_HARMLESS)
    return answer
