import asyncio

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from app.domain.errors import Unavailable
from app.domain.policy import Policy
from app.services.backlog import Backlog
from app.services.ledger import Ledger
from tests.support.jobs import JobTable, new_job


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def backlog(engine: AsyncEngine, clock: Clock) -> Backlog:
    return Backlog(Ledger(engine, Policy()), 5, clock=clock)


async def test_as_many_are_let_in_as_may_wait(backlog: Backlog) -> None:
    for _ in range(5):
        await backlog.admit()

    with pytest.raises(Unavailable) as refused:
        await backlog.admit()

    assert refused.value.code == "queue_full"
    assert refused.value.retry_after is not None


async def test_jobs_of_other_processes_are_seen_a_second_later(
    backlog: Backlog, jobs: JobTable, clock: Clock
) -> None:
    assert await backlog.pending() == 0
    ids = await jobs.submit(*(new_job() for _ in range(8)))

    assert await backlog.pending() == 0
    clock.now += 1.1
    assert await backlog.pending() == 5  # more do not matter
    with pytest.raises(Unavailable):
        await backlog.admit()
    for job_id in ids[:4]:
        await jobs.cancel(job_id)
    clock.now += 1.1
    await backlog.admit()


async def test_jobs_under_way_do_not_wait(
    backlog: Backlog, jobs: JobTable, clock: Clock
) -> None:
    ids = await jobs.submit(*(new_job() for _ in range(5)))
    await jobs.claim(*ids)

    assert await backlog.pending() == 0


async def test_many_at_once_count_once(
    backlog: Backlog, engine: AsyncEngine, jobs: JobTable
) -> None:
    await jobs.submit(*(new_job() for _ in range(3)))

    assert set(await asyncio.gather(*(backlog.pending() for _ in range(20)))) == {3}
