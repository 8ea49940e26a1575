"""What happened to one job: its log and its attempts, as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Uuid, bindparam, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.services.job_records import ATTEMPTS, EVENTS

_LONGEST = 1000  # a job's log is far shorter; what is older than these is left out

_EVENTS = (
    select(
        *(EVENTS.c.version, EVENTS.c.name, EVENTS.c.data),
        *(EVENTS.c.status, EVENTS.c.stage, EVENTS.c.at),
    )
    .where(EVENTS.c.job_id == bindparam("job_id", type_=Uuid()))
    .order_by(EVENTS.c.version.desc())
    .limit(_LONGEST)
)
_ATTEMPTS = (
    select(
        *(ATTEMPTS.c.number, ATTEMPTS.c.state, ATTEMPTS.c.handle),
        *(ATTEMPTS.c.sent_at, ATTEMPTS.c.closed_at),
    )
    .where(ATTEMPTS.c.job_id == bindparam("job_id", type_=Uuid()))
    .order_by(ATTEMPTS.c.number)
)


@dataclass(frozen=True, slots=True)
class History:
    """A job's log, oldest first, and its attempts in order.

    Events have `version`, `name`, `data`, `status`, `stage` and `at`; attempts `number`,
    `state`, `handle`, `sent_at` and `closed_at`.
    """

    events: Sequence[Any]
    attempts: Sequence[Any]


async def history(conn: AsyncConnection, job_id: UUID) -> History:
    """Read what happened to a job, whoever's it is; empty for an unknown one."""
    values = {"job_id": job_id}
    events = (await conn.execute(_EVENTS, values)).all()
    attempts = (await conn.execute(_ATTEMPTS, values)).all()
    return History(events[::-1], attempts)
