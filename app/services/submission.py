"""Accepting jobs: many submits in two statements, on the caller's connection, never committing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import ARRAY, Interval, Uuid, bindparam, func, insert, literal, select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from app.core.database import arrays, unnest
from app.domain import journal
from app.domain.generation import JSON, GenerationRequest
from app.domain.state import Stage, Status
from app.services.job_records import EVENTS, JOBS


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job as accepted, everything about it that never changes."""

    id: UUID
    request: GenerationRequest
    provider: str
    prompt: str
    num_outputs: int
    priority: int
    deadline: timedelta
    metadata: dict[str, JSON]
    webhook_url: str | None = None
    request_id: str | None = None
    retry_of: UUID | None = None
    warnings: tuple[str, ...] = ()
    uploads: Mapping[str, JSON] = field(default_factory=dict)


_NEW_COLUMNS = (
    "id",
    "provider",
    "model",
    "prompt",
    "input",
    "num_outputs",
    "priority",
    "webhook_url",
    "metadata",
    "request_id",
    "retry_of",
    "warnings",
    "uploads",
)
_new = unnest(JOBS, _NEW_COLUMNS, alias="new")
_INSERT_JOBS = (
    upsert(JOBS)
    .from_select(
        [
            *_NEW_COLUMNS,
            *("version", "status", "stage", "is_cancel_requested", "attempts"),
            *("look_failures", "due_at", "created_at", "deadline_at"),
        ],
        select(
            _new,
            literal(1),
            literal(Status.PENDING.value),
            literal(Stage.QUEUED.value),
            literal(False),
            literal(0),
            literal(0),
            func.now(),
            func.now(),
            func.now() + bindparam("deadline", type_=Interval()),
        ),
        include_defaults=False,
    )
    # A submit is repeated with the same id when the answer to its commit was lost.
    .on_conflict_do_nothing(index_elements=[JOBS.c.id])
    .returning(JOBS.c.id, JOBS.c.created_at)
)
_BORN = select(JOBS.c.id, JOBS.c.created_at).where(
    JOBS.c.id == func.any(bindparam("ids", type_=ARRAY(Uuid(), dimensions=1)))
)
_births = unnest(EVENTS, ("job_id", "data"), alias="born")
_INSERT_BIRTHS = insert(EVENTS).from_select(
    ["job_id", "data", "version", "name", "status", "stage", "at"],
    select(
        _births,
        literal(1),
        literal(journal.SUBMITTED),
        literal(Status.PENDING.value),
        literal(Stage.QUEUED.value),
        func.now(),
    ),
    include_defaults=False,
)


async def submit(conn: AsyncConnection, jobs: Sequence[NewJob]) -> dict[UUID, datetime]:
    """Accept the jobs: pending, due now.  Answer when each was born.

    Safe to repeat with the same ids.  All must have the same deadline (one service has one
    setting).  Does not commit.
    """
    deadline = jobs[0].deadline
    rows = [
        {
            "id": job.id,
            "provider": job.provider,
            "model": job.request.model,
            "prompt": job.prompt,
            "input": dict(job.request.input),
            "num_outputs": job.num_outputs,
            "priority": job.priority,
            "webhook_url": job.webhook_url,
            "metadata": job.metadata,
            "request_id": job.request_id,
            "retry_of": job.retry_of,
            "warnings": list(job.warnings),
            "uploads": dict(job.uploads),
        }
        for job in jobs
    ]
    values = arrays(rows, _NEW_COLUMNS, alias="new") | {"deadline": deadline}
    born = {row.id: row.created_at for row in await conn.execute(_INSERT_JOBS, values)}
    births = [
        {
            "job_id": job.id,
            "data": {
                "deadline": deadline.total_seconds(),
                "warnings": list(job.warnings),
            },
        }
        for job in {job.id: job for job in jobs if job.id in born}.values()
    ]
    await conn.execute(_INSERT_BIRTHS, arrays(births, ("job_id", "data"), alias="born"))
    if repeated := [job.id for job in jobs if job.id not in born]:
        known = await conn.execute(_BORN, {"ids": repeated})
        born |= {row.id: row.created_at for row in known}
    return born
