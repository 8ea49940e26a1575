"""Verbs on endpoints, the registered receivers of webhooks.  Nothing here commits."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    Interval,
    Row,
    Select,
    Uuid,
    bindparam,
    delete,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from app.core.signing import PREFIX
from app.domain.errors import Conflict, NotFound
from app.services.job_records import ENDPOINTS
from app.services.outbox import drop, name_of_endpoint

MOST_ENDPOINTS: Final = 50  # of one owner
OVERLAP: Final = timedelta(hours=24)  # in which both secrets sign
_THE_FLOOR = text("SELECT pg_advisory_xact_lock(1835466756, hashtext(:owner))")


def mint_secret() -> str:
    """Make a signing secret: 32 random bytes, as Standard Webhooks writes them."""
    return PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


@dataclass(frozen=True, slots=True)
class NewEndpoint:
    """An endpoint as it is asked for."""

    id: UUID
    owner: str
    url: str
    description: str
    events: Sequence[str]
    secret: str


async def create(conn: AsyncConnection, wanted: NewEndpoint) -> Row[Any]:
    """Register the endpoint; raise `Conflict` when its owner has too many."""
    # One at a time for each owner, or two would both be the last.
    await conn.execute(_THE_FLOOR, {"owner": wanted.owner})
    counted = select(func.count()).where(ENDPOINTS.c.owner == wanted.owner)
    if (await conn.scalar(counted) or 0) >= MOST_ENDPOINTS:
        raise Conflict(
            f"There are {MOST_ENDPOINTS} endpoints already: remove one first.",
            code="too_many_endpoints",
        )
    statement = insert(ENDPOINTS).values(
        id=wanted.id,
        owner=wanted.owner,
        url=wanted.url,
        description=wanted.description,
        events=list(wanted.events),
        secret=wanted.secret,
        created_at=func.now(),
    )
    return (await conn.execute(statement.returning(*ENDPOINTS.c))).one()


async def read(
    conn: AsyncConnection, endpoint_id: UUID, *, realm: str | None
) -> Row[Any]:
    """Read an endpoint; raise `NotFound`, also for one outside of the realm."""
    query = _within(select(ENDPOINTS).where(ENDPOINTS.c.id == endpoint_id), realm)
    row: Row[Any] | None = (await conn.execute(query)).one_or_none()
    if row is None:
        raise NotFound("There is no such endpoint.")
    return row


async def page(
    conn: AsyncConnection, *, realm: str | None, before: UUID | None, limit: int
) -> Sequence[Row[Any]]:
    """List endpoints, newest first, older than `before`."""
    query = select(ENDPOINTS).order_by(ENDPOINTS.c.id.desc()).limit(limit)
    query = _within(query, realm)
    if before is not None:
        query = query.where(ENDPOINTS.c.id < before)
    return (await conn.execute(query)).all()


async def change(
    conn: AsyncConnection,
    endpoint_id: UUID,
    changes: Mapping[str, Any],
    *,
    realm: str | None,
) -> Row[Any]:
    """Change `url`, `description`, `events` or `is_enabled`; raise `NotFound`.

    Switching it off drops what it was to be sent (see `outbox.drop`); switching it on forgets
    why it was off.
    """
    before = await read(conn, endpoint_id, realm=realm)
    values = dict(changes)
    if values.get("is_enabled"):
        values |= {"disabled_reason": None, "failing_since": None}
    if values:
        changed = update(ENDPOINTS).where(ENDPOINTS.c.id == endpoint_id)
        await conn.execute(changed.values(values))
    if values.get("is_enabled") is False:
        await _drop_pending(conn, [before])
    return await read(conn, endpoint_id, realm=realm)


async def remove(
    conn: AsyncConnection, endpoint_id: UUID, *, realm: str | None
) -> None:
    """Remove an endpoint; what it was to be sent is dropped.  Raise `NotFound`."""
    row = await read(conn, endpoint_id, realm=realm)
    await conn.execute(delete(ENDPOINTS).where(ENDPOINTS.c.id == endpoint_id))
    await _drop_pending(conn, [row])


async def rotate(
    conn: AsyncConnection, endpoint_id: UUID, secret: str, *, realm: str | None
) -> Row[Any]:
    """Give the endpoint another secret; the one before signs too, for `OVERLAP`."""
    await read(conn, endpoint_id, realm=realm)
    statement = (
        update(ENDPOINTS)
        .where(ENDPOINTS.c.id == endpoint_id)
        .values(
            previous_secret=ENDPOINTS.c.secret,
            previous_until=func.now() + bindparam("overlap", OVERLAP, Interval()),
            secret=secret,
        )
    )
    await conn.execute(statement)
    return await read(conn, endpoint_id, realm=realm)


# ---------------------------------------------------------------- how they are doing

_among = func.any(bindparam("ids", type_=ARRAY(Uuid(), dimensions=1)))
# Rows that somebody else is marking are left to the next try.
_well = (
    select(ENDPOINTS.c.id)
    .where(ENDPOINTS.c.id == _among, ENDPOINTS.c.failing_since.is_not(None))
    .with_for_update(skip_locked=True)
)
_ill = (
    select(ENDPOINTS.c.id)
    .where(ENDPOINTS.c.id == _among, ENDPOINTS.c.failing_since.is_(None))
    .with_for_update(skip_locked=True)
)
_MARK_WELL = (
    update(ENDPOINTS).where(ENDPOINTS.c.id.in_(_well)).values(failing_since=None)
)
_MARK_ILL = (
    update(ENDPOINTS).where(ENDPOINTS.c.id.in_(_ill)).values(failing_since=func.now())
)
_SWITCH_OFF = (
    update(ENDPOINTS)
    .where(ENDPOINTS.c.id == _among, ENDPOINTS.c.is_enabled)
    .values(is_enabled=False, disabled_reason=bindparam("reason"))
    .returning(ENDPOINTS.c.id, ENDPOINTS.c.owner)
)
_SWITCH_OFF_DEAD = _SWITCH_OFF.where(
    ENDPOINTS.c.failing_since <= func.now() - bindparam("enough", type_=Interval())
)


async def mark_well(conn: AsyncConnection, endpoint_ids: Collection[UUID]) -> None:
    """Note that tries succeeded where they had failed."""
    await conn.execute(_MARK_WELL, {"ids": list(endpoint_ids)})


async def mark_ill(conn: AsyncConnection, endpoint_ids: Collection[UUID]) -> None:
    """Note since when tries fail."""
    await conn.execute(_MARK_ILL, {"ids": list(endpoint_ids)})


async def switch_off(
    conn: AsyncConnection, endpoint_ids: Collection[UUID], reason: str
) -> list[UUID]:
    """Disable endpoints, and drop what is pending; give those that were enabled."""
    values = {"ids": list(endpoint_ids), "reason": reason}
    found = (await conn.execute(_SWITCH_OFF, values)).all()
    await _drop_pending(conn, found)
    return [row.id for row in found]


async def switch_off_dead(
    conn: AsyncConnection,
    endpoint_ids: Collection[UUID],
    reason: str,
    *,
    enough: timedelta,
) -> list[UUID]:
    """Do so with those that have been failing for so long."""
    values = {"ids": list(endpoint_ids), "reason": reason, "enough": enough}
    found = (await conn.execute(_SWITCH_OFF_DEAD, values)).all()
    await _drop_pending(conn, found)
    return [row.id for row in found]


async def _drop_pending(conn: AsyncConnection, endpoints: Sequence[Row[Any]]) -> None:
    if endpoints:
        await drop(conn, [name_of_endpoint(row.owner, row.id) for row in endpoints])


def _within(query: Select[Any], realm: str | None) -> Select[Any]:
    return query if realm is None else query.where(ENDPOINTS.c.owner == realm)
