"""Requests that are sent again, where several processes accept them at the same moment."""

import asyncio
from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
from pydantic import SecretStr
from sqlalchemy.ext.asyncio import AsyncEngine

from app.core.database import open_engine
from app.domain.errors import InProgress
from app.domain.policy import Policy
from app.services import submission
from app.services.ledger import Ledger
from app.services.repeats import Kind, Once
from app.services.submission import Birth, NewJob
from tests.support.jobs import JobTable, new_job


@pytest.fixture
async def ledgers(
    database_url: str, engine: AsyncEngine
) -> AsyncIterator[list[Ledger]]:
    """Two processes' worth of connections to one database."""
    other = open_engine(SecretStr(database_url), name="other", pool_size=4)
    yield [Ledger(one, Policy()) for one in (engine, other)]
    await other.dispose()


def _sent(kind: Kind) -> NewJob:
    return new_job(once=Once("generate retried:f", "f", kind))


async def test_equal_first_tries_at_once_are_jobs_each(ledgers: list[Ledger]) -> None:
    calls = (ledgers[n % 2].submit(_sent(Kind.FIRST)) for n in range(300))

    births = await asyncio.gather(*calls)

    assert len({birth.job_id for birth in births}) == 300
    assert not any(birth.is_repeat for birth in births)


async def test_a_first_try_does_not_wait_for_an_equal_one(
    engine: AsyncEngine, jobs: JobTable
) -> None:
    first, other, later = (_sent(Kind.FIRST), _sent(Kind.FIRST), _sent(Kind.LATER))
    async with engine.begin() as conn, engine.begin() as meanwhile:
        await submission.submit(conn, [first])
        writing = asyncio.create_task(submission.submit(meanwhile, [other]))
        await asyncio.wait((writing,), timeout=0.3)

        # Whoever comes after both must not overtake either.
        (refused,) = await jobs.try_submit(later)

        assert isinstance(refused, InProgress)
        await conn.commit()
        (born,) = await writing
        assert isinstance(born, Birth) and born.job_id == other.id
    (joined,) = await jobs.try_submit(later)
    assert isinstance(joined, Birth)
    assert (joined.job_id, joined.is_repeat) == (other.id, True)


async def test_one_of_many_keyed_requests_at_once_makes_a_job(
    ledgers: list[Ledger],
) -> None:
    key = str(uuid4())
    new = [new_job(once=Once(key, "f")) for _ in range(60)]

    calls = (ledgers[n % 2].submit(job) for n, job in enumerate(new))
    births = await asyncio.gather(*calls)

    assert len({birth.job_id for birth in births}) == 1
    assert sum(not birth.is_repeat for birth in births) == 1
