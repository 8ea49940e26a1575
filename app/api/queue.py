"""The queue over HTTP: how it is, and holding it still for a while."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from app.api.audit import act_of
from app.api.deps import parse_body, promptly, runtime_of
from app.api.guard import GuardedRoute, caller_of, needs
from app.api.problems import documented
from app.api.views import respond
from app.domain.access import Caller, Scope
from app.models import queue_schemas
from app.runtime import Runtime
from app.services import figures, switches
from app.services.figures import QueueFigures
from app.services.switches import QueueState

router = APIRouter(prefix="/queue", route_class=GuardedRoute, tags=["operations"])

_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/PauseRequest"}
            }
        },
    }
}


@router.get(
    "",
    response_model=queue_schemas.QueueStatus,
    responses=documented(503),
    summary="How the queue is",
)
@needs(Scope.READ)
async def show_queue(request: Request) -> Response:
    """Tell whether jobs start, and how many wait."""
    return await _tell(request)


@router.post(
    "/pause",
    response_model=queue_schemas.QueueStatus,
    responses=documented(400, 413, 422, 503),
    openapi_extra=_BODY,
    summary="Pause the queue",
)
@needs(Scope.ADMIN)
async def pause_queue(request: Request) -> Response:
    """Start nothing any more from the moment this answers; what is under way goes on.

    Jobs are accepted as always, and wait.  Their deadlines stand still.  Pausing a queue that is
    paused changes nothing.
    """
    wanted = await parse_body(request, queue_schemas.PauseRequest)
    await pause(request, wanted.reason)
    return await _tell(request)


@router.post(
    "/resume",
    response_model=queue_schemas.QueueStatus,
    responses=documented(503),
    summary="Let the queue go on",
)
@needs(Scope.ADMIN)
async def resume_queue(request: Request) -> Response:
    """Let jobs start again, within about a second; deadlines move by the length of the pause.

    Resuming a queue that runs changes nothing.
    """
    await resume(request)
    return await _tell(request)


async def pause(request: Request, reason: str) -> None:
    """Pause the queue in the caller's name."""
    act = act_of(request, "queue.paused", "queue", {"reason": reason})
    await runtime_of(request).pausing.pause(act, reason=reason)


async def resume(request: Request) -> None:
    """Let the queue go on in the caller's name."""
    act = act_of(request, "queue.resumed", "queue", {})
    await runtime_of(request).pausing.resume(act)


async def _tell(request: Request) -> Response:
    caller = caller_of(request)
    state, counted = await promptly(_read(runtime_of(request), caller.realm))
    return respond(queue_body(state, counted, caller))


async def _read(runtime: Runtime, realm: str | None) -> tuple[QueueState, QueueFigures]:
    async with runtime.ledger.reading() as conn:
        return await switches.read(conn), await figures.queue(conn, realm=realm)


def queue_body(
    state: QueueState, counted: QueueFigures, caller: Caller
) -> dict[str, Any]:
    """Give the queue as `queue_schemas.QueueStatus` describes it, as the caller may see it."""
    return {
        "state": "paused" if state.is_paused else "running",
        "since": state.since,
        "reason": state.reason if caller.is_admin else None,
        "paused_by": state.by if caller.is_admin else None,
        "pending": counted.pending,
        "in_flight": counted.in_flight,
        "oldest_pending_at": counted.oldest,
    }
