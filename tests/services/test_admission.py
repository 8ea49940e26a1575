"""Limits and budgets where jobs are accepted, on real tables and in parallel."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from decimal import Decimal
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.core.database import is_disconnect, open_engine
from app.domain.access import Budget, Limits
from app.domain.errors import BudgetExceeded, OverLimit, Unavailable
from app.domain.events import (
    Expired,
    GenerationFailed,
    Generated,
    OutputFailed,
    Started,
    Stored,
)
from app.domain.policy import Policy
from app.domain.admission import SERVICE, Account
from app.services import accounts, job_service, submission
from app.services.accounts import account_of
from app.services.job_service import Change, Hold, Outcome
from app.services.ledger import Ledger
from app.services.submission import Birth, NewJob
from tests.support.jobs import FAILURE, JobTable, new_job, stored_output
from tests.support.money import account, check_books, total
from tests.support.waiting import wait_for_async

CENT = Decimal("0.01")
FREE = Decimal(0)


@pytest.fixture
async def engines(
    database_url: str, engine: AsyncEngine
) -> AsyncIterator[list[AsyncEngine]]:
    """Two processes' worth of connections to one database."""
    other = open_engine(SecretStr(database_url), name="other", pool_size=4)
    yield [engine, other]
    await other.dispose()


def _priced(**changes: object) -> NewJob:
    return new_job(**({"worst_usd": CENT} | changes))


async def _complete(jobs: JobTable, job_id: UUID, cost: Decimal | None = CENT) -> None:
    await jobs.look(job_id, Started(str(job_id)))
    await jobs.make_due(job_id)
    claim = await jobs.claim_one(job_id)
    await jobs.record(claim, Generated())
    await jobs.settle(claim, Stored(1), outputs=[stored_output()], cost_usd=cost)


async def _fail(jobs: JobTable, job_id: UUID, cost: Decimal | None = FREE) -> None:
    await jobs.look(job_id, Started(str(job_id)))
    await jobs.make_due(job_id)
    claim = await jobs.claim_one(job_id)
    await jobs.settle(claim, GenerationFailed(FAILURE, False), cost_usd=cost)


# ---------------------------------------------------------------------------- in parallel


@pytest.mark.parametrize("whose", ["key", "service"])
async def test_of_500_submits_at_once_a_budget_for_7_accepts_7(
    engines: list[AsyncEngine], jobs: JobTable, whose: str
) -> None:
    budget = Budget(day_usd=CENT * 7 + CENT / 2)
    service = budget if whose == "service" else Budget()
    of_key = budget if whose == "key" else Budget()
    ledgers = [Ledger(engine, Policy(), budget=service) for engine in engines]
    key_id = uuid4()

    answers = await asyncio.gather(
        *(
            ledgers[n % 2].submit(_priced(key_id=key_id, budget=of_key))
            for n in range(500)
        ),
        return_exceptions=True,
    )

    born = [one for one in answers if isinstance(one, Birth)]
    assert len(born) == 7
    assert sum(isinstance(one, BudgetExceeded) for one in answers) == 493
    await check_books(engines[0])
    for one in born[:3]:
        await jobs.cancel(one.job_id)
    await _fail(jobs, born[3].job_id)
    await check_books(engines[0])
    for one in born[4:]:
        await _complete(jobs, one.job_id)
    await check_books(engines[0])
    assert await total(engines[0], "reserve", "release") == 0
    assert await total(engines[0], "charge") == CENT * 3
    standing = await account(engines[0], account_of(key_id))
    assert (standing.live, standing.reserved_usd) == (0, 0)
    assert standing.day_usd == standing.spent_usd == CENT * 3


