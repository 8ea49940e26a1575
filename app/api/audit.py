"""The audit log over HTTP, and how a request becomes an act."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from sqlalchemy import Row

from app.api.deps import promptly, runtime_of
from app.api.guard import GuardedRoute, address_of, caller_of, needs
from app.api.problems import BadParameter, documented
from app.api.views import respond
from app.domain.access import Scope
from app.models import key_schemas
from app.runtime import Runtime
from app.services import audit
from app.services.audit import Act

router = APIRouter(route_class=GuardedRoute, tags=["keys"])

_CURSOR_BYTES = 8


def act_of(
    request: Request, action: str, target: str, details: Mapping[str, Any]
) -> Act:
    """Say who does what, and from where; write it down in the transaction that does it."""
    return Act(
        actor=audit.actor_of(caller_of(request)),
        action=action,
        target=target,
        details=details,
        address=address_of(request),
        request_id=request.scope.get("request_id"),
    )


@router.get(
    "/audit",
    response_model=key_schemas.AuditPage,
    responses=documented(400),
    summary="Read the audit log",
)
@needs(Scope.ADMIN)
async def audit_log(
    request: Request,
    cursor: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
) -> Response:
    """List what administrators did, newest first."""
    runtime = runtime_of(request)
    found = await promptly(_page(runtime, _read_cursor(cursor), limit + 1))
    shown = found[:limit]
    return respond(
        {
            "items": [dict(row._mapping) for row in shown],
            "next_cursor": _write_cursor(shown[-1].id) if len(found) > limit else None,
        }
    )


async def _page(runtime: Runtime, before: int | None, limit: int) -> list[Row[Any]]:
    async with runtime.ledger.reading() as conn:
        return await audit.page(conn, before=before, limit=limit)


def _write_cursor(last: int) -> str:
    return base64.urlsafe_b64encode(last.to_bytes(_CURSOR_BYTES)).rstrip(b"=").decode()


def _read_cursor(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        given = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (ValueError, binascii.Error):
        given = b""
    number = int.from_bytes(given)
    if len(given) != _CURSOR_BYTES or number >= 2**63:
        raise BadParameter(
            "cursor must be a next_cursor of an earlier answer.",
            field="cursor",
            code="invalid_cursor",
        )
    return number
