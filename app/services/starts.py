"""Which pending jobs start, and when: at once while there is enough for all, else in turn.

    bell ──▶ claim ──▶ every token asked for was there ──▶ the jobs rung for start
                └────▶ not so: starts are scarce; they stay due, and from then on
    sift, watcher ──seek──▶ claim_in_turn ──▶ tokens, then as many jobs, whose turn it is

Each worker finds out for itself that starts are scarce: it got fewer tokens than it asked for,
it has more ids than it can claim at once, or there were more jobs waiting than it could start.
It goes back when a pick left nobody waiting.  A worker without free looks picks nothing, and
so leaves the tokens to those that have some.

While the queue is paused no tokens are asked for, and nothing is sought: the watcher, which asks
the table anyway, seeks again when there is something to start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Protocol
from uuid import UUID

from app.core.throttle import Grant
from app.services.job_records import Claim
from app.services.ledger import Ledger
from app.services.turns import MOST_IN_TURN

# Tokens that come one by one are gathered a little: a pick is a transaction.
PACE = timedelta(milliseconds=50)


class Purchases(Protocol):
    """Who says how many purchases may start: a `GuardedBucket`."""

    async def take(self, n: int = 1) -> Grant:
        """Let up to `n` start now; say when to ask for the rest."""
        ...

    async def give_back(self, n: int) -> None:
        """Take back what was let and did not start."""
        ...


async def never() -> bool:
    """Say no."""
    return False


class Starts:
    """Takes tokens and claims with them.  All methods belong to the loop's thread.

    `stir` is called when `claim_in_turn` has something to do that it had not before.
    `is_paused` tells when it would be in vain to start anything; it may be late.
    """

    def __init__(
        self,
        ledger: Ledger,
        purchases: Purchases,
        stir: Callable[[], None],
        is_paused: Callable[[], Awaitable[bool]] = never,
    ) -> None:
        self._ledger = ledger
        self._purchases = purchases
        self._stir = stir
        self._is_paused = is_paused
        self._is_scarce = False
        self._sought = 0  # how many jobs wait for a turn, as far as is known
        self._closed_until = 0.0  # no purchases before, on the loop's clock
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def are_scarce(self) -> bool:
        """Tell whether pending jobs have to wait for their turn."""
        return self._is_scarce

    @property
    def may_start(self) -> bool:
        """Tell whether the budget of purchases let one through when last asked."""
        return asyncio.get_running_loop().time() >= self._closed_until

    @property
    def wanted(self) -> int:
        """How many turns are worth asking for now."""
        return self._sought if self.may_start else 0

    def seek(self, count: int) -> None:
        """Have jobs started in turn: about so many wait for it."""
        self._sought = max(self._sought, min(count, MOST_IN_TURN))
        self._stir()

    def ration(self) -> None:
        """Start nothing out of turn from now on, until a pick leaves nobody waiting."""
        self._is_scarce = True
        self.seek(1)

    def stop(self) -> None:
        """Wake nobody any more."""
        if self._alarm is not None:
            self._alarm.cancel()

    async def claim(self, batch: Sequence[UUID]) -> list[Claim]:
        """Claim what is due among the jobs; start pending ones only if there is no want."""
        if await self._is_paused():
            return await self._ledger.claim(batch, starts=0)
        if not self._is_scarce:
            grant = await self._purchases.take(len(batch))
            # The want may have been found out while Redis was asked.
            if grant.granted == len(batch) and not self._is_scarce:
                return await self._start_at_once(batch)
            # Whoever was rung for is not the one whose turn it is.
            if grant.granted:
                await self._purchases.give_back(grant.granted)
            else:
                self._close(grant.retry_after)
            self._is_scarce = True
            self.seek(len(batch))
        return await self._ledger.claim(batch, starts=0)

    async def claim_in_turn(self, limit: int) -> list[Claim]:
        """Start up to `limit` jobs whose turn it is, as far as the budget reaches."""
        if await self._is_paused():
            self._sought, self._is_scarce = 0, False
            return []
        wanted = min(limit, self._sought)
        grant = await self._purchases.take(wanted)
        if grant.granted < wanted:
            self._close(max(grant.retry_after, PACE))
        if not grant.granted:
            self._is_scarce = True
            return []
        # What is sought from now on, this pick may be too early to see.
        sought, self._sought = self._sought, 0
        spent = 0
        try:
            started = await self._ledger.start(grant.granted)
            spent = sum(claim.is_fresh for claim in started.claims)
        except BaseException:
            self.seek(sought)
            raise
        finally:
            await self._return(grant.granted - spent)
        self._is_scarce = started.has_more
        if started.has_more:
            self.seek(2 * grant.granted)
            if not spent:
                self._close(PACE)  # those in front are in other hands
        return list(started.claims)

    async def _start_at_once(self, batch: Sequence[UUID]) -> list[Claim]:
        spent = 0
        try:
            claims = await self._ledger.claim(batch, starts=len(batch))
            spent = sum(claim.is_fresh for claim in claims)
            return claims
        finally:
            await self._return(len(batch) - spent)

    async def _return(self, unspent: int) -> None:
        if unspent > 0:
            self._open()
            await self._purchases.give_back(unspent)

    def _close(self, pause: timedelta) -> None:
        loop = asyncio.get_running_loop()
        self.stop()
        self._closed_until = loop.time() + pause.total_seconds()
        self._alarm = loop.call_later(pause.total_seconds(), self._open)

    def _open(self) -> None:
        self.stop()
        self._closed_until = 0.0
        self._stir()