async def test_concurrent_jobs_are_counted_across_processes(
    engines: list[AsyncEngine], jobs: JobTable
) -> None:
    ledgers = [Ledger(engine, Policy()) for engine in engines]
    key_id, limits = uuid4(), Limits(concurrent_jobs=5)

    async def submit_many() -> list[object]:
        new = [new_job(key_id=key_id, limits=limits) for _ in range(60)]
        calls = (ledgers[n % 2].submit(job) for n, job in enumerate(new))
        return list(await asyncio.gather(*calls, return_exceptions=True))

    answers = await submit_many()
    born = [one for one in answers if isinstance(one, Birth)]
    refused = [one for one in answers if isinstance(one, OverLimit)]
    assert (len(born), len(refused)) == (5, 55)
    assert {one.code for one in refused} == {"too_many_jobs"}

    await jobs.cancel(born[0].job_id)
    await jobs.cancel(born[1].job_id)

    assert sum(isinstance(one, Birth) for one in await submit_many()) == 2
    await check_books(engines[0])


async def test_whoever_opens_an_account_holds_no_later_one_meanwhile(
    engines: list[AsyncEngine],
) -> None:
    name = account_of(uuid4())
    first = text("INSERT INTO accounts (name, day, month) VALUES (:name, now(), now())")
    async with engines[0].begin() as conn, asyncio.timeout(10):
        await conn.execute(first, {"name": name})
        waiting = asyncio.create_task(_lock(engines[1], {name, SERVICE}))
        await wait_for_async(
            lambda: _has_waiter(engines[0]), within=5, what="waits for the account"
        )

        await accounts.lock(conn, {SERVICE})

    assert set(await waiting) == {name, SERVICE}


async def _lock(engine: AsyncEngine, names: set[str]) -> dict[str, Account]:
    async with engine.begin() as conn:
        return (await accounts.lock(conn, names))[0]


async def _has_waiter(engine: AsyncEngine) -> bool:
    query = text(
        "SELECT EXISTS (SELECT FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock')"
    )
    async with engine.connect() as conn:
        return bool(await conn.scalar(query))


async def test_a_process_that_freezes_holds_up_nobody_for_long(
    engines: list[AsyncEngine],
) -> None:
    """It holds the service's account, which all jobs with a price go through."""
    frozen, ledger = engines[0], Ledger(engines[1], Policy())
    async with frozen.connect() as conn:
        await accounts.lock(conn, {SERVICE})

        await wait_for_async(
            lambda: _goes_through(ledger), within=10, what="a submit is let through"
        )

        with pytest.raises(DBAPIError) as lost:
            await conn.execute(text("SELECT 1"))
        assert is_disconnect(lost.value)


async def _goes_through(ledger: Ledger) -> bool:
    try:
        await ledger.submit(_priced())
    except Unavailable:
        return False
    return True


async def test_jobs_of_the_day_stay_counted_when_they_are_over(
    jobs: JobTable, engine: AsyncEngine
) -> None:
    key_id, limits = uuid4(), Limits(jobs_per_day=2)
    ids = await jobs.submit(*(new_job(key_id=key_id, limits=limits) for _ in range(2)))
    for job_id in ids:
        await jobs.cancel(job_id)

    (refused,) = await jobs.try_submit(new_job(key_id=key_id, limits=limits))

    assert isinstance(refused, OverLimit) and refused.code == "too_many_jobs_today"
    assert timedelta(0) < refused.retry_after <= timedelta(days=1)
    async with engine.begin() as conn:
        await conn.execute(text("UPDATE accounts SET day = day - 1"))
    await jobs.submit(new_job(key_id=key_id, limits=limits))


# -------------------------------------------------------------------------------- budgets


async def test_a_refusal_says_what_is_left(jobs: JobTable) -> None:
    budget = Budget(month_usd=Decimal("0.025"))
    key_id = uuid4()
    await jobs.submit(*(_priced(key_id=key_id, budget=budget) for _ in range(2)))

    (refused,) = await jobs.try_submit(_priced(key_id=key_id, budget=budget))

    assert isinstance(refused, BudgetExceeded)
    assert refused.facts == {
        "budget": "key",
        "period": "month",
        "needed_usd": "0.01",
        "limit_usd": "0.025",
        "left_usd": "0.005",
    }


