"""Figures of how the service runs, read from the tables.  Nothing here changes a row.

Each statement reads an index from one end, or a bounded number of rows: it is as quick with
millions of finished jobs as with none.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import func, literal_column, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.services.job_records import JOBS


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
