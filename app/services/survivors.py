"""Purchases that turn up after they were declared lost, and predictions nobody wants.

A lost attempt's purchase may have been made all the same.  It is searched for as long as the
provider can show it; the job uses it if it has not bought again, else it is cancelled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

import structlog

from app.core.counters import SharedCounters
from app.core.queue import Bell
from app.domain.errors import NotFound, PredictionNotFound, Unavailable
from app.domain.generation import MediaClient
from app.services import job_queries, job_service
from app.services.job_queries import LostAttempt, Unwanted
from app.services.ledger import Ledger
from app.services.news import Hint
from app.services.reconciler import Reconciler, Seeker

log = structlog.get_logger("app.survivors")

SEARCH_EVERY = timedelta(seconds=30)
SEARCHED_AT_ONCE = 500
RESTS = 4  # times as long as it searched
CANCEL_EVERY = timedelta(seconds=1)
CANCELLED_AT_ONCE = 20
CONFIRM_AFTER = timedelta(seconds=5)
TRY_AGAIN_AFTER = timedelta(seconds=30)


class SearchForLost:
    """Looks for the purchases of lost attempts in the provider's list.  A watcher's duty."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        reconciler: Reconciler,
        bell: Bell,
        counters: SharedCounters,
        at_once: int = SEARCHED_AT_ONCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._reconciler = reconciler
        self._bell = bell
        self._counters = counters
        self._at_once = at_once
        self._clock = clock
        self._reached = job_queries.LONG_AGO

    async def perform(self) -> timedelta:
        """Search once; say how long to rest.  Of too many some are searched for in turn."""
        async with self._ledger.reading() as conn:
            lost = await job_queries.lost_attempts(
                conn,
                age=self._ledger.policy.data_lifetime,
                limit=self._at_once,
                after=self._reached,
            )
        is_full = len(lost) == self._at_once
        self._reached = lost[-1].sent_at if is_full else job_queries.LONG_AGO
        if not lost:
            return SEARCH_EVERY
        began = self._clock()
        try:
            await self._search(lost)
        except Unavailable as error:
            log.warning("search.failed", reason=str(error))
        # The list of a busy hour is long, and others need requests too.
        return max(SEARCH_EVERY, RESTS * timedelta(seconds=self._clock() - began))

    async def _search(self, lost: Sequence[LostAttempt]) -> None:
        seekers = [Seeker(one.attempt_id, one.request, one.sent_at) for one in lost]
        for attempt, found in zip(
            lost, await self._reconciler.search(seekers), strict=True
        ):
            if found is None:
                continue
            log.warning("attempt.survived", attempt_id=str(attempt.attempt_id))
            self._counters.add("late_survivors")
            hint = Hint(
                attempt.attempt_id,
                attempt.token,
                found.prediction.handle,
                found.prediction.phase.is_over,
                is_certain=found.is_certain,
            )
            try:
                told = await self._ledger.hint(hint)
            except NotFound:
                continue  # the job was deleted while the list was read
            if told.job_id is not None:
                self._bell.ring(str(told.job_id))


class CancelUnwanted:
    """Cancels predictions nobody wants, until the provider agrees.  A watcher's duty."""

    def __init__(
        self, *, ledger: Ledger, client: MediaClient, counters: SharedCounters
    ) -> None:
        self._ledger = ledger
        self._client = client
        self._counters = counters

    async def perform(self) -> timedelta:
        """Cancel what is due; say how long to rest."""
        async with self._ledger.reading() as conn:
            unwanted = await job_queries.unwanted(conn, limit=CANCELLED_AT_ONCE)
        for one in unwanted:
            again = await self._cancel(one)
            async with self._ledger.transaction() as conn:
                await job_service.cancel_again(conn, one.attempt_id, after=again)
        return CANCEL_EVERY

    async def _cancel(self, one: Unwanted) -> timedelta | None:
        """Cancel one; say after what time to see to it again, None when it is over."""
        try:
            await self._client.cancel(one.handle)
            prediction = await self._client.get(one.handle)
        except PredictionNotFound:
            # Denied; perhaps by an old answer, while it runs on.
            age = datetime.now(UTC) - one.sent_at
            return TRY_AGAIN_AFTER if age < self._ledger.policy.data_lifetime else None
        except Unavailable as error:
            log.warning("unwanted.not_cancelled", reason=str(error))
            return TRY_AGAIN_AFTER
        if not prediction.phase.is_over:
            return CONFIRM_AFTER
        log.info("unwanted.cancelled", handle=one.handle)
        self._counters.add("unwanted_cancelled")
        return None
