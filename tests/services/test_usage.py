"""Sums over the ledger, and how budgets stand."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import insert, text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.domain.access import Budget
from app.domain.events import Generated, GenerationFailed, Started, Stored
from app.services.accounts import ENTRIES, account_of
from app.services.usage import (
    Grouping,
    Period,
    Span,
    Sums,
    Usage,
    service_money,
    standing,
    usage,
)
from tests.support.jobs import FAILURE, JobTable, new_job, stored_output

CENT = Decimal("0.01")
FIRST, SECOND, THIRD = (date(2026, 9, day) for day in (1, 2, 3))
KEY = UUID(int=7)
EVER = Span(date.min, date.max, None)


async def book(engine: AsyncEngine, *entries: dict[str, Any]) -> None:
    """Write entries, each of a job of its own unless it says of which."""
    usual: dict[str, Any] = {
        "day": FIRST,
        "owner": "ann",
        "key_id": None,
        "model": "a/b",
        "kind": "charge",
        "amount_usd": CENT,
        "status": "completed",
        "outputs": 1,
        "at": datetime(2026, 9, 1, tzinfo=UTC),
    }
    rows = [usual | {"job_id": uuid4()} | entry for entry in entries]
    async with engine.begin() as conn:
        await conn.execute(insert(ENTRIES), rows)


async def ask(
    engine: AsyncEngine, *by: Grouping, span: Span = EVER, limit: int = 100
) -> Usage:
    async with engine.connect() as conn:
        return await usage(conn, span, by, limit=limit)


# ---------------------------------------------------------------------------------- sums


async def test_finished_jobs_are_added_up_by_group_and_in_all(
    engine: AsyncEngine,
) -> None:
    await book(
        engine,
        {"outputs": 4, "amount_usd": CENT * 4},
        {"status": "failed", "outputs": 0, "amount_usd": Decimal(0)},
        {"status": "cancelled", "outputs": 0, "amount_usd": None, "day": SECOND},
        {"amount_usd": None, "day": SECOND},
        {"day": SECOND},
    )

    found = await ask(engine, Grouping.DAY)

    assert [(row.day, row.sums) for row in found.rows] == [
        (FIRST, Sums(2, 1, 1, 0, 4, CENT * 4, 0)),
        (SECOND, Sums(3, 2, 0, 1, 2, CENT, 2)),
    ]
    assert found.totals == Sums(5, 3, 1, 1, 6, CENT * 5, 2)
    assert not found.is_cut


async def test_what_is_held_for_a_job_is_neither_a_job_nor_a_cost(
    engine: AsyncEngine,
) -> None:
    job_id = uuid4()
    await book(
        engine,
        {"job_id": job_id, "kind": "reserve", "amount_usd": CENT * 9, "outputs": 0},
        {"job_id": job_id, "kind": "release", "amount_usd": -CENT * 9, "outputs": 0},
        {"job_id": job_id},
        {"kind": "reserve", "amount_usd": CENT * 5, "outputs": 0},
    )

    assert (await ask(engine, Grouping.DAY)).totals == Sums(1, 1, 0, 0, 1, CENT, 0)


@pytest.mark.parametrize(
    ("by", "groups"),
    [
        ([Grouping.MODEL], [("a/b", None, None), ("c/d", None, None)]),
        ([Grouping.KEY], [(None, KEY, None), (None, None, None)]),
        (
            [Grouping.OWNER, Grouping.MODEL],
            [("a/b", None, "ann"), ("c/d", None, "ann"), ("a/b", None, "bob")],
        ),
    ],
)
async def test_groups_come_in_the_order_of_what_they_are_grouped_by(
    engine: AsyncEngine, by: list[Grouping], groups: list[tuple[Any, ...]]
) -> None:
    await book(
        engine,
        {"owner": "bob"},
        {"model": "c/d"},
        {"key_id": KEY},
        {"key_id": KEY, "day": SECOND},
    )

    found = await ask(engine, *by)

    assert [(row.model, row.key_id, row.owner) for row in found.rows] == groups
    assert found.totals.jobs == sum(row.sums.jobs for row in found.rows) == 4


async def test_only_the_days_and_the_owner_asked_for_are_added_up(
    engine: AsyncEngine,
) -> None:
    days = (FIRST, SECOND, THIRD)
    for owner in ("ann", "bob"):
        await book(engine, *({"day": day, "owner": owner} for day in days))

    both = await ask(engine, Grouping.DAY, span=Span(SECOND, THIRD, None))
    hers = await ask(engine, Grouping.DAY, span=Span(FIRST, SECOND, "ann"))

    assert [(row.day, row.sums.jobs) for row in both.rows] == [(SECOND, 2), (THIRD, 2)]
    assert [(row.day, row.sums.jobs) for row in hers.rows] == [(FIRST, 1), (SECOND, 1)]


async def test_the_totals_count_the_groups_that_are_not_told(
    engine: AsyncEngine,
) -> None:
    await book(engine, *({"model": f"a/{n}"} for n in range(4)))

    assert (await ask(engine, Grouping.MODEL, limit=4)).is_cut is False
    found = await ask(engine, Grouping.MODEL, limit=3)
    assert (len(found.rows), found.is_cut, found.totals.jobs) == (3, True, 4)


async def test_no_jobs_cost_nothing_and_unpriced_ones_nobody_knows_what(
    engine: AsyncEngine,
) -> None:
    nothing = await ask(engine, Grouping.DAY)
    assert (nothing.rows, nothing.totals.known_usd) == ([], 0)

    await book(engine, {"amount_usd": None})
    (row,) = (await ask(engine, Grouping.DAY)).rows
    assert row.sums.known_usd is None
    await book(engine, {})
    (row,) = (await ask(engine, Grouping.DAY)).rows
    assert row.sums.known_usd == CENT


# ------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("whose", ["key", "service"])
async def test_a_budget_is_spent_held_or_left(
    engine: AsyncEngine, jobs: JobTable, whose: str
) -> None:
    key_id = KEY if whose == "key" else None
    budget = Budget(job_usd=CENT, day_usd=CENT * 10, month_usd=CENT * 20)
    jobs_of_it = [new_job(worst_usd=CENT * 2, key_id=KEY) for _ in range(3)]
    done, failed, _ = await jobs.submit(*jobs_of_it)
    await jobs.look(done, Started("h-1"))
    await jobs.make_due(done)
    claim = await jobs.claim_one(done)
    await jobs.record(claim, Generated())
    await jobs.settle(claim, Stored(1), outputs=[stored_output()], cost_usd=CENT)
    await jobs.look(failed, Started("h-2"))
    await jobs.make_due(failed)
    claim = await jobs.claim_one(failed)
    free = Decimal(0)
    await jobs.settle(claim, GenerationFailed(FAILURE, False), cost_usd=free)

    async with engine.connect() as conn:
        found = await standing(conn, key_id, budget, now=datetime.now(UTC))
        money = await service_money(conn)

    day, month = budget.day_usd, budget.month_usd
    assert found.job_usd == CENT
    assert found.day == Period(day, CENT, CENT * 2)
    assert found.month == Period(month, CENT, CENT * 2)
    assert (found.day.left_usd, found.month.left_usd) == (CENT * 7, CENT * 17)
    assert (money.spent_usd, money.reserved_usd) == (CENT, CENT * 2)


async def test_a_new_day_begins_with_nothing_spent_and_a_new_month_too(
    engine: AsyncEngine,
) -> None:
    async with engine.begin() as conn:
        statement = (
            "INSERT INTO accounts (name, day, day_usd, month, month_usd)"
            " VALUES (:name, '2026-09-30', 1, '2026-09-01', 5)"
        )
        await conn.execute(text(statement), {"name": account_of(KEY)})

    async def spent(*moment: int) -> tuple[Decimal, Decimal]:
        now = datetime(*moment, tzinfo=UTC)  # type: ignore[misc,arg-type]
        async with engine.connect() as conn:
            found = await standing(conn, KEY, Budget(), now=now)
        assert found.day.left_usd is None
        return found.day.spent_usd, found.month.spent_usd

    assert await spent(2026, 9, 30, 23, 59) == (1, 5)
    assert await spent(2026, 10, 1) == (0, 0)


async def test_a_job_of_yesterday_holds_nothing_of_today(
    engine: AsyncEngine, jobs: JobTable
) -> None:
    now = datetime.now(UTC).replace(day=15, hour=12)
    (job_id,) = await jobs.submit(new_job(worst_usd=CENT, key_id=KEY))
    async with engine.begin() as conn:
        values = {
            "id": job_id,
            "then": now - timedelta(days=1),
            "today": now.date(),
            "month": now.date().replace(day=1),
        }
        await conn.execute(
            text("UPDATE jobs SET created_at = :then WHERE id = :id"), values
        )
        await conn.execute(
            text("UPDATE accounts SET day = :today, day_usd = 0, month = :month"),
            values,
        )

    async with engine.connect() as conn:
        found = await standing(conn, KEY, Budget(day_usd=CENT), now=now)

    assert (found.day.reserved_usd, found.day.spent_usd) == (0, 0)
    assert (found.month.reserved_usd, found.month.spent_usd) == (CENT, 0)


async def test_a_spent_budget_has_nothing_left_and_not_less() -> None:
    assert Period(CENT, CENT * 2, CENT).left_usd == 0


async def test_a_key_that_never_asked_for_anything_has_everything_left(
    engine: AsyncEngine,
) -> None:
    async with engine.connect() as conn:
        budget = Budget(day_usd=CENT)
        found = await standing(conn, uuid4(), budget, now=datetime.now(UTC))

    assert found.day == Period(CENT, Decimal(0), Decimal(0))
    assert found.day.left_usd == CENT
