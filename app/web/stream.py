"""News for an open page: one stream for a tab, small events that name a job and its version.

A page shows small steps from what an event says, and fetches the card for anything else.  Whoever
comes back says where they were (`Last-Event-ID`, which browsers send by themselves); what cannot
be told from there on is a `reset`, and the page looks at its jobs anew.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any, Final

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response

from app.api.deps import runtime_of
from app.api.streams import EventStream, Streams
from app.domain.access import Scope
from app.services.event_log import read_position
from app.services.listeners import Heard
from app.services.live import Reset
from app.web.door import PageRoute, caller_of, needs
from app.web.words import words_of

router = APIRouter(route_class=PageRoute)

_RESET: Final = b"event: reset\ndata: {}\n\n"


@router.get("/ui/events")
@needs(Scope.READ)
async def events(request: Request) -> Response:
    """Send what happens to the jobs the caller may see, until the caller leaves.

    One of the streams of the process, with their limits: it ends with the session, too.  The
    browser comes back by itself.
    """
    live, realm = runtime_of(request).live, caller_of(request).realm
    after, first = request.headers.get("last-event-id") or None, b""
    if after is not None and read_position(after) is None:
        after, first = None, _RESET
    streams: Streams = request.app.state.streams
    streams.make_room(request)
    async with AsyncExitStack() as stack:
        follower = await stack.enter_async_context(live.follow(realm, after=after))
        await stack.enter_async_context(
            streams.opened(request, lambda one: one.realm == realm, follower.end)
        )
        return EventStream(
            follower,
            stack.pop_all(),
            _said,
            position=lambda: str(follower.position),
            seconds=None,
            first=first,
        )


def _said(heard: Heard) -> bytes:
    if isinstance(heard, Reset):
        return _RESET
    news: dict[str, Any] = {
        "job": str(heard.job_id),
        "version": heard.version,
        "name": heard.name,
        "status": heard.status,
        "stage": heard.stage,
        "progress": heard.progress,
        "words": words_of(heard.status, heard.stage),
    }
    return b"id: %b\nevent: job\ndata: %b\n\n" % (heard.id.encode(), orjson.dumps(news))
