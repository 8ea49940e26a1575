"""How the pictures of a job came about, in a form that can be sent again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app import __version__
from app.api.deps import Id, parse_job_id, runtime_of
from app.api.guard import GuardedRoute, caller_of, needs
from app.api.problems import documented
from app.api.views import etag_of, respond
from app.domain.access import Scope
from app.domain.admission import plain
from app.domain.errors import Conflict
from app.domain.generation import JSON, GenerationRequest
from app.domain.provenance import SourceType
from app.domain.state import Status
from app.models import manifest_schemas
from app.services.inputs import with_uploads
from app.services.job_queries import JobRecord

router = APIRouter(route_class=GuardedRoute)

SOFTWARE = {"name": "mediagen", "version": __version__}
_TOLD = (
    *("index", "content_type", "size_bytes", "width", "height"),
    *("sha256", "provenance"),
)


@router.get(
    "/jobs/{job_id}/manifest",
    response_model=manifest_schemas.Manifest,
    responses=documented(400, 404, 409, 503) | {304: {"description": "Not changed."}},
    tags=["jobs"],
    summary="Read how a job's pictures came about",
)
@needs(Scope.READ)
async def manifest(request: Request, job_id: Id) -> Response:
    """Give what is needed to make the pictures of a finished job again, and to know them.

    Its `request` is a body for `POST /generate`, which makes the same effective input of it.
    """
    runtime, realm = runtime_of(request), caller_of(request).realm
    record = await runtime.ledger.read(parse_job_id(job_id), realm=realm)
    row = record.row
    if not Status(row.status).is_terminal:
        raise Conflict(f"The job is {row.status}: its manifest is told at its end.")
    etag = etag_of(row.id, row.version, f"manifest-{__version__}")
    headers = {"ETag": etag, "Cache-Control": "no-store"}
    known = request.headers.get("if-none-match")
    if known is not None and (known.strip() == "*" or etag in known):
        return Response(status_code=304, headers=headers)
    return respond(manifest_body(record), headers=headers)


def manifest_body(record: JobRecord) -> dict[str, Any]:
    """Give the manifest as `manifest_schemas.Manifest` describes it, in plain values."""
    row = record.row
    named = with_uploads(row.input, row.uploads)
    parameters = {name: value for name, value in named.items() if name != "prompt"}
    return {
        "manifest_version": 1,
        "job_id": str(row.id),
        "retry_of": None if row.retry_of is None else str(row.retry_of),
        "status": row.status,
        "request": {
            "model": row.model,
            "prompt": row.prompt,
            "num_outputs": row.num_outputs,
            "parameters": parameters,
        },
        "fingerprint": GenerationRequest(row.model, named).fingerprint,
        "model": row.model.partition(":")[0],
        "model_version": row.model.partition(":")[2] or None,
        "input": named,
        "seed": _seed(named),
        "provider": {"name": row.provider, "prediction_id": record.handle},
        "attempts": row.attempts,
        "times": {
            "created_at": row.created_at,
            "started_at": row.started_at,
            "generated_at": row.generated_at,
            "completed_at": row.completed_at,
        },
        "cost_usd": None if row.cost_usd is None else plain(row.cost_usd),
        "digital_source_type": SourceType.of(has_pictures=bool(row.uploads)).value,
        "outputs": [{name: one[name] for name in _TOLD} for one in record.outputs],
        "software": SOFTWARE,
    }


def _seed(model_input: Mapping[str, JSON]) -> int | None:
    seed = model_input.get("seed")
    return seed if isinstance(seed, int) else None
