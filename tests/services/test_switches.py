"""Pausing the queue: nothing starts or runs out of time, and nothing slips through."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.domain.errors import Unavailable
from app.domain.events import GenerationFailed, Progressed, Started
from app.domain.state import Status
from app.services import audit, job_queries, job_service, switches, turns
from app.services.audit import Act
from app.services.ledger import Ledger
from app.services.pausing import Pausing
from app.services.switches import QueueState
from tests.support.jobs import FAILURE, LEASE, JobTable, new_job
from tests.support.waiting import wait_for_async

ACT = Act("somebody", "queue.paused", "queue", {"reason": "a test"})
MINUTE = timedelta(minutes=1)


async def pick(jobs: JobTable) -> turns.Started:
    async with jobs.engine.begin() as conn:
        return await turns.start(conn, limit=10, lease=LEASE, policy=jobs.policy)


# --------------------------------------------------------------------------- the claim


async def test_nothing_pending_is_claimed_while_paused(jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    assert await jobs.pause()
    (later,) = await jobs.submit()
    before = [await jobs.snapshot(one) for one in (job_id, later)]

    assert await jobs.claim(job_id, later) == []
    assert (await pick(jobs)).claims == []

    assert [await jobs.snapshot(one) for one in (job_id, later)] == before
    assert await jobs.resume()
    assert {claim.job_id for claim in await jobs.claim(job_id)} == {job_id}
    assert {claim.job_id for claim in (await pick(jobs)).claims} == {later}


async def test_jobs_under_way_are_looked_at_while_paused(jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    await jobs.look(job_id, Started("h-1"))
    await jobs.pause()

    outcome = await jobs.look(job_id, Progressed(0.5))

    assert outcome.after.progress == 0.5


async def test_an_attempt_that_was_sent_is_reconciled_while_paused(
    jobs: JobTable,
) -> None:
    (job_id,) = await jobs.submit()
    await jobs.claim_one(job_id)
    await jobs.pause()
    await jobs.make_due(job_id)

    (claim,) = await jobs.claim(job_id)

    assert not claim.is_fresh


async def test_what_fails_for_a_moment_waits_like_the_others(jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    await jobs.look(job_id, Started("h-1"))
    await jobs.pause()

    outcome = await jobs.look(job_id, GenerationFailed(FAILURE, is_transient=True))
    await jobs.make_due(job_id)

    assert outcome.after.status is Status.PENDING
    assert await jobs.claim(job_id) == []


async def test_a_pending_job_is_cancelled_while_paused(jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    await jobs.pause()

    outcome = await jobs.cancel(job_id)

    assert outcome.after.status is Status.CANCELLED


async def test_nobody_is_told_of_what_may_not_start(jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    (late,) = await jobs.submit()
    await jobs.expire(late)
    await jobs.pause()

    async with jobs.engine.connect() as conn:
        assert await job_queries.count_due_starts(conn, limit=10) == 0
        assert await job_queries.out_of_time(conn, limit=10) == []
        assert await job_queries.looks_among(conn, [job_id, late]) == []
    await jobs.resume()
    async with jobs.engine.connect() as conn:
        assert await job_queries.count_due_starts(conn, limit=10) == 2
        assert await job_queries.out_of_time(conn, limit=10) == [late]
        assert await job_queries.looks_among(conn, [job_id, late]) == [late]


# ----------------------------------------------------------------------------- deadlines


async def test_a_deadline_that_passes_during_the_pause_ends_nothing(
    jobs: JobTable,
) -> None:
    (job_id,) = await jobs.submit(new_job(deadline=MINUTE))
    await jobs.pause()
    await jobs.age(10 * MINUTE)

    await jobs.claim(job_id)
    assert (await jobs.state(job_id)).status is Status.PENDING

    await jobs.resume()
    claim = await jobs.claim_one(job_id)
    left = claim.state.deadline_at - claim.now
    assert MINUTE - timedelta(seconds=10) < left <= MINUTE


async def test_a_job_is_given_back_what_it_waited_and_no_more(jobs: JobTable) -> None:
    (early,) = await jobs.submit(new_job(deadline=10 * MINUTE))
    (under_way,) = await jobs.submit(new_job(deadline=10 * MINUTE))
    await jobs.look(under_way, Started("h-1"))
    await jobs.pause()
    await jobs.age(4 * MINUTE)
    (late,) = await jobs.submit(new_job(deadline=10 * MINUTE))
    await jobs.age(2 * MINUTE)
    before = {one: await jobs.state(one) for one in (early, late, under_way)}

    resumed = await jobs.resume()

    moved = {
        one: (await jobs.state(one)).deadline_at - state.deadline_at
        for one, state in before.items()
    }
    assert resumed and resumed.jobs == 2
    assert resumed.length - moved[early] < timedelta(seconds=1)
    assert 2 * MINUTE <= moved[late] < 2.5 * MINUTE
    assert moved[under_way] == timedelta(0)


async def test_a_job_out_of_time_before_the_pause_ends_after_it(jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    await jobs.expire(job_id)
    await jobs.pause()
    await jobs.claim(job_id)
    assert (await jobs.state(job_id)).status is Status.PENDING

    await jobs.resume()
    await jobs.claim(job_id)

    assert (await jobs.state(job_id)).status is Status.FAILED


async def test_more_jobs_than_one_statement_takes_are_all_pushed(
    jobs: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switches, "BATCH", 2)
    ids = await jobs.submit(*(new_job(deadline=MINUTE) for _ in range(5)))
    await jobs.pause()
    await jobs.age(10 * MINUTE)

    resumed = await jobs.resume()

    assert resumed and resumed.jobs == 5
    assert len(await jobs.claim(*ids)) == 5


# ------------------------------------------------------------------------- twice, together


async def test_pausing_twice_and_resuming_twice_change_nothing(jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    assert await jobs.resume() is None
    assert await jobs.pause()
    first = await _read(jobs)
    assert not await jobs.pause()
    assert await _read(jobs) == first
    assert first.is_paused and first.reason == "a test" and first.by == "somebody"

    deadline = (await jobs.state(job_id)).deadline_at
    assert await jobs.resume()
    pushed = (await jobs.state(job_id)).deadline_at
    assert pushed > deadline
    assert await jobs.resume() is None
    assert (await jobs.state(job_id)).deadline_at == pushed
    assert await _read(jobs) == QueueState()


async def test_a_pause_waits_for_the_claim_it_meets(jobs: JobTable) -> None:
    """Or a job would be started after the pause was answered."""
    (job_id,) = await jobs.submit()
    async with jobs.engine.connect() as conn:
        await _claim(conn, jobs, job_id)
        pausing = asyncio.create_task(jobs.pause())
        await _until_somebody_waits(jobs.engine)
        assert not pausing.done()
        await conn.commit()

    assert await pausing
    assert (await jobs.state(job_id)).status is Status.PROCESSING


async def test_a_claim_that_meets_a_pause_sees_it(jobs: JobTable) -> None:
    """Also one whose statement began before the pause was committed."""
    (job_id,) = await jobs.submit()
    async with jobs.engine.connect() as conn:
        await switches.pause(conn, reason="a test", by="somebody")
        claiming = asyncio.create_task(jobs.claim(job_id))
        await _until_somebody_waits(jobs.engine)
        await conn.commit()

    assert await claiming == []
    assert (await jobs.state(job_id)).status is Status.PENDING


async def test_a_resume_that_dies_leaves_everything_as_it_was(jobs: JobTable) -> None:
    (job_id,) = await jobs.submit()
    await jobs.pause()
    before = await jobs.snapshot(job_id)
    async with jobs.engine.connect() as conn:
        await switches.resume(conn, by="somebody")
        await conn.rollback()

    assert await jobs.snapshot(job_id) == before
    assert (await _read(jobs)).is_paused


async def test_claims_cancels_pauses_and_resumes_never_lock_each_other_out(
    jobs: JobTable,
) -> None:
    ids = await jobs.submit(*(new_job() for _ in range(40)))

    async def toggle() -> None:
        for _ in range(8):
            await jobs.pause()
            await jobs.resume()

    async def claim(some: list[UUID]) -> None:
        for job_id in some:
            await jobs.claim(job_id, *ids[:5])
            await pick(jobs)

    async def cancel(some: list[UUID]) -> None:
        for job_id in some:
            await jobs.cancel(job_id)

    # A deadlock would end one of them with an error.
    async with asyncio.timeout(60):
        await asyncio.gather(
            *(toggle(), toggle(), claim(ids), claim(ids[::-1]), cancel(ids[::3]))
        )
    assert not (await _read(jobs)).is_paused


# ---------------------------------------------------------------------- as processes use it


async def test_it_is_remembered_for_a_second(jobs: JobTable) -> None:
    clock = [0.0]
    pausing = Pausing(Ledger(jobs.engine, jobs.policy), clock=lambda: clock[0])
    assert not await pausing.is_paused()
    await jobs.pause()

    assert not await pausing.is_paused()
    clock[0] += 1
    assert await pausing.is_paused()


async def test_whoever_throws_the_switch_knows_at_once(jobs: JobTable) -> None:
    pausing = Pausing(Ledger(jobs.engine, jobs.policy), clock=lambda: 0.0)

    state = await pausing.pause(ACT, reason="a test")
    assert state.is_paused and await pausing.is_paused()
    state = await pausing.resume(ACT)
    assert not state.is_paused and not await pausing.is_paused()


async def test_only_what_changed_something_is_audited(jobs: JobTable) -> None:
    pausing = Pausing(Ledger(jobs.engine, jobs.policy))
    await jobs.submit()
    resumed = Act("somebody", "queue.resumed", "queue", {})
    for _ in range(2):
        await pausing.pause(ACT, reason="a test")
    for _ in range(2):
        await pausing.resume(resumed)

    async with jobs.engine.connect() as conn:
        rows = list(await audit.page(conn, before=None, limit=10))
    assert [row.action for row in rows] == ["queue.resumed", "queue.paused"]
    assert rows[0].details["jobs"] == 1
    assert rows[0].details["paused_seconds"] >= 0
    assert rows[1].details == {"reason": "a test"}


async def test_without_a_database_the_last_known_state_holds(
    jobs: JobTable, settings: Callable[..., object]
) -> None:
    class Away(Ledger):
        def reading(self) -> object:  # type: ignore[override]
            raise Unavailable("The database does not answer.")

    clock = [0.0]
    away = Pausing(Away(jobs.engine, jobs.policy), clock=lambda: clock[0])
    await away.pause(ACT, reason="a test")
    clock[0] += 5

    assert await away.is_paused()


async def _read(jobs: JobTable) -> QueueState:
    async with jobs.engine.connect() as conn:
        return await switches.read(conn)


async def _claim(conn: AsyncConnection, jobs: JobTable, job_id: UUID) -> None:
    claimed = await job_service.claim(
        conn, [job_id], lease=LEASE, starts=1, policy=jobs.policy
    )
    assert claimed.claims


async def _until_somebody_waits(engine: AsyncEngine) -> None:
    query = (
        select(func.count()).select_from(text("pg_locks")).where(text("NOT granted"))
    )

    async def somebody_waits() -> bool:
        async with engine.connect() as conn:
            return bool(await conn.scalar(query))

    await wait_for_async(somebody_waits, within=10, what="somebody waits for a lock")
