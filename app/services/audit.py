"""What administrators did: written in the transaction that does it, and told to the log.

Every verb that needs the scope `admin` and changes something comes here.  Nothing commits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import Row, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.domain.access import Caller
from app.models.account import AuditEvent
from app.services.job_records import table_of

log = structlog.get_logger("app.audit")

AUDIT = table_of(AuditEvent)


@dataclass(frozen=True, slots=True)
class Act:
    """One thing an administrator does: `actor` did `action` to `target`.

    `action` is `area.verb_in_past_tense`; `details` are plain JSON without secrets.
    """

    actor: str
    action: str
    target: str
    details: Mapping[str, Any]
    address: str | None = None
    request_id: str | None = None


def actor_of(caller: Caller) -> str:
    """Name a caller so that nobody can pass for somebody else: names of keys are free text."""
    return caller.name if caller.key_id is None else f"key:{caller.key_id}"


async def record(conn: AsyncConnection, act: Act) -> None:
    """Write down what is being done, in the transaction that does it."""
    await conn.execute(
        insert(AUDIT).values(
            at=func.now(),
            actor=act.actor,
            action=act.action,
            target=act.target,
            details=dict(act.details),
            address=act.address,
            request_id=act.request_id,
        )
    )


def tell(act: Act) -> None:
    """Tell the log what was done, after the commit."""
    log.info(
        "admin.acted",
        actor=act.actor,
        action=act.action,
        target=act.target,
        address=act.address,
    )


async def page(
    conn: AsyncConnection, *, before: int | None, limit: int
) -> list[Row[Any]]:
    """List what was done, newest first, before the event `before`; rows of `audit_events`."""
    query = select(AUDIT).order_by(AUDIT.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(AUDIT.c.id < before)
    return list(await conn.execute(query))
