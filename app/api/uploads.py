"""Pictures that come in, to be inputs of models."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app.api.deps import Id, runtime_of
from app.api.guard import GuardedRoute, admit_again, caller_of, needs
from app.api.multipart import FIELD, file_of
from app.api.problems import BadParameter
from app.api.views import respond
from app.domain.access import Scope
from app.domain.errors import NotFound
from app.models import schemas
from app.services.inputs import UPLOAD
from app.services.upload_rows import Upload
from app.services.uploads import Uploads

router = APIRouter(route_class=GuardedRoute, tags=["uploads"])

_PROBLEM = {
    "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
}
_TEXTS = {
    400: "The body is broken, or the id is no UUID.",
    404: "There is no such upload.",
    408: "The body arrives too slowly.",
    413: "The file is larger than MAX_UPLOAD_BYTES.",
    415: "The body is neither a form nor a picture.",
    422: "The form is not one part named `file`, or its file is no picture we accept.",
    503: "The database or the store does not answer, or too much comes in at once.",
}


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {
        status: {"description": _TEXTS[status], "content": _PROBLEM}
        for status in statuses
    }


_FILE = {"type": "string", "format": "binary"}
_FORM = {"type": "object", "required": [FIELD], "properties": {FIELD: _FILE}}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": _FORM},
            "image/*": {"schema": _FILE},
        },
    }
}


@router.post(
    "/uploads",
    status_code=201,
    response_model=schemas.Upload,
    responses=_problems(400, 408, 413, 415, 422, 503),
    openapi_extra=_BODY,
    summary="Upload a picture",
)
@needs(Scope.GENERATE)
async def upload(request: Request) -> Response:
    """Keep a picture for models to work on: its `uri` goes where a model wants an image.

    The same bytes again are the same upload.  It is kept for a week after it was last used.
    """
    runtime = runtime_of(request)
    uploads = runtime.uploads
    file = file_of(request, max_bytes=uploads.max_bytes)
    stream = _while_admitted(request, file)
    kept = await uploads.take_in(caller_of(request).owner, stream, field=FIELD)
    location = f"{runtime.settings.api_v1_prefix}/uploads/{kept.id}"
    return respond(_body(kept, uploads), 201, {"Location": location})


async def _while_admitted(
    request: Request, file: AsyncGenerator[bytes, None]
) -> AsyncGenerator[bytes, None]:
    """Give the file; its end only to a key that is still valid."""
    async with aclosing(file):
        async for chunk in file:
            yield chunk
    await admit_again(request)


@router.get(
    "/uploads/{upload_id}",
    response_model=schemas.Upload,
    responses=_problems(400, 404, 503),
    summary="Describe an upload",
)
@needs(Scope.READ)
async def describe(request: Request, upload_id: Id) -> Response:
    """Say what is known of an upload.  That does not count as using it."""
    found = await _find(request, upload_id)
    return respond(_body(found, runtime_of(request).uploads))


@router.delete(
    "/uploads/{upload_id}",
    status_code=204,
    response_class=Response,
    responses=_problems(400, 404, 503),
    summary="Delete an upload",
)
@needs(Scope.GENERATE)
async def delete(request: Request, upload_id: Id) -> Response:
    """Remove an upload, and its file unless somebody else has the same.

    A job that names it and has not started yet may fail for want of it.
    """
    found = await _find(request, upload_id)
    await runtime_of(request).uploads.delete(found)
    return Response(status_code=204)


async def _find(request: Request, text: str) -> Upload:
    """Find an upload the caller may know of."""
    try:
        upload_id = UUID(text)
    except ValueError:
        raise BadParameter("upload_id must be a UUID.", field="upload_id") from None
    found = await runtime_of(request).uploads.find(upload_id)
    if not caller_of(request).sees(found.owner):
        raise NotFound("There is no such upload.")
    return found


def _body(upload: Upload, uploads: Uploads) -> dict[str, Any]:
    return {
        "upload_id": str(upload.id),
        "uri": f"{UPLOAD}{upload.id}",
        "content_type": upload.content_type,
        "size_bytes": upload.size_bytes,
        "width": upload.width,
        "height": upload.height,
        "sha256": upload.sha256,
        "created_at": upload.created_at,
        "expires_at": uploads.expiry_of(upload),
    }
