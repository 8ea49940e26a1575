"""Short transactions around `job_service`: begin, do, commit; many callers share one.

The doors and the runner come here to have things written down.  Every method returns after
the commit.  A database that cannot be had is `Unavailable`, within `PATIENCE`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from uuid import UUID

from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.core.batching import Batcher
from app.core.database import DISCONNECTED, is_disconnect
from app.domain.access import Budget
from app.domain.errors import InProgress, NotFound, ServiceError, Unavailable
from app.domain.policy import Policy
from app.domain.state import JobState
from app.services import (
    file_locks,
    job_queries,
    job_service,
    news,
    repeats,
    submission,
    turns,
)
from app.services.job_queries import JobRecord
from app.services.job_records import Claim
from app.services.job_service import Change, Outcome
from app.services.news import Hint, Told
from app.services.repeats import Earlier, Once
from app.services.submission import Birth, NewJob
from app.services.turns import Started

PATIENCE = timedelta(seconds=1.7)  # callers are promised an answer within two seconds
CLAIM_PATIENCE = timedelta(seconds=5)
LEASE = timedelta(seconds=15)
MOST_AT_ONCE = 200  # rows in one transaction
_PAUSES = (0.02, 0.05, 0.1, 0.2, 0.4)  # seconds, while an equal request is accepted

_GONE = (DBAPIError, *DISCONNECTED)


@contextmanager
def _translated() -> Iterator[None]:
    """Turn the driver's ways of saying "gone" into `Unavailable`; pass the rest on."""
    try:
        yield
    except _GONE as error:
        if not is_disconnect(error):
            raise
        raise Unavailable("The database does not answer.") from error


@asynccontextmanager
async def _within(patience: timedelta) -> AsyncIterator[None]:
    """Give up after a while with `Unavailable`."""
    try:
        async with asyncio.timeout(patience.total_seconds()):
            yield
    except TimeoutError as error:
        raise Unavailable("The database does not answer in time.") from error


def _is_shared(error: BaseException) -> bool:
    """A database that is gone is everybody's trouble; a broken rule is one caller's."""
    return isinstance(error, Unavailable)


OnEnd = Callable[[JobState], None]


def _ignore_end(state: JobState) -> None:
    """Take no notice."""


