"""The JSON API for many jobs at once: one answer, with a result for each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from app.api import acts
from app.api.deps import parse_body, promptly, runtime_of
from app.api.endpoints import ONCE
from app.api.guard import GuardedRoute, caller_of, needs
from app.api.intake import Accepted
from app.api.problems import documented
from app.api.views import respond
from app.domain.access import Scope
from app.domain.errors import Conflict, NotFound, ServiceError
from app.models import schemas
from app.runtime import Runtime
from app.services import job_queries
from app.services.archive import archive
from app.services.job_queries import JobRecord
from app.services.job_service import Outcome

router = APIRouter(route_class=GuardedRoute)

_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/JobSelection"}
            }
        },
    }
}
_ZIP: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The pictures, and `manifest.json`.",
        "content": {
            "application/zip": {"schema": {"type": "string", "format": "binary"}}
        },
    }
}


async def _selected(request: Request) -> list[UUID]:
    """Read which jobs are meant, each once."""
    selection = await parse_body(request, schemas.JobSelection)
    return list(dict.fromkeys(selection.job_ids))


@router.post(
    "/jobs/cancel",
    response_model=schemas.JobResults,
    responses=documented(413, 422, 503),
    openapi_extra=_BODY,
    tags=["jobs"],
    summary="Cancel many jobs",
)
@needs(Scope.GENERATE)
async def cancel_many(request: Request) -> Response:
    """Ask for the end of the jobs, all in one transaction.  Finished ones stay as they are."""
    outcomes = await acts.cancel_many(request, await _selected(request))
    return _answer({one: _cancelled(end) for one, end in outcomes.items()})


@router.post(
    "/jobs/retry",
    response_model=schemas.JobResults,
    responses=documented(400, 413, 422, 503),
    openapi_extra=_BODY | ONCE,
    tags=["jobs"],
    summary="Run many finished jobs again",
)
@needs(Scope.GENERATE)
async def retry_many(request: Request) -> Response:
    """Submit a new job for each, as `POST /jobs/{job_id}/retry` does.

    What forbids one of them (a budget, a limit, its status) is told for that one.  An
    `Idempotency-Key` counts for each job by itself.
    """
    results = await acts.retry_many(request, await _selected(request))
    return _answer(results)


@router.post(
    "/jobs/delete",
    response_model=schemas.JobResults,
    responses=documented(413, 422, 503),
    openapi_extra=_BODY,
    tags=["jobs"],
    summary="Delete many finished jobs",
)
@needs(Scope.GENERATE)
async def delete_many(request: Request) -> Response:
    """Remove those that are finished, in one transaction, and files no other job has."""
    job_ids = await _selected(request)
    refused = await acts.delete_many(request, job_ids)
    return _answer({one: refused.get(one, "deleted") for one in job_ids})


@router.post(
    "/jobs/download",
    response_class=StreamingResponse,
    responses=documented(404, 409, 413, 422, 503) | _ZIP,
    openapi_extra=_BODY,
    tags=["jobs"],
    summary="Download the pictures of many jobs",
)
@needs(Scope.READ)
async def download_many(request: Request) -> Response:
    """Send the pictures as one zip with a `manifest.json` that says where each came from.

    Jobs that do not exist and files that cannot be read are named in the manifest.
    """
    return await zipped(request, await _selected(request))


async def zipped(request: Request, job_ids: Sequence[UUID]) -> Response:
    """Answer with the pictures of those of the jobs the caller may see.

    Raise `NotFound` when there is none, `Conflict` when none has a picture.
    """
    runtime, realm = runtime_of(request), caller_of(request).realm
    found = await promptly(_find(runtime, job_ids))
    if realm is not None:
        found = {one: job for one, job in found.items() if job.row.owner == realm}
    if not found:
        raise NotFound("There is none of these jobs.")
    records = [found[one] for one in job_ids if one in found]
    if not any(record.outputs for record in records):
        raise Conflict("None of these jobs has a picture.")
    unknown = "There is no such job."
    missing = [
        {"job_id": str(one), "error": unknown} for one in job_ids if one not in found
    ]
    name = f"pictures-{datetime.now(UTC):%Y-%m-%d-%H%M%S}.zip"
    headers = {
        "Cache-Control": "no-store",
        "Content-Disposition": f'attachment; filename="{name}"',
    }
    return StreamingResponse(
        archive(runtime.store, records, missing),
        media_type="application/zip",
        headers=headers,
    )


async def _find(runtime: Runtime, job_ids: Sequence[UUID]) -> dict[UUID, JobRecord]:
    async with runtime.ledger.reading() as conn:
        return await job_queries.find(conn, job_ids)


def _cancelled(outcome: Outcome | Exception) -> str | ServiceError:
    if isinstance(outcome, ServiceError):
        return outcome
    if isinstance(outcome, Exception):
        raise outcome
    if outcome.is_end:
        return "cancelled"
    return "unchanged" if outcome.after.is_terminal else "cancelling"


def _answer(results: Mapping[UUID, str | Accepted | ServiceError]) -> Response:
    return respond({"results": [_result(*one) for one in results.items()]})


def _result(job_id: UUID, result: str | Accepted | ServiceError) -> dict[str, Any]:
    body: dict[str, Any] = {
        "job_id": str(job_id),
        "outcome": None,
        "new_job_id": None,
        "error": None,
    }
    match result:
        case Accepted():
            return body | {"outcome": "accepted", "new_job_id": str(result.job.id)}
        case ServiceError():
            return body | {
                "error": {
                    "code": result.code,
                    "message": str(result),
                    "retryable": result.retryable,
                }
            }
    return body | {"outcome": result}
