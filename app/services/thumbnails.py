"""Thumbnails of stored pictures: made after the job is done, or when they are first asked for.

They lie beside their file and go with it.  Nothing depends on them: what is not made is made
later, and what cannot be made is no error of the job.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import structlog

from app.core.patience import end
from app.domain.errors import (
    InvalidRequest,
    NotFound,
    OutputInvalid,
    ServiceError,
    Unavailable,
)
from app.services import colours, file_locks
from app.services.blobs import in_thread
from app.services.ledger import Ledger
from app.services.media_store import WIDTHS, MediaStore
from app.services.scaling import Scaled, scale_down

log = structlog.get_logger("app.thumbnails")

AT_ONCE: Final = 2  # pictures a process works on
_QUEUE: Final = 1000  # files that wait to be worked on when there is time
_ASKED: Final = 64  # files somebody waits for
_HOPELESS: Final = 1024  # files remembered because nothing can be made of them
_NICENESS: Final = 10


@dataclass(frozen=True, slots=True)
class Made:
    """Thumbnails by width; `are_kept` tells whether they are in the store."""

    thumbnails: Mapping[int, bytes]
    are_kept: bool


class Thumbnails:
    """Makes thumbnails.  One per process and event loop."""

    def __init__(self, ledger: Ledger, store: MediaStore) -> None:
        self._ledger = ledger
        self._store = store
        self._threads = ThreadPoolExecutor(
            AT_ONCE, "thumbnail", initializer=_give_way_to_others
        )
        self._room = asyncio.Semaphore(AT_ONCE)
        self._queue: asyncio.Queue[str] = asyncio.Queue(_QUEUE)
        self._flights: dict[str, asyncio.Task[Made]] = {}
        self._hopeless: OrderedDict[str, str] = OrderedDict()
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Work on what is offered, one file after the other."""
        self._worker = asyncio.create_task(self._work(), name="thumbnails")

    def offer(self, keys: Iterable[str]) -> None:
        """Have thumbnails made when there is time; forgotten when there is too much to do."""
        with suppress(asyncio.QueueFull):
            for key in keys:
                self._queue.put_nowait(key)

    async def make(self, key: str) -> Made:
        """Make the thumbnails of a file now, once however many ask for them.

        Raise `NotFound` for an unknown file, `InvalidRequest` where nothing can be made of it,
        `Unavailable` when too many are asked for.  Without the database they are made all the
        same, and not kept.
        """
        if key in self._hopeless:
            raise _say_hopeless(self._hopeless[key])
        if key not in self._flights and len(self._flights) >= _ASKED:
            raise Unavailable(
                "Too many thumbnails are being made at the moment.",
                retry_after=timedelta(seconds=2),
            )
        # Shielded: one who goes away must not take it from the others.
        return await asyncio.shield(self._fly(key))

    async def aclose(self) -> None:
        """End; what was not begun is made when somebody asks for it."""
        tasks = [*self._flights.values(), *([self._worker] if self._worker else [])]
        await end(*tasks)
        await asyncio.to_thread(self._threads.shutdown)

    async def _work(self) -> None:
        while True:
            key = await self._queue.get()
            try:
                if await self._is_done(key):
                    continue
            except ServiceError as error:
                log.info("thumbnails.skipped", key=key, reason=type(error).__name__)
                continue
            flight = self._fly(key)
            await asyncio.wait([flight])
            broken = None if flight.cancelled() else flight.exception()
            if broken is not None:
                told = log.info if isinstance(broken, ServiceError) else log.error
                told("thumbnails.failed", key=key, reason=type(broken).__name__)

    async def _is_done(self, key: str) -> bool:
        """Tell whether an equal picture was worked on before."""
        try:
            for width in WIDTHS:
                await self._store.head(key, width=width)
        except NotFound:
            return False
        async with self._ledger.reading() as conn:
            return await colours.inherit(conn, key)

    def _fly(self, key: str) -> asyncio.Task[Made]:
        """Join the work on this file that is under way, or start it."""
        flight = self._flights.get(key)
        if flight is None:
            flight = asyncio.create_task(self._make(key), name="thumbnail")
            self._flights[key] = flight
            flight.add_done_callback(lambda done: self._land(key, done))
        return flight

    def _land(self, key: str, flight: asyncio.Task[Made]) -> None:
        del self._flights[key]
        if not flight.cancelled():
            flight.exception()  # seen; nobody may be waiting

    async def _make(self, key: str) -> Made:
        async with self._room:
            async with self._store.fetched(key) as file:
                try:
                    scaled = await in_thread(self._threads, scale_down, file, WIDTHS)
                except OutputInvalid as error:
                    self._hopeless[key] = str(error)
                    while len(self._hopeless) > _HOPELESS:
                        self._hopeless.popitem(last=False)
                    raise _say_hopeless(str(error)) from error
            return Made(scaled.thumbnails, await self._keep(key, scaled))

    async def _keep(self, key: str, scaled: Scaled) -> bool:
        """Store what was made; tell whether it could be.

        Whoever removes the file waits meanwhile, and finds the thumbnails when they are there;
        whoever comes too late finds no file, and stores nothing.
        """
        try:
            async with (
                self._ledger.reading() as conn,
                file_locks.together(conn, [key]),
            ):
                await self._store.head(key)
                for width, content in scaled.thumbnails.items():
                    await self._store.keep_thumbnail(key, width, content)
                await colours.write(conn, key, scaled.colour)
        except Unavailable as error:
            log.warning("thumbnails.not_kept", key=key, code=error.code)
            return False
        return True


def _say_hopeless(reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"No thumbnail can be made of this file: {reason} Ask for the file itself.",
        field="w",
        code="no_thumbnail",
    )


def _give_way_to_others() -> None:
    """Have the calling thread run when nobody else wants to.  On Linux threads have priorities."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
