"""News for an open page: one stream for a tab, small events that name a job and its version.

A page shows small steps from what an event says, and fetches the card for anything else.  Whoever
comes back says where they were (`Last-Event-ID`, which browsers send by themselves); what cannot
be told from there on is a `reset`, and the page looks at its jobs anew.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from app.api.deps import runtime_of
from app.api.guard import admit_again
from app.domain.access import Scope
from app.domain.errors import ServiceError
from app.services.event_log import read_position
from app.services.live import LiveEvent, Reset
from app.web.door import PageRoute, caller_of, needs
from app.web.words import words_of

router = APIRouter(route_class=PageRoute)

SILENCE: Final = (
    10.0  # seconds after which a sign of life is sent, and the key looked at
)
_COME_BACK: Final = b"retry: 1000\n\n"  # milliseconds after a connection was lost
_SIGN_OF_LIFE: Final = b": all is quiet\n\n"
_RESET: Final = b"event: reset\ndata: {}\n\n"


@router.get("/ui/events")
@needs(Scope.READ)
async def events(request: Request) -> Response:
    """Send what happens to the jobs the caller may see, until the caller leaves."""
    headers = {
        "Cache-Control": "no-store",
        "X-Accel-Buffering": "no",  # a proxy that gathers would hold the news back
    }
    return StreamingResponse(
        _tell(request), media_type="text/event-stream", headers=headers
    )


async def _tell(request: Request) -> AsyncIterator[bytes]:
    """Give the stream; it ends with the session, the process, or when the log is away.

    The browser comes back by itself.
    """
    live, realm = runtime_of(request).live, caller_of(request).realm
    after = request.headers.get("last-event-id") or None
    yield _COME_BACK
    if after is not None and read_position(after) is None:
        yield _RESET
        after = None
    try:
        async with live.follow(realm, after=after) as follower:
            while not follower.is_over:
                heard = await follower.heard(SILENCE)
                await admit_again(request)
                if caller_of(request).realm != realm:
                    return
                yield b"".join(map(_said, heard)) or _SIGN_OF_LIFE
    except ServiceError:
        return


def _said(heard: LiveEvent | Reset) -> bytes:
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
