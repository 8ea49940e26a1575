"""What was told to whom, and telling it again.  Nothing here commits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID, uuid4

from sqlalchemy import (
    DateTime,
    Row,
    Select,
    and_,
    bindparam,
    func,
    insert,
    literal_column,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncConnection

from app.domain.errors import Conflict, NotFound
from app.domain.notices import TEST
from app.services.job_records import ENDPOINTS
from app.services.outbox import NOTIFICATIONS, name_of_endpoint

MOST_AT_ONCE: Final = 10_000  # sent again by one request

# What a row shows of itself: all but what it says.
_SHOWN = [c for c in NOTIFICATIONS.c if c.name not in ("data", "url", "receiver")]
# The latest of them, in order.
_tries = literal_column(
    """(
    SELECT jsonb_agg(
        jsonb_build_object(
            'number', last.number, 'at', last.at, 'seconds', last.seconds,
            'status_code', last.status_code, 'error', last.error
        ) ORDER BY last.number
    ) FROM (
        SELECT * FROM deliveries d WHERE d.notification_id = notifications.id
        ORDER BY d.number DESC LIMIT 50
    ) AS last
    )""",
    JSONB,
)
_RECORD: Select[Any] = select(
    *_SHOWN,
    func.coalesce(NOTIFICATIONS.c.url, ENDPOINTS.c.url).label("url"),
    ENDPOINTS.c.is_enabled,
    _tries.label("tries"),
    func.now().label("now"),
).outerjoin_from(
    NOTIFICATIONS, ENDPOINTS, ENDPOINTS.c.id == NOTIFICATIONS.c.endpoint_id
)
_OF_AGE = NOTIFICATIONS.c.created_at, NOTIFICATIONS.c.id
_NEWEST = tuple(column.desc() for column in _OF_AGE)
_is_free = or_(
    NOTIFICATIONS.c.claim_token.is_(None), NOTIFICATIONS.c.due_at <= func.now()
)
_AGAIN: Final[Mapping[str, Any]] = {
    "state": "pending",
    "finished_at": None,
    "claim_token": None,
    "tried_before": NOTIFICATIONS.c.attempts,
}


@dataclass(frozen=True, slots=True)
class LogFilter:
    """Which notifications to list; None means any."""

    realm: str | None = None
    endpoint_id: UUID | None = None
    job_id: UUID | None = None
    state: str | None = None


async def read(
    conn: AsyncConnection, notification_id: UUID, *, realm: str | None
) -> Row[Any]:
    """Read a notification with its latest tries; raise `NotFound`."""
    query = _RECORD.where(NOTIFICATIONS.c.id == notification_id)
    if realm is not None:
        query = query.where(NOTIFICATIONS.c.owner == realm)
    row: Row[Any] | None = (await conn.execute(query)).one_or_none()
    if row is None:
        raise NotFound("There is no such delivery.")
    return row


async def page(
    conn: AsyncConnection, wanted: LogFilter, *, before: UUID | None, limit: int
) -> Sequence[Row[Any]]:
    """List notifications with their latest tries, newest first, older than `before`."""
    chosen: Select[Any] = select(NOTIFICATIONS.c.id)
    if wanted.realm is not None:
        chosen = chosen.where(NOTIFICATIONS.c.owner == wanted.realm)
    if wanted.endpoint_id is not None:
        chosen = chosen.where(NOTIFICATIONS.c.endpoint_id == wanted.endpoint_id)
    if wanted.job_id is not None:
        chosen = chosen.where(NOTIFICATIONS.c.job_id == wanted.job_id)
    if wanted.state is not None:
        chosen = chosen.where(NOTIFICATIONS.c.state == wanted.state)
    if before is not None:
        last = NOTIFICATIONS.alias("before")
        mark = select(last.c.created_at, last.c.id).where(last.c.id == before)
        if wanted.realm is not None:
            mark = mark.where(last.c.owner == wanted.realm)
        chosen = chosen.where(tuple_(*_OF_AGE) < mark.scalar_subquery())
    ids = chosen.order_by(*_NEWEST).limit(limit).subquery()
    query = _RECORD.join(ids, ids.c.id == NOTIFICATIONS.c.id).order_by(*_NEWEST)
    found: Sequence[Row[Any]] = (await conn.execute(query)).all()
    return found


async def add_test(conn: AsyncConnection, endpoint: Row[Any]) -> UUID:
    """Write down that the endpoint is to be sent a test, now; give its id."""
    statement = insert(NOTIFICATIONS).values(
        id=uuid4(),
        owner=endpoint.owner,
        endpoint_id=endpoint.id,
        receiver=name_of_endpoint(endpoint.owner, endpoint.id),
        type=TEST,
        data={
            "endpoint_id": str(endpoint.id),
            "message": "This is a test: nothing happened.",
        },
        due_at=func.now(),
        created_at=func.now(),
    )
    made: UUID = await conn.scalar(statement.returning(NOTIFICATIONS.c.id))
    return made


async def redeliver(
    conn: AsyncConnection, notification_id: UUID, *, realm: str | None
) -> Row[Any]:
    """Make one due now, whatever became of it, as if it had never been tried.

    One that is being sent at this moment is left to that.  Raise `NotFound`, or `Conflict`
    when it would go nowhere.
    """
    row = await read(conn, notification_id, realm=realm)
    if row.endpoint_id is not None:
        if row.is_enabled is None:
            raise Conflict("The endpoint was removed: there is nobody to send it to.")
        if not row.is_enabled and row.type != TEST:
            raise Conflict("The endpoint is disabled: enable it first.")
    statement = update(NOTIFICATIONS).where(
        NOTIFICATIONS.c.id == notification_id, _is_free
    )
    await conn.execute(statement.values(due_at=func.now(), **_AGAIN))
    return await read(conn, notification_id, realm=realm)


@dataclass(frozen=True, slots=True)
class Redelivered:
    """How many were made due again; `next_since`: where to go on, for there are more."""

    count: int
    next_since: datetime | None


_since = bindparam("since", type_=DateTime(timezone=True))
_until = bindparam("until", type_=DateTime(timezone=True))


async def redeliver_range(
    conn: AsyncConnection,
    endpoint: Row[Any],
    *,
    since: datetime,
    until: datetime,
    includes_delivered: bool,
) -> Redelivered:
    """Make due now what was to be told to an endpoint in a time and was not, in its order.

    At most `MOST_AT_ONCE`.  Raise `Conflict` when the endpoint is disabled.
    """
    if not endpoint.is_enabled:
        raise Conflict("The endpoint is disabled: enable it first.")
    states = ["failed", "dropped"] + ["delivered"] * includes_delivered
    chosen = (
        select(NOTIFICATIONS.c.id)
        .where(
            and_(
                NOTIFICATIONS.c.endpoint_id == endpoint.id,
                NOTIFICATIONS.c.created_at >= _since,
                NOTIFICATIONS.c.created_at < _until,
                NOTIFICATIONS.c.state.in_(states),
                NOTIFICATIONS.c.type != TEST,
            )
        )
        .order_by(*_OF_AGE)
        .limit(MOST_AT_ONCE)
        .with_for_update()
        .cte("chosen")
    )
    # Due in the past, by their age: so the older ones are sent first.
    by_age = "now() - (now() - notifications.created_at) / 1000000"
    due_at = literal_column(by_age, NOTIFICATIONS.c.due_at.type)
    statement = (
        update(NOTIFICATIONS)
        .where(NOTIFICATIONS.c.id == chosen.c.id)
        .values(due_at=due_at, **_AGAIN)
        .returning(NOTIFICATIONS.c.created_at)
    )
    rows = await conn.execute(statement, {"since": since, "until": until})
    moments = list(rows.scalars())
    is_full = len(moments) == MOST_AT_ONCE
    return Redelivered(len(moments), max(moments) if is_full else None)
