"""Finds what is due and nobody was told about.

The bell is lossy and processes die; the rows are neither.  Twice a second the leader asks
the table which looks are due and has them made: by its own engine first, by the other workers
for what is beyond it.  Pending jobs are for all: each worker asks whether any wait, and has its
engine start those whose turn it is.  What else is done once per deployment, at a pace of its
own, is a duty.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol
from uuid import UUID

import structlog

from app.core.leasing import Leadership
from app.core.patience import end
from app.core.queue import Bell
from app.domain.errors import ServiceError
from app.services import job_queries
from app.services.engine import DATABASE_TROUBLE, Engine
from app.services.ledger import MOST_AT_ONCE, Ledger

log = structlog.get_logger("app.watcher")

LEADERSHIP_KEY = 0x6D67_0001
ROUND = timedelta(milliseconds=500)
SLACK = timedelta(milliseconds=750)  # a worker's own timers come first
RINGS_A_ROUND = 32
REST_OF_THE_LATE = timedelta(seconds=5)
REST_AFTER_TROUBLE = timedelta(seconds=2)


class Duty(Protocol):
    """Something the leader does again and again.  May be cut off anywhere."""

    async def perform(self) -> timedelta:
        """Do it once; say how long to rest.  Raises `ServiceError` when it cannot be done."""
        ...


class EndOutOfTime:
    """Has pending jobs looked at whose time is up, also while nothing may start."""

    def __init__(self, ledger: Ledger, engine: Engine) -> None:
        self._ledger = ledger
        self._engine = engine

    async def perform(self) -> timedelta:
        """Offer them to the engine: a claim ends them."""
        async with self._ledger.reading() as conn:
            found = await job_queries.out_of_time(conn, limit=MOST_AT_ONCE)
        self._engine.offer(found)
        return ROUND if len(found) == MOST_AT_ONCE else REST_OF_THE_LATE


class Watcher:
    """Runs in every worker; in the one that holds the leadership it does most."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        engine: Engine,
        leadership: Leadership,
        bell: Bell,
        duties: Sequence[Duty] = (),
    ) -> None:
        self._ledger = ledger
        self._engine = engine
        self._leadership = leadership
        self._bell = bell
        self._duties = duties
        self._tasks: list[asyncio.Task[None]] = []
        self._led = False

    @property
    def is_leading(self) -> bool:
        """Tell whether this process watches for the deployment."""
        return self._leadership.is_held

    def start(self) -> None:
        """Start the rounds, in the running loop."""
        self._tasks = [asyncio.create_task(self._watch_for_ever(), name="watcher")]
        for duty in self._duties:
            serving = self._serve_for_ever(duty)
            name = type(duty).__name__
            self._tasks.append(asyncio.create_task(serving, name=name))

    async def breakdown(self) -> None:
        """Return when a round or a duty ended that nobody ended."""
        await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)

    async def stop(self) -> None:
        """End the rounds and give the leadership up."""
        await end(*self._tasks)
        await self._leadership.resign()

    async def _watch_for_ever(self) -> None:
        while True:
            is_full = False
            if await self._confirm():
                try:
                    is_full = await self.sweep()
                except DATABASE_TROUBLE as error:
                    log.warning("sweep.failed", error=type(error).__name__)
            # A database that is away is the leader's to tell of.
            with contextlib.suppress(*DATABASE_TROUBLE):
                await self.seek_starts()
            # With more due than one round takes, go on as soon as there is room.
            pause = ROUND / 10 if is_full else ROUND
            await asyncio.sleep(pause.total_seconds())

    async def _serve_for_ever(self, duty: Duty) -> None:
        """Perform the duty while leading; two leaders at once cost requests, no more."""
        while True:
            rest = ROUND
            if self._led:
                try:
                    rest = await duty.perform()
                except (ServiceError, *DATABASE_TROUBLE) as error:
                    name = type(duty).__name__
                    log.warning("duty.failed", duty=name, error=type(error).__name__)
                    rest = REST_AFTER_TROUBLE
            await asyncio.sleep(rest.total_seconds())

    async def _confirm(self) -> bool:
        leads = await self._leadership.confirm()
        if leads != self._led:
            log.info("watcher.leads" if leads else "watcher.follows")
            self._led = leads
        return leads

    async def sweep(self) -> bool:
        """Offer the looks that are due; tell whether there were more than fit."""
        limit = min(self._engine.room, MOST_AT_ONCE)
        if limit == 0:
            return True
        async with self._ledger.reading() as conn:
            due = await job_queries.due_looks(
                conn, slack=SLACK, limit=limit + RINGS_A_ROUND
            )
        self._engine.offer(due[:limit])
        self._ring(due[limit:])
        return len(due) >= limit

    async def seek_starts(self) -> None:
        """Tell the engine how many jobs wait to be started, unless it knows that some do."""
        if self._engine.is_seeking:
            return
        async with self._ledger.reading() as conn:
            count = await job_queries.count_due_starts(conn, limit=MOST_AT_ONCE)
        if count:
            self._engine.seek(count)

    def _ring(self, beyond: list[UUID]) -> None:
        for job_id in beyond:
            self._bell.ring(str(job_id))
