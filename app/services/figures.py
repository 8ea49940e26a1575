"""Figures of how the service runs, read from the tables.  Nothing here changes a row.

Each statement reads an index from one end, or a bounded number of rows: it is as quick with
millions of finished jobs as with none.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import ARRAY, Uuid, bindparam, func, literal_column, select, text
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
    """Jobs that are not finished; `oldest` is how long ago the first pending one came in."""

    pending: int
    in_flight: int
    oldest: timedelta | None


_is_pending = JOBS.c.status == literal_column("'pending'")
_is_processing = JOBS.c.status == literal_column("'processing'")


async def queue(conn: AsyncConnection, *, realm: str | None) -> QueueFigures:
    """Count the jobs of an owner that are not finished; None: everybody's."""
    ours = [] if realm is None else [JOBS.c.owner == realm]
    count = select(func.count()).select_from(JOBS)
    first = (
        select(func.now() - JOBS.c.created_at)
        .where(_is_pending, *ours)
        .order_by(JOBS.c.id)
        .limit(1)
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


_SPREAD = "percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY extract(epoch FROM {} - {}))"
_HOURS = text(f"""
SELECT
    hours.number,
    count(job.id) AS jobs,
    count(*) FILTER (WHERE job.status = 'completed') AS completed,
    count(*) FILTER (WHERE job.status = 'failed') AS failed,
    {_SPREAD.format("job.started_at", "job.created_at")} AS queue,
    {_SPREAD.format("job.generated_at", "job.started_at")} AS generate,
    {_SPREAD.format("job.completed_at", "job.generated_at")} AS store
FROM unnest(:firsts, :ends) WITH ORDINALITY AS hours (first, ends, number)
LEFT JOIN LATERAL (
    SELECT id, status, created_at, started_at, generated_at, completed_at FROM jobs
    WHERE id >= hours.first AND id < hours.ends
    ORDER BY id DESC LIMIT {SAMPLE}
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


_FAILED = f"""
    SELECT failed.* FROM (
        SELECT id, error_code, error_message, error_retryable, completed_at FROM jobs
        WHERE status = 'failed' AND id >= :since ORDER BY id DESC LIMIT {MOST_FAILURES}
    ) AS failed
    WHERE NOT EXISTS (SELECT 1 FROM jobs AS again WHERE again.retry_of = failed.id)
"""
_GROUPS = text(rf"""
SELECT
    error_code AS code,
    count(*) AS jobs,
    max(completed_at) AS latest,
    (array_agg(error_message ORDER BY id DESC))[1] AS message,
    (array_agg(error_retryable ORDER BY id DESC))[1] AS is_retryable,
    (array_agg(id ORDER BY id DESC))[1\:{SAMPLES}] AS samples
FROM ({_FAILED}) AS failures
GROUP BY error_code ORDER BY count(*) DESC, error_code
""").bindparams(bindparam("since", type_=Uuid()))
_OF_GROUP = text(f"""
SELECT id FROM ({_FAILED}) AS failures WHERE error_code = :code ORDER BY id LIMIT :limit
""").bindparams(bindparam("since", type_=Uuid()))


async def failure_groups(
    conn: AsyncConnection, *, since: datetime
) -> list[FailureGroup]:
    """Group the jobs accepted since then that failed and were not run again."""
    rows = await conn.execute(_GROUPS, {"since": first_id(since)})
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
    values = {"since": first_id(since), "code": code, "limit": limit}
    return list((await conn.execute(_OF_GROUP, values)).scalars())


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
    f"SELECT count(*), coalesce(sum(size_bytes), 0) FROM"
    f" (SELECT size_bytes FROM assets LIMIT {_FEW}) AS few"
)
_SAMPLED = text(
    "SELECT count(*), coalesce(sum(size_bytes), 0) FROM assets TABLESAMPLE SYSTEM (:share)"
)
_DATABASE = text("SELECT pg_database_size(current_database())")


async def stored(conn: AsyncConnection) -> Stored:
    """Tell how much is kept: exactly while it is little, else from a sample."""
    database = int(await conn.scalar(_DATABASE) or 0)
    counted, total = (await conn.execute(_EXACT)).one()
    if counted < _FEW:
        return Stored(counted, int(total), database)
    rows = max(int(await conn.scalar(_ROWS) or 0), counted)
    share = min(100.0, 100.0 * _FEW / rows)
    sampled, of_sample = (await conn.execute(_SAMPLED, {"share": share})).one()
    if sampled:
        counted, total = sampled, of_sample
    return Stored(rows, int(rows * total / counted), database)
