"""Webhooks out over HTTP: endpoints of an owner, what was told to them, telling it again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from uuid import UUID

import structlog
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from sqlalchemy import Row
from uuid_utils.compat import uuid7

from app.api.deliveries import delivery_body, page_of, parse_id, read_one
from app.api.deps import (
    Cursor,
    Id,
    parse_body,
    promptly,
    read_cursor,
    runtime_of,
)
from app.api.guard import GuardedRoute, admit_again, caller_of, needs
from app.api.paths import keep_apart
from app.api.problems import documented
from app.api.views import respond
from app.core.stopping import pause
from app.domain.access import Scope
from app.models import webhook_schemas
from app.models.webhook_schemas import EndpointChange, EndpointRequest, RangeRequest
from app.runtime import Runtime
from app.services import delivery_log, receivers
from app.services.delivery_log import Redelivered
from app.services.receivers import NewEndpoint, mint_secret

log = structlog.get_logger("app.webhooks")


keep_apart("endpoint", "secret", "deliveries")

router = APIRouter(prefix="/webhooks", route_class=GuardedRoute, tags=["webhooks"])

TEST_PATIENCE = timedelta(seconds=5)
_TEST_POLL = 0.1


def _takes(name: str) -> dict[str, Any]:
    """Document a body we parse ourselves."""
    schema = {"$ref": f"#/components/schemas/{name}"}
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


# ---------------------------------------------------------------------------- endpoints


@router.post(
    "",
    status_code=201,
    response_model=webhook_schemas.NewEndpoint,
    responses=documented(409, 413, 422),
    openapi_extra=_takes("EndpointRequest"),
    summary="Register an endpoint",
)
@needs(Scope.GENERATE)
async def create_endpoint(request: Request) -> Response:
    """Register a receiver.  It hears of what happens from now on."""
    wanted = await parse_body(request, EndpointRequest)
    made = await register(request, wanted)
    location = f"{runtime_of(request).settings.api_v1_prefix}/webhooks/{made.id}"
    body = endpoint_body(made) | {"secret": made.secret}
    return respond(body, 201, headers={"Location": location})


async def register(request: Request, wanted: EndpointRequest) -> Row[Any]:
    """Register an endpoint of the caller's; raise `OutboundRefused`, `Conflict`."""
    runtime, owner = runtime_of(request), caller_of(request).owner
    await runtime.outbound.examine(wanted.url, field="url")
    await admit_again(request)  # a name may take its time to be looked up
    endpoint = NewEndpoint(
        id=uuid7(),
        owner=owner,
        url=wanted.url,
        description=wanted.description,
        events=wanted.events,
        secret=mint_secret(),
    )

    async def create() -> Row[Any]:
        async with runtime.ledger.transaction() as conn:
            return await receivers.create(conn, endpoint)

    made = await promptly(create())
    log.info("endpoint.created", endpoint_id=str(made.id), owner=owner)
    return made


