"""How many jobs wait to start, and no more than may."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import timedelta

from app.domain.errors import Unavailable
from app.services.ledger import Ledger

FRESH = timedelta(seconds=1)  # how old a count may be
RETRY_AFTER = timedelta(seconds=10)


class Backlog:
    """Counts pending jobs once a second at most, whatever is submitted meanwhile.

    So the ceiling holds to within what all processes accept in that second.
    """

    def __init__(
        self,
        ledger: Ledger,
        ceiling: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = ledger
        self._ceiling = ceiling
        self._clock = clock
        self._count = 0
        self._counted_at = float("-inf")
        self._counting = asyncio.Lock()

    async def pending(self) -> int:
        """Say how many jobs wait, the ceiling at most; `Unavailable` without a database."""
        if self._is_old():
            async with self._counting:
                if self._is_old():  # nobody counted meanwhile
                    self._count = await self._ledger.count_pending(self._ceiling)
                    self._counted_at = self._clock()
        return self._count

    async def admit(self) -> None:
        """Let one more job in; raise `Unavailable` when as many wait as may."""
        if await self.pending() >= self._ceiling:
            raise Unavailable(
                f"{self._ceiling} jobs wait to start already; nothing was accepted.",
                retry_after=RETRY_AFTER,
                code="queue_full",
            )
        self._count += 1

    def withdraw(self) -> None:
        """Take back one that was let in and did not become a job: it waits for nothing."""
        self._count = max(self._count - 1, 0)

    def _is_old(self) -> bool:
        return self._clock() - self._counted_at >= FRESH.total_seconds()
