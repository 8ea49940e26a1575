"""What operators look at, gathered: each figure asked for once in a while, whoever looks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar
from uuid import UUID

from app.core.patience import within
from app.domain.errors import Unavailable
from app.services import figures, notifications, switches, usage
from app.services.figures import (
    FailureGroup,
    Hour,
    QueueFigures,
    Stored,
)
from app.services.health import HealthChecks, PartHealth
from app.services.ledger import Ledger
from app.services.switches import QueueState
from app.services.usage import Day

NOW_LIFE = timedelta(seconds=2)
FAILURES_LIFE = timedelta(seconds=5)
TRENDS_LIFE = timedelta(seconds=30)
PATIENCE = timedelta(seconds=5)

HOURS = 24
DAYS = 30
FAILURES_SPAN = timedelta(days=7)
MOST_AGAIN = 50  # jobs of a group that are run again in one go

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WebhookBacklog:
    """Webhooks that are not delivered yet; `late` is how long the first has been due."""

    pending: int
    late: timedelta


@dataclass(frozen=True, slots=True)
class Now:
    """How it is at this moment."""

    at: datetime
    switch: QueueState
    queue: QueueFigures
    webhooks: WebhookBacklog
    parts: Mapping[str, PartHealth]


@dataclass(frozen=True, slots=True)
class Trends:
    """How it went: hour by hour, day by day, and what has gathered."""

    at: datetime
    hours: Sequence[Hour]
    days: Sequence[Day]
    stored: Stored


class Operations:
    """Gathers the figures.  Raises `Unavailable` without a database.

    Safe to share within one event loop.
    """

    def __init__(self, ledger: Ledger, health: HealthChecks) -> None:
        self._ledger = ledger
        self._health = health
        self._now = _Remembered(self._read_now, NOW_LIFE)
        self._failures = _Remembered(self._read_failures, FAILURES_LIFE)
        self._trends = _Remembered(self._read_trends, TRENDS_LIFE)

    async def now(self) -> Now:
        """Tell how it is, at most two seconds ago."""
        return await self._now()

    async def failures(self) -> list[FailureGroup]:
        """Group the failures of the last seven days that nobody ran again."""
        return await self._failures()

    async def trends(self) -> Trends:
        """Tell how the last day and the last thirty went, at most half a minute ago."""
        return await self._trends()

    @asynccontextmanager
    async def taking(self, code: str) -> AsyncIterator[list[UUID]]:
        """Give as many jobs of a group of failures as are run again in one go, oldest first.

        Whoever comes for the same group meanwhile, in any process, raises `Conflict`: they
        would be given the same jobs.
        """
        since = datetime.now(UTC) - FAILURES_SPAN
        async with self._ledger.reading() as conn:
            async with figures.alone_with(conn, code):
                try:
                    yield await figures.failed_with(
                        conn, code, since=since, limit=MOST_AGAIN
                    )
                finally:
                    self.forget()

    def forget(self) -> None:
        """Look anew next time: something was changed from here."""
        self._now.forget()
        self._failures.forget()

    async def _read_now(self) -> Now:
        parts = await self._health.everything()
        async with self._ledger.reading() as conn:
            return Now(
                datetime.now(UTC),
                await switches.read(conn),
                await figures.queue(conn, realm=None),
                WebhookBacklog(*await notifications.figures(conn)),
                parts,
            )

    async def _read_failures(self) -> list[FailureGroup]:
        async with self._ledger.reading() as conn:
            since = datetime.now(UTC) - FAILURES_SPAN
            return await figures.failure_groups(conn, since=since)

    async def _read_trends(self) -> Trends:
        now = datetime.now(UTC)
        async with self._ledger.reading() as conn:
            first = now.date() - timedelta(days=DAYS - 1)
            return Trends(
                now,
                await figures.hours(conn, now=now, count=HOURS),
                await usage.days(conn, first, now.date()),
                await figures.stored(conn),
            )


class _Remembered(Generic[T]):
    """An answer that is good for a while; whoever comes while it is asked for waits for it."""

    def __init__(
        self, ask: Callable[[], Coroutine[Any, Any, T]], life: timedelta
    ) -> None:
        self._ask = ask
        self._life = life.total_seconds()
        self._known: tuple[float, T] | None = None
        self._changes = 0
        self._asking = asyncio.Lock()

    async def __call__(self) -> T:
        async with self._asking:
            if self._known is None or time.monotonic() - self._known[0] >= self._life:
                return await self._ask_anew()
            return self._known[1]

    async def _ask_anew(self) -> T:
        changes = self._changes
        try:
            found = await within(PATIENCE, self._ask())
        except TimeoutError as error:
            raise Unavailable("The database does not answer in time.") from error
        # What was asked for before a change is no answer for whoever comes after it.
        if changes == self._changes:
            self._known = (time.monotonic(), found)
        return found

    def forget(self) -> None:
        """Ask anew next time, even if an answer is just under way."""
        self._known = None
        self._changes += 1
