"""Every way in which a job ends writes what it held and cost, once."""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from decimal import Decimal
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.domain.events import (
    CancelRequested,
    Expired,
    GenerationCancelled,
    GenerationFailed,
    Generated,
    LookFailed,
    NotFound,
    OutcomeUnknown,
    OutputFailed,
    Refused,
    Started,
    Stored,
)
from app.domain.generation import RefusalKind
from app.domain.lifecycle import overdue
from app.services.ledger import Ledger
from tests.support.jobs import FAILURE, JobTable, new_job, stored_output
from tests.support.money import account, check_books

HELD = Decimal("0.5")
COST = Decimal("0.125")
FREE = Decimal(0)

Way = Callable[[JobTable, UUID], Awaitable[object]]


async def _bought(jobs: JobTable, job_id: UUID) -> None:
    await jobs.look(job_id, Started(str(job_id)))


async def _cancelled_while_pending(jobs: JobTable, job_id: UUID) -> None:
    await jobs.cancel(job_id)


async def _cancelled_while_it_ran(jobs: JobTable, job_id: UUID) -> None:
    await _bought(jobs, job_id)
    await jobs.tell(job_id, CancelRequested())
    await jobs.make_due(job_id)
    claim = await jobs.claim_one(job_id)
    await jobs.settle(claim, GenerationCancelled(False), cost_usd=COST)


async def _cancelled_before_another_try(jobs: JobTable, job_id: UUID) -> None:
    claim = await jobs.claim_one(job_id)
    await jobs.tell(job_id, CancelRequested())
    await jobs.settle(claim, Refused(RefusalKind.TRANSIENT, FAILURE))


async def _expired_while_pending(jobs: JobTable, job_id: UUID) -> None:
    await jobs.expire(job_id)
    await jobs.make_due(job_id)
    assert await jobs.claim(job_id) == []


async def _expired_in_a_pick(jobs: JobTable, job_id: UUID) -> None:
    await jobs.expire(job_id)
    await jobs.make_due(job_id)
    ledger = Ledger(jobs.engine, jobs.policy)
    assert not (await ledger.start(5)).claims, "jobs out of time are no starts"
    await ledger.claim([job_id], starts=0)


async def _expired_while_it_ran(jobs: JobTable, job_id: UUID) -> None:
    await _bought(jobs, job_id)
    await jobs.expire(job_id)
    await jobs.look(job_id, Expired())


async def _long_overdue(jobs: JobTable, job_id: UUID) -> None:
    await _bought(jobs, job_id)
    await jobs.age(timedelta(hours=3), job_id)
    row = await jobs.row(job_id)
    assert overdue(await jobs.state(job_id), row.now, jobs.policy) is not None
    await jobs.make_due(job_id)
    assert await jobs.claim(job_id) == []


async def _long_overdue_with_a_picture(jobs: JobTable, job_id: UUID) -> None:
    await _bought(jobs, job_id)
    await jobs.make_due(job_id)
    await jobs.record(await jobs.claim_one(job_id), Generated())
    await jobs.age(timedelta(hours=3), job_id)
    await jobs.make_due(job_id)
    assert await jobs.claim(job_id) == []


async def _poisonous(jobs: JobTable, job_id: UUID) -> None:
    await _bought(jobs, job_id)
    for _ in range(30):
        await jobs.make_due(job_id)
        await jobs.claim(job_id)
        if (await jobs.state(job_id)).is_terminal:
            return


async def _refused(jobs: JobTable, job_id: UUID) -> None:
    await jobs.look(job_id, Refused(RefusalKind.PERMANENT, FAILURE))


async def _tried_in_vain(jobs: JobTable, job_id: UUID) -> None:
    for _ in range(jobs.policy.retry.max_retries + 1):
        await jobs.look(job_id, Refused(RefusalKind.TRANSIENT, FAILURE))


async def _failed(jobs: JobTable, job_id: UUID) -> None:
    await _bought(jobs, job_id)
    await jobs.make_due(job_id)
    claim = await jobs.claim_one(job_id)
    await jobs.settle(claim, GenerationFailed(FAILURE, False), cost_usd=COST)


