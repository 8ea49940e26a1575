"""Answers that go on: Server-Sent Events, and who has how many of them open.

A stream ends with the process, with its client, and soon after its key may no longer read what
it tells.  It is written as fast as its client reads: what waits meanwhile is the listener's.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.guard import admit_again, caller_of
from app.domain.access import Caller
from app.domain.errors import (
    Forbidden,
    OverLimit,
    ServiceError,
    Unauthorized,
    Unavailable,
)
from app.services.live import Follower, JobFollower
from app.services.listeners import TROUBLE, Heard

MEDIA_TYPE: Final = "text/event-stream"
HEARTBEAT: Final = timedelta(seconds=15)
RETRY: Final = timedelta(seconds=2)  # clients come back after it
ADMITTED_EVERY: Final = timedelta(seconds=1)
BUSY: Final = timedelta(seconds=10)

_ID_CHANGED = b"id: %b\n\n"


@dataclass(slots=True, eq=False)
class _Open:
    """One open stream: who has it, who may, and how it is ended."""

    request: Request
    credentials: tuple[object, ...]  # empty: nobody is asked for any
    may: Callable[[Caller], bool]
    end: Callable[[], None]


@dataclass(slots=True)
class Streams:
    """The open streams of this process."""

    most: int
    most_of_key: int
    _open: set[_Open] = field(default_factory=set)
    _of_keys: Counter[str] = field(default_factory=Counter)
    _admitting: asyncio.Task[None] | None = None

    @property
    def count(self) -> int:
        """Say how many are open."""
        return len(self._open)

    def make_room(self, request: Request) -> None:
        """Refuse one stream too many: `Unavailable` of the process, `OverLimit` of its key."""
        key = _key_of(request)
        if key and self._of_keys[key] >= self.most_of_key:
            raise OverLimit(
                f"This key has {self.most_of_key} event streams open: close some.",
                retry_after=BUSY,
                code="too_many_streams",
            )
        if self.count >= self.most:
            raise Unavailable(
                "This process has as many event streams open as it may.",
                retry_after=BUSY,
                code="streams_full",
            )

    @asynccontextmanager
    async def opened(
        self, request: Request, may: Callable[[Caller], bool], end: Callable[[], None]
    ) -> AsyncIterator[None]:
        """Count a stream; call `end` once its caller is no longer one who `may` have it.

        Raises what `make_room` does: others may have come since.
        """
        self.make_room(request)
        key = _key_of(request)
        stream = _Open(request, _credentials_of(request), may, end)
        self._open.add(stream)
        self._of_keys[key] += 1
        if stream.credentials and self._admitting is None:
            self._admitting = asyncio.create_task(self._admit_for_ever())
        try:
            yield
        finally:
            self._open.discard(stream)
            self._of_keys[key] -= 1
            if not self._of_keys[key]:
                del self._of_keys[key]

    async def aclose(self) -> None:
        """End what looks after the streams."""
        if self._admitting is not None:
            self._admitting.cancel()
            await asyncio.gather(self._admitting, return_exceptions=True)

    async def _admit_for_ever(self) -> None:
        """Ask of all credentials again and again; once for all streams that came with them."""
        try:
            while groups := self._by_credentials():
                await asyncio.gather(*map(self._admit_again, groups))
                await asyncio.sleep(ADMITTED_EVERY.total_seconds())
        finally:
            self._admitting = None

    def _by_credentials(self) -> list[list[_Open]]:
        found: dict[tuple[object, ...], list[_Open]] = {}
        for stream in self._open:
            if stream.credentials:
                found.setdefault(stream.credentials, []).append(stream)
        return list(found.values())

    async def _admit_again(self, streams: list[_Open]) -> None:
        request = streams[0].request
        try:
            await admit_again(request)
            caller = caller_of(request)
        except (Unauthorized, Forbidden, OverLimit):
            # Over the limit of wrong keys, that is: a right one is asked about without.
            for stream in streams:
                stream.end()
        except (ServiceError, *TROUBLE):
            return  # nobody knows; and without the database there is nothing to tell
        else:
            for stream in streams:
                if not stream.may(caller):
                    stream.end()


def _demands_keys(request: Request) -> bool:
    return bool(request.app.state.runtime.gatekeeper.demands_keys)


def _key_of(request: Request) -> str:
    """Name the key of a request, where keys are demanded; else nothing."""
    if not _demands_keys(request):
        return ""
    caller = caller_of(request)
    return str(caller.key_id or caller.name)


def _credentials_of(request: Request) -> tuple[object, ...]:
    """Give all that a request says of who makes it, where keys are demanded.

    Pages and the JSON API believe different ones: equal headers need not mean equal callers.
    """
    if not _demands_keys(request):
        return ()
    names = ("authorization", "x-api-key", "cookie")
    believed = request.scope.get("identify")
    return (believed, *(request.headers.get(name) for name in names))


class EventStream(Response):
    """Tells what a follower hears, until it is over or the time is up.

    `stack` is left at the end, whatever happens.  `write` makes the text of one thing heard;
    `position` is told as the id whenever it moved without an event; `first` comes before all.
    """

    def __init__(
        self,
        follower: Follower | JobFollower,
        stack: AsyncExitStack,
        write: Callable[[Heard], bytes],
        *,
        position: Callable[[], str | None],
        seconds: float | None,
        first: bytes = b"",
    ) -> None:
        super().__init__(
            headers={
                "Content-Type": MEDIA_TYPE,
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
            }
        )
        del self.headers["content-length"]
        self._follower = follower
        self._stack = stack
        self._write = write
        self._position = position
        self._seconds = seconds
        self._first = first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        async with self._stack:
            leaving = asyncio.create_task(self._end_with_client(receive))
            try:
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": self.raw_headers,
                    }
                )
                await self._tell(send)
                await send({"type": "http.response.body", "body": b""})
            finally:
                leaving.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await leaving

    async def _end_with_client(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._follower.end()

    async def _tell(self, send: Send) -> None:
        follower, began = self._follower, time.monotonic()
        told = self._position()
        text = b"retry: %d\n" % (RETRY / timedelta(milliseconds=1))
        # A client that is cut off before its first event must know where to go on.
        text += b"\n" if told is None else _ID_CHANGED % told.encode()
        text += self._first
        while True:
            await send({"type": "http.response.body", "body": text, "more_body": True})
            patience = HEARTBEAT.total_seconds()
            if self._seconds is not None:
                left = began + self._seconds - time.monotonic()
                patience = max(min(patience, left), 0)
            heard = await follower.heard(patience)
            if heard:
                text = b"".join(map(self._write, heard))
                continue
            if follower.is_over:
                return
            if self._seconds is not None:
                if time.monotonic() - began >= self._seconds:
                    return
            text = b": still here\n"
            now = self._position()
            text += b"\n" if now in (None, told) else _ID_CHANGED % now.encode()
            told = now
