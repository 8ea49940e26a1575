"""Jobs as callers see them: from stored rows to response bodies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import orjson
from fastapi.responses import Response

from app.core.breaker import BreakerState
from app.domain.admission import plain
from app.domain.generation import ModelDescription
from app.domain.pricing import Basis, Price
from app.services.job_queries import JobRecord
from app.services.media_links import Addresses
from app.services.media_store import WIDTHS
from app.services.submission import NewJob

# Why purchases are held back, in words that help a caller; what to do about it is the
# operator's business.
_WAITING = {
    "provider_account": "No pictures can be bought at the moment; the job starts by itself"
    " as soon as that is put right.",
    "provider_unavailable": "The provider of pictures does not answer; the job starts by"
    " itself when it does.",
}


def job_body(
    record: JobRecord, addresses: Addresses, breaker: BreakerState
) -> dict[str, Any]:
    """Give the job as `schemas.Job` describes it, in plain values for orjson."""
    row, is_public = record.row, record.row.is_public
    files = [
        {
            "index": file["index"],
            "url": addresses.url(file["key"], is_public=is_public),
            "content_type": file["content_type"],
            "size_bytes": file["size_bytes"],
            "width": file["width"],
            "height": file["height"],
            "sha256": file["sha256"],
            "thumbnails": {
                str(width): addresses.url(file["key"], is_public=is_public, width=width)
                for width in WIDTHS
            },
            "colour": file["colour"],
            "provenance": file["provenance"],
        }
        for file in record.outputs
    ]
    first = None
    if record.outputs:
        first = addresses.path(record.outputs[0]["key"], is_public=is_public)
    return _body(row, files, first, record.handle, breaker)


def newborn_body(job: NewJob, born: datetime, breaker: BreakerState) -> dict[str, Any]:
    """Give the body of a job just accepted, without reading it back."""
    row = SimpleNamespace(
        id=job.id,
        owner=job.owner,
        is_public=job.is_public,
        status="pending",
        stage="queued",
        model=job.request.model,
        prompt=job.prompt,
        input=job.request.input,
        num_outputs=job.num_outputs,
        progress=None,
        attempts=0,
        warnings=job.warnings,
        error_code=None,
        cost_usd=None,
        provider=job.provider,
        created_at=born,
        started_at=None,
        generated_at=None,
        completed_at=None,
        retry_of=job.retry_of,
        metadata=job.metadata,
        version=1,
    )
    return _body(row, [], None, None, breaker)


def _body(
    row: Any,
    outputs: Sequence[Mapping[str, Any]],
    image_path: str | None,
    handle: str | None,
    breaker: BreakerState,
) -> dict[str, Any]:
    error = None
    if row.error_code is not None:
        error = {
            "code": row.error_code,
            "message": row.error_message,
            "retryable": row.error_retryable,
        }
    return {
        "job_id": str(row.id),
        "owner": row.owner,
        "visibility": "public" if row.is_public else "private",
        "status": row.status,
        "stage": row.stage,
        "waiting_for": _waiting(breaker) if row.status == "pending" else None,
        "model": row.model,
        "prompt": row.prompt,
        "parameters": row.input,
        "num_outputs": row.num_outputs,
        "progress": row.progress,
        "attempts": row.attempts,
        "image_path": image_path,
        "outputs": outputs,
        "warnings": row.warnings,
        "error": error,
        "cost_usd": None if row.cost_usd is None else plain(row.cost_usd),
        "provider": {"name": row.provider, "prediction_id": handle},
        "timings": {
            "queued": _span(row.created_at, row.started_at),
            "generating": _span(row.started_at, row.generated_at),
            "storing": _span(row.generated_at, row.completed_at),
            "total": _span(row.created_at, row.completed_at),
        },
        "created_at": row.created_at,
        "started_at": row.started_at,
        "completed_at": row.completed_at,
        "retry_of": None if row.retry_of is None else str(row.retry_of),
        "metadata": row.metadata,
        "version": row.version,
    }


def model_body(model: ModelDescription, price: Price | None) -> dict[str, Any]:
    """Give a model as `schemas.Model` describes it."""
    usd = None if price is None else f"{price.usd:f}"
    by_image = price is not None and price.basis is Basis.IMAGE
    return {
        "name": model.name,
        "description": model.description,
        "version": model.version,
        "input_schema": model.input_schema,
        "price_per_output_usd": usd if by_image else None,
        "price": price
        and {"basis": price.basis.value, "usd": usd, "since": price.since},
    }


def _waiting(breaker: BreakerState) -> dict[str, Any] | None:
    if breaker.reason is None:
        return None
    # A process of another version may know other reasons.
    code = breaker.reason if breaker.reason in _WAITING else "provider_unavailable"
    return {
        "code": code,
        "message": _WAITING[code],
        "since": breaker.since,
    }


def _span(begin: datetime | None, end: datetime | None) -> float | None:
    if begin is None or end is None:
        return None
    return round((end - begin).total_seconds(), 3)


def etag_of(job_id: UUID, version: int, links: str | None = None) -> str:
    """Give the strong validator of a job at a version; `links` names those it is told with."""
    mark = f"-{links}" if links else ""
    return f'"{job_id.hex[-12:]}-{version}{mark}"'


def etag_with_links(record: JobRecord, addresses: Addresses) -> str:
    """Give the validator of a job's body: it changes with the job, and with its links."""
    links = None
    if record.outputs:
        links = addresses.mark(is_public=record.row.is_public)
    return etag_of(record.row.id, record.row.version, links)


def respond(
    body: Mapping[str, Any],
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Send a body as JSON; never cached unless the headers say otherwise."""
    own = {"Cache-Control": "no-store"} | dict(headers or {})
    return Response(
        orjson.dumps(body, option=orjson.OPT_UTC_Z), status, own, "application/json"
    )