async def _failed_each_time(jobs: JobTable, job_id: UUID) -> None:
    for number in range(jobs.policy.retry.max_retries + 1):
        await jobs.look(job_id, Started(f"{job_id}-{number}"))
        await jobs.make_due(job_id)
        claim = await jobs.claim_one(job_id)
        await jobs.settle(claim, GenerationFailed(FAILURE, True), cost_usd=COST / 4)


async def _completed(jobs: JobTable, job_id: UUID) -> None:
    await _bought(jobs, job_id)
    await _fetched(jobs, job_id)


async def _fetched(jobs: JobTable, job_id: UUID) -> None:
    await jobs.make_due(job_id)
    claim = await jobs.claim_one(job_id)
    await jobs.record(claim, Generated())
    await jobs.settle(claim, Stored(1), outputs=[stored_output()], cost_usd=COST)


async def _adopted(jobs: JobTable, job_id: UUID) -> None:
    await jobs.look(job_id, OutcomeUnknown("no answer"))
    await jobs.hear(job_id, "h-heard", is_over=True)
    await _fetched(jobs, job_id)


async def _picture_lost(jobs: JobTable, job_id: UUID) -> None:
    await _bought(jobs, job_id)
    await jobs.make_due(job_id)
    claim = await jobs.claim_one(job_id)
    await jobs.record(claim, Generated())
    await jobs.settle(claim, OutputFailed(FAILURE, True))


async def _picture_never_fetched(jobs: JobTable, job_id: UUID) -> None:
    await _bought(jobs, job_id)
    await jobs.make_due(job_id)
    claim = await jobs.claim_one(job_id)
    await jobs.record(claim, Generated())
    await jobs.age(timedelta(hours=2), job_id)
    await jobs.tell(job_id, LookFailed("no"))


async def _never_confirmed(jobs: JobTable, job_id: UUID) -> None:
    await jobs.look(job_id, OutcomeUnknown("no answer"))
    await jobs.expire(job_id)
    await jobs.look(job_id, NotFound())


WAYS: dict[str, tuple[Way, str, Decimal]] = {
    "cancelled while pending": (_cancelled_while_pending, "cancelled", FREE),
    "cancelled while it ran": (_cancelled_while_it_ran, "cancelled", COST),
    "cancelled before a try": (_cancelled_before_another_try, "cancelled", FREE),
    "expired while pending": (_expired_while_pending, "failed", FREE),
    "expired in a pick": (_expired_in_a_pick, "failed", FREE),
    "expired while it ran": (_expired_while_it_ran, "failed", HELD),
    "long overdue": (_long_overdue, "failed", HELD),
    "overdue with a picture": (_long_overdue_with_a_picture, "failed", HELD),
    "poisonous": (_poisonous, "failed", HELD),
    "refused": (_refused, "failed", FREE),
    "tried in vain": (_tried_in_vain, "failed", FREE),
    "failed": (_failed, "failed", COST),
    "failed each time": (_failed_each_time, "failed", COST),
    "completed": (_completed, "completed", COST),
    "adopted": (_adopted, "completed", COST),
    "picture lost": (_picture_lost, "failed", HELD),
    "picture never fetched": (_picture_never_fetched, "failed", HELD),
    "never confirmed": (_never_confirmed, "failed", FREE),
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("is_priced", [True, False])
async def test_whatever_ends_a_job_settles_it(
    jobs: JobTable, engine: AsyncEngine, name: str, is_priced: bool
) -> None:
    end, status, charged = WAYS[name]
    held = HELD if is_priced else None
    (job_id,) = await jobs.submit(new_job(key_id=uuid4(), worst_usd=held))

    await end(jobs, job_id)

    assert (await jobs.row(job_id)).status == status
    async with engine.connect() as conn:
        query = text("SELECT kind, amount_usd, status FROM ledger_entries ORDER BY id")
        entries = (await conn.execute(query)).all()
    if is_priced:
        assert {tuple(row) for row in entries} == {
            ("reserve", HELD, None),
            ("release", -HELD, None),
            ("charge", charged, status),
        }
    else:
        known = charged if charged == COST else None
        assert [tuple(row) for row in entries] == [("charge", known, status)]
    service = await account(engine)
    assert (service.live, service.reserved_usd) == (0, 0)
    await check_books(engine)