async def test_strangers_learn_nothing_of_the_service_s_money(jobs: JobTable) -> None:
    service = Budget(day_usd=Decimal(0))

    stranger, owner = await jobs.try_submit(
        _priced(is_trusted=False), _priced(), service=service
    )

    assert isinstance(stranger, BudgetExceeded) and isinstance(owner, BudgetExceeded)
    assert set(stranger.facts) == {"budget", "period", "needed_usd"}
    assert owner.facts["left_usd"] == "0"


@pytest.mark.parametrize(
    ("days", "budget"),
    [(1, Budget(day_usd=CENT * 2)), (40, Budget(month_usd=CENT * 2))],
)
async def test_a_clock_behind_the_account_s_day_does_not_open_the_budget(
    jobs: JobTable, engine: AsyncEngine, days: int, budget: Budget
) -> None:
    """Whoever came before had a later clock, or was faster across midnight."""
    new = {"key_id": uuid4(), "budget": budget}
    await jobs.submit(_priced(**new))
    async with engine.begin() as conn:
        await conn.execute(
            text("UPDATE jobs SET created_at = created_at + :by"),
            {"by": timedelta(days)},
        )
        await conn.execute(
            text("UPDATE ledger_entries SET day = day + CAST(:by AS int)"), {"by": days}
        )
        await conn.execute(
            text(
                "UPDATE accounts SET day = day + CAST(:by AS int),"
                " month = date_trunc('month', day + CAST(:by AS int))"
            ),
            {"by": days},
        )

    answers = [(await jobs.try_submit(_priced(**new)))[0] for _ in range(3)]

    assert [type(one) for one in answers] == [Birth, BudgetExceeded, BudgetExceeded]
    await check_books(engine)
    assert isinstance(answers[0], Birth)
    await jobs.cancel(answers[0].job_id)
    await check_books(engine)


async def test_a_job_is_of_the_moment_it_was_counted(
    engines: list[AsyncEngine],
) -> None:
    """Not of that at which it began to wait for the account: that may be the day before."""
    new = _priced(key_id=uuid4(), budget=Budget(day_usd=CENT))
    async with engines[0].begin() as conn, engines[1].begin() as other:
        began = await conn.scalar(text("SELECT now()"))
        later = await other.scalar(text("SELECT now()"))
        assert began < later

        (birth,) = await submission.submit(conn, [new])

    assert isinstance(birth, Birth) and birth.at > later


async def test_a_job_dearer_than_a_job_may_be_is_refused(jobs: JobTable) -> None:
    cheap = Budget(job_usd=CENT / 2)

    refused, accepted = await jobs.try_submit(_priced(budget=cheap), _priced())

    # Without a key there is no key's budget.
    assert isinstance(refused, Birth) and isinstance(accepted, Birth)
    (refused,) = await jobs.try_submit(_priced(key_id=uuid4(), budget=cheap))
    assert isinstance(refused, BudgetExceeded)
    assert refused.facts["period"] == "job"


async def test_an_unknown_price_is_never_free(
    jobs: JobTable, engine: AsyncEngine
) -> None:
    with_budget, without = await jobs.try_submit(
        new_job(key_id=uuid4(), budget=Budget(day_usd=Decimal(1000))),
        new_job(key_id=uuid4()),
    )

    assert isinstance(with_budget, BudgetExceeded)
    assert with_budget.code == "price_unknown"
    assert isinstance(without, Birth)
    (refused,) = await jobs.try_submit(new_job(), service=Budget(day_usd=Decimal(9)))
    assert isinstance(refused, BudgetExceeded)
    await _complete(jobs, without.job_id, cost=None)
    async with engine.connect() as conn:
        entries = await conn.execute(
            text("SELECT kind, amount_usd FROM ledger_entries")
        )
        assert list(entries) == [("charge", None)]
    await check_books(engine)


