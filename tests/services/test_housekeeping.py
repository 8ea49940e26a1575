import asyncio

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.domain.policy import Policy
from app.services import housekeeping, submission
from app.services.housekeeping import ForgetSubmissions
from app.services.ledger import Ledger
from app.services.repeats import Once
from app.services.submission import Birth
from tests.support.jobs import JobTable, new_job

_AGE = text("UPDATE submissions SET created_at = created_at - interval '25 hours'")
_COUNT = text("SELECT count(*) FROM submissions")


async def test_keys_are_forgotten_after_a_day_and_not_before(
    engine: AsyncEngine, jobs: JobTable
) -> None:
    duty = ForgetSubmissions(Ledger(engine, Policy()))
    await jobs.submit(*(new_job(once=Once(f"old-{n}", "f")) for n in range(3)))
    async with engine.begin() as conn:
        await conn.execute(_AGE)
    await jobs.submit(new_job(once=Once("young", "f")))

    rest = await duty.perform()

    assert rest == housekeeping.REST
    async with engine.connect() as conn:
        assert await conn.scalar(_COUNT) == 1
        assert await conn.scalar(text("SELECT key FROM submissions")) == "young"


async def test_many_are_forgotten_in_portions(
    engine: AsyncEngine, jobs: JobTable
) -> None:
    duty = ForgetSubmissions(Ledger(engine, Policy()))
    many = housekeeping.KEYS_AT_ONCE + 1
    await jobs.submit(*(new_job(once=Once(f"old-{n}", "f")) for n in range(many)))
    async with engine.begin() as conn:
        await conn.execute(_AGE)

    assert await duty.perform() == housekeeping.REST_BETWEEN_BATCHES
    assert await duty.perform() == housekeeping.REST
    async with engine.connect() as conn:
        assert await conn.scalar(_COUNT) == 0


async def test_a_key_that_is_used_again_at_that_moment_is_not_forgotten(
    engine: AsyncEngine, jobs: JobTable
) -> None:
    duty = ForgetSubmissions(Ledger(engine, Policy()))
    await jobs.submit(new_job(once=Once("old", "f")))
    async with engine.begin() as conn:
        await conn.execute(_AGE)

    again = new_job(once=Once("old", "f"))
    async with engine.begin() as conn:
        await submission.submit(conn, [again])
        forgetting = asyncio.create_task(duty.perform())
        await asyncio.wait((forgetting,), timeout=0.5)
    await forgetting

    (repeat,) = await jobs.try_submit(new_job(once=Once("old", "f")))
    assert isinstance(repeat, Birth)
    assert (repeat.job_id, repeat.is_repeat) == (again.id, True)
