"""The queue's switch as processes use it: remembered for a second, thrown with an audit entry."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.exc import DBAPIError

from app.core.database import DISCONNECTED
from app.core.patience import within
from app.domain.errors import ServiceError, Unavailable
from app.services import audit, switches
from app.services.audit import Act
from app.services.ledger import PATIENCE, Ledger
from app.services.switches import QueueState

GLANCE = timedelta(seconds=1)  # how old an answer to a reader may be
# Claims under way end within seconds, whatever becomes of their process; the deadlines of very
# many pending jobs take a while to write.
LONGEST_PAUSE = timedelta(seconds=10)
LONGEST_RESUME = timedelta(minutes=2)

_Work = Coroutine[Any, Any, tuple[Act | None, QueueState]]
_TROUBLE = (ServiceError, DBAPIError, *DISCONNECTED)


@dataclass(frozen=True, slots=True)
class Obstacle:
    """What keeps pending jobs from starting, beyond their place in the queue; None: nothing."""

    reason: str | None = None
    since: datetime | None = None


class Pausing:
    """Tells whether the queue is paused, and pauses it.  Safe to share within one event loop.

    What is told is for people, and for whoever would spare itself an attempt to start.  It
    is the claim itself that starts nothing (see `switches`).
    """

    def __init__(
        self, ledger: Ledger, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._known = QueueState()
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()

    async def state(self) -> QueueState:
        """Tell how the queue is: at most a second ago, or when the database last answered."""
        if self._is_old():
            async with self._reading:
                if self._is_old():  # nobody asked meanwhile
                    await self._look()
        return self._known

    async def is_paused(self) -> bool:
        """Tell whether it would be in vain to start anything."""
        return (await self.state()).is_paused

    async def pause(self, act: Act, *, reason: str) -> QueueState:
        """Pause the queue, and write down who did; one that is paused stays as it is.

        When this returns nothing is started any more.
        """
        return await self._throw(LONGEST_PAUSE, self._pause(act, reason))

    async def resume(self, act: Act) -> QueueState:
        """Let the queue go on, and write down who did; one that runs stays as it is."""
        return await self._throw(LONGEST_RESUME, self._resume(act))

    async def _throw(self, patience: timedelta, work: _Work) -> QueueState:
        try:
            act, self._known = await within(patience, work)
        except TimeoutError as error:
            raise Unavailable("The database does not answer in time.") from error
        self._read_at = self._clock()
        if act is not None:
            audit.tell(act)
        return self._known

    async def _pause(self, act: Act, reason: str) -> tuple[Act | None, QueueState]:
        async with self._ledger.transaction() as conn:
            is_new = await switches.pause(conn, reason=reason, by=act.actor)
            if is_new:
                await audit.record(conn, act)
            return act if is_new else None, await switches.read(conn)

    async def _resume(self, act: Act) -> tuple[Act | None, QueueState]:
        async with self._ledger.transaction() as conn:
            resumed = await switches.resume(conn, by=act.actor)
            if resumed is not None:
                paused = round(resumed.length.total_seconds(), 3)
                act = replace(
                    act, details={"paused_seconds": paused, "jobs": resumed.jobs}
                )
                await audit.record(conn, act)
            return act if resumed else None, await switches.read(conn)

    async def _look(self) -> None:
        try:
            self._known = await within(PATIENCE, self._read())
        except _TROUBLE:
            pass  # health tells of it; what was known is as good as anything
        self._read_at = self._clock()

    async def _read(self) -> QueueState:
        async with self._ledger.reading() as conn:
            return await switches.read(conn)

    def _is_old(self) -> bool:
        return self._clock() - self._read_at >= GLANCE.total_seconds()