async def test_a_picture_of_unknown_cost_is_charged_what_was_reserved(
    jobs: JobTable, engine: AsyncEngine
) -> None:
    (job_id,) = await jobs.submit(_priced())

    await _complete(jobs, job_id, cost=None)

    assert await total(engine, "charge") == CENT
    await check_books(engine)


async def test_failed_attempts_that_cost_something_add_up(
    jobs: JobTable, engine: AsyncEngine
) -> None:
    (job_id,) = await jobs.submit(_priced(worst_usd=CENT * 9))
    await jobs.look(job_id, Started("h-1"))
    await jobs.make_due(job_id)
    claim = await jobs.claim_one(job_id)
    await jobs.settle(claim, GenerationFailed(FAILURE, True), cost_usd=CENT)
    await jobs.make_due(job_id)

    await _complete(jobs, job_id, cost=CENT * 2)

    assert (await jobs.row(job_id)).cost_usd == CENT * 3
    assert await total(engine, "charge") == CENT * 3
    await check_books(engine)


async def test_what_was_told_already_is_not_charged_again(
    jobs: JobTable, engine: AsyncEngine
) -> None:
    (job_id,) = await jobs.submit(_priced(worst_usd=CENT * 9))
    await jobs.look(job_id, Started("h-1"))
    await jobs.make_due(job_id)
    claim = await jobs.claim_one(job_id)
    made = Change(job_id, Generated(), Hold.KEEP, claim.token, cost_usd=CENT)
    await jobs.transition(made)

    # The answer was lost, so it is told again, together with what comes next.
    stored = Change(
        job_id, Stored(1), Hold.RELEASE, claim.token, outputs=(stored_output(),)
    )
    *_, outcome = await jobs.transition(made, stored)

    assert isinstance(outcome, Outcome) and outcome.is_end
    assert (await jobs.row(job_id)).cost_usd == CENT
    assert await total(engine, "charge") == CENT
    await check_books(engine)


async def test_a_picture_of_unknown_cost_is_not_free_when_its_file_is_lost(
    jobs: JobTable, engine: AsyncEngine
) -> None:
    (job_id,) = await jobs.submit(_priced())
    await jobs.look(job_id, Started("h-1"))
    await jobs.make_due(job_id)
    claim = await jobs.claim_one(job_id)
    await jobs.record(claim, Generated())

    await jobs.settle(claim, OutputFailed(FAILURE, True))

    assert await total(engine, "charge") == CENT
    await check_books(engine)


async def test_what_was_given_up_while_it_ran_is_not_free(
    jobs: JobTable, engine: AsyncEngine
) -> None:
    (job_id,) = await jobs.submit(_priced())
    await jobs.look(job_id, Started("h-1"))
    await jobs.expire(job_id)

    await jobs.tell(job_id, Expired())

    assert (await jobs.row(job_id)).status == "failed"
    assert await total(engine, "charge") == CENT
    await check_books(engine)


async def test_money_stays_written_when_the_job_is_deleted(
    jobs: JobTable, engine: AsyncEngine
) -> None:
    (job_id,) = await jobs.submit(_priced(key_id=uuid4()))
    await _complete(jobs, job_id)

    async with engine.begin() as conn:
        await job_service.delete_job(conn, job_id, realm=None)

    assert await total(engine, "charge") == CENT
    await check_books(engine)


async def test_a_submit_whose_answer_was_lost_is_not_refused_by_itself(
    engine: AsyncEngine,
) -> None:
    job = _priced(key_id=uuid4(), budget=Budget(day_usd=CENT))
    for is_again in (False, True):
        async with engine.begin() as conn:
            (answer,) = await submission.submit(conn, [job], is_again=is_again)
        assert isinstance(answer, Birth) and not answer.is_repeat
    await check_books(engine)


# ----------------------------------------------------------------------- whatever happens

