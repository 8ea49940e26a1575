"""Figures of how the service runs, read from the tables.  Nothing here changes a row.

Each statement reads an index from one end, or a bounded number of rows: it is as quick with
millions of finished jobs as with none.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Subquery,
    Uuid,
    bindparam,
    exists,
    func,
    literal_column,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import aggregate_order_by
from sqlalchemy.ext.asyncio import AsyncConnection

from app.domain.errors import Conflict
from app.services.job_queries import first_id
from app.services.job_records import JOBS

HOUR = timedelta(hours=1)
SAMPLE = 1000  # jobs looked at for each hour: the latest ones
MOST_FAILURES = (
    5000  # the latest ones are told apart; what is beyond is told by "or more"
)
SAMPLES = 3  # jobs named for each reason


# ------------------------------------------------------------------------------- the queue


@dataclass(frozen=True, slots=True)
class QueueFigures:
    """Jobs that are not finished; `oldest` is when the first pending one came in."""

    pending: int
    in_flight: int
    oldest: datetime | None


_is_pending = JOBS.c.status == literal_column("'pending'")
_is_processing = JOBS.c.status == literal_column("'processing'")


async def queue(conn: AsyncConnection, *, realm: str | None) -> QueueFigures:
    """Count the jobs of an owner that are not finished; None: everybody's."""
    ours = [] if realm is None else [JOBS.c.owner == realm]
    count = select(func.count()).select_from(JOBS)
    first = (
        select(JOBS.c.created_at).where(_is_pending, *ours).order_by(JOBS.c.id).limit(1)
    )
    query = select(
        count.where(_is_pending, *ours).scalar_subquery(),
        count.where(_is_processing, *ours).scalar_subquery(),
        first.scalar_subquery(),
    )
    pending, in_flight, oldest = (await conn.execute(query)).one()
    return QueueFigures(pending, in_flight, oldest)


# ---------------------------------------------------------------------------- hour by hour


@dataclass(frozen=True, slots=True)
class Spread:
    """How long a phase took, in seconds: for half of the jobs at most, and for 95 in 100."""

    median: float
    p95: float


@dataclass(frozen=True, slots=True)
class Hour:
    """The jobs accepted in the hour that began at `at`, the latest `SAMPLE` of them.

    A phase nobody went through is None.
    """

    at: datetime
    jobs: int
    completed: int
    failed: int
    queue: Spread | None
    generate: Spread | None
    store: Spread | None

    @property
    def failed_share(self) -> float | None:
        """Give the share of failures among those that completed or failed."""
        ended = self.completed + self.failed
        return self.failed / ended if ended else None


_HOURS = text("""
SELECT
    hours.number,
    count(job.id) AS jobs,
    count(*) FILTER (WHERE job.status = 'completed') AS completed,
    count(*) FILTER (WHERE job.status = 'failed') AS failed,
    percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (
        ORDER BY extract(epoch FROM job.started_at - job.created_at)
    ) AS queue,
    percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (
        ORDER BY extract(epoch FROM job.generated_at - job.started_at)
    ) AS generate,
    percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (
        ORDER BY extract(epoch FROM job.completed_at - job.generated_at)
    ) AS store
FROM unnest(:firsts, :ends) WITH ORDINALITY AS hours (first, ends, number)
LEFT JOIN LATERAL (
    SELECT id, status, created_at, started_at, generated_at, completed_at FROM jobs
    WHERE id >= hours.first AND id < hours.ends
    ORDER BY id DESC LIMIT :sample
) AS job ON true
GROUP BY hours.number ORDER BY hours.number
""").bindparams(
    bindparam("firsts", type_=ARRAY(Uuid())), bindparam("ends", type_=ARRAY(Uuid()))
)


async def hours(conn: AsyncConnection, *, now: datetime, count: int) -> list[Hour]:
    """Tell of the last so many hours, the one that has just begun included, oldest first."""
    this = now.replace(minute=0, second=0, microsecond=0)
    begins = [this - HOUR * back for back in range(count - 1, -1, -1)]
    values = {
        "firsts": [first_id(at) for at in begins],
        "ends": [first_id(at + HOUR) for at in begins],
        "sample": SAMPLE,
    }
    rows = (await conn.execute(_HOURS, values)).all()
    return [
        Hour(
            at,
            row.jobs,
            row.completed,
            row.failed,
            _spread(row.queue),
            _spread(row.generate),
            _spread(row.store),
        )
        for at, row in zip(begins, rows, strict=True)
    ]


def _spread(found: Sequence[float | None] | None) -> Spread | None:
    """Read what PostgreSQL says of a phase; clocks that differ make it no less than nothing."""
    if found is None or found[0] is None or found[1] is None:
        return None
    return Spread(max(found[0], 0.0), max(found[1], 0.0))


# -------------------------------------------------------------------------------- failures


