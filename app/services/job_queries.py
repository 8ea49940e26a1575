"""Reading jobs: one, a page, and the figures operators want.  Nothing here changes a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Interval,
    Row,
    Select,
    Text,
    Uuid,
    bindparam,
    func,
    literal_column,
    or_,
    select,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import aggregate_order_by
from sqlalchemy.ext.asyncio import AsyncConnection

from app.domain.generation import GenerationRequest
from app.services.job_records import ASSETS, ATTEMPTS, EVENTS, JOBS

# How far the clocks of the processes that make ids may be from the database's.
CLOCK_SKEW = timedelta(minutes=5)
LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as stored, with its files and its latest handle at the provider.

    `row` has the columns of `jobs`; `outputs` the assets in order, as plain values.
    """

    row: Row[Any]
    outputs: Sequence[Mapping[str, Any]]
    handle: str | None


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs to list; None means any.

    `text` is looked for in the prompt, `size` (width, height) among the outputs: see `job_search`.
    """

    owner: str | None = None
    status: str | None = None
    model: str | None = None
    text: str | None = None
    size: tuple[int, int] | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None


_outputs = (
    select(
        func.jsonb_agg(
            aggregate_order_by(
                func.jsonb_build_object(
                    *("index", ASSETS.c.index, "key", ASSETS.c.key),
                    *("content_type", ASSETS.c.content_type),
                    *("size_bytes", ASSETS.c.size_bytes, "sha256", ASSETS.c.sha256),
                    *("width", ASSETS.c.width, "height", ASSETS.c.height),
                    *("colour", ASSETS.c.colour, "provenance", ASSETS.c.provenance),
                ),
                ASSETS.c.index,
            )
        )
    )
    .where(ASSETS.c.job_id == JOBS.c.id)
    .scalar_subquery()
)
_handle = (
    select(ATTEMPTS.c.handle)
    .where(ATTEMPTS.c.job_id == JOBS.c.id)
    .order_by(ATTEMPTS.c.number.desc())
    .limit(1)
    .scalar_subquery()
)
_RECORD = select(JOBS, _outputs.label("files"), _handle.label("handle"))
_FIND = _RECORD.where(
    JOBS.c.id == func.any(bindparam("ids", type_=ARRAY(Uuid(), dimensions=1)))
)


def _record(row: Row[Any]) -> JobRecord:
    return JobRecord(row, row.files or (), row.handle)


async def find(conn: AsyncConnection, job_ids: Sequence[UUID]) -> dict[UUID, JobRecord]:
    """Read the jobs that exist among these."""
    rows = await conn.execute(_FIND, {"ids": list(job_ids)})
    return {row.id: _record(row) for row in rows}


async def page(
    conn: AsyncConnection, wanted: JobFilter, *, before: UUID | None, limit: int
) -> list[JobRecord]:
    """List jobs, newest first, older than the job `before`; at most `limit`.

    Searches nothing: that is `job_search.page`.
    """
    ids = select(JOBS.c.id).where(*conditions(wanted))
    if before is not None:
        ids = ids.where(JOBS.c.id < before)
    # Choosing by ids alone lets the index of a filter answer.  Asked for whole rows, the
    # planner walks the primary key and filters: past every live job to the completed ones.
    chosen = ids.order_by(JOBS.c.id.desc()).limit(limit).subquery()
    query = _RECORD.join(chosen, chosen.c.id == JOBS.c.id)
    rows = await conn.execute(query.order_by(JOBS.c.id.desc()))
    return [_record(row) for row in rows]


def conditions(wanted: JobFilter) -> Sequence[ColumnElement[bool]]:
    """Give what a job must be, but for what it says and how large it is."""
    asked: list[ColumnElement[bool]] = []
    if wanted.owner is not None:
        asked.append(JOBS.c.owner == wanted.owner)
    if wanted.status is not None:
        asked.append(JOBS.c.status == wanted.status)
    if wanted.model is not None:
        asked.append(JOBS.c.model == wanted.model)
    # Ids are in time order: bounding them lets the primary key find the moment.
    if wanted.created_after is not None:
        asked.append(JOBS.c.created_at >= wanted.created_after)
        asked.append(JOBS.c.id >= _first_id(wanted.created_after - CLOCK_SKEW))
    if wanted.created_before is not None:
        asked.append(JOBS.c.created_at < wanted.created_before)
        asked.append(JOBS.c.id < _first_id(wanted.created_before + CLOCK_SKEW))
    return asked


def _first_id(moment: datetime) -> UUID:
    """Give the smallest UUIDv7 of a moment: 48 bits of milliseconds (RFC 9562, 5.7)."""
    milliseconds = min(max(int(moment.timestamp() * 1000), 0), 2**48 - 1)
    return UUID(int=milliseconds << 80)


# ------------------------------------------------------------------------ what is due

_DUE_LOOKS = (
    select(JOBS.c.id)
    .where(JOBS.c.due_at <= func.now() - bindparam("slack", timedelta(0)))
    .where(JOBS.c.status == "processing")
    .order_by(JOBS.c.due_at)
    .limit(bindparam("limit"))
)
# In the order of the index on `due_at`: whatever else is due at the same time is soon gone.
_COUNT_DUE_STARTS = select(func.count()).select_from(
    select(JOBS.c.id)
    .where(JOBS.c.status == literal_column("'pending'"))
    .where(JOBS.c.due_at <= func.now())
    .order_by(JOBS.c.due_at)
    .limit(bindparam("limit"))
    .subquery()
)
_LOOKS_AMONG = (
    select(JOBS.c.id)
    .where(JOBS.c.id == func.any(bindparam("ids", type_=ARRAY(Uuid()))))
    .where(JOBS.c.due_at <= func.now())
    .where(
        or_(
            JOBS.c.status != literal_column("'pending'"),
            JOBS.c.deadline_at <= func.now(),
        )
    )
)
_OUT_OF_TIME = (
    select(JOBS.c.id)
    .where(JOBS.c.status == literal_column("'pending'"))
    .where(JOBS.c.deadline_at <= func.now(), JOBS.c.due_at <= func.now())
    .limit(bindparam("limit"))
)
_OWNED = select(ATTEMPTS.c.handle).where(
    ATTEMPTS.c.handle == func.any(bindparam("handles", type_=ARRAY(Text())))
)


async def due_looks(
    conn: AsyncConnection, *, slack: timedelta, limit: int
) -> list[UUID]:
    """Name jobs under way whose look has been due for longer than `slack`, oldest first."""
    rows = await conn.execute(_DUE_LOOKS, {"slack": slack, "limit": limit})
    return list(rows.scalars())


async def count_due_starts(conn: AsyncConnection, *, limit: int) -> int:
    """Count pending jobs that may start now, up to `limit`."""
    return await conn.scalar(_COUNT_DUE_STARTS, {"limit": limit}) or 0


async def looks_among(conn: AsyncConnection, job_ids: Sequence[UUID]) -> list[UUID]:
    """Tell which of the jobs are due for anything but a start."""
    rows = await conn.execute(_LOOKS_AMONG, {"ids": list(job_ids)})
    return list(rows.scalars())


async def out_of_time(conn: AsyncConnection, *, limit: int) -> list[UUID]:
    """Name pending jobs whose deadline has passed: a claim ends them."""
    return list((await conn.execute(_OUT_OF_TIME, {"limit": limit})).scalars())


_WAITING: Select[Any] = select(literal_column("1")).where(
    JOBS.c.status == literal_column("'pending'")
)
_BIRTH_WARNINGS = select(EVENTS.c.data["warnings"]).where(
    EVENTS.c.job_id == bindparam("job_id"), EVENTS.c.version == literal_column("1")
)


async def count_pending(conn: AsyncConnection, *, limit: int) -> int:
    """Count the jobs that wait to start, up to a number beyond which it does not matter."""
    counted = select(func.count()).select_from(_WAITING.limit(limit).subquery())
    return int(await conn.scalar(counted) or 0)


async def birth_warnings(conn: AsyncConnection, job_id: UUID) -> tuple[str, ...]:
    """Give the warnings a job was accepted with."""
    return tuple(await conn.scalar(_BIRTH_WARNINGS, {"job_id": job_id}) or ())


async def owned(conn: AsyncConnection, handles: Sequence[str]) -> set[str]:
    """Tell which of the handles belong to an attempt already."""
    rows = await conn.execute(_OWNED, {"handles": list(handles)})
    return set(rows.scalars())


# How long the latest pictures of a model took; few rows, found by its index.
_latest = (
    select(JOBS.c.started_at, JOBS.c.generated_at)
    .where(JOBS.c.model == bindparam("model"))
    .order_by(JOBS.c.id.desc())
    .limit(50)
    .subquery()
)
_USUAL = select(
    func.percentile_cont(0.5).within_group(
        _latest.c.generated_at - _latest.c.started_at
    )
)


async def usual_duration(conn: AsyncConnection, model: str) -> timedelta | None:
    """Say how long the latest pictures of the model took from purchase to picture."""
    found: timedelta | None = await conn.scalar(_USUAL, {"model": model})
    return found


# ------------------------------------------------------------- what is at the provider


@dataclass(frozen=True, slots=True)
class InFlight:
    """Predictions of one model that run at the provider."""

    count: int
    oldest: datetime  # when it was sent


@dataclass(frozen=True, slots=True)
class Unwanted:
    """A prediction that is to be cancelled at the provider."""

    attempt_id: UUID
    handle: str
    sent_at: datetime


@dataclass(frozen=True, slots=True)
class LostAttempt:
    """An attempt that was declared lost, and what it asked for."""

    attempt_id: UUID
    token: str
    request: GenerationRequest
    sent_at: datetime


_IN_FLIGHT = (
    select(
        JOBS.c.model,
        func.count().label("total"),
        func.min(ATTEMPTS.c.sent_at).label("oldest"),
        func.now().label("now"),
    )
    .join(JOBS, JOBS.c.id == ATTEMPTS.c.job_id)
    .where(ATTEMPTS.c.state == literal_column("'running'"))
    .group_by(JOBS.c.model)
)
_RUNNING_AMONG = select(ATTEMPTS.c.handle).where(
    ATTEMPTS.c.handle == func.any(bindparam("handles", type_=ARRAY(Text()))),
    ATTEMPTS.c.state == literal_column("'running'"),
    ATTEMPTS.c.sent_at <= bindparam("before"),
)
_UNWANTED = (
    select(ATTEMPTS.c.id, ATTEMPTS.c.handle, ATTEMPTS.c.sent_at)
    .where(ATTEMPTS.c.cancel_at <= func.now(), ATTEMPTS.c.handle.is_not(None))
    .order_by(ATTEMPTS.c.cancel_at)
    .limit(bindparam("limit"))
)
_LOST = (
    select(
        *(ATTEMPTS.c.id, ATTEMPTS.c.token, ATTEMPTS.c.sent_at),
        *(JOBS.c.model, JOBS.c.input),
    )
    .join(JOBS, JOBS.c.id == ATTEMPTS.c.job_id)
    .where(ATTEMPTS.c.state == literal_column("'lost'"), ATTEMPTS.c.handle.is_(None))
    .where(ATTEMPTS.c.sent_at > func.now() - bindparam("age", type_=Interval()))
    .where(ATTEMPTS.c.sent_at > bindparam("after", type_=ATTEMPTS.c.sent_at.type))
    .order_by(ATTEMPTS.c.sent_at)
    .limit(bindparam("limit"))
)


async def in_flight(conn: AsyncConnection) -> tuple[dict[str, InFlight], datetime]:
    """Count what runs at the provider, by model; and tell the database's clock.

    Without anything in flight the clock is not asked, and the moment means nothing.
    """
    found: dict[str, InFlight] = {}
    now = datetime.now(UTC)
    for row in await conn.execute(_IN_FLIGHT):
        now = row.now
        found[row.model] = InFlight(row.total, row.oldest)
    return found, now


async def running_among(
    conn: AsyncConnection, handles: Sequence[str], *, before: datetime
) -> set[str]:
    """Tell which of the predictions are ours, not known to be over, and sent by then."""
    values = {"handles": list(handles), "before": before}
    return set((await conn.execute(_RUNNING_AMONG, values)).scalars())


async def unwanted(conn: AsyncConnection, *, limit: int) -> list[Unwanted]:
    """Name predictions nobody wants whose cancellation is due."""
    rows = await conn.execute(_UNWANTED, {"limit": limit})
    return [Unwanted(row.id, row.handle, row.sent_at) for row in rows]


async def lost_attempts(
    conn: AsyncConnection, *, age: timedelta, limit: int, after: datetime = LONG_AGO
) -> list[LostAttempt]:
    """Name lost attempts younger than `age` whose purchase never turned up, oldest first.

    Those sent later than `after` only.
    """
    values = {"age": age, "limit": limit, "after": after}
    rows = await conn.execute(_LOST, values)
    return [
        LostAttempt(
            row.id, row.token, GenerationRequest(row.model, row.input), row.sent_at
        )
        for row in rows
    ]


# ---------------------------------------------------------------------------- figures


@dataclass(frozen=True, slots=True)
class LiveFigures:
    """Jobs that are not finished, by stage.

    `overdue` is how long the job that waits longest has been due, zero when none is.
    """

    by_stage: Mapping[str, int]
    overdue: timedelta


_BY_STATUS = select(JOBS.c.status, func.count()).group_by(JOBS.c.status)
_BY_STAGE = (
    select(JOBS.c.stage, func.count())
    .where(JOBS.c.due_at.is_not(None))
    .group_by(JOBS.c.stage)
)
_OLDEST = select(type_coerce(func.now() - func.min(JOBS.c.due_at), Interval())).where(
    JOBS.c.due_at.is_not(None)
)


async def live_figures(conn: AsyncConnection) -> LiveFigures:
    """Count the live jobs: cheap, however many are finished."""
    by_stage = {stage: count for stage, count in await conn.execute(_BY_STAGE)}
    overdue = await conn.scalar(_OLDEST)
    return LiveFigures(by_stage, max(overdue or timedelta(0), timedelta(0)))


async def count_by_status(conn: AsyncConnection) -> dict[str, int]:
    """Count all jobs by status.  Scans the status index: cache the answer."""
    return {status: count for status, count in await conn.execute(_BY_STATUS)}