class Ledger:
    """Where jobs are written down and looked up.  Safe to share within one event loop."""

    def __init__(
        self,
        engine: AsyncEngine,
        policy: Policy,
        *,
        on_end: OnEnd = _ignore_end,
        budget: Budget = Budget(),
    ) -> None:
        """`on_end(state)` is told of every job that finished here, after the commit.

        `budget` is what all jobs together may cost.
        """
        self.engine = engine
        self.policy = policy
        self.budget = budget
        self._on_end = on_end
        self._submits: Batcher[NewJob, Birth] = Batcher(
            self._submit, limit=MOST_AT_ONCE, lanes=2, is_shared=_is_shared
        )
        self._changes: Batcher[Change, Outcome] = Batcher(
            self._change, limit=MOST_AT_ONCE, is_shared=_is_shared
        )
        self._reads: Batcher[UUID, JobRecord] = Batcher(
            self._read, limit=MOST_AT_ONCE, lanes=2, is_shared=_is_shared
        )
        self._hints: Batcher[Hint, Told] = Batcher(
            self._hear, limit=MOST_AT_ONCE, is_shared=_is_shared
        )

    async def submit(self, job: NewJob) -> Birth:
        """Accept the job, together with whoever else submits now; say when it was born.

        Raises what forbids it (see `submission.submit`).  An equal request that is being
        accepted at this moment is waited for a little, then `InProgress`.
        """
        async with _within(PATIENCE):
            for pause in _PAUSES:
                with suppress(InProgress):
                    return await self._submits(job)
                await asyncio.sleep(pause)
            return await self._submits(job)

    async def earlier(self, owner: str, once: Once) -> Earlier | None:
        """Find the job an earlier equal request made; raise `KeyReused` for an unequal one."""
        async with _within(PATIENCE), self.reading() as conn:
            found = await repeats.find(conn, {(owner, once.key)})
        before = found.get((owner, once.key))
        heeded = repeats.heed(once, before) if before is not None else None
        if isinstance(heeded, Exception):
            raise heeded
        return heeded

    async def judge(self, *jobs: NewJob) -> None:
        """Raise what would forbid the jobs together at this moment; accept nothing."""
        async with _within(PATIENCE), self.reading() as conn:
            found = await submission.objection_to(conn, jobs, service=self.budget)
        if found is not None:
            raise found

    async def change(self, change: Change) -> Outcome:
        """Put the change through the gate; raise `NotFound` or `LostClaim` as it says."""
        async with _within(PATIENCE):
            return await self._changes(change)

    async def read(self, job_id: UUID, *, realm: str | None) -> JobRecord:
        """Read the job, together with whoever else reads now; raise `NotFound`.

        With a `realm`, a job of any other owner is as unknown as one that does not exist.
        """
        async with _within(PATIENCE):
            record = await self._reads(job_id)
        if realm not in (None, record.row.owner):
            raise NotFound("There is no such job.")
        return record

    async def count_pending(self, limit: int) -> int:
        """Count the jobs that wait to start, `limit` at most."""
        async with _within(PATIENCE), self.reading() as conn:
            return await job_queries.count_pending(conn, limit=limit)

    async def hint(self, hint: Hint) -> Told:
        """Take news of an attempt, together with whoever else brings some; see `news.hear`.

        Raises `NotFound` when the attempt does not exist or has another token.
        """
        try:
            async with _within(PATIENCE):
                return await self._hints(hint)
        except IntegrityError:
            # Among equal purchases another attempt has just become the owner.
            return Told()

    async def postpone(self, handles: Sequence[str], *, calm: timedelta) -> None:
        """Put off looks of jobs whose predictions were seen running: see `news.postpone`."""
        async with _within(CLAIM_PATIENCE), self.reading() as conn:
            await news.postpone(conn, handles, calm=calm)

    async def wake(self, handles: Sequence[str]) -> list[UUID]:
        """Make the jobs of these predictions due now: see `news.wake`."""
        async with _within(CLAIM_PATIENCE), self.transaction() as conn:
            return await news.wake(conn, handles)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """Open one short transaction, committed at the end; raise `Unavailable` for lost ones.

        Whether a commit whose answer was lost took place is not known; what is written here
        may therefore be repeated safely.
        """
        with _translated():
            async with self.engine.begin() as conn:
                yield conn

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """Open a connection without a transaction, for single reads."""
        with _translated():
            async with self.engine.connect() as conn:
                yield await conn.execution_options(isolation_level="AUTOCOMMIT")

    @asynccontextmanager
    async def removing(self, keys: Sequence[str]) -> AsyncIterator[list[str]]:
        """Give those of the files nobody has any more, and keep it so while inside."""
        if not keys:
            yield []
            return
        async with self.reading() as conn, file_locks.alone(conn, keys):
            yield await job_service.orphans_among(conn, keys)

    async def claim(self, job_ids: Sequence[UUID], *, starts: int) -> list[Claim]:
        """Claim what is due among the jobs: see `job_service.claim`."""
        async with _within(CLAIM_PATIENCE), self.transaction() as conn:
            claimed = await job_service.claim(
                conn, job_ids, lease=LEASE, starts=starts, policy=self.policy
            )
        for state in claimed.ended:
            self._on_end(state)
        return list(claimed.claims)

    async def start(self, limit: int) -> Started:
        """Claim up to `limit` pending jobs whose turn it is: see `turns.start`."""
        async with _within(CLAIM_PATIENCE), self.transaction() as conn:
            started = await turns.start(
                conn, limit=limit, lease=LEASE, policy=self.policy
            )
        for state in started.ended:
            self._on_end(state)
        return started

    async def looks_among(self, job_ids: Sequence[UUID]) -> list[UUID]:
        """Tell which of the jobs a claim would take, or end, without starting anything."""
        async with _within(CLAIM_PATIENCE), self.reading() as conn:
            return await job_queries.looks_among(conn, job_ids)

    async def renew(self, claims: Sequence[Claim]) -> set[UUID]:
        """Renew the leases of the claims; give the tokens that still stand."""
        async with self.transaction() as conn:
            return await job_service.renew(conn, claims, lease=LEASE)

    async def _submit(self, jobs: Sequence[NewJob]) -> Sequence[Birth | ServiceError]:
        async with _within(PATIENCE):
            try:
                return await self._submit_once(jobs)
            except Unavailable:
                # After a restart of PostgreSQL every pooled connection is dead, and the
                # first failure has cleared them out.  Ids are chosen, so this is harmless.
                return await self._submit_once(jobs, is_again=True)

    async def _submit_once(
        self, jobs: Sequence[NewJob], *, is_again: bool = False
    ) -> list[Birth | ServiceError]:
        async with self.transaction() as conn:
            return await submission.submit(
                conn, jobs, service=self.budget, is_again=is_again
            )

    async def _change(self, changes: Sequence[Change]) -> Sequence[Outcome | Exception]:
        # A silent connection must not hold everybody's lane; changes may be repeated.
        async with _within(PATIENCE), self.transaction() as conn:
            outcomes = await job_service.transition(conn, changes, policy=self.policy)
        for outcome in outcomes:
            if isinstance(outcome, Outcome) and outcome.is_end:
                self._on_end(outcome.after)
        return outcomes

    async def _hear(self, hints: Sequence[Hint]) -> Sequence[Told | Exception]:
        async with _within(PATIENCE):
            async with self.reading() as conn:
                known = await news.hear_known(conn, hints)
            rest = [hint for hint, told in zip(hints, known) if told is None]
            if not rest:
                return [told for told in known if told is not None]
            async with self.transaction() as conn:
                found = iter(await news.hear(conn, rest, policy=self.policy))
            return [next(found) if told is None else told for told in known]

    async def _read(self, job_ids: Sequence[UUID]) -> Sequence[JobRecord | Exception]:
        async with _within(PATIENCE):
            try:
                found = await self._read_once(job_ids)
            except Unavailable:
                found = await self._read_once(job_ids)
        missing = NotFound("There is no such job.")
        return [found.get(job_id, missing) for job_id in job_ids]

    async def _read_once(self, job_ids: Sequence[UUID]) -> dict[UUID, JobRecord]:
        async with self.reading() as conn:
            return await job_queries.find(conn, list(set(job_ids)))
