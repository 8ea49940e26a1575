from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.domain.policy import Policy
from app.services import housekeeping
from app.services.housekeeping import ForgetSubmissions
from app.services.ledger import Ledger
from app.services.repeats import Once
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