KEYS = [uuid4() for _ in range(2)]
_job = st.tuples(
    st.sampled_from([None, *KEYS]),
    st.sampled_from([None, CENT, CENT * 3]),
)
_step = st.one_of(
    st.tuples(st.just("submit"), st.lists(_job, min_size=1, max_size=4)),
    st.tuples(
        st.sampled_from(["complete", "fail", "cancel", "delete"]), st.integers(0, 20)
    ),
    st.tuples(st.just("a day passes"), st.sampled_from([1, 1, 40])),
)


@settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=st.lists(_step, min_size=3, max_size=14))
async def test_the_books_are_right_after_any_history(
    jobs: JobTable, engine: AsyncEngine, steps: list[tuple[str, object]]
) -> None:
    limit = CENT * 7
    async with engine.begin() as conn:
        await conn.execute(text("TRUNCATE jobs, ledger_entries CASCADE"))
        await conn.execute(text("DELETE FROM accounts WHERE name <> 'service'"))
        await conn.execute(
            text(
                "UPDATE accounts SET live = 0, day_jobs = 0, day_usd = 0, month_usd = 0,"
                " reserved_usd = 0, spent_usd = 0"
            )
        )
    live: list[UUID] = []
    over: list[UUID] = []
    for name, what in steps:
        if isinstance(what, list):
            new = [
                new_job(key_id=key, worst_usd=usd, budget=Budget(day_usd=limit))
                for key, usd in what
            ]
            answers = await jobs.try_submit(*new, service=Budget(month_usd=limit * 3))
            live += [one.job_id for one in answers if isinstance(one, Birth)]
        elif name == "a day passes":
            await _pass_days(engine, int(str(what)))
        elif name == "delete" and over:
            async with engine.begin() as conn:
                await job_service.delete_job(
                    conn, over.pop(int(str(what)) % len(over)), realm=None
                )
        elif name != "delete" and live:
            job_id = live.pop(int(str(what)) % len(live))
            over.append(job_id)
            await _end(jobs, job_id, name)
        await check_books(engine)
        await _check_within(engine, day=limit, month=limit * 3)
    for job_id in live:
        await jobs.cancel(job_id)
    await check_books(engine)
    assert await total(engine, "reserve", "release") == 0


async def _end(jobs: JobTable, job_id: UUID, how: str) -> None:
    reserved = (await jobs.row(job_id)).reserved_usd
    if how == "complete":
        await _complete(jobs, job_id, cost=reserved and reserved / 2)
    elif how == "fail":
        await _fail(jobs, job_id, cost=reserved and reserved / 4)
    else:
        await jobs.cancel(job_id)


async def _pass_days(engine: AsyncEngine, days: int) -> None:
    """Move everything written so far into the past."""
    past = {"days": days}
    async with engine.begin() as conn:
        await conn.execute(
            text(
                "UPDATE jobs SET created_at = created_at - CAST(:days AS int) * interval '1 day'"
            ),
            past,
        )
        await conn.execute(
            text("UPDATE ledger_entries SET day = day - CAST(:days AS int)"), past
        )
        await conn.execute(
            text(
                "UPDATE accounts SET day = day - CAST(:days AS int),"
                " month = date_trunc('month', day - CAST(:days AS int))::date,"
                " month_usd = (SELECT coalesce(sum(amount_usd), 0) FROM ledger_entries e"
                "   WHERE date_trunc('month', e.day)"
                "         = date_trunc('month', accounts.day - CAST(:days AS int))"
                "   AND (accounts.name = 'service' OR 'key:' || e.key_id = accounts.name))"
            ),
            past,
        )


async def _check_within(engine: AsyncEngine, *, day: Decimal, month: Decimal) -> None:
    async with engine.connect() as conn:
        rows = await conn.execute(text("SELECT name, day_usd, month_usd FROM accounts"))
        for row in rows:
            if row.name == "service":
                assert row.month_usd <= month
            else:
                assert row.day_usd <= day
