"""Event streams: what happens to a job, or to all that the caller sees.

The `id` of an event is where to go on after it: its version in a job's stream, its position in
the log in the others.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import lru_cache
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from app.api.deps import Id, parse_job_id, runtime_of
from app.api.guard import GuardedRoute, caller_of, needs
from app.api.problems import BadParameter, documented
from app.api.streams import MEDIA_TYPE, EventStream, Streams
from app.domain.access import Caller, Scope
from app.domain.errors import Forbidden
from app.domain.state import Status
from app.services.listeners import Heard
from app.services.live import LiveEvent, Reset

router = APIRouter(route_class=GuardedRoute, tags=["events"])

LONGEST = 86_400.0  # seconds
_LARGEST_VERSION = 2**31 - 1

_SCHEMAS = [
    {"$ref": f"#/components/schemas/{name}"} for name in ("JobEvent", "StreamReset")
]
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Server-Sent Events. `data` is one line of JSON: a `JobEvent`, or a"
        " `StreamReset` when `event` is `reset`.",
        "content": {
            MEDIA_TYPE: {
                "schema": {  # of one event, as OpenAPI 3.2 describes streams
                    "type": "object",
                    "properties": {
                        "id": {"type": "string"},
                        "event": {"type": "string"},
                        "data": {
                            "type": "string",
                            "contentMediaType": "application/json",
                            "contentSchema": {"oneOf": _SCHEMAS},
                        },
                    },
                    "required": ["event", "data"],
                }
            }
        },
    }
}
_NOTHING_LEFT = {204: {"description": "The job is finished, and all of it was told."}}
_VERSION = "^[0-9]{1,10}$"
_POSITION = r"^[0-9]{1,20}\.[0-9]{1,20}$"


def _last_event_id(pattern: str) -> dict[str, Any]:
    return {
        "parameters": [
            {
                "name": "Last-Event-ID",
                "in": "header",
                "required": False,
                "description": "The `id` heard last; browsers send it when they come back."
                " Wins over `after`.",
                # Some send an empty one before they heard any.
                "schema": {"type": "string", "pattern": f"^$|{pattern}"},
            }
        ]
    }


Wait = Annotated[
    float | None,
    Query(
        ge=0,
        le=LONGEST,
        description="Seconds after which to end; 0: tell what there is. Default: never.",
    ),
]


@router.get(
    "/jobs/{job_id}/events",
    response_class=Response,
    responses=_STREAM | _NOTHING_LEFT | documented(400, 404, 503),
    openapi_extra=_last_event_id(_VERSION),
    summary="Follow a job",
)
@needs(Scope.READ)
async def follow_job(
    request: Request,
    job_id: Id,
    after: Annotated[
        str | None,
        Query(
            json_schema_extra={"pattern": _VERSION},
            description="The version after which to begin; default: all of its log.",
        ),
    ] = None,
    wait: Wait = None,
) -> Response:
    """Tell all that happened and happens to a job, as it happens, up to its end.

    Ids are the job's versions.
    """
    runtime, caller = runtime_of(request), caller_of(request)
    key = parse_job_id(job_id)
    name, given = _where(request, after)
    known = 0
    if given is not None:
        if not (given.isascii() and given.isdigit() and len(given) <= 10):
            raise _bad(name, "must be a version of the job, such as 3")
        known = min(int(given), _LARGEST_VERSION)
    record = await runtime.ledger.read(key, realm=caller.realm)
    row = record.row
    if Status(row.status).is_terminal and known == row.version:
        # An empty stream would have browsers come back for ever.
        return Response(status_code=204, headers={"Cache-Control": "no-store"})
    owner = row.owner
    streams = _streams(request)
    streams.make_room(request)
    async with AsyncExitStack() as stack:
        follower = await stack.enter_async_context(
            runtime.live.follow_job(key, after=known)
        )
        await stack.enter_async_context(
            streams.opened(request, lambda one: one.sees(owner), follower.end)
        )
        return EventStream(
            follower,
            stack.pop_all(),
            _of_job,
            position=lambda: None,
            seconds=wait,
        )


@router.get(
    "/events",
    response_class=Response,
    responses=_STREAM | documented(400, 503),
    openapi_extra=_last_event_id(_POSITION),
    summary="Follow all jobs",
)
@needs(Scope.READ)
async def follow(
    request: Request,
    owner: Annotated[
        str | None,
        Query(max_length=200, description="Whose; others' are for administrators."),
    ] = None,
    after: Annotated[
        str | None,
        Query(
            json_schema_extra={"pattern": _POSITION},
            description="The id after which to begin; default: what happens from now on.",
        ),
    ] = None,
    wait: Wait = None,
) -> Response:
    """Tell what happens to the caller's jobs, as it happens; administrators hear of all.

    Ids are positions in the log.  From one that is unknown, or too far back, nothing can be told
    again: then a `reset` comes first, and after it what happens from now on.
    """
    runtime, caller = runtime_of(request), caller_of(request)
    if owner is not None and not caller.sees(owner):
        raise Forbidden("Only administrators see other owners.", field="owner")
    realm = owner or caller.realm
    name, given = _where(request, after)
    streams = _streams(request)
    streams.make_room(request)
    async with AsyncExitStack() as stack:
        try:
            follower = await stack.enter_async_context(
                runtime.live.follow(realm, after=given)
            )
        except ValueError:
            raise _bad(name, "must be the id of an event, such as 1234.56") from None
        await stack.enter_async_context(
            streams.opened(request, _who_may(realm), follower.end)
        )
        return EventStream(
            follower,
            stack.pop_all(),
            _of_all,
            position=lambda: str(follower.position),
            seconds=wait,
        )


def _who_may(realm: str | None) -> Callable[[Caller], bool]:
    if realm is None:
        return lambda caller: caller.is_admin
    return lambda caller: caller.sees(realm)


def _streams(request: Request) -> Streams:
    streams: Streams = request.app.state.streams
    return streams


def _where(request: Request, after: str | None) -> tuple[str, str | None]:
    """Give where the caller wants to go on, and what told so."""
    header = request.headers.get("last-event-id")
    return ("Last-Event-ID", header) if header else ("after", after)


def _bad(name: str, text: str) -> BadParameter:
    return BadParameter(f"{name} {text}.", field=name, code="invalid_position")


def _of_job(heard: Heard) -> bytes:
    if isinstance(heard, Reset):
        return _reset(heard)
    return b"id: %d\n%b" % (heard.version, _event(heard))


def _of_all(heard: Heard) -> bytes:
    if isinstance(heard, Reset):
        return _reset(heard)
    return b"id: %b\n%b" % (heard.id.encode(), _event(heard))


@lru_cache(maxsize=1024)  # most are told to many
def _event(event: LiveEvent) -> bytes:
    data = {
        "type": event.name,
        "job_id": str(event.job_id),
        "owner": event.owner,
        "version": event.version,
        "status": event.status,
        "stage": event.stage,
        "progress": event.progress,
        "at": event.at,
    }
    return _block(event.name, data)


def _reset(reset: Reset) -> bytes:
    return _block("reset", {"reason": reset.reason, "message": reset.message})


def _block(name: str, data: dict[str, Any]) -> bytes:
    text = orjson.dumps(data, option=orjson.OPT_UTC_Z)
    return b"event: %b\ndata: %b\n\n" % (name.encode(), text)