@dataclass(frozen=True, slots=True)
class FailureGroup:
    """Failed jobs with one reason that nobody ran again; `samples` are the latest of them.

    `count` is of the latest `MOST_FAILURES` failures of any reason.
    """

    code: str
    count: int
    latest: datetime
    message: str
    is_retryable: bool
    samples: Sequence[UUID]


_AGAIN = JOBS.alias("again")


def _not_run_again(since: datetime) -> Subquery:
    """Select the latest failures, but for those that were run again."""
    latest = (
        select(
            *(JOBS.c.id, JOBS.c.completed_at),
            *(JOBS.c.error_code, JOBS.c.error_message, JOBS.c.error_retryable),
        )
        .where(JOBS.c.status == literal_column("'failed'"))
        .where(JOBS.c.id >= first_id(since))
        .order_by(JOBS.c.id.desc())
        .limit(MOST_FAILURES)
        .subquery("latest")
    )
    again = exists(select(literal_column("1")).where(_AGAIN.c.retry_of == latest.c.id))
    return select(latest).where(~again).subquery("failed")


async def failure_groups(
    conn: AsyncConnection, *, since: datetime
) -> list[FailureGroup]:
    """Group the jobs accepted since then that failed and were not run again."""
    failed = _not_run_again(since)

    def latest(column: ColumnElement[Any]) -> Any:
        ordered = aggregate_order_by(column, failed.c.id.desc())
        return func.array_agg(ordered, type_=ARRAY(column.type))

    query = (
        select(
            failed.c.error_code.label("code"),
            func.count().label("jobs"),
            func.max(failed.c.completed_at).label("latest"),
            latest(failed.c.error_message)[1].label("message"),
            latest(failed.c.error_retryable)[1].label("is_retryable"),
            latest(failed.c.id)[1:SAMPLES].label("samples"),
        )
        .group_by(failed.c.error_code)
        .order_by(func.count().desc(), failed.c.error_code)
    )
    rows = await conn.execute(query)
    return [
        FailureGroup(
            row.code,
            row.jobs,
            row.latest,
            row.message or "",
            bool(row.is_retryable),
            tuple(row.samples),
        )
        for row in rows
    ]


async def failed_with(
    conn: AsyncConnection, code: str, *, since: datetime, limit: int
) -> list[UUID]:
    """Name jobs of one of these groups, oldest first."""
    failed = _not_run_again(since)
    query = select(failed.c.id).where(failed.c.error_code == code)
    rows = await conn.execute(query.order_by(failed.c.id).limit(limit))
    return list(rows.scalars())


_TRY_LOCK = text("SELECT pg_try_advisory_lock(:space, hashtext(:code))")
_UNLOCK = text("SELECT pg_advisory_unlock(:space, hashtext(:code))")
_GROUPS_SPACE = 0x6D67


@asynccontextmanager
async def alone_with(conn: AsyncConnection, code: str) -> AsyncIterator[None]:
    """Keep a group of failures to oneself; raise `Conflict` when somebody has it.

    The connection must be in autocommit and stay with the caller.
    """
    values = {"space": _GROUPS_SPACE, "code": code}
    if not await conn.scalar(_TRY_LOCK, values):
        raise Conflict("Somebody is running these jobs again right now.")
    try:
        yield
    except BaseException:
        await conn.invalidate()  # ending the session lets go of it
        raise
    await conn.execute(_UNLOCK, values)


# -------------------------------------------------------------------------- what is kept


@dataclass(frozen=True, slots=True)
class Stored:
    """What is kept: pictures and their bytes, about; and the whole database's bytes.

    A file that several jobs have counts for each of them.
    """

    pictures: int
    picture_bytes: int
    database_bytes: int


_FEW = 5000
# The planner's own count, and the mean of a bounded part of the table.
_ROWS = text(
    "SELECT greatest(reltuples, 0)::bigint FROM pg_class WHERE oid = 'assets'::regclass"
)
_EXACT = text(
    "SELECT count(*), coalesce(sum(size_bytes), 0) FROM"
    " (SELECT size_bytes FROM assets LIMIT :few) AS few"
)
_SAMPLED = text(
    "SELECT count(*), coalesce(sum(size_bytes), 0) FROM assets TABLESAMPLE SYSTEM (:share)"
)
_DATABASE = text("SELECT pg_database_size(current_database())")


async def stored(conn: AsyncConnection) -> Stored:
    """Tell how much is kept: exactly while it is little, else from a sample."""
    database = int(await conn.scalar(_DATABASE) or 0)
    counted, total = (await conn.execute(_EXACT, {"few": _FEW})).one()
    if counted < _FEW:
        return Stored(counted, int(total), database)
    rows = max(int(await conn.scalar(_ROWS) or 0), counted)
    share = min(100.0, 100.0 * _FEW / rows)
    sampled, of_sample = (await conn.execute(_SAMPLED, {"share": share})).one()
    if sampled:
        counted, total = sampled, of_sample
    return Stored(rows, int(rows * total / counted), database)
