"""The sweep: one page of the provider's list tells how a hundred predictions stand.

Watching costs pages, not jobs.  What the list says is a hint: a job whose prediction is over
becomes due and is looked at.  Stragglers beyond the pages that are worth walking look for
themselves (see `Policy.next_look`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

import structlog

from app.core.counters import SharedCounters
from app.core.queue import Bell
from app.domain.durations import Durations
from app.domain.errors import ProviderThrottled, Unavailable
from app.domain.generation import MediaClient, Prediction
from app.services import job_queries, news
from app.services.engine import Engine
from app.services.job_queries import InFlight
from app.services.ledger import Ledger
from app.services.reconciler import SKEW

log = structlog.get_logger("app.sweep")

ROUND = timedelta(milliseconds=500)
# With webhooks the list is the net below them.
ROUND_WITH_WEBHOOKS = timedelta(seconds=5)
SHARE = 0.5  # of the account's requests the sweep may use
LONGEST_REST = timedelta(seconds=30)
FEW = 200  # jobs in flight that may look by themselves: it brings their progress, too
CALM = timedelta(seconds=60)


@dataclass(slots=True)
class _Walk:
    """How far one walk through the list came."""

    wanted: int
    pages: int = 0
    seen: int = 0
    idle_pages: int = 0
    woken: int = 0

    @property
    def is_done(self) -> bool:
        """Tell whether asking for those left one by one costs less than walking on."""
        left = self.wanted - self.seen
        return left <= 0 or self.idle_pages >= left


class ListSweep:
    """Reads the list and wakes the jobs that are over.  A duty of the watcher."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        client: MediaClient,
        engine: Engine,
        bell: Bell,
        durations: Durations,
        counters: SharedCounters,
        requests_per_minute: int,
        has_webhooks: bool,
    ) -> None:
        self._ledger = ledger
        self._client = client
        self._engine = engine
        self._bell = bell
        self._durations = durations
        self._counters = counters
        self._page_cost = timedelta(minutes=1) / (requests_per_minute * SHARE)
        self._round = ROUND_WITH_WEBHOOKS if has_webhooks else ROUND
        self._failures = 0

    async def perform(self) -> timedelta:
        """Walk the list once, if anything can be over; say how long to rest."""
        async with self._ledger.reading() as conn:
            running, now = await job_queries.in_flight(conn)
        if not running:
            return ROUND
        if (early := self._earliest(running) - now) > timedelta(0):
            # One of a quicker model may be sent meanwhile.
            rest = min(early, self._durations.soonest_of_all, LONGEST_REST)
            return max(rest, ROUND)
        try:
            walk = await self._walk(running, now)
        except ProviderThrottled as error:
            # No budget for a page is none for single looks either.
            return max(error.retry_after or self._round, self._round)
        except Unavailable as error:
            return await self._do_without(running, error)
        self._failures = 0
        return max(self._round, walk.pages * self._page_cost)

    def _earliest(self, running: Mapping[str, InFlight]) -> datetime:
        """Say when the first of all may be over."""
        return min(
            found.oldest + self._durations.soonest(model)
            for model, found in running.items()
        )

    async def _walk(self, running: Mapping[str, InFlight], now: datetime) -> _Walk:
        walk = _Walk(wanted=sum(found.count for found in running.values()))
        since = min(found.oldest for found in running.values()) - SKEW
        async for page in self._client.list_since(since):
            walk.pages += 1
            ours = await self._ours(page, now)
            walk.seen += len(ours)
            walk.idle_pages += not ours
            over = [p.handle for p in page if p.phase.is_over and p.handle in ours]
            woken = await self._ledger.wake(over) if over else []
            walk.woken += len(woken)
            self._tell(woken)
            if walk.wanted > FEW:
                # Their own looks would be more requests than the account has.
                seen = [handle for handle in ours if handle not in over]
                await self._ledger.postpone(seen, calm=CALM)
            if walk.is_done:
                break
        self._counters.add("swept_pages", walk.pages)
        self._counters.add("swept_news", walk.woken)
        return walk

    async def _ours(self, page: Sequence[Prediction], now: datetime) -> set[str]:
        handles = [prediction.handle for prediction in page]
        async with self._ledger.reading() as conn:
            return await job_queries.running_among(conn, handles, before=now)

    def _tell(self, woken: Sequence[UUID]) -> None:
        """Have the jobs looked at, here as far as there is room, else by other workers."""
        room = self._engine.room
        self._engine.offer(woken[:room])
        for job_id in woken[room:]:
            self._bell.ring(str(job_id))

    async def _do_without(
        self, running: Mapping[str, InFlight], error: Unavailable
    ) -> timedelta:
        """Look at jobs one by one while the list cannot be had, in turn, within the budget."""
        self._failures += 1
        if self._failures == 1:
            log.warning("sweep.list_lost", reason=str(error))
        count = sum(found.count for found in running.values())
        share = max(1, int(self._round / self._page_cost))
        async with self._ledger.transaction() as conn:
            woken = await news.wake_next(conn, limit=min(count, share))
        self._tell(woken)
        return max(self._round, len(woken) * self._page_cost, ROUND * 2)
