"""The worker's loop: takes job ids in, claims in batches, looks at many jobs at once.

    bells, watcher, timers ──offer──▶ intake ──claim──▶ looks (≤ concurrency) ──▶ timers

One event loop owns everything that waits.  An id that is offered and dropped, claimed and
lost, or forgotten by a dying process costs time, never correctness: the row stays due.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from datetime import timedelta
from typing import Protocol
from uuid import UUID

import structlog
from sqlalchemy.exc import DBAPIError

from app.core.throttle import Grant
from app.domain.errors import Unavailable
from app.services.job_records import Claim
from app.services.ledger import LEASE, MOST_AT_ONCE, Ledger

log = structlog.get_logger("app.engine")

INTAKE_LIMIT = (
    20_000  # ids waiting for a claim; more are dropped, the watcher finds them
)
TIMER_HORIZON = timedelta(seconds=30)  # looks further ahead are left to the watcher
RENEW_EVERY = LEASE / 3
DATABASE_REST = timedelta(milliseconds=500)

# What the loops outlive: a database that is gone, or that refuses the statement (its tables
# are not there yet; it lost a deadlock).  The rows stay due.
DATABASE_TROUBLE = (Unavailable, DBAPIError)


class Runner(Protocol):
    """What looks at one job: `JobRunner`."""

    async def advance(self, claim: Claim) -> timedelta | None:
        """Look, settle, and say how soon to look again."""
        ...


class Purchases(Protocol):
    """Who says how many purchases may start: a `GuardedBucket`."""

    async def take(self, n: int = 1) -> Grant:
        """Let up to `n` start now; say when to ask for the rest."""
        ...

    async def give_back(self, n: int) -> None:
        """Take back what was let and did not start."""
        ...


class Engine:
    """Runs looks.  All methods belong to the loop's thread."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        runner: Runner,
        purchases: Purchases,
        concurrency: int,
    ) -> None:
        self._ledger = ledger
        self._runner = runner
        self._purchases = purchases
        self._concurrency = concurrency
        self._intake: dict[UUID, None] = {}  # ordered, without doubles
        self._arrived = asyncio.Event()
        self._freed = asyncio.Event()
        self._looks: dict[asyncio.Task[None], Claim] = {}
        self._timers: dict[UUID, asyncio.TimerHandle] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._is_draining = False
        self._closed_until = 0.0  # no purchases before, on the loop's clock

    # ------------------------------------------------------------------------- intake

    @property
    def in_flight(self) -> int:
        """How many looks are going on."""
        return len(self._looks)

    @property
    def room(self) -> int:
        """How many more ids are worth offering now."""
        if self._is_draining:
            return 0
        return max(self._concurrency * 2 - len(self._intake), 0)

    @property
    def may_start(self) -> bool:
        """Tell whether the budget of purchases let one through when last asked."""
        return asyncio.get_running_loop().time() >= self._closed_until

    def offer(self, job_ids: Iterable[UUID]) -> None:
        """Ask for looks at the jobs.  Never waits; drops what does not fit."""
        if self._is_draining:
            return
        for job_id in job_ids:
            if len(self._intake) >= INTAKE_LIMIT:
                break
            self._intake[job_id] = None
            if (timer := self._timers.pop(job_id, None)) is not None:
                timer.cancel()
        self._arrived.set()

    # --------------------------------------------------------------------------- life

    def start(self) -> None:
        """Start serving, in the running loop."""
        self._tasks = [
            asyncio.create_task(self._serve(), name="engine"),
            asyncio.create_task(self._renew_for_ever(), name="leases"),
        ]

    async def breakdown(self) -> None:
        """Return when a loop of the engine ended that nobody ended; it serves no more."""
        await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)

    async def drain(self, patience: timedelta) -> None:
        """Take nothing more, finish the looks under way, cut off what takes too long.

        What is cut off keeps its claim until the lease ends; another worker resumes it.
        """
        self._is_draining = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._intake.clear()
        # A claim on its way is waited for: cut off, it would hold its jobs for a lease.
        self._arrived.set()
        self._freed.set()
        await asyncio.gather(self._tasks[0], return_exceptions=True)
        if self._looks:
            log.info("engine.draining", in_flight=len(self._looks))
            await asyncio.wait(self._looks, timeout=patience.total_seconds())
        left = list(self._looks)
        for task in [*left, *self._tasks]:
            task.cancel()
        await asyncio.gather(*left, *self._tasks, return_exceptions=True)
        log.info("engine.drained", cut_off=len(left))

    async def _serve(self) -> None:
        while not self._is_draining:
            await self._arrived.wait()
            if len(self._looks) >= self._concurrency:
                self._freed.clear()
                await self._freed.wait()
            batch = self._next_batch()
            if not batch:  # also when draining woke us
                continue
            try:
                claims = await self._claim(batch)
            except DATABASE_TROUBLE as error:
                # The watcher offers them again when the database is back.
                log.warning("claim.failed", error=type(error).__name__)
                await asyncio.sleep(DATABASE_REST.total_seconds())
                continue
            for claim in claims:
                self._begin(claim)

    def _next_batch(self) -> list[UUID]:
        size = min(MOST_AT_ONCE, self._concurrency - len(self._looks))
        batch = [job_id for job_id, _ in zip(self._intake, range(size))]
        for job_id in batch:
            del self._intake[job_id]
        if not self._intake:
            self._arrived.clear()
        return batch

    async def _claim(self, batch: list[UUID]) -> list[Claim]:
        """Claim what is due, buying only as much as the shared budget lets."""
        budget = 0
        if self.may_start:
            grant = await self._purchases.take(len(batch))
            budget = grant.granted
            if grant.granted < len(batch):
                loop = asyncio.get_running_loop()
                self._closed_until = loop.time() + grant.retry_after.total_seconds()
        spent = 0
        try:
            claims = await self._ledger.claim(batch, starts=budget)
            spent = sum(claim.is_fresh for claim in claims)
            return claims
        finally:
            if budget > spent:
                self._closed_until = 0.0
                await self._purchases.give_back(budget - spent)

    # -------------------------------------------------------------------------- looks

    def _begin(self, claim: Claim) -> None:
        task = asyncio.create_task(self._look(claim))
        self._looks[task] = claim
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._looks.pop(task, None)
        self._freed.set()

    async def _look(self, claim: Claim) -> None:
        next_look = await self._runner.advance(claim)
        if next_look is None or self._is_draining or next_look > TIMER_HORIZON:
            return
        self._remind(claim.job_id, next_look)

    def _remind(self, job_id: UUID, after: timedelta) -> None:
        """Look again by ourselves, to the moment; the watcher is only the safety net."""
        if (old := self._timers.pop(job_id, None)) is not None:
            old.cancel()
        loop = asyncio.get_running_loop()
        self._timers[job_id] = loop.call_later(
            after.total_seconds(), self._ring_timer, job_id
        )

    def _ring_timer(self, job_id: UUID) -> None:
        self._timers.pop(job_id, None)
        self.offer((job_id,))

    async def _renew_for_ever(self) -> None:
        """Keep the leases of looks under way; a look whose claim is gone is ended."""
        doubted: set[UUID] = set()
        while True:
            await asyncio.sleep(RENEW_EVERY.total_seconds())
            looks = dict(self._looks)
            if not looks:
                continue
            with contextlib.suppress(*DATABASE_TROUBLE):
                standing = await self._ledger.renew(list(looks.values()))
                gone = {c.token for c in looks.values()} - standing
                for task, claim in looks.items():
                    # Gone for the first time, it may just have settled, and be tidying up.
                    if claim.token in gone & doubted and not task.done():
                        log.warning("look.abandoned", job_id=str(claim.job_id))
                        task.cancel()
                doubted = gone
