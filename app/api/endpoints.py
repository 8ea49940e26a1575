"""The JSON API: validate, one transaction, ring, answer.

Every write is committed before the answer leaves; the bell is rung after the commit and may
be lost.  Bodies are built by `views`, whose shape `models/schemas.py` documents.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from app.api import acts
from app.api.deps import (
    Cursor,
    Id,
    Moment,
    Size,
    parse_body,
    parse_job_id,
    promptly,
    read_cursor,
    read_size,
    runtime_of,
    write_cursor,
)
from app.api.guard import GuardedRoute, admit_again, caller_of, needs
from app.api.intake import (
    ONCE_PATTERN,
    accept,
    compose,
    estimate,
    once_of,
    replayed,
    tell,
    sketch,
)
from app.api.paths import keep_apart
from app.api.problems import documented
from app.api.views import (
    etag_of,
    etag_with_links,
    job_body,
    model_body,
    obstacle_to,
    respond,
)
from app.domain.access import Scope
from app.domain.errors import Forbidden
from app.domain.state import Status
from app.models import schemas
from app.runtime import Runtime
from app.services import job_search
from app.services.job_queries import JobFilter, JobRecord
from app.services.media_links import Addresses

router = APIRouter(route_class=GuardedRoute)

keep_apart("job", "cancel", "retry", "delete", "download")

LONGEST_WAIT = 60.0
LONGEST_TRUST = 5.0  # seconds; a job that vanished is no news

EARLIEST = datetime(1970, 1, 2, tzinfo=UTC)
LATEST = datetime(9999, 1, 1, tzinfo=UTC)

_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/GenerateRequest"}
            }
        },
    }
}

ONCE = {
    "parameters": [
        {
            "name": "Idempotency-Key",
            "in": "header",
            "required": False,
            "description": "Any text of yours; a repeat with the same one makes no second"
            " job. Kept for 24 hours at least.",
            "schema": {"type": "string", "pattern": ONCE_PATTERN},
        }
    ]
}


@router.post(
    "/generate",
    status_code=202,
    response_model=schemas.Job,
    responses=documented(400, 402, 404, 409, 413, 422, 503)
    | {
        200: {
            "model": schemas.Estimate,
            "description": "With `dry_run`: what it would mean.",
        }
    },
    openapi_extra=_BODY | ONCE,
    tags=["jobs"],
    summary="Submit a job",
)
@needs(Scope.GENERATE)
async def generate(
    request: Request,
    dry_run: Annotated[
        bool,
        Query(
            description="Say what it would cost and when it would start; buy nothing."
        ),
    ] = False,
) -> Response:
    """Accept a job: it is stored before this answers, and will be looked after from then on.

    With an `Idempotency-Key` a repeat gets the first answer again, for 24 hours at least.
    """
    runtime, caller = runtime_of(request), caller_of(request)
    wanted = await parse_body(request, schemas.GenerateRequest)
    once = once_of(request, "generate", wanted)
    if dry_run:
        return await estimate(runtime, await sketch(request, wanted))
    if once and (repeat := await replayed(runtime, caller.owner, once)):
        return repeat
    return await accept(runtime, await compose(request, wanted, once))


@router.get(
    "/status/{job_id}",
    response_model=schemas.Job,
    responses=documented(400, 404, 503) | {304: {"description": "Not changed."}},
    tags=["jobs"],
    summary="Read a job",
)
@needs(Scope.READ)
async def status(
    request: Request,
    job_id: Id,
    wait: Annotated[
        float,
        Query(
            ge=0,
            le=LONGEST_WAIT,
            description="Seconds to wait for the end of the job; with `If-None-Match`,"
            " for any change.",
        ),
    ] = 0,
) -> Response:
    """Read a job as it is now, or as soon as it is finished.

    A process that was asked to stop answers at once: ask again, another one waits on.
    """
    runtime = runtime_of(request)
    key = parse_job_id(job_id)
    known = request.headers.get("if-none-match")
    realm = caller_of(request).realm
    record = await _wait_for(runtime, key, realm, known, wait)
    if wait:
        await admit_again(request)
    addresses = runtime.links.now()
    etag = etag_with_links(record, addresses)
    if known is not None and _mentions(known, etag):
        return Response(
            status_code=304, headers={"ETag": etag, "Cache-Control": "no-store"}
        )
    return await _tell(runtime, record, addresses)


async def _tell(runtime: Runtime, record: JobRecord, addresses: Addresses) -> Response:
    obstacle = await obstacle_to(runtime, (record,))
    headers = {"ETag": etag_with_links(record, addresses)}
    return respond(job_body(record, addresses, obstacle), headers=headers)


async def _wait_for(
    runtime: Runtime, job_id: UUID, realm: str | None, known: str | None, wait: float
) -> JobRecord:
    """Read until the job is worth telling about, or the time is up, or the process stops."""
    deadline = time.monotonic() + wait

    def is_worth_telling(record: JobRecord) -> bool:
        if Status(record.row.status).is_terminal or runtime.stopping.is_set():
            return True
        etag = etag_of(job_id, record.row.version)
        is_news = known is not None and not _mentions(known, etag)
        return is_news or time.monotonic() >= deadline

    record = await runtime.ledger.read(job_id, realm=realm)
    if is_worth_telling(record):
        return record
    async with runtime.live.watch(job_id) as watch:
        while True:
            record = await runtime.ledger.read(job_id, realm=realm)
            if is_worth_telling(record):
                return record
            left = deadline - time.monotonic()
            await watch.newer_than(record.row.version, min(left, LONGEST_TRUST))


def _mentions(header: str, etag: str) -> bool:
    return header.strip() == "*" or etag in header


@router.get(
    "/jobs",
    response_model=schemas.JobPage,
    responses=documented(400, 503),
    tags=["jobs"],
    summary="List jobs",
)
@needs(Scope.READ)
async def jobs(
    request: Request,
    owner: Annotated[
        str | None,
        Query(max_length=200, description="Whose; others' are for administrators."),
    ] = None,
    status: Annotated[schemas.StatusWord | None, Query()] = None,
    model: Annotated[str | None, Query(max_length=300)] = None,
    q: Annotated[
        str | None,
        Query(
            max_length=200,
            description="Words of the prompt, or parts of them, in any case: all must occur,"
            " in any order. What is between double quotes must occur as it stands.",
        ),
    ] = None,
    size: Size = None,
    created_after: Annotated[Moment | None, Query()] = None,
    created_before: Annotated[Moment | None, Query()] = None,
    cursor: Cursor = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Response:
    """List jobs, newest first.  The cursor is stable while jobs come and go.

    A search (`q`, `size`) that took too long answers with what it has found, perhaps nothing,
    and `next_cursor` goes on from there: the end is where there is none.
    """
    runtime, caller = runtime_of(request), caller_of(request)
    before = read_cursor(cursor)
    owner = _clean(owner)
    if owner is not None and not caller.sees(owner):
        raise Forbidden("Only administrators see other owners.", field="owner")
    wanted = JobFilter(
        owner=owner or caller.realm,
        status=status,
        model=_clean(model),
        text=_clean(q),
        size=read_size(size),
        created_after=_storable(created_after),
        created_before=_storable(created_before),
    )
    found = await promptly(_page(runtime, wanted, before, limit))
    addresses, obstacle = runtime.links.now(), await obstacle_to(runtime, found.jobs)
    return respond(
        {
            "items": [job_body(record, addresses, obstacle) for record in found.jobs],
            "next_cursor": write_cursor(found.rest) if found.rest else None,
        }
    )


async def _page(
    runtime: Runtime, wanted: JobFilter, before: UUID | None, limit: int
) -> job_search.Page:
    async with runtime.ledger.transaction() as conn:
        return await job_search.page(conn, wanted, before=before, limit=limit)


def _clean(text: str | None) -> str | None:
    """Drop what PostgreSQL cannot hold, and so cannot match either."""
    return text.replace("\x00", "\ufffd") if text else None


def _storable(moment: datetime | None) -> datetime | None:
    """Read a moment without a zone as UTC; move one at the calendar's ends inwards.

    There, arithmetic overflows; and no job is older or younger than these.
    """
    if moment is None:
        return None
    aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return min(max(aware, EARLIEST), LATEST)


@router.post(
    "/jobs/{job_id}/cancel",
    response_model=schemas.Job,
    responses=documented(400, 404, 503),
    tags=["jobs"],
    summary="Cancel a job",
)
@needs(Scope.GENERATE)
async def cancel(request: Request, job_id: Id) -> Response:
    """Ask for the end of a job.  A finished job stays as it is.

    A job that was not sent yet is cancelled at once; one under way as soon as the provider
    agrees, and it stays `processing` until then.
    """
    runtime, key = runtime_of(request), parse_job_id(job_id)
    await acts.cancel(request, key)
    record = await runtime.ledger.read(key, realm=caller_of(request).realm)
    return await _tell(runtime, record, runtime.links.now())


@router.post(
    "/jobs/{job_id}/retry",
    status_code=202,
    response_model=schemas.Job,
    responses=documented(400, 402, 404, 409, 422, 503),
    openapi_extra=ONCE,
    tags=["jobs"],
    summary="Run a finished job again",
)
@needs(Scope.GENERATE)
async def retry(request: Request, job_id: Id) -> Response:
    """Submit a new job with the same effective input; the old one stays as it is.

    The new one belongs to the owner of the old one, and is as visible.  `Idempotency-Key` is
    honoured as by `POST /generate`.
    """
    accepted = await acts.retry(request, parse_job_id(job_id))
    return await tell(runtime_of(request), accepted)


@router.delete(
    "/jobs/{job_id:job}",
    status_code=204,
    response_class=Response,
    responses=documented(400, 404, 409, 503),
    tags=["jobs"],
    summary="Delete a finished job",
)
@needs(Scope.GENERATE)
async def delete(request: Request, job_id: Id) -> Response:
    """Remove a finished job, and its files unless another job has the same ones."""
    await acts.delete(request, parse_job_id(job_id))
    return Response(status_code=204)


@router.get(
    "/models",
    response_model=schemas.ModelList,
    tags=["models"],
    summary="List models",
)
@needs(Scope.READ)
async def models(request: Request) -> Response:
    """List the models known here with their inputs.  Others work too, by name."""
    runtime = runtime_of(request)
    today = datetime.now(UTC).date()
    items = [
        model_body(model, runtime.prices.price_of(model.name, today))
        for model in runtime.catalogue.list()
    ]
    return respond({"default": runtime.settings.default_model, "items": items})
