"""The log of webhooks out over HTTP: what was told to whom, and telling it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from sqlalchemy import Row

from app.api.deps import Cursor, Id, promptly, read_cursor, runtime_of, write_cursor
from app.api.guard import GuardedRoute, caller_of, needs
from app.api.problems import BadParameter, documented
from app.api.views import respond
from app.domain.access import Scope
from app.models import webhook_schemas
from app.runtime import Runtime
from app.services import delivery_log
from app.services.delivery_log import LogFilter
from app.services.notifications import webhook_id_of

router = APIRouter(
    prefix="/webhooks/deliveries", route_class=GuardedRoute, tags=["webhooks"]
)


@router.get(
    "",
    response_model=webhook_schemas.DeliveryPage,
    responses=documented(400),
    summary="Read the delivery log",
)
@needs(Scope.READ)
async def list_deliveries(
    request: Request,
    endpoint_id: Annotated[UUID | None, Query(description="To this endpoint.")] = None,
    job_id: Annotated[UUID | None, Query(description="About this job.")] = None,
    state: Annotated[webhook_schemas.StateWord | None, Query()] = None,
    cursor: Cursor = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Response:
    """List webhooks of the last 30 days with their tries, newest first."""
    runtime, realm = runtime_of(request), caller_of(request).realm
    wanted = LogFilter(realm, endpoint_id, job_id, state)
    before = read_cursor(cursor)
    found = await promptly(deliveries_of(runtime, wanted, before, limit + 1))
    return page_of(found, limit, delivery_body)


async def deliveries_of(
    runtime: Runtime, wanted: LogFilter, before: UUID | None, limit: int
) -> Sequence[Row[Any]]:
    """List webhooks, newest first."""
    async with runtime.ledger.reading() as conn:
        return await delivery_log.page(conn, wanted, before=before, limit=limit)


@router.get(
    "/{delivery_id}",
    response_model=webhook_schemas.Delivery,
    responses=documented(400, 404),
    summary="Read a delivery",
)
@needs(Scope.READ)
async def read_delivery(request: Request, delivery_id: Id) -> Response:
    """Read one webhook and its tries."""
    runtime, realm = runtime_of(request), caller_of(request).realm
    target = parse_id(delivery_id, "delivery_id")
    return respond(delivery_body(await promptly(read_one(runtime, target, realm))))


@router.post(
    "/{delivery_id}/redeliver",
    status_code=202,
    response_model=webhook_schemas.Delivery,
    responses=documented(400, 404, 409),
    summary="Send a webhook again",
)
@needs(Scope.GENERATE)
async def redeliver(request: Request, delivery_id: Id) -> Response:
    """Send one webhook again now, whatever became of it, under the same `webhook-id`."""
    runtime, realm = runtime_of(request), caller_of(request).realm
    target = parse_id(delivery_id, "delivery_id")
    return respond(delivery_body(await redeliver_one(runtime, target, realm)), 202)


async def redeliver_one(
    runtime: Runtime, delivery_id: UUID, realm: str | None
) -> Row[Any]:
    """Make a webhook due now; raise `NotFound`, `Conflict`."""

    async def again() -> Row[Any]:
        async with runtime.ledger.transaction() as conn:
            return await delivery_log.redeliver(conn, delivery_id, realm=realm)

    return await promptly(again())


async def read_one(runtime: Runtime, delivery_id: UUID, realm: str | None) -> Row[Any]:
    """Read a webhook with its tries; raise `NotFound`."""
    async with runtime.ledger.reading() as conn:
        return await delivery_log.read(conn, delivery_id, realm=realm)


def parse_id(text: str, name: str) -> UUID:
    """Read an id of a path; raise `BadParameter` for anything that is no UUID."""
    try:
        return UUID(text)
    except ValueError:
        raise BadParameter(f"{name} must be a UUID.", field=name) from None


def page_of(
    rows: Sequence[Row[Any]], limit: int, body: Callable[[Row[Any]], dict[str, Any]]
) -> Response:
    """Answer a page of rows, of which one more than `limit` was read."""
    shown = rows[:limit]
    return respond(
        {
            "items": [body(row) for row in shown],
            "next_cursor": write_cursor(shown[-1].id) if len(rows) > limit else None,
        }
    )


def delivery_body(row: Row[Any]) -> dict[str, Any]:
    """Give a webhook as `webhook_schemas.Delivery` describes it."""
    is_being_sent = row.claim_token is not None and row.due_at > row.now
    return {
        "delivery_id": str(row.id),
        "webhook_id": webhook_id_of(row.id),
        "owner": row.owner,
        "endpoint_id": None if row.endpoint_id is None else str(row.endpoint_id),
        "url": row.url,
        "type": row.type,
        "job_id": None if row.job_id is None else str(row.job_id),
        "job_version": row.job_version,
        "state": row.state,
        "attempts": row.attempts,
        "next_try_at": None if is_being_sent else row.due_at,
        "created_at": row.created_at,
        "finished_at": row.finished_at,
        "tries": [_try(one) for one in row.tries or ()],
    }


def _try(one: Mapping[str, Any]) -> dict[str, Any]:
    at = datetime.fromisoformat(one["at"]).astimezone(UTC)
    return {**one, "at": at}