@router.get(
    "",
    response_model=webhook_schemas.EndpointPage,
    responses=documented(400),
    summary="List endpoints",
)
@needs(Scope.READ)
async def list_endpoints(
    request: Request,
    cursor: Cursor = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Response:
    """List the caller's endpoints, newest first; administrators see everybody's."""
    runtime, realm = runtime_of(request), caller_of(request).realm
    before = read_cursor(cursor)
    found = await promptly(endpoints_of(runtime, realm, before, limit + 1))
    return page_of(found, limit, endpoint_body)


async def endpoints_of(
    runtime: Runtime, realm: str | None, before: UUID | None, limit: int
) -> Sequence[Row[Any]]:
    """List endpoints, newest first."""
    async with runtime.ledger.reading() as conn:
        return await receivers.page(conn, realm=realm, before=before, limit=limit)


@router.get(
    "/secret",
    response_model=webhook_schemas.Secrets,
    summary="Read the secret of webhook_url",
)
@needs(Scope.GENERATE)
async def own_secret(request: Request) -> Response:
    """Read what signs the webhooks that go to the `webhook_url` of the caller's jobs."""
    runtime, caller = runtime_of(request), caller_of(request)
    first, *others = runtime.owner_secrets.of(caller.owner)
    return respond({"secret": first, "also_valid": others})


@router.get(
    "/{endpoint_id:endpoint}",
    response_model=webhook_schemas.Endpoint,
    responses=documented(400, 404),
    summary="Read an endpoint",
)
@needs(Scope.READ)
async def read_endpoint(request: Request, endpoint_id: Id) -> Response:
    """Read an endpoint."""
    runtime, realm = runtime_of(request), caller_of(request).realm
    target = parse_id(endpoint_id, "endpoint_id")
    return respond(endpoint_body(await promptly(_endpoint(runtime, target, realm))))


@router.patch(
    "/{endpoint_id:endpoint}",
    response_model=webhook_schemas.Endpoint,
    responses=documented(400, 404, 413, 422),
    openapi_extra=_takes("EndpointChange"),
    summary="Change an endpoint",
)
@needs(Scope.GENERATE)
async def change_endpoint(request: Request, endpoint_id: Id) -> Response:
    """Change what is named and leave the rest.

    Switched off, it is sent nothing, and what is pending is dropped; all of that may be sent
    again later (`POST /webhooks/{endpoint_id}/redeliver`).
    """
    target = parse_id(endpoint_id, "endpoint_id")
    wanted = await parse_body(request, EndpointChange)
    changed = await change(request, target, wanted)
    return respond(endpoint_body(changed))


async def change(
    request: Request, endpoint_id: UUID, wanted: EndpointChange
) -> Row[Any]:
    """Change what is given of an endpoint; raise `NotFound`, `OutboundRefused`."""
    runtime, realm = runtime_of(request), caller_of(request).realm
    given = wanted.model_dump(exclude_unset=True)
    if "enabled" in given:
        given["is_enabled"] = given.pop("enabled")
    # Whose it is comes first: an answer about the URL would tell that the endpoint exists.
    await promptly(_endpoint(runtime, endpoint_id, realm))
    if "url" in given:
        await runtime.outbound.examine(given["url"], field="url")
        await admit_again(request)

    async def save() -> Row[Any]:
        async with runtime.ledger.transaction() as conn:
            return await receivers.change(conn, endpoint_id, given, realm=realm)

    changed = await promptly(save())
    log.info("endpoint.changed", endpoint_id=str(endpoint_id), fields=sorted(given))
    return changed


@router.delete(
    "/{endpoint_id:endpoint}",
    status_code=204,
    response_class=Response,
    responses=documented(400, 404),
    summary="Remove an endpoint",
)
@needs(Scope.GENERATE)
async def remove_endpoint(request: Request, endpoint_id: Id) -> Response:
    """Remove an endpoint.  What is pending is dropped; the log stays for its 30 days."""
    runtime, realm = runtime_of(request), caller_of(request).realm
    await remove(runtime, parse_id(endpoint_id, "endpoint_id"), realm)
    return Response(status_code=204)


async def remove(runtime: Runtime, endpoint_id: UUID, realm: str | None) -> None:
    """Remove an endpoint; raise `NotFound`."""

    async def go() -> None:
        async with runtime.ledger.transaction() as conn:
            await receivers.remove(conn, endpoint_id, realm=realm)

    await promptly(go())
    log.info("endpoint.removed", endpoint_id=str(endpoint_id))


@router.get(
    "/{endpoint_id:endpoint}/secret",
    response_model=webhook_schemas.Secrets,
    responses=documented(400, 404),
    summary="Read an endpoint's secret",
)
@needs(Scope.GENERATE)
async def read_secret(request: Request, endpoint_id: Id) -> Response:
    """Read what signs the webhooks of an endpoint."""
    runtime, realm = runtime_of(request), caller_of(request).realm
    target = parse_id(endpoint_id, "endpoint_id")
    found = await promptly(_endpoint(runtime, target, realm))
    return respond(secrets_body(found))


@router.post(
    "/{endpoint_id:endpoint}/rotate",
    response_model=webhook_schemas.NewEndpoint,
    responses=documented(400, 404),
    summary="Give an endpoint a new secret",
)
@needs(Scope.GENERATE)
async def rotate_secret(request: Request, endpoint_id: Id) -> Response:
    """Make a new secret.  For 24 hours the one before signs too: there are two signatures."""
    runtime, realm = runtime_of(request), caller_of(request).realm
    changed = await rotate(runtime, parse_id(endpoint_id, "endpoint_id"), realm)
    return respond(endpoint_body(changed) | {"secret": changed.secret})


async def rotate(runtime: Runtime, endpoint_id: UUID, realm: str | None) -> Row[Any]:
    """Give an endpoint a new secret; raise `NotFound`."""

    async def go() -> Row[Any]:
        async with runtime.ledger.transaction() as conn:
            return await receivers.rotate(conn, endpoint_id, mint_secret(), realm=realm)

    changed = await promptly(go())
    log.info("endpoint.rotated", endpoint_id=str(endpoint_id))
    return changed


@router.post(
    "/{endpoint_id:endpoint}/test",
    response_model=webhook_schemas.Delivery,
    responses=documented(400, 404)
    | {
        202: {
            "model": webhook_schemas.Delivery,
            "description": "It is on its way: look at the delivery a little later.",
        }
    },
    summary="Send a test",
)
@needs(Scope.GENERATE)
async def test_endpoint(request: Request, endpoint_id: Id) -> Response:
    """Send a `webhook.test`, as any other webhook is sent, and tell what came of it.

    Also to an endpoint that is disabled.  It is tried once.
    """
    runtime, realm = runtime_of(request), caller_of(request).realm
    target = parse_id(endpoint_id, "endpoint_id")
    found = await send_test(runtime, target, realm)
    await admit_again(request)
    return respond(delivery_body(found), 200 if found.finished_at else 202)


async def send_test(runtime: Runtime, endpoint_id: UUID, realm: str | None) -> Row[Any]:
    """Send a test and wait a few seconds for its end; raise `NotFound`."""

    async def begin() -> UUID:
        async with runtime.ledger.transaction() as conn:
            endpoint = await receivers.read(conn, endpoint_id, realm=realm)
            return await delivery_log.add_test(conn, endpoint)

    delivery_id = await promptly(begin())
    ends = time.monotonic() + TEST_PATIENCE.total_seconds()
    while True:
        found = await promptly(read_one(runtime, delivery_id, realm))
        is_late = time.monotonic() >= ends or runtime.stopping.is_set()
        if found.finished_at is not None or is_late:
            return found
        await pause(_TEST_POLL, runtime.stopping)


@router.post(
    "/{endpoint_id:endpoint}/redeliver",
    status_code=202,
    response_model=webhook_schemas.Redelivered,
    responses=documented(400, 404, 409, 413, 422),
    openapi_extra=_takes("RangeRequest"),
    summary="Send again what did not arrive",
)
@needs(Scope.GENERATE)
async def redeliver_many(request: Request, endpoint_id: Id) -> Response:
    """Send again what happened in a time and did not arrive, the oldest first.

    At most 10,000 at once; `next_since` says where to go on.
    """
    runtime, realm = runtime_of(request), caller_of(request).realm
    target = parse_id(endpoint_id, "endpoint_id")
    wanted = await parse_body(request, RangeRequest)
    done = await redeliver_range(runtime, target, realm, wanted)
    return respond({"count": done.count, "next_since": done.next_since}, 202)


async def redeliver_range(
    runtime: Runtime, endpoint_id: UUID, realm: str | None, wanted: RangeRequest
) -> Redelivered:
    """Make due now what did not arrive in a time; raise `NotFound`, `Conflict`."""

    async def go() -> Redelivered:
        async with runtime.ledger.transaction() as conn:
            endpoint = await receivers.read(conn, endpoint_id, realm=realm)
            return await delivery_log.redeliver_range(
                conn,
                endpoint,
                since=wanted.since,
                until=wanted.until or datetime.now(UTC) + timedelta(minutes=5),
                includes_delivered=wanted.all,
            )

    done = await promptly(go())
    log.info("endpoint.redelivered", endpoint_id=str(endpoint_id), count=done.count)
    return done


# -------------------------------------------------------------------------------- bodies


async def _endpoint(runtime: Runtime, endpoint_id: UUID, realm: str | None) -> Row[Any]:
    async with runtime.ledger.reading() as conn:
        return await receivers.read(conn, endpoint_id, realm=realm)


def endpoint_body(row: Row[Any]) -> dict[str, Any]:
    """Give an endpoint as `webhook_schemas.Endpoint` describes it: without its secret."""
    return {
        "endpoint_id": str(row.id),
        "owner": row.owner,
        "url": row.url,
        "description": row.description,
        "events": row.events,
        "enabled": row.is_enabled,
        "disabled_reason": row.disabled_reason,
        "failing_since": row.failing_since,
        "previous_secret_until": row.previous_until if _overlaps(row) else None,
        "created_at": row.created_at,
    }


def secrets_body(row: Row[Any]) -> dict[str, Any]:
    """Give the secrets of an endpoint as `webhook_schemas.Secrets` describes them."""
    others = [row.previous_secret] if _overlaps(row) else []
    return {"secret": row.secret, "also_valid": others}


def _overlaps(row: Row[Any]) -> bool:
    return row.previous_until is not None and row.previous_until > datetime.now(UTC)
