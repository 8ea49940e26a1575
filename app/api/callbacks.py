"""The door for the provider's webhooks: read, hand over, count, ring, answer fast.

Never a 5xx, whatever is sent and whatever is down: to the provider each of them is as good as
a 4xx (it sends again), and to whoever watches ours it would be an alarm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from app.api.bodies import read_body
from app.api.deps import runtime_of
from app.api.problems import problem
from app.services.callback_urls import CALLBACK_PATH, TOKEN
from app.services.webhook_inbox import RETRY_AFTER, Receipt, Reception

router = APIRouter(tags=["callbacks"])

BODY_LIMIT = 1024 * 1024  # a prediction repeats its input and may carry a long log


@dataclass(frozen=True, slots=True)
class _Refusal:
    """How a webhook that is not taken is answered."""

    status: int
    code: str
    title: str
    detail: str
    retryable: bool = False
    retry_after: timedelta | None = None


_REFUSALS: Mapping[Reception, _Refusal] = {
    Reception.UNSIGNED: _Refusal(
        401,
        code="webhook_unsigned",
        title="Not signed",
        detail="webhook-id, webhook-timestamp and webhook-signature are needed.",
    ),
    Reception.STALE: _Refusal(
        401,
        code="webhook_stale",
        title="Not of this moment",
        detail="webhook-timestamp is more than five minutes away from our clock.",
    ),
    Reception.FORGED: _Refusal(
        401,
        code="webhook_forged",
        title="Signature does not fit",
        detail="No signature fits the body and the account's secret.",
    ),
    Reception.SECRET_UNKNOWN: _Refusal(
        401,
        code="webhook_secret_unknown",
        title="Signature cannot be checked",
        detail="The account's secret could not be had; send it again later.",
        retryable=True,
    ),
    Reception.MALFORMED: _Refusal(
        400,
        code="webhook_malformed",
        title="Not a prediction",
        detail="The body is not a JSON object with the id of a prediction.",
    ),
    Reception.UNKNOWN: _Refusal(
        404,
        code="not_found",
        title="Not found",
        detail="There is no such attempt, or not with this token.",
    ),
    Reception.UNAVAILABLE: _Refusal(
        429,
        code="webhook_not_taken",
        title="Not taken",
        detail="It could not be written down; send it again later.",
        retryable=True,
        retry_after=RETRY_AFTER,
    ),
}

_PROBLEM = {
    "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    204: {"description": "Taken, or known already."},
    400: {"description": "Not a prediction.", "content": _PROBLEM},
    401: {"description": "Not signed by the provider just now.", "content": _PROBLEM},
    404: {"description": "No such attempt with this token.", "content": _PROBLEM},
    413: {"description": "The body is too large.", "content": _PROBLEM},
    429: {"description": "The database does not answer.", "content": _PROBLEM},
}
_BODY = {
    "requestBody": {
        "required": True,
        "description": "A prediction, as the provider's own API shows it.",
        "content": {"application/json": {"schema": {"type": "object"}}},
    }
}


@router.post(
    CALLBACK_PATH,
    status_code=204,
    response_class=Response,
    responses=_RESPONSES,
    openapi_extra=_BODY,
    summary="Take the provider's webhook",
)
async def replicate(
    request: Request,
    attempt_id: str,
    token: Annotated[
        str,
        Query(alias=TOKEN, description="The attempt's own; only the provider has it."),
    ] = "",
) -> Response:
    """For the provider only: news about a prediction, signed by Standard Webhooks.

    It is a hint: the job is looked at now, and what is believed is what that look reads.
    Duplicates, late and reordered ones do no harm.
    """
    runtime = runtime_of(request)
    try:
        receipt = await _receive(request, attempt_id, token)
    except HTTPException as error:  # the body: too large, or broken off
        is_large = error.status_code == 413
        _count(request, Reception.OVERSIZED if is_large else Reception.MALFORMED)
        raise
    _count(request, receipt.reception)
    if receipt.is_adoption:
        runtime.counters.add("orphans_adopted", by="webhook")
    if receipt.job_id is not None:
        runtime.bell.ring(str(receipt.job_id))
    refusal = _REFUSALS.get(receipt.reception)
    return Response(status_code=204) if refusal is None else _refuse(request, refusal)


async def _receive(request: Request, attempt_id: str, token: str) -> Receipt:
    body = await read_body(request, limit=BODY_LIMIT)
    try:
        key = UUID(attempt_id)
    except ValueError:
        return Receipt(Reception.UNKNOWN)
    return await runtime_of(request).inbox.receive(key, token, request.headers, body)


def _count(request: Request, reception: Reception) -> None:
    runtime_of(request).counters.add("provider_webhooks", outcome=reception.value)


def _refuse(request: Request, refusal: _Refusal) -> Response:
    return problem(
        request,
        refusal.status,
        code=refusal.code,
        title=refusal.title,
        detail=refusal.detail,
        retryable=refusal.retryable,
        retry_after=refusal.retry_after,
    )
