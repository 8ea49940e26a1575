"""The worker's loop: takes job ids in, claims in batches, looks at many jobs at once.

    bells, watcher, timers ──offer──▶ intake ──claim──▶ looks (≤ concurrency) ──▶ timers
                                         └──sift──▶ starts, each in its turn ──▶ looks

While starts are scarce (see `starts`), pending jobs in the intake are left to the turns.  One
event loop owns everything that waits.  An id that is offered and dropped, claimed and
lost, or forgotten by a dying process costs time, never correctness: the row stays due.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Iterator
from datetime import timedelta
from typing import Protocol
from uuid import UUID

import structlog
from sqlalchemy.exc import DBAPIError

from app.core.patience import end
from app.domain.errors import Unavailable
from app.services.job_records import Claim
from app.services.ledger import CLAIM_PATIENCE, LEASE, MOST_AT_ONCE, Ledger
from app.services.starts import Purchases, Starts, never

log = structlog.get_logger("app.engine")

INTAKE_LIMIT = (
    20_000  # ids waiting for a claim; more are dropped, the watcher finds them
)
TIMER_HORIZON = timedelta(seconds=30)  # looks further ahead are left to the watcher
RENEW_EVERY = LEASE / 3
DATABASE_REST = timedelta(milliseconds=500)
LONGEST_CLAIM = CLAIM_PATIENCE * 2

# What the loops outlive: a database that is gone, or that refuses the statement (its tables
# are not there yet; it lost a deadlock).  The rows stay due.
DATABASE_TROUBLE = (Unavailable, DBAPIError)


class Runner(Protocol):
    """What looks at one job: `JobRunner`."""

    async def advance(self, claim: Claim) -> timedelta | None:
        """Look, settle, and say how soon to look again."""
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
        is_paused: Callable[[], Awaitable[bool]] = never,
    ) -> None:
        """`is_paused` tells that nothing may start at the moment; see `starts`."""
        self._ledger = ledger
        self._runner = runner
        self._concurrency = concurrency
        self._intake: dict[UUID, None] = {}  # ordered, without doubles
        self._sifted: dict[UUID, None] = {}  # taken from there, and no starts
        self._arrived = asyncio.Event()
        self._freed = asyncio.Event()
        self._stirred = asyncio.Event()
        self._starts = Starts(ledger, purchases, self._stirred.set, is_paused)
        self._reserved = 0  # places of claims on their way
        self._looks: dict[asyncio.Task[None], Claim] = {}
        self._timers: dict[UUID, asyncio.TimerHandle] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._is_draining = False

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
        waiting = len(self._intake) + len(self._sifted)
        return max(self._concurrency * 2 - waiting, 0)

    @property
    def may_start(self) -> bool:
        """Tell whether the budget of purchases let one through when last asked."""
        return self._starts.may_start

    @property
    def is_seeking(self) -> bool:
        """Tell whether pending jobs are being started in turn, without being told of."""
        return self._starts.are_scarce

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

    def seek(self, count: int) -> None:
        """Start pending jobs in turn: somebody saw about so many waiting."""
        if not self._is_draining:
            self._starts.seek(count)

    # --------------------------------------------------------------------------- life

    def start(self) -> None:
        """Start serving, in the running loop."""
        self._tasks = [
            asyncio.create_task(self._serve(), name="engine"),
            asyncio.create_task(self._start_in_turn(), name="starts"),
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
        self._sifted.clear()
        # A claim on its way is waited for: cut off, it would hold its jobs for a lease.
        for event in (self._arrived, self._freed, self._stirred):
            event.set()
        await asyncio.wait(self._tasks[:2], timeout=LONGEST_CLAIM.total_seconds())
        self._starts.stop()
        if self._looks:
            log.info("engine.draining", in_flight=len(self._looks))
            await asyncio.wait(self._looks, timeout=patience.total_seconds())
        left = list(self._looks)
        await end(*left, *self._tasks)
        log.info("engine.drained", cut_off=len(left))

    # -------------------------------------------------------------------------- claims

    async def _serve(self) -> None:
        while not self._is_draining:
            await self._arrived.wait()
            with _outliving() as outlived:
                await self._take_in()
            if outlived:
                # The watcher offers them again when the database is back.
                await asyncio.sleep(DATABASE_REST.total_seconds())

    async def _take_in(self) -> None:
        waiting = len(self._intake) + len(self._sifted)
        if waiting > min(MOST_AT_ONCE, self._free):
            self._starts.ration()
        if self._intake and self._starts.are_scarce:
            await self._sift()
        batch = self._next_batch(min(MOST_AT_ONCE, self._free))
        if batch:
            with self._reserving(len(batch)):
                for claim in await self._starts.claim(batch):
                    self._begin(claim)
        elif self._sifted:
            self._freed.clear()
            await self._freed.wait()

    async def _sift(self) -> None:
        """Keep what is no start; starts are rung for by turns, not by name."""
        ids = _pop(self._intake, MOST_AT_ONCE)
        kept = await self._ledger.looks_among(ids)
        if not self._is_draining:
            self._sifted.update(dict.fromkeys(kept))
            self._starts.seek(len(ids) - len(kept))

    def _next_batch(self, size: int) -> list[UUID]:
        batch = _pop(self._sifted, size)
        if not self._starts.are_scarce:
            batch += _pop(self._intake, size - len(batch))
        if not self._intake and not self._sifted:
            self._arrived.clear()
        return batch

    async def _start_in_turn(self) -> None:
        while not self._is_draining:
            await self._stirred.wait()
            self._stirred.clear()
            with _outliving() as outlived:
                while limit := self._places_for_starts():
                    with self._reserving(limit):
                        for claim in await self._starts.claim_in_turn(limit):
                            self._begin(claim)
            if outlived:
                await asyncio.sleep(DATABASE_REST.total_seconds())
                self._stirred.set()

    def _places_for_starts(self) -> int:
        """Count what looks leave free: they come before starts, for they are paid for."""
        if self._is_draining:
            return 0
        free = self._free - len(self._sifted)
        return max(min(free, self._starts.wanted), 0)

    @property
    def _free(self) -> int:
        """How many more looks may begin."""
        return self._concurrency - len(self._looks) - self._reserved

    @contextlib.contextmanager
    def _reserving(self, places: int) -> Iterator[None]:
        """Keep places free for what is being claimed."""
        self._reserved += places
        try:
            yield
        finally:
            self._reserved -= places
            self._wake()

    def _wake(self) -> None:
        """Tell those who wait for a free place."""
        self._freed.set()
        self._stirred.set()

    # -------------------------------------------------------------------------- looks

    def _begin(self, claim: Claim) -> None:
        task = asyncio.create_task(self._look(claim))
        self._looks[task] = claim
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._looks.pop(task, None)
        self._wake()

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


def _pop(ids: dict[UUID, None], count: int) -> list[UUID]:
    """Take the first ids out."""
    taken = [job_id for job_id, _ in zip(ids, range(count))]
    for job_id in taken:
        del ids[job_id]
    return taken


@contextlib.contextmanager
def _outliving() -> Iterator[list[Exception]]:
    """Outlive trouble with the database, and tell of it."""
    met: list[Exception] = []
    try:
        yield met
    except DATABASE_TROUBLE as error:
        log.warning("claim.failed", error=type(error).__name__)
        met.append(error)
