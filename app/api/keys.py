"""Keys over HTTP, for administrators: each change and its audit event in one transaction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from uuid_utils.compat import uuid7

from app.api.audit import act_of
from app.api.deps import (
    parse_body,
    promptly,
    read_cursor,
    runtime_of,
    write_cursor,
)
from app.api.guard import GuardedRoute, needs
from app.api.problems import BadParameter, documented
from app.api.views import respond
from app.domain.access import Budget, Limits, Scope
from app.domain.errors import InvalidRequest
from app.models import key_schemas
from app.models.key_schemas import OWNER_PATTERN, KeyChange, KeyRequest
from app.runtime import Runtime
from app.services import audit, keys
from app.services.gatekeeper import warn_locked_out
from app.services.keys import Changes, KeyRecord, NewKey, Secret

router = APIRouter(route_class=GuardedRoute, tags=["keys"])


def _takes(name: str) -> dict[str, Any]:
    """Document a body we parse ourselves."""
    schema = {"$ref": f"#/components/schemas/{name}"}
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


@router.post(
    "/keys",
    status_code=201,
    response_model=key_schemas.NewKey,
    responses=documented(413, 422),
    openapi_extra=_takes("KeyRequest"),
    summary="Make a key",
)
@needs(Scope.ADMIN)
async def create_key(request: Request) -> Response:
    """Make a key.  This answer is the only one that ever has the key itself: keep it."""
    runtime = runtime_of(request)
    wanted = await parse_body(request, KeyRequest)
    _check_expiry(wanted.expires_at)
    models = wanted.limits.models
    limits = wanted.limits.model_dump() | {"models": models and frozenset(models)}
    key = NewKey(
        id=uuid7(),
        owner=wanted.owner,
        name=wanted.name,
        scopes=frozenset(Scope(word) for word in wanted.scopes),
        expires_at=wanted.expires_at,
        limits=Limits(**limits),
        budget=Budget(**wanted.budget.model_dump()),
    )
    secret = Secret.mint()
    details = {"prefix": secret.prefix} | wanted.model_dump(
        mode="json", exclude_unset=True
    )
    details |= {"owner": key.owner, "scopes": list(wanted.scopes)}
    act = act_of(request, "key.created", str(key.id), details)
    made = await promptly(_create(runtime, key, secret, wanted.weight, act))
    audit.tell(act)
    location = f"{runtime.settings.api_v1_prefix}/keys/{key.id}"
    return respond(
        key_body(made) | {"key": secret.text}, 201, headers={"Location": location}
    )


async def _create(
    runtime: Runtime, key: NewKey, secret: Secret, weight: int | None, act: audit.Act
) -> KeyRecord:
    async with runtime.ledger.transaction() as conn:
        if weight is not None:
            await keys.set_weight(conn, key.owner, weight)
        made = await keys.create(conn, key, secret)
        await audit.record(conn, act)
    return made


@router.get(
    "/keys",
    response_model=key_schemas.KeyPage,
    responses=documented(400),
    summary="List keys",
)
@needs(Scope.ADMIN)
async def list_keys(
    request: Request,
    owner: Annotated[str | None, Query(pattern=OWNER_PATTERN)] = None,
    cursor: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Response:
    """List keys, newest first, those that are revoked or expired included."""
    runtime = runtime_of(request)
    found = await promptly(_page(runtime, owner, read_cursor(cursor), limit + 1))
    shown = found[:limit]
    return respond(
        {
            "items": [key_body(record) for record in shown],
            "next_cursor": write_cursor(shown[-1].id) if len(found) > limit else None,
        }
    )


async def _page(
    runtime: Runtime, owner: str | None, before: UUID | None, limit: int
) -> list[KeyRecord]:
    async with runtime.ledger.reading() as conn:
        return await keys.page(conn, owner=owner, before=before, limit=limit)


@router.get(
    "/keys/{key_id}",
    response_model=key_schemas.Key,
    responses=documented(400, 404),
    summary="Read a key",
)
@needs(Scope.ADMIN)
async def read_key(request: Request, key_id: str) -> Response:
    """Read what is kept of a key: everything but the key."""
    found = await promptly(_read(runtime_of(request), parse_key_id(key_id)))
    return respond(key_body(found))


async def _read(runtime: Runtime, key_id: UUID) -> KeyRecord:
    async with runtime.ledger.reading() as conn:
        return await keys.read(conn, key_id)


@router.patch(
    "/keys/{key_id}",
    response_model=key_schemas.Key,
    responses=documented(400, 404, 409, 413, 422),
    openapi_extra=_takes("KeyChange"),
    summary="Change a key",
)
@needs(Scope.ADMIN)
async def change_key(request: Request, key_id: str) -> Response:
    """Change what is named and leave the rest; it holds everywhere within a second."""
    runtime = runtime_of(request)
    target = parse_key_id(key_id)
    wanted = await parse_body(request, KeyChange)
    _check_expiry(wanted.expires_at)
    given = wanted.model_dump(exclude_unset=True)
    limits, budget = given.pop("limits", {}), given.pop("budget", {})
    weight = given.pop("weight", None)
    if "scopes" in given:
        given["scopes"] = frozenset(Scope(word) for word in given["scopes"])
    changes = Changes(columns=given, limits=limits, budget=budget)
    details = wanted.model_dump(mode="json", exclude_unset=True)
    act = act_of(request, "key.changed", str(target), details)
    changed, locked_out = await promptly(_change(runtime, target, changes, weight, act))
    _tell(act, locked_out)
    return respond(key_body(changed))


async def _change(
    runtime: Runtime, key_id: UUID, changes: Changes, weight: int | None, act: audit.Act
) -> tuple[KeyRecord, bool]:
    async with runtime.ledger.transaction() as conn:
        changed = await keys.change(conn, key_id, changes)
        if weight is not None:
            await keys.set_weight(conn, changed.owner, weight)
            changed = await keys.read(conn, key_id)
        await audit.record(conn, act)
        return changed, await runtime.gatekeeper.is_locked_out(conn)


@router.delete(
    "/keys/{key_id}",
    status_code=204,
    response_class=Response,
    responses=documented(400, 404),
    summary="Revoke a key",
)
@needs(Scope.ADMIN)
async def revoke_key(request: Request, key_id: str) -> Response:
    """End a key's life, for good: within a second nobody lets it in any more.

    Its jobs go on, and stay its owner's.  Revoking it again changes nothing.
    """
    runtime = runtime_of(request)
    target = parse_key_id(key_id)
    act = act_of(request, "key.revoked", str(target), {})
    was_live, locked_out = await promptly(_revoke(runtime, target, act))
    if was_live:
        _tell(act, locked_out)
    return Response(status_code=204)


async def _revoke(runtime: Runtime, key_id: UUID, act: audit.Act) -> tuple[bool, bool]:
    async with runtime.ledger.transaction() as conn:
        revoked = await keys.revoke(conn, key_id)
        if revoked is not None:
            await audit.record(conn, act)
        return revoked is not None, await runtime.gatekeeper.is_locked_out(conn)


def _tell(act: audit.Act, locked_out: bool) -> None:
    """Tell the log what was done, and that it was the last key that could do it."""
    audit.tell(act)
    if locked_out:
        warn_locked_out()


def parse_key_id(text: str) -> UUID:
    """Read a key's id; raise `BadParameter` for anything that is no UUID."""
    try:
        return UUID(text)
    except ValueError:
        raise BadParameter("key_id must be a UUID.", field="key_id") from None


def _check_expiry(moment: datetime | None) -> None:
    if moment is not None and moment <= datetime.now(UTC):
        raise InvalidRequest("expires_at must be in the future.", field="expires_at")


def key_body(record: KeyRecord) -> dict[str, Any]:
    """Give the key as `key_schemas.Key` describes it, in plain values for orjson."""
    models = record.limits.models
    return {
        "key_id": str(record.id),
        "name": record.name,
        "owner": record.owner,
        "prefix": record.prefix,
        "scopes": [scope.value for scope in Scope if scope in record.scopes],
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "revoked_at": record.revoked_at,
        "last_used_at": record.last_used_at,
        "limits": asdict(record.limits)
        | {"models": None if models is None else sorted(models)},
        "budget": _amounts(asdict(record.budget)),
        "weight": record.weight,
    }


def _amounts(budget: Mapping[str, Decimal | None]) -> dict[str, str | None]:
    """Write dollars as decimal text without needless zeros, and without exponents."""
    return {
        name: None if amount is None else f"{amount.normalize():f}"
        for name, amount in budget.items()
    }
