"""Jobs for tests: a factory, and every verb of `job_service` in a transaction of its own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import Row, Table, delete, func, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from uuid_utils.compat import uuid7

from app.domain import journal
from app.domain.access import Budget
from app.domain.errors import ServiceError
from app.domain.events import Event
from app.domain.generation import Failure, GenerationRequest
from app.domain.policy import Policy
from app.domain.state import Attempt, AttemptState, JobState
from app.services import job_service, news, submission, switches
from app.services.job_records import (
    ASSETS,
    ATTEMPTS,
    EVENTS,
    JOBS,
    SELECT_STATE,
    Claim,
    StoredOutput,
    read_state,
)
from app.services.job_service import Change, Hold, Outcome
from app.services.submission import Birth, NewJob
from app.services.news import Hint, Told
from app.services.switches import SWITCHES, Resumed

LEASE = timedelta(seconds=30)
FAILURE = Failure("bad_weather", "The weather was bad.", retryable=True)

_seeds = itertools.count(1)


def new_job(**changes: Any) -> NewJob:
    """Make a job to submit; every one has an input of its own."""
    values: dict[str, Any] = {
        "id": uuid7(),
        "request": GenerationRequest(
            "acme/painter", {"prompt": "a lighthouse", "seed": next(_seeds)}
        ),
        "provider": "replicate",
        "prompt": "a lighthouse",
        "num_outputs": 1,
        "priority": 0,
        "deadline": timedelta(minutes=15),
        "metadata": {},
    }
    return NewJob(**(values | changes))


def stored_output(index: int = 0, *, digest: str = "ab" * 32) -> StoredOutput:
    """Make a file as the store would report it."""
    return StoredOutput(
        index=index,
        key=f"{digest[:2]}/{digest}.png",
        sha256=digest,
        content_type="image/png",
        size_bytes=1234,
        width=64,
        height=48,
    )


class JobTable:
    """The jobs of one database, as a test wants to drive them.  Every verb commits."""

    def __init__(self, engine: AsyncEngine, policy: Policy = Policy()) -> None:
        self.engine = engine
        self.policy = policy

    # -- verbs ---------------------------------------------------------------------------

    async def submit(self, *jobs: NewJob) -> list[UUID]:
        """Accept the jobs, one of its own making when none is given; give their ids."""
        accepted = jobs or (new_job(),)
        for answer in await self.try_submit(*accepted):
            if isinstance(answer, Exception):
                raise answer
        return [job.id for job in accepted]

    async def try_submit(
        self, *jobs: NewJob, service: Budget = Budget()
    ) -> list[Birth | ServiceError]:
        """Submit the jobs; give what became of each."""
        async with self.engine.begin() as conn:
            return await submission.submit(conn, jobs, service=service)

    async def claim(
        self, *job_ids: UUID, lease: timedelta = LEASE, starts: int = 1000
    ) -> list[Claim]:
        """Claim what may be claimed of the jobs."""
        async with self.engine.begin() as conn:
            claimed = await job_service.claim(
                conn, job_ids, lease=lease, starts=starts, policy=self.policy
            )
        return list(claimed.claims)

    async def claim_one(self, job_id: UUID, *, lease: timedelta = LEASE) -> Claim:
        """Claim the job; it must be free and due."""
        (claim,) = await self.claim(job_id, lease=lease)
        return claim

    async def renew(self, *claims: Claim, lease: timedelta = LEASE) -> set[UUID]:
        """Push the lease of the claims."""
        async with self.engine.begin() as conn:
            return await job_service.renew(conn, claims, lease=lease)

    async def transition(self, *changes: Change) -> list[Outcome | Exception]:
        """Put the changes through the gate in one transaction."""
        async with self.engine.begin() as conn:
            return await job_service.transition(conn, changes, policy=self.policy)

    async def settle(
        self,
        claim: Claim,
        event: Event,
        *,
        outputs: Sequence[StoredOutput] = (),
        cost_usd: Decimal | None = None,
    ) -> Outcome:
        """End the look with an event.  Raise what the gate answers instead of an outcome."""
        change = Change(
            claim.job_id, event, Hold.RELEASE, claim.token, tuple(outputs), cost_usd
        )
        return _believe(await self.transition(change))

    async def record(self, claim: Claim, event: Event) -> Outcome:
        """Write an event down in the middle of a look."""
        change = Change(claim.job_id, event, Hold.KEEP, claim.token)
        return _believe(await self.transition(change))

    async def tell(self, job_id: UUID, event: Event) -> Outcome:
        """Write down an event that comes from outside any look."""
        return _believe(await self.transition(Change(job_id, event)))

    async def look(self, job_id: UUID, *events: Event) -> Outcome:
        """Claim the job, when due or not, and settle with each event in turn."""
        for event in events:
            await self.make_due(job_id)
            outcome = await self.settle(await self.claim_one(job_id), event)
        return outcome

    async def hear(
        self,
        job_id: UUID,
        handle: str,
        *,
        number: int = 1,
        is_over: bool = False,
        is_certain: bool = True,
    ) -> Told | Exception:
        """Take a hint about an attempt of the job."""
        row = (await self.attempts(job_id))[number - 1]
        hint = Hint(row.id, row.token, handle, is_over, is_certain)
        async with self.engine.begin() as conn:
            (told,) = await news.hear(conn, [hint], policy=self.policy)
        return told

    async def cancel(self, job_id: UUID) -> Outcome:
        """Ask for the end of the job."""
        async with self.engine.begin() as conn:
            return await job_service.cancel(conn, job_id, policy=self.policy)

    async def pause(self) -> bool:
        """Pause the queue; tell whether it was running."""
        async with self.engine.begin() as conn:
            return await switches.pause(conn, reason="a test", by="somebody")

    async def resume(self) -> Resumed | None:
        """Let the queue go on."""
        async with self.engine.begin() as conn:
            return await switches.resume(conn, by="somebody")

    # -- time ----------------------------------------------------------------------------

    async def age(self, by: timedelta, *job_ids: UUID) -> None:
        """Move the jobs (all when none is named) into the past, with all their moments.

        With all of them, a pause began earlier, too.
        """
        async with self.engine.begin() as conn:
            if not job_ids:
                earlier = {"changed_at": SWITCHES.c.changed_at - by}
                await conn.execute(update(SWITCHES).values(earlier))
            for table, owner, names in _MOMENTS:
                values = {name: table.c[name] - by for name in names}
                statement = update(table).values(values)
                if job_ids:
                    statement = statement.where(table.c[owner].in_(job_ids))
                await conn.execute(statement)

    async def make_due(self, *job_ids: UUID) -> None:
        """Make the live ones of the jobs due now: a lease runs out, a delay is over."""
        async with self.engine.begin() as conn:
            await conn.execute(
                update(JOBS)
                .where(JOBS.c.id.in_(job_ids), JOBS.c.due_at.is_not(None))
                .values(due_at=func.now())
            )

    async def expire(self, *job_ids: UUID) -> None:
        """Let the deadline of the jobs pass."""
        await self.age(timedelta(minutes=20), *job_ids)

    # -- what is stored ------------------------------------------------------------------

    async def row(self, job_id: UUID) -> Row[Any]:
        """Read the job's row, with its latest attempt and the database's clock."""
        async with self.engine.connect() as conn:
            return (await conn.execute(SELECT_STATE, {"ids": [job_id]})).one()

    async def state(self, job_id: UUID) -> JobState:
        """Read the job's state."""
        return read_state(await self.row(job_id))

    async def attempts(self, job_id: UUID) -> list[Row[Any]]:
        """Read the job's attempts, first one first."""
        return await self._all(ATTEMPTS, job_id, ATTEMPTS.c.number)

    async def events(self, job_id: UUID) -> list[Row[Any]]:
        """Read the job's history, birth included."""
        return await self._all(EVENTS, job_id, EVENTS.c.version)

    async def assets(self, job_id: UUID) -> list[Row[Any]]:
        """Read the job's files."""
        return await self._all(ASSETS, job_id, ASSETS.c.index)

    async def replayed(self, job_id: UUID) -> JobState:
        """Fold the job's history over its birth.

        The deadline is the job's own: pauses of the queue move it, and are no job's history.
        """
        birth, *history = await self.events(job_id)
        assert birth.name == journal.SUBMITTED
        deadline = (await self.state(job_id)).deadline_at - birth.at
        assert deadline >= timedelta(seconds=birth.data["deadline"])
        return journal.replay(
            birth.at,
            deadline,
            [(journal.revive(event.name, event.data), event.at) for event in history],
            self.policy,
            warnings=tuple(birth.data.get("warnings", ())),
        )

    async def attempt_values(self, job_id: UUID) -> list[Attempt]:
        """Read the job's attempts as the domain sees them."""
        return [
            Attempt(row.number, AttemptState(row.state), row.sent_at, row.handle)
            for row in await self.attempts(job_id)
        ]

    async def due(self) -> list[UUID]:
        """Name all jobs that are due."""
        async with self.engine.connect() as conn:
            query = select(JOBS.c.id).where(JOBS.c.due_at <= func.clock_timestamp())
            return list((await conn.execute(query.order_by(JOBS.c.id))).scalars())

    async def next_due(self) -> datetime | None:
        """Tell when the first of all live jobs is due."""
        async with self.engine.connect() as conn:
            return await conn.scalar(select(func.min(JOBS.c.due_at)))

    async def handles(self) -> set[str]:
        """Name the predictions that belong to an attempt."""
        async with self.engine.connect() as conn:
            query = select(ATTEMPTS.c.handle).where(ATTEMPTS.c.handle.is_not(None))
            return set((await conn.execute(query)).scalars())

    async def wipe(self) -> None:
        """Remove all jobs."""
        async with self.engine.begin() as conn:
            await conn.execute(delete(JOBS))

    async def snapshot(self, job_id: UUID) -> dict[str, list[tuple[Any, ...]]]:
        """Read everything stored about the job, to be compared with itself later."""
        async with self.engine.connect() as conn:
            return await snapshot(conn, job_id)

    async def _all(self, table: Table, job_id: UUID, order: Any) -> list[Row[Any]]:
        statement = select(table).where(table.c.job_id == job_id).order_by(order)
        async with self.engine.connect() as conn:
            return list((await conn.execute(statement)).all())


