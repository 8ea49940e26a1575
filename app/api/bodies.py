"""Bodies of requests: as large and as slow as allowed, and what nobody read is not taken in.

A client that sends too slowly is told 408 and parted with; so is one that has not finished
soon after the process was asked to stop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import timedelta

from fastapi import Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

BODY_LIMIT = 256 * 1024

# How often somebody who waits for a body looks whether the process is to stop.
_GLANCE = 0.25  # seconds


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a body must arrive: pauses, a start, and bytes a second from then on."""

    longest_pause: timedelta = timedelta(seconds=10)
    free: timedelta = timedelta(seconds=30)
    bytes_per_second: int = 32 * 1024
    when_stopping: timedelta = timedelta(seconds=3)


PACE = Pace()


@dataclass(slots=True)
class Arrival:
    """The body of a request as it arrives, whoever reads it."""

    receive_next: Receive
    is_whole: bool = False

    async def receive(self) -> Message:
        """Give the next message of the server; may be cancelled without losing one."""
        message = await self.receive_next()
        if message["type"] != "http.request" or not message.get("more_body"):
            self.is_whole = True
        return message

    async def take_in(self, most: int, within: timedelta) -> None:
        """Read and drop what is left, up to a number of bytes and a time."""
        try:
            async with asyncio.timeout(within.total_seconds()):
                while most >= 0 and not self.is_whole:
                    most -= len((await self.receive()).get("body", b""))
        except TimeoutError:
            pass


class _Clock:
    """When the next bytes of one body must be there."""

    def __init__(self, request: Request) -> None:
        state = request.app.state
        self._pace: Pace = getattr(state, "pace", PACE)
        self._stopping: asyncio.Event = state.runtime.stopping
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._last_call: float | None = None

    async def next_message(self, receive: Receive, size: int) -> Message:
        """Wait for a message; raise 408 when it does not come in time."""
        pace = self._pace
        allowed = pace.free.total_seconds() + size / pace.bytes_per_second
        deadline = min(
            self._began + allowed,
            self._loop.time() + pace.longest_pause.total_seconds(),
        )
        while True:
            if self._stopping.is_set() and self._last_call is None:
                self._last_call = self._loop.time() + pace.when_stopping.total_seconds()
            if self._last_call is not None:
                deadline = min(deadline, self._last_call)
            now = self._loop.time()
            if now >= deadline:
                raise self._too_slow()
            try:
                async with asyncio.timeout_at(min(deadline, now + _GLANCE)):
                    return await receive()
            except TimeoutError:
                continue

    def _too_slow(self) -> HTTPException:
        detail = "The body arrived too slowly; nothing was done."
        if self._last_call is not None:
            detail = "This process stops and cannot wait for the body; send it again."
        return HTTPException(408, detail, headers={"Connection": "close"})


async def timed_chunks(request: Request) -> AsyncGenerator[bytes, None]:
    """Give the body as it arrives, in time.

    Raises 408 when it comes too slowly, 400 when it breaks off.  The size is the caller's to
    watch.  Once per request.
    """
    clock = _Clock(request)
    size = 0
    is_whole = False
    while not is_whole:
        message = await clock.next_message(request.receive, size)
        if message["type"] == "http.disconnect":
            raise HTTPException(400, "The body did not arrive whole.")
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        is_whole = not message.get("more_body", False)
        if chunk:
            yield chunk


async def read_body(request: Request, *, limit: int = BODY_LIMIT) -> bytes:
    """Read the body, whatever its header said about the length, up to the limit in bytes.

    Past it the answer is 413; 400 for a body that breaks off, 408 for one that is too slow.
    """
    too_large = HTTPException(413, f"The body must be at most {limit} bytes.")
    if declared_length(request.headers) > limit:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    async for chunk in timed_chunks(request):
        size += len(chunk)
        if size > limit:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


def declared_length(headers: Headers) -> int:
    """Give what the client says about the length; 0 when it says nothing sensible."""
    text = headers.get("content-length", "")
    return int(text) if text.isdigit() and len(text) < 20 else 0
