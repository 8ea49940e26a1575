"""Webhooks out, as a test wants to see them: endpoints, what is written, what arrived."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Row, func, select, update
from sqlalchemy.ext.asyncio import AsyncEngine
from standardwebhooks import Webhook
from uuid_utils.compat import uuid7

from app.services import delivery_log, receivers
from app.services.job_records import ENDPOINTS
from app.services.outbox import DELIVERIES, NOTIFICATIONS
from app.services.receivers import NewEndpoint, mint_secret
from tests.contracts.scripted_server import Request


class Hooks:
    """The webhooks of one database.  Every verb commits."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine

    async def register(
        self, url: str, *events: str, owner: str = "default", enabled: bool = True
    ) -> Row[Any]:
        """Make an endpoint."""
        wanted = NewEndpoint(uuid7(), owner, url, "", events, mint_secret())
        async with self.engine.begin() as conn:
            made = await receivers.create(conn, wanted)
            if not enabled:
                made = await receivers.change(
                    conn, made.id, {"is_enabled": False}, realm=None
                )
        return made

    async def endpoint(self, endpoint_id: UUID) -> Row[Any]:
        """Read an endpoint."""
        async with self.engine.connect() as conn:
            return await receivers.read(conn, endpoint_id, realm=None)

    async def change(self, endpoint_id: UUID, **changes: Any) -> Row[Any]:
        """Change an endpoint."""
        async with self.engine.begin() as conn:
            return await receivers.change(conn, endpoint_id, changes, realm=None)

    async def rotate(self, endpoint_id: UUID) -> Row[Any]:
        """Give it a new secret."""
        async with self.engine.begin() as conn:
            return await receivers.rotate(conn, endpoint_id, mint_secret(), realm=None)

    async def test(self, endpoint: Row[Any]) -> UUID:
        """Write a test to an endpoint."""
        async with self.engine.begin() as conn:
            return await delivery_log.add_test(conn, endpoint)

    async def redeliver(self, notification_id: UUID) -> None:
        """Ask for one again."""
        async with self.engine.begin() as conn:
            await delivery_log.redeliver(conn, notification_id, realm=None)

    async def written(self, **where: Any) -> Sequence[Row[Any]]:
        """Read the notifications, oldest first."""
        query = select(NOTIFICATIONS).filter_by(**where)
        order = NOTIFICATIONS.c.created_at, NOTIFICATIONS.c.type
        async with self.engine.connect() as conn:
            return (await conn.execute(query.order_by(*order))).all()

    async def states(self) -> Counter[str]:
        """Count the notifications by state."""
        return Counter(row.state for row in await self.written())

    async def tries(self, notification_id: UUID) -> Sequence[Row[Any]]:
        """Read the tries of a notification, first one first."""
        query = (
            select(DELIVERIES)
            .where(DELIVERIES.c.notification_id == notification_id)
            .order_by(DELIVERIES.c.number)
        )
        async with self.engine.connect() as conn:
            return (await conn.execute(query)).all()

    async def make_due(self) -> None:
        """Make everything pending due now: a pause is over, a lease has run out."""
        pending = update(NOTIFICATIONS).where(NOTIFICATIONS.c.due_at.is_not(None))
        async with self.engine.begin() as conn:
            await conn.execute(pending.values(due_at=func.now()))

    async def age(self, by: timedelta) -> None:
        """Move all that was written, and since when endpoints fail, into the past."""
        moments = {
            NOTIFICATIONS: ("created_at", "due_at", "finished_at"),
            ENDPOINTS: ("failing_since", "previous_until"),
        }
        async with self.engine.begin() as conn:
            for table, names in moments.items():
                past = {name: table.c[name] - by for name in names}
                await conn.execute(update(table).values(past))


def verified(request: Request, secret: str) -> dict[str, Any]:
    """Check the signature as a receiver does, and give what was said."""
    Webhook(secret).verify(request.body, dict(request.headers))
    body: dict[str, Any] = json.loads(request.body)
    assert set(body) == {"type", "timestamp", "data"}
    return body


def ids_of(requests: Sequence[Request]) -> Counter[str]:
    """Count what arrived by `webhook-id`."""
    return Counter(request.headers["webhook-id"] for request in requests)