async def snapshot(
    conn: AsyncConnection, job_id: UUID
) -> dict[str, list[tuple[Any, ...]]]:
    """Read every row of every table that belongs to the job."""
    found = {}
    for table, owner in (
        *((JOBS, "id"), (ATTEMPTS, "job_id"), (EVENTS, "job_id")),
        (ASSETS, "job_id"),
    ):
        statement = select(table).where(table.c[owner] == job_id)
        rows = await conn.execute(statement.order_by(text("1, 2")))
        found[table.name] = [tuple(row) for row in rows]
    return found


def timeless(state: JobState) -> JobState:
    """Blank the scheduling, which a replay does not give back."""
    return replace(
        state,
        due_at=None,
        look_failures=0,
        silent_looks=0,
        is_claimed=False,
        has_news=False,
    )


def _believe(outcomes: list[Outcome | Exception]) -> Outcome:
    (outcome,) = outcomes
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


_MOMENTS: tuple[tuple[Table, str, tuple[str, ...]], ...] = (
    (
        *(JOBS, "id"),
        (
            *("due_at", "deadline_at", "created_at"),
            *("started_at", "generated_at", "completed_at"),
        ),
    ),
    (ATTEMPTS, "job_id", ("sent_at", "closed_at", "cancel_at")),
    (EVENTS, "job_id", ("at",)),
    (ASSETS, "job_id", ("created_at",)),
)
